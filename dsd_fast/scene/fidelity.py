"""How true a mesh is to the field it was made of: the same views of both."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dsd_fast.scene.cameras import CameraConfig, eval_camera
from dsd_fast.scene.field_scene import FieldScene
from dsd_fast.scene.mesh import Made
from dsd_fast.scene.painted import PaintedMesh
from dsd_fast.scene.renderer import OPAQUE, RenderOutput

# Between those that the level was chosen by, over a grey, without light.
N_VIEWS = 24
ELEVATIONS_DEG = (-5.0, 10.0, 25.0, 40.0)
GREY = 0.7
# Colours are compared where both are the object and nothing of the background.
INSIDE = 0.95


class Fidelity(NamedTuple):
    """Medians over views."""

    # Peak signal to noise ratio of pictures over grey, in decibels.
    psnr: float
    # Intersection over union of outlines, pixels more than half covered.
    iou: float
    # The mesh's outline as a share of the field's.
    area: float
    # The standard deviation of the mesh's colours as a share of that of the field's.
    spread: float

    def __str__(self) -> str:
        return (
            f"mesh beside field, {N_VIEWS} other views: PSNR {self.psnr:.1f} dB, outlines' IoU "
            f"{self.iou:.4f}, area {100 * self.area:.1f} %, colours' spread "
            f"{100 * self.spread:.0f} %"
        )


@torch.no_grad()
def fidelity(
    scene: FieldScene, made: Made, cameras: CameraConfig, step: int, size: int = 256
) -> Fidelity:
    """Compare a scene with the mesh made of it."""
    material = scene.renderer.material
    unlit, material.ambient_only_on_test = material.ambient_only_on_test, True
    try:
        mesh = PaintedMesh(made, scene.background, material).to(scene.device)
        figures = []
        for view in range(N_VIEWS):
            camera = eval_camera(
                cameras,
                360 / N_VIEWS * (view + 0.5),
                ELEVATIONS_DEG[view % len(ELEVATIONS_DEG)],
                (size, size),
                scene.device,
            )
            figures.append(_compare(scene.view(camera, step), mesh.view(camera, step)))
    finally:
        material.ambient_only_on_test = unlit
    values = torch.tensor([figure for figure in figures if all(map(math.isfinite, figure))])
    if not len(values):
        return Fidelity(math.nan, 0.0, math.nan, math.nan)
    return Fidelity(*values.median(0).values.tolist())


def _compare(field: RenderOutput, mesh: RenderOutput) -> tuple[float, float, float, float]:
    ours, theirs = _over_grey(mesh), _over_grey(field)
    psnr = -10 * math.log10(max(float((ours - theirs).square().mean()), 1e-12))
    a, b = (seen.opacity[..., 0] > OPAQUE for seen in (mesh, field))
    union, own = int((a | b).sum()), int(b.sum())
    if not union or not own:
        return math.nan, math.nan, math.nan, math.nan
    inside = (mesh.opacity[..., 0] > INSIDE) & (field.opacity[..., 0] > INSIDE)
    spread = ours[inside].std(0).mean() / theirs[inside].std(0).mean()
    return psnr, int((a & b).sum()) / union, int(a.sum()) / own, float(spread)


def _over_grey(seen: RenderOutput) -> Tensor:
    return seen.rgb_fg + GREY * (1 - seen.opacity)
