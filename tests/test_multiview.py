"""Multi-view diffusion (MVDream): UNet against diffusers' blocks, cameras, guidance, the run."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import cuda_only, relative_error
from runs import CLOCK, SMALL, Runner
from tiny_model import (
    SCHEDULER,
    TINY_MULTIVIEW,
    build_tiny_model,
    build_tiny_multiview,
    toy_model,
)
from torch import Tensor, nn

from dsd_fast import train as module
from dsd_fast.config import ConfigError, PromptConfig, TrainConfig, check, preset
from dsd_fast.diffusion import DiffusionModel, load_model
from dsd_fast.diffusion.condition import Condition
from dsd_fast.diffusion.engines import make_engine
from dsd_fast.diffusion.engines.base import EagerEngine
from dsd_fast.diffusion.networks.multiview_unet import (
    MultiViewUNet,
    load_multiview_unet,
    sinusoids,
)
from dsd_fast.diffusion.noise_path import NoisePath, alphas_cumprod
from dsd_fast.diffusion.text import PromptEmbeddings
from dsd_fast.guidance import GuidanceConfig, MultiViewConfig, dsd_gradient, settings
from dsd_fast.guidance import make_guidance as build_guidance
from dsd_fast.guidance.conditions.multiview import (
    MultiViewConditions,
    QuarterBins,
    camera_lattice,
)
from dsd_fast.guidance.contrast import rescaled
from dsd_fast.rng import RngStreams
from dsd_fast.run import checkpoint, memory, outputs
from dsd_fast.scene.background import Background, BackgroundConfig
from dsd_fast.scene.cameras import CameraConfig, RandomCameras, camera_condition
from dsd_fast.scene.field import GridConfig
from dsd_fast.scene.field_scene import FieldScene
from dsd_fast.tasks.step_graphs import StepGraphs

SIZE, WIDTH, LENGTH = 8, 16, 5
ELEVATIONS = (0.0, 30.0)
# As distributed, sd-v2.1-base-4view.
DISTRIBUTED = {
    "image_size": 32,
    "in_channels": 4,
    "model_channels": 320,
    "out_channels": 4,
    "num_res_blocks": 2,
    "attention_resolutions": [4, 2, 1],
    "channel_mult": [1, 2, 4, 4],
    "num_head_channels": 64,
    "transformer_depth": 1,
    "context_dim": 1024,
    "camera_dim": 16,
    "use_checkpoint": False,
}


def make_unet(seed: int = 0, **config: object) -> MultiViewUNet:
    torch.manual_seed(seed)
    unet = MultiViewUNet(TINY_MULTIVIEW | config)
    with torch.no_grad():  # norms that do something
        for parameter in unet.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return unet.eval().requires_grad_(False)


def unet_inputs(n_rows: int = 8, seed: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents, levels, text and cameras in float64."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    t = torch.randint(0, 1000, (n_rows,), generator=g)
    return draw(n_rows, 4, SIZE, SIZE), t, draw(n_rows, LENGTH, WIDTH), draw(n_rows, 16)


class FromDiffusers:
    """The same network put together from diffusers' blocks, weights handed over name by name."""

    def __init__(self, weights: dict[str, Tensor], config: dict) -> None:
        self.weights = {name: tensor.double() for name, tensor in weights.items()}
        self.config = config
        self.used: set[str] = set()

    def fill(self, block: nn.Module, prefix: str, names: dict[str, str]) -> nn.Module:
        """`names`: the block's module -> ours under the prefix."""
        state = {}
        for name in block.state_dict():
            piece, kind = name.rsplit(".", 1)
            ours = f"{prefix}.{names.get(piece, piece)}.{kind}"
            state[name] = self.weights[ours]
            self.used.add(ours)
        block = block.double().eval()
        block.load_state_dict(state)
        return block

    def residual(self, x: Tensor, embedding: Tensor, prefix: str) -> Tensor:
        from diffusers.models.resnet import ResnetBlock2D

        channels = self.weights[f"{prefix}.out_layers.3.weight"].shape[0]
        block = ResnetBlock2D(
            in_channels=x.shape[1],
            out_channels=channels,
            temb_channels=embedding.shape[1],
            groups=32,
            eps=1e-5,
        )
        names = {
            "norm1": "in_layers.0",
            "conv1": "in_layers.2",
            "time_emb_proj": "emb_layers.1",
            "norm2": "out_layers.0",
            "conv2": "out_layers.3",
            "conv_shortcut": "skip_connection",
        }
        return self.fill(block, prefix, names)(x, embedding)

    def transformer(self, x: Tensor, text: Tensor, prefix: str) -> Tensor:
        from diffusers.models.attention import BasicTransformerBlock

        n, c, h, w = x.shape
        norm = self._own(nn.GroupNorm(32, c, eps=1e-6), f"{prefix}.norm")
        proj_in = self._own(nn.Linear(c, c), f"{prefix}.proj_in")
        proj_out = self._own(nn.Linear(c, c), f"{prefix}.proj_out")
        block = BasicTransformerBlock(
            dim=c,
            num_attention_heads=c // self.config["num_head_channels"],
            attention_head_dim=self.config["num_head_channels"],
            cross_attention_dim=text.shape[-1],
        )
        block = self.fill(block, f"{prefix}.transformer_blocks.0", {})
        tokens = proj_in(norm(x).permute(0, 2, 3, 1).reshape(n, h * w, c))
        # Each object's views in one sequence, for self-attention alone.
        sequence = torch.stack([torch.cat(list(views)) for views in tokens.split(4)])
        sequence = sequence + block.attn1(block.norm1(sequence))
        tokens = torch.cat([torch.stack(views.split(h * w)) for views in sequence])
        tokens = tokens + block.attn2(block.norm2(tokens), encoder_hidden_states=text)
        tokens = tokens + block.ff(block.norm3(tokens))
        return x + proj_out(tokens).reshape(n, h, w, c).permute(0, 3, 1, 2)

    def _own(self, layer: nn.Module, name: str) -> nn.Module:
        state = {kind: self.weights[f"{name}.{kind}"] for kind in layer.state_dict()}
        self.used |= {f"{name}.{kind}" for kind in state}
        layer = layer.double()
        layer.load_state_dict(state)
        return layer

    def conv(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight, bias = (self.weights[f"{name}.{kind}"] for kind in ("weight", "bias"))
        self.used |= {f"{name}.weight", f"{name}.bias"}
        return F.conv2d(x, weight, bias, stride=stride, padding=1)

    def embedder(self, x: Tensor, prefix: str) -> Tensor:
        from diffusers.models.embeddings import TimestepEmbedding

        width = self.weights[f"{prefix}.0.weight"].shape[0]
        block = TimestepEmbedding(x.shape[1], width)
        return self.fill(block, prefix, {"linear_1": "0", "linear_2": "2"})(x)

    @torch.no_grad()
    def __call__(self, latents: Tensor, t: Tensor, text: Tensor, cameras: Tensor) -> Tensor:
        from diffusers.models.embeddings import Timesteps

        level = Timesteps(32, flip_sin_to_cos=True, downscale_freq_shift=0)(t).double()
        embedding = self.embedder(level, "time_embed") + self.embedder(cameras, "camera_embed")
        # Level 0: convolution, residual + attention; down; level 1: residual + attention.
        h0 = self.conv(latents, "input_blocks.0.0")
        h1 = self.residual(h0, embedding, "input_blocks.1.0")
        h1 = self.transformer(h1, text, "input_blocks.1.1")
        h2 = self.conv(h1, "input_blocks.2.0.op", stride=2)
        h3 = self.residual(h2, embedding, "input_blocks.3.0")
        h3 = self.transformer(h3, text, "input_blocks.3.1")
        x = self.residual(h3, embedding, "middle_block.0")
        x = self.transformer(x, text, "middle_block.1")
        x = self.residual(x, embedding, "middle_block.2")
        for i, skip in enumerate((h3, h2, h1, h0)):
            x = self.residual(torch.cat([x, skip], 1), embedding, f"output_blocks.{i}.0")
            x = self.transformer(x, text, f"output_blocks.{i}.1")
            if i == 1:
                x = self.conv(F.interpolate(x, scale_factor=2), "output_blocks.1.2.conv")
        norm = self._own(nn.GroupNorm(32, x.shape[1]), "out.0")
        return self.conv(F.silu(norm(x)), "out.2")


class TestUNet:
    def test_agrees_with_diffusers_blocks(self) -> None:
        unet = make_unet()
        reference = FromDiffusers(unet.state_dict(), TINY_MULTIVIEW)
        latents, t, text, cameras = unet_inputs()
        expected = reference(latents, t, text, cameras)
        assert reference.used == set(unet.state_dict())  # every weight takes part
        exact = unet.double()(latents, t, text, cameras)[0]
        # The sinusoids are float32 in both.
        torch.testing.assert_close(exact, expected, rtol=1e-6, atol=1e-6)
        single = make_unet()(latents.float(), t, text.float(), cameras.float())[0]
        assert float((single - expected).norm() / expected.norm()) < 1e-5

    def test_is_stable_diffusion_and_a_camera_network(self) -> None:
        """As many weights as Stable Diffusion 2.1, whose UNet it was trained from."""
        import diffusers

        with torch.device("meta"):
            unet = MultiViewUNet(DISTRIBUTED)
            stable = diffusers.UNet2DConditionModel(
                attention_head_dim=[5, 10, 20, 20],
                cross_attention_dim=1024,
                use_linear_projection=True,
            )
        count = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
        assert count(unet) - count(unet.camera_embed) == count(stable)
        names = set(unet.state_dict())
        for name in (
            "time_embed.0.weight",
            "camera_embed.2.bias",
            "input_blocks.0.0.weight",
            "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight",
            "input_blocks.1.1.transformer_blocks.0.attn2.to_out.0.bias",
            "input_blocks.3.0.op.weight",
            "input_blocks.4.0.skip_connection.weight",
            "input_blocks.11.0.out_layers.3.weight",
            "middle_block.1.transformer_blocks.0.ff.net.0.proj.weight",
            "middle_block.1.transformer_blocks.0.ff.net.2.weight",
            "output_blocks.2.1.conv.weight",
            "output_blocks.5.2.conv.weight",
            "output_blocks.11.1.proj_out.weight",
            "out.2.weight",
        ):
            assert name in names, name
        assert "input_blocks.10.1.norm.weight" not in names  # no attention at the deepest level
        assert unet.state_dict()["input_blocks.1.1.proj_in.weight"].ndim == 2

    def test_views_of_an_object_see_each_other_alone(self) -> None:
        unet = make_unet()
        latents, t, text, cameras = (
            x.float() if x.is_floating_point() else x for x in unet_inputs()
        )
        run = lambda z, c: unet(z, t, text, c)[0]  # noqa: E731
        base = run(latents, cameras)
        changed = latents.clone()
        changed[1] += 1
        difference = (run(changed, cameras) - base).flatten(1).norm(dim=1)
        assert bool((difference[:4] > 1e-3).all())
        assert bool((difference[4:] == 0).all())
        turned = cameras.clone()
        turned[6] = -turned[6]
        difference = (run(latents, turned) - base).flatten(1).norm(dim=1)
        assert bool((difference[4:] > 1e-4).all())
        assert bool((difference[:4] == 0).all())

    def test_order_of_views_is_of_no_matter(self) -> None:
        unet = make_unet().double()
        latents, t, text, cameras = unet_inputs()
        t[:4], t[4:] = 400, 700
        order = torch.tensor([2, 0, 3, 1, 5, 7, 4, 6])
        plain = unet(latents, t, text, cameras)[0]
        moved = unet(latents[order], t[order], text[order], cameras[order])[0]
        torch.testing.assert_close(moved, plain[order], rtol=1e-9, atol=1e-9)

    def test_heads_by_number(self) -> None:
        """num_heads in the place of num_head_channels: other attention from the same weights."""
        latents, t, text, cameras = unet_inputs(4)
        rows = (text, cameras)
        by_width = make_unet(num_head_channels=32, num_heads=-1).double()(latents, t, *rows)[0]
        by_number = make_unet(num_head_channels=-1, num_heads=1).double()(latents, t, *rows)[0]
        assert not torch.allclose(by_width, by_number)  # two heads at level 1 against one
        two = make_unet(num_head_channels=-1, num_heads=2, channel_mult=[1, 1]).double()
        same = make_unet(num_head_channels=16, channel_mult=[1, 1]).double()
        torch.testing.assert_close(two(latents, t, *rows)[0], same(latents, t, *rows)[0])

    def test_half_an_object(self) -> None:
        latents, t, text, cameras = unet_inputs(6)
        with pytest.raises(ValueError, match="4 rows an object, one a view, got 6"):
            make_unet()(latents.float(), t, text.float(), cameras.float())

    def test_sinusoids(self) -> None:
        levels, rates = (0, 7, 999), [10000.0 ** (-i / 4) for i in range(4)]
        expected = [[f(t * rate) for f in (math.cos, math.sin) for rate in rates] for t in levels]
        found = sinusoids(torch.tensor(levels), 8)
        torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-4)


class TestFolder:
    @pytest.fixture
    def folder(self, tmp_path) -> Path:
        return build_tiny_multiview(tmp_path / "mv")

    def test_loads(self, folder) -> None:
        model = load_model(folder, n_views=4, engine="eager")
        assert model.n_views == 4
        assert (model.latent_size, model.image_size, model.latent_channels) == (8, 16, 4)
        assert isinstance(model.engine, EagerEngine)
        torch.manual_seed(0)
        for name, tensor in MultiViewUNet(TINY_MULTIVIEW).state_dict().items():
            assert torch.equal(model.unet.state_dict()[name], tensor), name
        assert not any(p.requires_grad for p in model.unet.parameters())

    def test_dtype(self, folder) -> None:
        model = load_model(folder, dtype=torch.bfloat16, engine="eager", n_views=4)
        assert model.dtype == torch.bfloat16
        condition = Condition(torch.randn(4, 3, 16), camera=torch.randn(4, 16)).to(torch.bfloat16)
        eps = model.engine(torch.randn(4, 4, 8, 8).bfloat16(), torch.full((4,), 500), condition)
        assert eps.dtype == torch.bfloat16
        assert eps.isfinite().all()

    def test_a_model_of_views_where_one_image_is_wanted(self, folder) -> None:
        with pytest.raises(ValueError, match=r"predicts 4 views .* --preset mvdream"):
            load_model(folder)

    def test_a_model_of_one_image_where_views_are_wanted(self, tmp_path) -> None:
        folder = build_tiny_model(tmp_path / "sd")
        with pytest.raises(ValueError, match=r"one view at a time.*MultiViewUNetModel"):
            load_model(folder, n_views=4)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"ip_dim": 16}, "ip_dim = 16: an ImageDream model"),
            ({"camera_dim": None}, "camera_dim is not set"),
            ({"camera_dim": 12}, "camera_dim = 12 is not supported, expected 16"),
            ({"context_dim": 32}, "reads text embeddings of width 32, the text encoder gives 16"),
            ({"resblock_updown": True}, "resblock_updown = True is not supported"),
            ({"model_channels": None}, "model_channels missing"),
            ({"model_channels": 48}, "multiple of 32 channels"),
            ({"num_head_channels": -1}, "num_heads or num_head_channels"),
            ({"num_head_channels": 24}, "not a whole number of heads"),
            ({"num_res_blocks": [1, 1, 1]}, "num_res_blocks must be one number or 2"),
            ({"image_size": "big"}, "image_size must be one square size"),
            ({"in_channels": 9}, "in_channels = 9 and the vae 4"),
            ({"num_res_blocks": 2}, r"weights lack \d+ of the tensors"),
            ({"attention_resolutions": [2]}, r"hold \d+ tensors that its config.json does not ask"),
            ({"context_dim": 16, "out_channels": 8}, "out_channels = 8 and the vae 4"),
        ],
    )
    def test_what_cannot_be_read(self, tmp_path, change, message) -> None:
        folder = build_tiny_multiview(tmp_path / "mv", **change)
        with pytest.raises(ValueError, match=message):
            load_model(folder, n_views=4)

    def test_weights_that_are_no_weights(self, folder) -> None:
        file = folder / "unet" / "diffusion_pytorch_model.safetensors"
        file.write_bytes(b"no weights")
        with pytest.raises(ValueError, match=r"cannot read .*diffusion_pytorch_model"):
            load_multiview_unet(TINY_MULTIVIEW, [file], torch.float32)

    def test_engines_of_single_views(self) -> None:
        for kind in ("graph", "fused", "tensorrt"):
            with pytest.raises(ValueError, match="needs a CUDA device"):
                make_engine(make_unet(), torch.device("cpu"), kind)
        with pytest.raises(ValueError, match="tensorrt engine does not support multi-view"):
            make_engine(make_unet(), torch.device("cuda"), "tensorrt")


def camera_config(**values: object) -> CameraConfig:
    cfg = preset("mvdream").cameras
    for name, value in values.items():
        setattr(cfg, name, value)
    return cfg


class TestCameras:
    def test_views_of_an_object(self) -> None:
        cameras, generator = RandomCameras(camera_config()), torch.Generator().manual_seed(0)
        starts, elevations = [], []
        for step in range(40):
            batch = cameras.sample(step, generator)
            assert (len(batch), batch.height, batch.width) == (8, 64, 64)
            for name in ("elevation_deg", "distance", "fovy"):
                values = getattr(batch, name).view(2, 4)
                assert torch.equal(values, values[:, :1].expand(2, 4)), name
            azimuth = batch.azimuth_deg.view(2, 4)
            apart = 90.0 * torch.arange(4).expand(2, 4)
            torch.testing.assert_close(azimuth - azimuth[:, :1], apart)
            starts += azimuth[:, 0].tolist()
            elevations += batch.elevation_deg[::4].tolist()
            # The field of view decides the distance: the object looks equally large.
            relative = batch.distance * torch.tan(batch.fovy / 2)
            assert bool(((relative > 0.8 - 1e-5) & (relative < 1.0 + 1e-5)).all())
            torch.testing.assert_close(batch.camera_positions.norm(dim=1), batch.distance)
            # They look at the centre, level.
            towards = -F.normalize(batch.camera_positions, dim=1)
            torch.testing.assert_close(-batch.c2w[:, :3, 2], towards, atol=1e-6, rtol=1e-5)
            assert float(batch.c2w[:, 2, 0].abs().max()) < 1e-6
        assert 0 <= min(starts) < 15 < 75 < max(starts) < 90
        assert 0 <= min(elevations) < 5 < 25 < max(elevations) <= 30
        assert len(set(starts)) == len(starts)

    def test_second_stage(self) -> None:
        batch = RandomCameras(camera_config()).sample(5000, torch.Generator().manual_seed(0))
        assert (len(batch), batch.height) == (4, 256)

    def test_condition_is_the_matrix_at_unit_distance(self) -> None:
        """As MVDream normalises a camera: the matrix with its position at length one."""
        batch = RandomCameras(camera_config()).sample(3, torch.Generator().manual_seed(3))
        matrix = batch.c2w.clone()
        matrix[:, :3, 3] /= matrix[:, :3, 3].norm(dim=1, keepdim=True)
        condition = camera_condition(batch.elevation_deg, batch.azimuth_deg)
        torch.testing.assert_close(condition, matrix.flatten(1), atol=2e-6, rtol=1e-5)

    def test_condition_of_a_known_camera(self) -> None:
        """On +x, level: right is +y, up is +z, and it looks along -x."""
        expected = [0, 0, 1, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1]
        condition = camera_condition(torch.zeros(1), torch.zeros(1))
        torch.testing.assert_close(condition, torch.tensor([expected]).float(), atol=1e-7, rtol=0)

    def test_lattice(self) -> None:
        bins = QuarterBins(MultiViewConfig(azimuth_bins=3, elevation_bins=2), ELEVATIONS, 4)
        cameras = RandomCameras(camera_config(), bins)
        seen, generator = set(), torch.Generator().manual_seed(0)
        for step in range(60):
            batch = cameras.sample(step, generator)
            seen |= set(zip(batch.elevation_deg[::4].tolist(), batch.azimuth_deg[::4].tolist()))
        assert {(round(e, 3), round(a, 3)) for e, a in seen} == {
            (e, a) for e in (7.5, 22.5) for a in (15.0, 45.0, 75.0)
        }

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"batch_size": (8, 6)}, r"multiples of n_view \(4\).*\[8, 6\]"),
            ({"azimuth_range": (-90.0, 90.0)}, "360 degrees"),
            ({"center_perturb": 0.2}, "center_perturb: .*--cameras.center-perturb 0"),
            ({"camera_perturb": 0.1}, "--cameras.camera-perturb 0"),
        ],
    )
    def test_what_they_cannot_do(self, change, message) -> None:
        with pytest.raises(ValueError, match=message):
            RandomCameras(camera_config(**change))

    def test_relative_distance_of_single_views(self) -> None:
        cfg = CameraConfig(relative_distance=True, camera_perturb=0.0)
        plain = CameraConfig(camera_perturb=0.0)
        near, far = (
            RandomCameras(c).sample(3, torch.Generator().manual_seed(0)) for c in (plain, cfg)
        )
        torch.testing.assert_close(far.distance * torch.tan(far.fovy / 2), near.distance)
        assert torch.equal(far.fovy, near.fovy)

    def test_one_random_background_for_all_views(self) -> None:
        cfg = BackgroundConfig(random_aug_prob=1.0, share_aug_bg=True)
        paint = Background(cfg).draw(4, torch.Generator().manual_seed(0))
        assert torch.equal(paint, paint[:1].expand(4, 4))
        cfg.share_aug_bg = False
        assert not torch.equal(*Background(cfg).draw(2, torch.Generator().manual_seed(0)))


class TestBins:
    bins = QuarterBins(MultiViewConfig(azimuth_bins=12, elevation_bins=4), ELEVATIONS, 4)

    def test_middles_are_in_their_own_bins(self) -> None:
        assert len(self.bins) == 48
        cameras = torch.tensor([self.bins.camera(i) for i in range(48)])
        assert self.bins.index(cameras[:, 0], cameras[:, 1]) == list(range(48))
        # Which of the four views is first makes no difference.
        assert self.bins.index(cameras[:, 0], cameras[:, 1] + 270) == list(range(48))

    def test_ends_belong_to_it(self) -> None:
        elevation = torch.tensor([-5.0, 0.0, 30.0, 50.0])
        azimuth = torch.tensor([0.0, 89.9999, 0.0, 0.0])
        assert self.bins.index(elevation, azimuth) == [0, 11, 36, 36]

    def test_snap_is_near(self) -> None:
        g = torch.Generator().manual_seed(0)
        elevation, azimuth = 30 * torch.rand(200, generator=g), 90 * torch.rand(200, generator=g)
        near = self.bins.snap(elevation, azimuth)
        assert float((near[0] - elevation).abs().max()) <= 3.75 + 1e-4
        assert float((near[1] - azimuth).abs().max()) <= 3.75 + 1e-4

    def test_one_elevation(self) -> None:
        bins = QuarterBins(MultiViewConfig(elevation_bins=1), (15.0, 15.0), 4)
        assert bins.snap(torch.tensor([15.0]), torch.tensor([1.0]))[0].tolist() == [15.0]

    @pytest.mark.parametrize(
        "values", [{"azimuth_bins": 0}, {"elevation_bins": 0}, {"recon_std_rescale": 1.5}]
    )
    def test_settings(self, values) -> None:
        with pytest.raises(ValueError, match=f"{next(iter(values))}: expected"):
            QuarterBins(MultiViewConfig(**values), ELEVATIONS, 4)


def make_model(prediction: str = "epsilon") -> DiffusionModel:
    return DiffusionModel(
        make_unet(),
        nn.Identity(),
        None,
        noise_path=NoisePath.diffusion(alphas_cumprod(SCHEDULER), prediction),
        latent_size=SIZE,
    )


def make_prompts(view_dependent: bool = False) -> PromptEmbeddings:
    g = torch.Generator().manual_seed(5)
    text = torch.randn(4, LENGTH, WIDTH, generator=g)
    uncond = torch.randn(1, LENGTH, WIDTH, generator=g).expand(4, -1, -1).contiguous()
    return PromptEmbeddings(text if view_dependent else text[:1].expand(4, -1, -1), uncond)


def make_noise(n_views: int = 4) -> Tensor:
    return torch.randn(n_views, 4, SIZE, SIZE, generator=torch.Generator().manual_seed(9))


def make_guidance(
    method: str = "dsd",
    noise: Tensor | None = None,
    views: MultiViewConfig | None = None,
    view_dependent: bool = False,
    model: DiffusionModel | None = None,
    **settings: object,
):
    cfg = preset("mvdream", method=method).guidance
    for name, value in settings.items():
        setattr(cfg, name, value)
    model, prompts = model or make_model(), make_prompts(view_dependent)
    conditions = MultiViewConditions(prompts, model, cfg, views or MultiViewConfig(), ELEVATIONS)
    noise = make_noise() if noise is None else noise
    return build_guidance(cfg, model, conditions, noise, 100)


def object_views(elevation: float, start: float) -> tuple[Tensor, Tensor]:
    return torch.full((4,), elevation), start + 90.0 * torch.arange(4)


def make_latents(n_views: int = 4, seed: int = 3) -> Tensor:
    return torch.randn(n_views, 4, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def predictor(elevation: Tensor, azimuth: Tensor, prompts: PromptEmbeddings):
    """`predict` of `dsd_gradient` for one object, written apart from the guidance."""
    unet = make_unet()
    cameras = camera_condition(elevation, azimuth)
    folded = (azimuth + 180) % 360 - 180
    side = [1 if abs(a) < 45 else 2 if abs(a) > 135 else 0 for a in folded.tolist()]

    def predict(z: Tensor, t: Tensor, scale: float) -> Tensor:
        conditional = unet(z, t, prompts.text_vd[side], cameras)[0]
        unconditional = unet(z, t, prompts.uncond_vd[side], cameras)[0]
        return unconditional + scale * (conditional - unconditional)

    return predict


class TestDSD:
    @pytest.mark.parametrize("view_dependent", [False, True])
    @pytest.mark.parametrize(("t", "t_delta"), [(980, 985), (600, 640), (500, 500)])
    def test_exact_gradient(self, t, t_delta, view_dependent) -> None:
        elevation, azimuth = object_views(12.0, 33.0)
        x, noise = make_latents(), make_noise()
        expected = dsd_gradient(
            x,
            noise=noise,
            t=t,
            t_delta=t_delta,
            predict=predictor(elevation, azimuth, make_prompts(view_dependent)),
            alphas_cumprod=alphas_cumprod(SCHEDULER),
            n_ddim_steps=5,
        )
        guidance = make_guidance(trajectory="exact", n_ddim_steps=5, view_dependent=view_dependent)
        latents = x.clone().requires_grad_()
        output = guidance.at_levels(latents, elevation, azimuth, torch.tensor([t] * 4),
                                    torch.tensor([t_delta] * 4))  # fmt: skip
        assert output.grad.shape == x.shape
        assert float((output.grad - expected).norm() / expected.norm()) < 2e-5
        output.loss.backward()
        # The original's loss is a mean over views.
        torch.testing.assert_close(latents.grad, output.grad / 4)
        torch.testing.assert_close(output.loss, 0.5 * output.grad.square().sum() / 4)
        assert output.t.tolist() == [t] * 4
        assert not guidance.can_capture

    @pytest.mark.parametrize("start", [3.75, 78.75])
    def test_cached_is_exact_at_a_bins_middle(self, start) -> None:
        elevation, azimuth = object_views(11.25, start)
        levels = torch.tensor([600] * 4), torch.tensor([633] * 4)
        exact = make_guidance(trajectory="exact").at_levels(
            make_latents(), elevation, azimuth, *levels
        )
        cached = make_guidance(noise_table_step=0).at_levels(
            make_latents(), elevation, azimuth, *levels
        )
        assert float((cached.grad - exact.grad).norm() / exact.grad.norm()) < 2e-5
        table = make_guidance(noise_table_step=20)
        assert table.can_capture
        tabulated = table.at_levels(make_latents(), elevation, azimuth, *levels)
        assert float((tabulated.grad - exact.grad).norm() / exact.grad.norm()) < 0.02

    def test_cached_elsewhere_is_the_middles(self) -> None:
        levels = torch.tensor([600] * 4), torch.tensor([600] * 4)
        outputs = [
            make_guidance(trajectory=kind, noise_table_step=0).at_levels(
                make_latents(), *object_views(elevation, start), *levels
            )
            for kind, elevation, start in (("cached", 12, 80), ("exact", 12, 80))
        ]
        difference = (outputs[0].grad - outputs[1].grad).norm() / outputs[1].grad.norm()
        assert 1e-4 < float(difference) < 0.5

    def test_objects_do_not_mix(self) -> None:
        """Two objects in a batch, at levels of their own, as each alone."""
        views = [object_views(3.75, 11.25), object_views(26.25, 48.75)]
        elevation, azimuth = (torch.cat(parts) for parts in zip(*views))
        t = torch.tensor([800] * 4 + [450] * 4)
        x = make_latents(8)
        for trajectory in ("exact", "cached"):
            both = make_guidance(trajectory=trajectory).at_levels(x, elevation, azimuth, t, t + 9)
            for i, (e, a) in enumerate(views):
                rows = slice(4 * i, 4 * i + 4)
                alone = make_guidance(trajectory=trajectory).at_levels(
                    x[rows], e, a, t[rows], t[rows] + 9
                )
                torch.testing.assert_close(both.grad[rows], alone.grad, rtol=1e-3, atol=1e-4)

    def test_seeds_side_by_side(self) -> None:
        noise = torch.cat([make_noise(), -make_noise()])
        views = object_views(11.25, 41.25)
        x, t = make_latents(), torch.tensor([700] * 8)
        both = make_guidance(noise=noise).at_levels(
            torch.cat([x, x]), *(angle.repeat(2) for angle in views), t, t
        )
        for i in range(2):
            alone = make_guidance(noise=noise[4 * i : 4 * i + 4]).at_levels(x, *views, t[:4], t[:4])
            torch.testing.assert_close(
                both.grad[4 * i : 4 * i + 4], alone.grad, rtol=1e-3, atol=1e-4
            )
        with pytest.raises(ValueError, match="each of the 2 seeds, got 1"):
            make_guidance(noise=noise).at_levels(x, *views, t[:4], t[:4])

    def test_noise_is_of_the_quarters(self) -> None:
        """Another noise in one slot changes all views, through self-attention; and it is kept."""
        views, t = object_views(11.25, 41.25), torch.tensor([600] * 4)
        noise = make_noise()
        other = noise.clone()
        other[2] = -other[2]
        a, b = (make_guidance(noise=n).at_levels(make_latents(), *views, t, t).grad
                for n in (noise, other))  # fmt: skip
        difference = (a - b).flatten(1).norm(dim=1)
        assert bool((difference > 1e-4).all())
        assert torch.equal(make_guidance(noise=noise).state_dict()["noise"], noise)
        guidance = make_guidance(noise=noise)
        guidance.load_state_dict({"noise": other})
        torch.testing.assert_close(guidance.at_levels(make_latents(), *views, t, t).grad, b)

    def test_velocity_model(self) -> None:
        """A v-prediction is turned into noise view by view."""
        views, t = object_views(11.25, 41.25), torch.tensor([600] * 4)
        abar = alphas_cumprod(SCHEDULER)
        inner = predictor(*views, make_prompts())

        def predict(z: Tensor, t: Tensor, scale: float) -> Tensor:
            a = abar[t].view(-1, 1, 1, 1)
            return a.sqrt() * inner(z, t, scale) + (1 - a).sqrt() * z

        expected = dsd_gradient(
            make_latents(), noise=make_noise(), t=600, t_delta=600, predict=predict,
            alphas_cumprod=abar,
        )  # fmt: skip
        model = make_model(prediction="v_prediction")
        output = make_guidance(model=model, trajectory="exact").at_levels(
            make_latents(), *views, t, t
        )
        assert float((output.grad - expected).norm() / expected.norm()) < 1e-4

    def test_levels_are_of_objects(self) -> None:
        t, t_delta = make_guidance().levels(8, 1, torch.Generator().manual_seed(0))
        assert t.unique().numel() == 1
        assert torch.equal(t_delta.view(2, 4), t_delta.view(2, 4)[:, :1].expand(2, 4))
        assert t_delta[0] != t_delta[4]

    @pytest.mark.parametrize(
        ("elevation", "azimuth", "message"),
        [
            ([10.0] * 3, [0.0, 90.0, 180.0], "4 views of every object, got 3"),
            ([10.0] * 4, [0.0, 80.0, 180.0, 270.0], "90 degrees apart"),
            ([10.0, 10.0, 11.0, 10.0], [0.0, 90.0, 180.0, 270.0], "one elevation"),
            ([10.0] * 4, [-180.0, -90.0, 0.0, 90.0], r"from one in \[0, 90\)"),
        ],
    )
    def test_views_that_do_not_belong_together(self, elevation, azimuth, message) -> None:
        with pytest.raises(ValueError, match=message):
            make_guidance().plan_levels(torch.tensor(elevation), torch.tensor(azimuth), 500, 500)

    def test_levels_that_differ_within_an_object(self) -> None:
        with pytest.raises(ValueError, match="t: expected one level for the views"):
            make_guidance().plan_levels(
                *object_views(10, 10), torch.tensor([5, 5, 6, 5]), torch.tensor([9] * 4)
            )

    def test_what_does_not_fit(self) -> None:
        for name in ("use_perp_neg", "mirror_trajectory"):
            flag = "--guidance.no-" + name.replace("_", "-")
            with pytest.raises(ValueError, match=flag):
                make_guidance(**{name: True})
        with pytest.raises(ValueError, match=r"seed noise \[4, 4, 8, 8\].*got \[1, 4, 8, 8\]"):
            make_guidance(noise=make_noise(1))
        guidance = make_guidance()
        plan = guidance.plan_levels(*object_views(10, 10), 500, 500)
        with pytest.raises(ValueError, match="expected latents"):
            guidance.at_plan(torch.zeros(8, 4, SIZE, SIZE), plan)
        with pytest.raises(ValueError, match="a model of several views"):
            make_guidance(model=toy_model())

    @pytest.mark.parametrize("percent", [0.98, 0.6, 0.02])
    def test_an_anchored_step_leads_to_the_trajectorys_clean_image(self, percent) -> None:
        """DDIM written apart from the guidance, to the grid level above; and one step of unit
        length is there."""
        views = MultiViewConfig(azimuth_bins=1, elevation_bins=1)
        elevation, azimuth = object_views(15.0, 45.0)
        guidance = make_guidance(views=views, anchors=1.0, anchor_percent=percent, n_ddim_steps=5)
        latents = make_latents().requires_grad_()
        output = guidance.from_latents(latents, elevation, azimuth, 7, torch.Generator())
        predict = predictor(elevation, azimuth, make_prompts())
        abar, z = alphas_cumprod(SCHEDULER).double(), make_noise()
        grid = [999, 799, 599, 399, 199]
        above = [level for level in grid if level > 1000 * percent]
        for level, lower in zip(above, [*above[1:], None]):
            eps = predict(z, torch.tensor([level] * 4), guidance.cfg.guidance_scale)
            clean = (z - (1 - abar[level]).sqrt() * eps) / abar[level].sqrt()
            if lower is not None:
                z = (abar[lower].sqrt() * clean + (1 - abar[lower]).sqrt() * eps).float()
        assert relative_error(output.target, clean) < 1e-4
        output.loss.backward()
        torch.testing.assert_close(latents.grad, (latents.detach() - output.target) / 4)
        assert output.t.tolist() == [round(1000 * percent)] * 4

    def test_seeds_anchored_side_by_side(self) -> None:
        noise = torch.cat([make_noise(), -make_noise()])
        own = {"views": MultiViewConfig(azimuth_bins=2, elevation_bins=1), "anchors": 1.0}
        elevation, azimuth = (angle.repeat(2) for angle in object_views(15.0, 67.5))
        draws = torch.Generator()
        both = make_guidance(noise=noise, **own).from_latents(
            make_latents(8), elevation, azimuth, 0, draws
        )
        for i in range(2):
            rows = slice(4 * i, 4 * i + 4)
            alone = make_guidance(noise=noise[rows], **own).from_latents(
                make_latents(8)[rows], elevation[rows], azimuth[rows], 0, draws
            )
            torch.testing.assert_close(both.target[rows], alone.target, rtol=1e-3, atol=1e-4)
        assert relative_error(both.target[:4], both.target[4:]) > 0.1

    def test_no_unet_call_but_for_the_trajectory(self) -> None:
        views = MultiViewConfig(azimuth_bins=1, elevation_bins=1)
        guidance = make_guidance(views=views, anchors=1.0, n_ddim_steps=5)
        calls, engine = [], guidance.model.engine
        guidance.model.engine = lambda *args: calls.append(args) or engine(*args)
        for step in range(3):
            views = object_views(15.0, 45.0)
            guidance.from_latents(make_latents(), *views, step, torch.Generator())
        assert len(calls) == 5

    def test_an_anchored_step_of_other_cameras(self) -> None:
        guidance = make_guidance(anchors=1.0)
        with pytest.raises(ValueError, match=r"anchored step: expected views .* at elevation"):
            guidance.plan(*object_views(12.0, 33.0), 0, torch.Generator())

    def test_anchored_steps_are_spread_evenly(self) -> None:
        cfg = GuidanceConfig(anchors=0.25)
        steps = [step for step in range(400) if cfg.is_anchored(step)]
        assert len(steps) == 100
        assert max(np.diff(steps)) <= 5
        falling = GuidanceConfig(anchors=(10, 1.0, 0.0, 20))
        assert [falling.is_anchored(step) for step in (0, 9, 20, 30)] == [True, True, False, False]
        assert not GuidanceConfig(method="sds", anchors=1.0).is_anchored(0)

    def test_anchored_cameras_and_backgrounds(self) -> None:
        views = MultiViewConfig(azimuth_bins=1, elevation_bins=1, at_bins=False)
        guidance = GuidanceConfig(anchors=0.5, use_perp_neg=False)
        lattice = camera_lattice(guidance, views, ELEVATIONS, 4)
        cfg = camera_config(camera_distance_range=(0.6, 0.8), fovy_range=(40.0, 60.0))
        cameras = RandomCameras(cfg, lattice, guidance.is_anchored)
        background = Background(BackgroundConfig(random_aug_prob=1.0))
        generator = torch.Generator().manual_seed(0)
        for step in range(8):
            batch = cameras.sample(step, generator)
            at = float(batch.azimuth_deg[0]), round(float(batch.elevation_deg[0]), 4)
            frame = float(batch.distance[0]), round(float(torch.rad2deg(batch.fovy[0])), 4)
            assert batch.anchored == guidance.is_anchored(step) == (at == (45.0, 15.0))
            middle = 0.7 / math.tan(math.radians(25)) if cfg.relative_distance else 0.7
            assert (frame == (pytest.approx(middle), 50.0)) == batch.anchored
            painted = background.draw(4, generator, batch.anchored)[:, 3]
            assert bool((painted == (0.0 if batch.anchored else 1.0)).all())
        assert {guidance.is_anchored(step) for step in range(8)} == {False, True}

    def test_lattice_of_cameras(self) -> None:
        views = MultiViewConfig()
        cfg = preset("mvdream").guidance
        assert len(camera_lattice(cfg, views, ELEVATIONS, 4)) == 48
        cfg.trajectory = "exact"
        assert camera_lattice(cfg, views, ELEVATIONS, 4) is None
        cfg = preset("mvdream", method="recon").guidance
        assert camera_lattice(cfg, views, ELEVATIONS, 4) is None


class TestOwnLoss:
    """MVDream's formulations, against their formulas in float64."""

    def reference(self, x: Tensor, eps: Tensor, t: int, views, share: float | None) -> Tensor:
        abar = alphas_cumprod(SCHEDULER).double()[t]
        alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
        z = alpha * x.double() + sigma * eps.double()
        predict = predictor(*views, make_prompts())
        at = torch.full((4,), t)
        guided, positive = (predict(z.float(), at, s).double() for s in (50.0, 1.0))
        if share is None:
            return (1 - abar) * (guided - eps)
        clean, plain = (z - sigma * guided) / alpha, (z - sigma * positive) / alpha
        factor = plain.std() / clean.std()
        return x - (share * factor * clean + (1 - share) * clean)

    @pytest.mark.parametrize("share", [0.5, 0.0, 1.0, None])
    @pytest.mark.parametrize("t", [20, 500, 980])
    def test_gradient(self, t, share) -> None:
        views = [object_views(4.0, 10.0), object_views(20.0, 80.0)]
        x, eps = make_latents(8), make_latents(8, seed=11)
        config = MultiViewConfig(recon_std_rescale=share or 0.0)
        guidance = make_guidance("sds" if share is None else "recon", views=config)
        assert guidance.cfg.guidance_scale == 50
        latents = x.clone().requires_grad_()
        level = torch.full((8,), t)
        plan = guidance.plan_levels(
            *(torch.cat(parts) for parts in zip(*views)), level, level, {"eps": eps}
        )
        output = guidance.at_plan(latents, plan)
        for i, pair in enumerate(views):
            rows = slice(4 * i, 4 * i + 4)
            expected = self.reference(x[rows], eps[rows], t, pair, share)
            assert float((output.grad[rows] - expected).norm() / expected.norm()) < 1e-4
        output.loss.backward()
        torch.testing.assert_close(latents.grad, output.grad / 8)
        torch.testing.assert_close(output.loss, 0.5 * output.grad.square().sum() / 8)
        assert guidance.can_capture

    def test_consistent_flow(self) -> None:
        """Two objects of one seed: their views share the surface's noise, item by item."""
        guidance = make_guidance("cfd")
        generator = torch.Generator().manual_seed(0)
        surface = torch.rand(8, 16, 16, 4, generator=generator) - 0.3
        surface[..., 3] += 0.3
        views = [torch.cat(part) for part in zip(object_views(4.0, 10.0), object_views(20.0, 80.0))]
        plan = guidance.plan_levels(*views, 500, 500).seeing(surface)
        eps = guidance.noise_of_views(plan)
        each = [guidance._noise.of_views(surface[4 * i : 4 * i + 4]) for i in (0, 1)]
        assert torch.equal(eps, torch.cat(each))
        assert not torch.equal(eps[:4], guidance.state_dict()["noise"])
        x = make_latents(8)
        got = guidance.at_plan(x, plan).grad
        abar = alphas_cumprod(SCHEDULER).double()[500]
        expected = [
            self.reference(x[rows], eps[rows], 500, [v[rows] for v in views], None)
            for rows in (slice(4), slice(4, 8))
        ]
        # The other weight.
        expected = torch.cat(expected) / ((1 - abar) * abar).sqrt()
        assert float((got - expected).norm() / expected.norm()) < 1e-4
        nothing = guidance.plan_levels(*views, 500, 500)
        behind = guidance.noise_of_views(nothing)
        assert torch.equal(behind, guidance.state_dict()["noise"].repeat(2, 1, 1, 1))

    def test_score_matching(self) -> None:
        """One length for the views of an object together."""
        guidance = make_guidance("sim")
        x, eps = make_latents(8), make_latents(8, seed=11)
        views = [torch.cat(part) for part in zip(object_views(4.0, 10.0), object_views(20.0, 80.0))]
        plan = guidance.plan_levels(*views, 500, 500, {"eps": eps})
        got = guidance.at_plan(x, plan).grad
        for rows in (slice(4), slice(4, 8)):
            own = [v[rows] for v in views]
            expected = self.reference(x[rows], eps[rows], 500, own, None)
            expected = expected / expected.square().mean().sqrt()
            assert float((got[rows] - expected).norm() / expected.norm()) < 1e-4

    def test_rescaled(self) -> None:
        clean, plain = 3 * make_latents(2), make_latents(2, seed=5) + 1
        full = rescaled(clean, plain, 1.0)
        torch.testing.assert_close(full.flatten(1).std(1), plain.flatten(1).std(1))
        torch.testing.assert_close(rescaled(clean, plain, 0.5), (full + clean) / 2)
        assert rescaled(clean, plain, 0.0) is clean
        assert rescaled(torch.zeros(1, 3), torch.zeros(1, 3), 0.5).isfinite().all()

    def test_one_level_for_all_objects(self) -> None:
        guidance = make_guidance("recon", min_step_percent=0.02, max_step_percent=0.98)
        assert guidance.name == "recon"
        generator, seen = torch.Generator().manual_seed(0), set()
        for _ in range(40):
            t, t_delta = guidance.levels(8, 0, generator)
            assert t.shape == (8,)
            assert t.unique().numel() == 1
            assert torch.equal(t, t_delta)
            seen.add(int(t[0]))
        assert len(seen) > 20
        assert min(seen) >= 20
        assert max(seen) <= 980

    def test_levels_fall_over_the_run(self) -> None:
        guidance = make_guidance("recon")
        generator = torch.Generator().manual_seed(0)
        assert int(guidance.levels(4, 0, generator)[0][0]) == 980
        late = [int(guidance.levels(4, 9000, generator)[0][0]) for _ in range(50)]
        assert 20 <= min(late) < 150 < 350 < max(late) <= 500

    def test_call(self) -> None:
        """From latents to the loss, drawing all that is needed."""
        guidance = make_guidance("recon")
        views = object_views(4.0, 10.0)
        outputs = [
            guidance.from_latents(make_latents(), *views, 0, torch.Generator().manual_seed(s))
            for s in (0, 0, 1)
        ]
        assert torch.equal(outputs[0].grad, outputs[1].grad)
        assert not torch.equal(outputs[0].grad, outputs[2].grad)

    def test_without_noise(self) -> None:
        with pytest.raises(ValueError, match="recon needs 'eps' of draw_noise for 1 items"):
            make_guidance("recon").plan_levels(*object_views(4, 10), 500, 500)


class TestPreset:
    def test_values(self) -> None:
        cfg = preset("mvdream")
        cfg.prompt = "a chair"
        check(cfg)
        assert cfg.max_steps == 10000
        assert (cfg.guidance.method, cfg.guidance.guidance_scale) == ("dsd", 7.5)
        assert cfg.cameras.batch_size == (8, 4)
        assert cfg.cameras.width == cfg.cameras.height == (64, 256)
        flow = preset("mvdream", 500, method="cfd").guidance
        assert (flow.guidance_scale, flow.weighting, flow.t_anneal) == (50, "ddim", False)
        assert (
            flow.max_step_percent
            == flow.min_step_percent
            == settings("cfd", 500)["max_step_percent"]
        )
        own = preset("mvdream", 500, method="recon")
        assert own.max_steps == 500
        assert own.guidance.min_step_percent == (0, 0.98, 0.02, 8000)
        assert own.guidance.max_step_percent == (0, 0.98, 0.5, 8000)
        assert own.multiview.recon_std_rescale == 0.5

    def test_rates(self) -> None:
        cfg = preset("mvdream")
        cfg.field.grid = GridConfig(n_levels=2, log2_table_size=8, start_level=1)
        rates = {name: each.rate for name, each in FieldScene(cfg).trainables().items()}
        assert rates.pop("field.grid.table") == 0.01
        assert set(rates.values()) == {0.001}
        assert any(name.startswith("field.") for name in rates)
        cfg.optimizer.network_lr = None
        rates = {name: each.rate for name, each in FieldScene(cfg).trainables().items()}
        assert {rate for name, rate in rates.items() if name.startswith("field.")} == {0.01}

    def test_methods_of_multi_view_models_alone(self) -> None:
        cfg = TrainConfig(prompt="a chair", guidance=GuidanceConfig(method="recon"))
        with pytest.raises(ConfigError, match="--preset mvdream"):
            check(cfg)

    def test_memory(self) -> None:
        assert memory.settings_for(8, "mvdream")["cameras.batch_size"] == 4
        assert memory.settings_for(8, "dsd")["cameras.batch_size"] == 1
        cfg = preset("mvdream")
        assert any("--cameras.batch-size 4 (one object" in way for way in memory.savings(cfg))
        cfg.cameras.batch_size = 4
        assert not any("batch-size" in way for way in memory.savings(cfg))

    def test_negative_prompt_is_long(self) -> None:
        assert preset("mvdream").text == PromptConfig(
            negative=preset("mvdream").text.negative, view_dependent=False
        )
        assert preset("mvdream").text.negative.startswith("ugly, bad anatomy")


TINY_RUN = [*SMALL, "--cameras.resolution-milestones", "2", "--text.negative", "bad"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return build_tiny_multiview(tmp_path_factory.mktemp("model") / "mv")


def run(output: Path, model: Path, *flags: str) -> tuple[int, outputs.RunFolder]:
    arguments = ["--preset", "mvdream", "--model", str(model), "--prompt", "a chair"]
    code = module.main([*arguments, "--max-steps", "4", "--output", str(output), *TINY_RUN, *flags])
    method = flags[flags.index("--guidance.method") + 1] if "--guidance.method" in flags else "dsd"
    return code, Runner(output, model).folder_of(method=method)


def metrics(folder: outputs.RunFolder) -> list[dict]:
    lines = folder.metrics.read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCK} for line in lines]


class TestRun:
    @pytest.mark.parametrize("method", ["dsd", "recon", "cfd", "sim"])
    def test_end_to_end_and_resume_bit_for_bit(self, tmp_path, folder, method) -> None:
        """Across the change from two objects a step to one."""
        flags = ("--guidance.method", method)
        code, whole = run(tmp_path / "whole", folder, *flags)
        assert code == 0
        assert whole.preview.exists()
        assert whole.mesh.exists()
        code, parts = run(tmp_path / "parts", folder, *flags, "--stop-at", "1")
        assert code == 0
        code, parts = run(tmp_path / "parts", folder, *flags, "--resume", "auto")
        assert code == 0
        assert metrics(parts) == metrics(whole)
        assert all(math.isfinite(line["dsd"]) for line in metrics(whole))
        a, b = (checkpoint.load(checkpoint.step_path(f.checkpoints, 4)) for f in (whole, parts))
        assert a["scene"].keys() == b["scene"].keys()
        for name, tensor in a["scene"].items():
            assert torch.equal(tensor, b["scene"][name]), name
        assert a["guidance"]["noise"].shape == (4, 4, 8, 8)
        noise = torch.randn(4, 4, 8, 8, generator=RngStreams(0).noise)
        assert torch.equal(a["guidance"]["noise"], noise)

    @pytest.mark.parametrize("method", ["dsd", "cfd", "sim"])
    def test_several_seeds(self, tmp_path, folder, method) -> None:
        flags = ("--guidance.method", method)
        flags += ("--cameras.batch-size", "4", "--pictures.no-turntable", "--pictures.no-mesh")
        code, _ = run(tmp_path / "two", folder, "--num-seeds", "2", *flags)
        assert code == 0
        code, alone = run(tmp_path / "one", folder, *flags)
        assert code == 0
        two = Runner(tmp_path / "two", folder).folder_of(method=method)
        for a, b in zip(metrics(two), metrics(alone), strict=True):
            assert a["dsd"] == pytest.approx(b["dsd"], rel=1e-3)

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--num-seeds", "2"], "--num-seeds needs --cameras.batch-size 4"),
            (["--cameras.batch-size", "6"], "multiples of n_view"),
            (["--cameras.n-view", "1"], "predicts 4 views"),
            (["--guidance.use-perp-neg"], "--guidance.no-use-perp-neg"),
            (["--multiview.azimuth-bins", "0"], "multiview.azimuth_bins"),
            (["--guidance.anchors", "0.5"], "--multiview.no-at-bins"),
            (["--guidance.anchors", "0.5", "--guidance.trajectory", "exact"], "trajectory cached"),
        ],
    )
    def test_bad_input(self, tmp_path, folder, caplog, flags, message) -> None:
        code, made = run(tmp_path, folder, *flags)
        assert code == 2
        assert message in caplog.text
        assert not made.metrics.exists()

    def test_another_model(self, tmp_path, caplog) -> None:
        code, _ = run(tmp_path / "out", build_tiny_model(tmp_path / "sd"))
        assert code == 2
        assert "one view at a time" in caplog.text

    def test_method_is_kept_on_resume(self, tmp_path, folder, caplog) -> None:
        code, saved = run(tmp_path, folder, "--stop-at", "1")
        assert code == 0
        code, _ = run(tmp_path, folder, "--resume", str(saved.path), "--guidance.method", "recon")
        assert code == 2
        assert "keeps its guidance.method" in caplog.text


@cuda_only
class TestOnCuda:
    @pytest.mark.parametrize("method", ["dsd", "recon", "sds", "cfd", "sim"])
    def test_gradient_is_the_cpus(self, folder, method, monkeypatch) -> None:
        """float32 on both, of a plan made of the same draws; the UNet runs in a CUDA graph."""
        # With TF32 in convolutions, torch's default, it is 2e-3 (recon, sds) and 5e-3 (dsd) away.
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
        outputs = []
        for device in ("cpu", "cuda"):
            model = load_model(folder, device, torch.float32, n_views=4)
            guidance = make_guidance(method, model=model, guidance_scale=7.5)
            views, generator = object_views(4.0, 11.25), torch.Generator().manual_seed(0)
            plan = guidance.plan(*views, 60, generator)
            outputs.append(guidance.at_plan(make_latents().to(device), plan))
        assert torch.equal(outputs[0].t, outputs[1].t)
        assert relative_error(outputs[1].grad, outputs[0].grad) < 1e-3
        assert relative_error(outputs[1].loss, outputs[0].loss) < 2e-3

    @pytest.mark.parametrize("method", ["dsd", "recon", "sds", "cfd", "sim"])
    def test_a_graph_holds_the_step(self, tmp_path, folder, method, monkeypatch) -> None:
        """At learning rates of zero the object stays, and a step with graphs is that without."""
        captured, capture = [], StepGraphs._captured

        def watched(self, key, function):
            captured.append(capture(self, key, function))
            return captured[-1]

        monkeypatch.setattr(StepGraphs, "_captured", watched)
        flags = ["--preset", "mvdream", "--model", str(folder), "--prompt", "a chair"]
        flags += ["--text.negative", "bad", "--device", "cuda", "--max-steps", "24"]
        flags += ["--guidance.method", method, "--trainer.log-every", "1", "--trainer.no-progress"]
        flags += ["--pictures.no-turntable", "--pictures.no-mesh", "--optimizer.background-lr", "0"]
        flags += ["--optimizer.geometry-lr", "0", "--optimizer.network-lr", "0"]
        seen = []
        for name, more in (("with", []), ("without", ["--trainer.no-graphs"])):
            assert module.main([*flags, "--output", str(tmp_path / name), *more]) == 0
            (path,) = (tmp_path / name).rglob("metrics.jsonl")
            seen.append([json.loads(line)["dsd"] for line in path.read_text().splitlines()])
        assert captured
        assert None not in captured
        np.testing.assert_allclose(*seen, rtol=0.02)
