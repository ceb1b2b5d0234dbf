"""Another scene and another task, in this one file: a mesh with a texture that is trained.

A skeleton of what a textured mesh would be. Its geometry is a sphere, which needs no rasteriser;
where a pixel's ray meets it, the texture is looked up by longitude and latitude.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsd_fast import train
from dsd_fast.config import TASK_PRESETS, TrainConfig, preset
from dsd_fast.diffusion import embed_views, load_model
from dsd_fast.guidance import DSDGuidance, GuidanceConfig, seed_noise
from dsd_fast.rng import RngStreams
from dsd_fast.run import checkpoint, pictures
from dsd_fast.run.checkpoint import CheckpointError
from dsd_fast.run.cli import Job
from dsd_fast.run.optimizer import Adam
from dsd_fast.run.outputs import RunFolder
from dsd_fast.run.state import TrainState
from dsd_fast.scene.cameras import CameraBatch, RandomCameras, eval_camera
from dsd_fast.scene.field_scene import FieldScene
from dsd_fast.scene.image import Image, ImageConfig
from dsd_fast.scene.mesh_scene import MeshScene, Surface
from dsd_fast.scene.protocol import GraphKey, Scene, Trainable
from dsd_fast.tasks import TASKS, Task, register
from dsd_fast.tasks.step import TrainStep

CPU = torch.device("cpu")
RADIUS = 0.6


# The scene


class Seen(NamedTuple):
    rgb: Tensor  # [B,H,W,3]


class TexturedSphere(nn.Module):
    """A sphere around the origin with a texture [1,3,h,w] of raw colours, over grey of a level that
    is drawn."""

    is_latent = False
    can_capture = True
    fixed = "the size of its texture"

    def __init__(self, size: int, generator: torch.Generator) -> None:
        super().__init__()
        self.texture = nn.Parameter(torch.randn(1, 3, size, 2 * size, generator=generator))

    @property
    def device(self) -> torch.device:
        return self.texture.device

    def trainables(self) -> dict[str, Trainable]:
        return {"texture": Trainable(self.texture, rate=0.1)}

    def draw(self, views: CameraBatch, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"grey": torch.rand(len(views), 1, 1, 1, generator=generator)}

    def render(self, views: CameraBatch, draws: Mapping[str, Tensor]) -> Seen:
        origins, dirs = views.rays_o, views.rays_d
        # Of o + s d on the sphere the nearer s; where no ray meets it, the point nearest to it.
        middle = -(origins * dirs).sum(-1, keepdim=True)
        inside = RADIUS**2 - (origins + middle * dirs).square().sum(-1, keepdim=True)
        points = F.normalize(origins + (middle - inside.clamp_min(0).sqrt()) * dirs, dim=-1)
        longitude = torch.atan2(points[..., 1], points[..., 0]) / math.pi
        latitude = torch.asin(points[..., 2].clamp(-1, 1)) / (math.pi / 2)
        where = torch.stack([longitude, -latitude], -1)
        texture = self.texture.expand(len(views), -1, -1, -1)
        colors = F.grid_sample(texture, where, padding_mode="border", align_corners=False)
        there = (inside > 0).float()
        albedo = torch.sigmoid(colors.permute(0, 2, 3, 1))
        return Seen(there * albedo + (1 - there) * draws["grey"])

    def graph_key(self, views: CameraBatch) -> GraphKey:
        return GraphKey("sphere")

    def watch_replay(self, views: CameraBatch) -> None:
        """It counts nothing."""


# The task


class SphereTask(Task):
    """One texture a run."""

    lr_flag = "none"

    def is_finished(self, cfg: TrainConfig, run: RunFolder) -> bool:
        return run.preview.exists()

    def scene(self, cfg: TrainConfig, generator: torch.Generator) -> TexturedSphere:
        return TexturedSphere(8, generator)

    def cameras(self, cfg: TrainConfig) -> RandomCameras:
        return RandomCameras(cfg.cameras, cfg.guidance.lattice)

    def result(self, state: TrainState) -> TexturedSphere:
        return state.scene

    def finish(
        self,
        result: TexturedSphere,
        cfg: TrainConfig,
        step: int,
        run: RunFolder,
        say: Callable[[str], None],
    ) -> None:
        say("finishing: the picture")
        views = eval_camera(cfg.cameras, size=(16, 16))
        seen = result.render(views, {"grey": torch.ones(1, 1, 1, 1)})
        pictures.write_png(pictures.to_uint8(seen.rgb[0].detach()), run.preview)


@pytest.fixture
def sphere_task() -> Iterator[None]:
    register("sphere")(SphereTask)
    yield
    del TASKS["sphere"], TASK_PRESETS["sphere"]


def settings(tmp_path, model, steps: int = 2) -> TrainConfig:
    cfg = preset("dsd", steps)
    cfg.prompt, cfg.task, cfg.model = "a chair", "sphere", str(model)
    cfg.output, cfg.device = tmp_path, "cpu"
    cfg.cameras.width = cfg.cameras.height = (12, 12)
    cfg.trainer.log_every, cfg.trainer.progress = 1, False
    return cfg


def test_a_task_of_its_own_trains_a_scene_of_its_own(tmp_path, tiny_model, sphere_task) -> None:
    cfg = settings(tmp_path, tiny_model)
    run = RunFolder.named(tmp_path, "runs", "a chair", 0)
    train.train([Job(cfg, run, None, overwrite=False, stop_at=None)])
    records = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2]
    assert all(record["gradient_norm"] > 0 and record["skipped"] == 0 for record in records)
    tree = checkpoint.load(checkpoint.step_path(run.checkpoints, 2))
    assert tree["scene"].keys() == {"texture"}
    start = TexturedSphere(8, RngStreams(0).init)
    moved = (tree["scene"]["texture"] - start.texture).abs()
    assert 0 < moved.max() < 2.1 * 0.1, "two steps of Adam"
    assert (moved == 0).any(), "of the texture's back and poles nothing is seen"
    assert run.preview.exists()

    # As far again, from the checkpoint.
    more = settings(tmp_path, tiny_model, steps=3)
    train.train([Job(more, run, tree, overwrite=False, stop_at=None)])
    assert run.last_step() == 3


def test_a_step_goes_through_the_protocol_alone(tiny_model) -> None:
    """Of any scene: what is drawn decides what is seen, and parameters move by their rates."""
    model = load_model(tiny_model, CPU, engine="eager")
    cfg = preset("dsd", 10)
    cfg.guidance = GuidanceConfig(trajectory="exact", n_ddim_steps=2)
    cfg.cameras.width = cfg.cameras.height = (12, 12)
    prompts = embed_views(model, "a chair", release=False)
    shape = (model.latent_channels, model.latent_size, model.latent_size)
    kinds = {
        "sphere": lambda rng: TexturedSphere(8, rng.init),
        "rgb": lambda rng: Image(ImageConfig("rgb", lr=0.1), shape, model.image_size, rng.init),
        "latent": lambda rng: Image(ImageConfig(lr=0.1), shape, model.image_size, rng.init),
    }
    for name, make in kinds.items():
        rng = RngStreams(0)
        scene: Scene = make(rng)
        optimizer = Adam(scene.trainables(), (0.9, 0.99), 1e-15, CPU)
        noise = seed_noise(rng.noise, (1, *shape))
        guidance = DSDGuidance(cfg.guidance, model, prompts, noise, cfg.max_steps)
        state = TrainState(scene, optimizer, noise, rng, model)
        step = TrainStep(cfg, [state], guidance, RandomCameras(cfg.cameras), CPU)
        before = [parameter.detach().clone() for parameter in scene.parameters()]
        for _ in range(2):
            (output,) = step()
        values = output.values()
        assert list(values) == list(step.names) and np.isfinite(list(values.values())).all(), name
        for parameter, value in zip(scene.parameters(), before):
            assert 0 < (parameter - value).abs().max() < 0.21, name


def test_every_scene_has_the_protocol() -> None:
    """What the type checker says of implementations, for whoever runs none."""
    wanted = {name for name in vars(Scene) if not name.startswith("_")}
    wanted |= set(Scene.__annotations__)
    cfg = preset("dsd")
    cfg.field.grid.log2_table_size = 8
    scenes = (
        FieldScene(cfg),
        MeshScene(cfg, Surface(np.eye(3), np.eye(3), np.array([[0, 1, 2]]))),
        Image(ImageConfig(), (4, 8, 8), 64),
        TexturedSphere(8, torch.Generator()),
    )
    for scene in scenes:
        assert not [name for name in wanted if not hasattr(scene, name)], type(scene)


@pytest.mark.parametrize(
    "scene, kept",
    [
        (lambda: TexturedSphere(8, torch.Generator()), "the size of its texture"),
        (lambda: Image(ImageConfig(), (4, 8, 8), 64), "its --image.parameter, size and model"),
    ],
    ids=["sphere", "image"],
)
def test_a_checkpoint_of_another_size_says_what_a_run_keeps(scene, kept) -> None:
    state = TrainState(scene(), None, torch.zeros(1), RngStreams(0), None)
    with pytest.raises(CheckpointError, match=f"A resumed run keeps {kept}; start a new run"):
        state.restore({"scene": {"texture": torch.zeros(1)}})
