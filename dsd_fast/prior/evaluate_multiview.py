"""Whether four views of a prior are of one object: a field is fitted to them and seen again.

What no object can look like from four sides at once is lost in the fit. The figure is the PSNR
between the views and those of the field, on models that the multi-view prior was never trained on:
of samples of their captions by the multi-view prior and by the prior of single views, which is told
each view's name, and of their own renders.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dsd_fast.config import TrainConfig, preset
from dsd_fast.diffusion.ddim import sample, sample_objects
from dsd_fast.diffusion.networks.multiview_unet import N_VIEWS
from dsd_fast.files import write_json
from dsd_fast.judge.captions import VIEWS, view_index
from dsd_fast.prior.dataset import open_views
from dsd_fast.prior.evaluate import SampleConfig, load_sampled, seed_noise
from dsd_fast.prior.quarters import Quarters
from dsd_fast.ranges import AnyPath, Count, NonNegative
from dsd_fast.run.optimizer import Adam
from dsd_fast.scene.cameras import CameraBatch, look_at, orbit_positions
from dsd_fast.scene.field_scene import FieldScene
from dsd_fast.scene.renderer import RenderOutput

SIZE = 128
GREY = 0.7
# Of samples, whose prior is not told them: half of the frame at the object, in the middle of what
# it was trained on, and the field of view in degrees.
FRAME, FOVY = 0.75, 50.0
# Half an edge of the box, as large as the objects.
RADIUS = 0.6
# Brings a mean of squares to the size of distillation losses, for which the rates are.
_WEIGHT = 1e4


@dataclass(kw_only=True)
class MultiviewEvaluateConfig(SampleConfig):
    """Settings of the multi-view prior's evaluation."""

    # Folder of rendered quarter turns.
    views: AnyPath
    # Held-out objects.
    objects: Count = 12
    # Steps of each fit.
    fit_steps: Count = 200
    # Of the samples.
    scale: NonNegative = 4.0


def evaluate_multiview(cfg: MultiviewEvaluateConfig) -> dict[str, object]:
    """Fit fields to views; writes multiview-report.json, which it returns.

    Raises:
        FileNotFoundError, ValueError: unusable views, model or device.
    """
    together, alone = load_sampled(cfg, N_VIEWS), load_sampled(cfg)
    device = together.device
    data = Quarters(cfg.views, device, held_out=True)
    _, meta, index = open_views(cfg.views)
    chosen = torch.linspace(0, len(data) - 1, min(cfg.objects, len(data))).long().tolist()
    found: dict[str, list[float]] = {"multi-view": [], "single views": [], "real": []}
    for number in chosen:
        rows = data.rows[number]
        caption = index["captions"][meta["caption"][int(rows[0]), 0]]
        words = re.sub(rf", ({'|'.join(VIEWS)}) view$", "", caption)
        azimuth, elevation = data.azimuth[number].cpu(), data.elevation[number].cpu()
        noise = seed_noise(together, [number * N_VIEWS + v for v in range(N_VIEWS)]).to(device)
        drawn = sample_objects(
            together, [words], noise[None], elevation[None], azimuth[None], cfg.steps, cfg.scale
        )[0]
        names = view_index(azimuth.numpy(), elevation.numpy())
        named = [f"{words}, {VIEWS[name]} view" for name in names]
        single = sample(alone, named, noise[:1].expand(N_VIEWS, -1, -1, -1), cfg.steps, cfg.scale)
        rgba = data.images(rows).permute(0, 3, 1, 2).float() / 255
        real = rgba[:, :3] * rgba[:, 3:] + GREY * (1 - rgba[:, 3:])
        distance = torch.full((N_VIEWS,), FRAME) / np.tan(np.radians(FOVY / 2))
        fovy = torch.full((N_VIEWS,), FOVY)
        theirs = [torch.from_numpy(meta[name][rows.numpy()]) for name in ("distance", "fovy")]
        own = (elevation, azimuth, distance, fovy)
        for name, images, cameras in (
            ("multi-view", drawn, own),
            ("single views", single, own),
            ("real", real, (elevation, azimuth, theirs[0], theirs[1])),
        ):
            found[name].append(consistency(images, cameras, cfg.fit_steps))
        print(words, *(f"{name} {values[-1]:.2f} dB" for name, values in found.items()), flush=True)
    report: dict[str, object] = {name: float(np.mean(values)) for name, values in found.items()}
    report |= {"objects": len(chosen), "by_object_db": found}
    cfg.out.mkdir(parents=True, exist_ok=True)
    write_json(cfg.out / "multiview-report.json", report)
    return report


def consistency(
    images: Tensor, of_cameras: tuple[Tensor, Tensor, Tensor, Tensor], steps: int
) -> float:
    """PSNR in dB between views and those of a field that is fitted to them.

    Args:
        images: [V,3,H,W] in [0,1].
        of_cameras: elevation and azimuth in degrees, distance, and field of view in degrees of
            cameras that look at the middle, [V] each on the CPU.
    """
    elevation_deg, azimuth_deg, distance, fovy_deg = of_cameras
    device = images.device
    want = F.interpolate(images, (SIZE, SIZE), mode="area").permute(0, 2, 3, 1)
    elevation, azimuth = torch.deg2rad(elevation_deg), torch.deg2rad(azimuth_deg)
    positions = orbit_positions(elevation, azimuth, distance)
    up = torch.tensor([0.0, 0.0, 1.0]).expand_as(positions)
    c2w = look_at(positions, torch.zeros_like(positions), up)
    fovy = torch.deg2rad(fovy_deg)
    cameras = CameraBatch(c2w, fovy, positions, elevation_deg, azimuth_deg, distance, SIZE, SIZE)
    cameras = cameras.to(device)
    cfg = _settings(steps)
    generator = torch.Generator().manual_seed(0)
    scene = FieldScene(cfg, generator).to(device)
    optimizer = Adam(scene.trainables(), cfg.optimizer.betas, cfg.optimizer.eps, device)
    fine = torch.ones((), dtype=torch.bool, device=device)
    edge = torch.cat([want[:, 0], want[:, -1], want[:, :, 0], want[:, :, -1]], 1)
    plain = edge.median(1).values.view(-1, 1, 1, 3)  # the background of each view

    def before(seen: RenderOutput) -> Tensor:
        return seen.rgb_fg + (1 - seen.opacity) * plain

    for step in range(steps):
        draws = {k: v.to(device) for k, v in scene.draw(cameras, step, generator).items()}
        error = F.mse_loss(before(scene.render(cameras, draws)), want)
        optimizer.step(_WEIGHT * error, fine, cfg.optimizer.share(step))
    seen = before(scene.view(cameras, steps)).detach()
    return float(-10 * torch.log10((seen - want).square().mean()))


def _settings(steps: int) -> TrainConfig:
    """Of the embedded preset's field, in a box that all views see: what floats before one of them
    stands beside the object in the others."""
    cfg = preset("embedded", steps)
    cfg.field.radius = RADIUS
    return cfg
