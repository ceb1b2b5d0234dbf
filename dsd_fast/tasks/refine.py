"""Going on with the mesh of an object that has been made: its colours alone, seen in full size.

python -m dsd_fast.refine outputs/diverse-score-distillation/an_armchair-seed0
"""

from __future__ import annotations

import dataclasses
import hashlib
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dsd_fast.config import ConfigError, TrainConfig, from_dict, resolve_device
from dsd_fast.run import cli
from dsd_fast.run.checkpoint import CheckpointError
from dsd_fast.run.cli import Job
from dsd_fast.run.outputs import RunFolder
from dsd_fast.run.saved import SavedRun, open_saved
from dsd_fast.run.state import load_run
from dsd_fast.scene.mesh_file import MeshFile
from dsd_fast.scene.mesh_scene import MeshScene, Surface
from dsd_fast.scene.surface import MeshError
from dsd_fast.scene.texture import TextureSize, choose_atlas
from dsd_fast.schedules import Schedule
from dsd_fast.tasks.base import register
from dsd_fast.tasks.texture import Canvas, MeshTask

# Steps where nobody says.
STEPS_GPU, STEPS_CPU = 300, 120
# Height and width of renderings on a CPU, of the embedded models; elsewhere the model's own.
SIZE_CPU = 128
# Noise levels, the lowest and the highest: above, colours and layout would be made anew.
LEVELS = (0.05, 0.35)
# Share of the learning rates.
LR_SHARE = 0.3


class _Source(NamedTuple):
    """The mesh of a run, and the colours that it begins with."""

    canvas: Canvas
    state: dict[str, Tensor]


@register("refine")
class RefineTask(MeshTask):
    """The texture of one run's mesh, from the colours of its field on."""

    def canvas(self, cfg: TrainConfig) -> Canvas:
        return self._source(cfg).canvas

    def scene(self, cfg: TrainConfig, generator: torch.Generator) -> MeshScene:
        """With the colours and the background that the object has come to."""
        source = self._source(cfg)
        scene = MeshScene(cfg, source.canvas.surface, cfg.texture.samples, generator)
        scene.load_state_dict(source.state)
        return scene

    def doing(self, cfg: TrainConfig, step: int) -> str:
        return "refining"

    def _source(self, cfg: TrainConfig) -> _Source:
        """ConfigError where there is no such run, or another one than at the start."""
        own = cfg.refine
        assert own.run is not None  # cfg.validate
        try:
            file, _ = cli.find_checkpoint(own.run)
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            if own.digest and own.digest != digest:
                raise ConfigError(
                    f"{own.run} has gone on since its mesh was first refined: pass --overwrite to "
                    "begin again"
                )
            text = (cfg.texture.uv, cfg.texture.unwrap_seconds)
            source = _source(own.run, digest, cfg.device, own.max_faces, *text)
        except (CheckpointError, MeshError, OSError) as error:
            raise ConfigError(f"refine: {error}") from error
        own.digest = digest
        return source


@lru_cache(maxsize=1)
def _source(
    run: Path, digest: str, device: str, max_faces: int, uv: str, seconds: float
) -> _Source:
    saved = open_saved(run, resolve_device(device))
    mesh = _mesh_of(saved, max_faces)
    surface = Surface(
        mesh.points.astype("float32"), mesh.normals.astype("float32"), mesh.faces.astype("int32")
    )
    state = {
        name: value.cpu()
        for name, value in saved.scene.state_dict().items()
        if name.startswith(("field.", "background."))
    }
    return _Source(Canvas(mesh, surface, choose_atlas(mesh, uv, seconds)), state)


def _mesh_of(saved: SavedRun, max_faces: int) -> MeshFile:
    """The decimated mesh of a run, in the field's coordinates."""
    settings = dataclasses.replace(saved.cfg.mesh, max_faces=max_faces)
    found = saved.scene.mesh(settings, saved.step)
    points, faces = found.points.astype("float64"), found.faces.astype("int64")
    return MeshFile(points, found.normals, faces, None, z_up=True)


def refinement(
    folder: RunFolder,
    device: str,
    steps: int | None = None,
    max_faces: int | None = None,
    texture_size: TextureSize | None = None,
    overwrite: bool = False,
) -> Job:
    """What refines the object of a run: a run of its own beside it, from its beginning or its
    newest checkpoint on. Whatever is None is the run's own, or for its device.

    Raises:
        ConfigError: the run has no object from a prompt.
        CheckpointError: it has no whole checkpoint.
    """
    file, _ = cli.find_checkpoint(folder.path)
    cfg = from_dict(TrainConfig, load_run(file)["config"])
    if cfg.task != "text":
        raise ConfigError(
            f"{folder.path} is a run of --task {cfg.task}: expected one of --task text, an object "
            "from a prompt"
        )
    cfg.device = device
    _settle(cfg, steps or cfg.refine.steps or None)
    cfg.output, cfg.name = folder.path.parent.parent, folder.path.parent.name
    cfg.refine.run = folder.path.absolute()
    cfg.refine.max_faces = max_faces or cfg.refine.max_faces
    if texture_size is not None:
        cfg.texture.size = texture_size
    own = RunFolder.of(cfg, cfg.seed)
    state = None
    if not overwrite and own.last_step() is not None:
        state = load_run(cli.find_checkpoint(own.path)[0])
        saved = from_dict(TrainConfig, state["config"])
        saved.device, saved.output, saved.name = device, cfg.output, cfg.name
        saved.refine.run = cfg.refine.run
        cfg = saved
    return Job(cfg, own, state, overwrite, None)


def _settle(cfg: TrainConfig, steps: int | None) -> None:
    """Turn the settings of an object's run into those of its refinement."""
    on_cpu = resolve_device(cfg.device).type == "cpu"
    cfg.task, done = "refine", cfg.max_steps
    cfg.max_steps = steps or (STEPS_CPU if on_cpu else STEPS_GPU)
    cameras, grid, guidance = cfg.cameras, cfg.field.grid, cfg.guidance
    cameras.batch_size = cameras.per_stage("batch_size")[-1]
    side = SIZE_CPU if on_cpu else 256 if cfg.preset == "embedded" else 512
    largest = max(*cameras.per_stage("height"), *cameras.per_stage("width"))
    cameras.height = cameras.width = max(side, largest)
    cameras.resolution_milestones = ()
    cameras.progressive_from = cameras.progressive_until = 0
    grid.start_level = grid.n_levels
    guidance.min_step_percent, guidance.max_step_percent = LEVELS
    # As many as at the end of the object's run, of the clean images.
    guidance.anchors = Schedule.parse(guidance.anchors)(done)
    guidance.anchor_percent = Schedule.parse(guidance.anchor_percent)(done)
    cfg.optimizer.lr_share = LR_SHARE
    cfg.loss.lambda_dsd = 1.0
    # Shadows are part of the colours by now.
    cfg.material.diffuse_prob = 0.0
    trainer = cfg.trainer
    trainer.log_every = min(trainer.log_every, max(cfg.max_steps // 20, 1))
    trainer.preview_every = max(cfg.max_steps // 4, 1) if trainer.preview_every else 0
    trainer.checkpoint_every = max(cfg.max_steps // 4, 1)
