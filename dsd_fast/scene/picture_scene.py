"""A field scene that is to look like one picture, and the losses that compare the two."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from dsd_fast.scene.cameras import CameraBatch
from dsd_fast.scene.field import Field
from dsd_fast.scene.field_scene import FieldScene, FieldSettings
from dsd_fast.scene.picture import resized
from dsd_fast.scene.renderer import OPAQUE, RenderOutput

PICTURE_LOSSES = ("rgb", "mask", "normal_smooth", "normal_smooth_3d")
# How far from a point on the surface its neighbour lies, a standard deviation an axis, and how many
# points are looked at.
NEIGHBOUR_DISTANCE = 0.01
NEIGHBOURS = 4096


class PictureScene(FieldScene):
    """A scene with the picture that it is to look like; the picture is no part of its state.

    Args:
        rgba: [1,4,S,S] of `read_picture`.
        sizes: of renderings, in pixels.
    """

    def __init__(
        self,
        cfg: FieldSettings,
        generator: torch.Generator | None,
        rgba: Tensor,
        sizes: Collection[int],
    ) -> None:
        super().__init__(cfg, generator)
        for size in set(sizes):
            picture = resized(rgba, size).permute(0, 2, 3, 1).contiguous()
            self.register_buffer(f"picture_{size}", picture, persistent=False)

    def draw(self, views: CameraBatch, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """As of any field, then neighbours of points on the surface: offsets [N,3] to them."""
        draws = super().draw(views, step, generator)
        draws["offsets"] = NEIGHBOUR_DISTANCE * torch.randn(NEIGHBOURS, 3, generator=generator)
        # The model knows objects on white alone.
        draws["paint"] = torch.ones(len(views), 4)
        return draws

    def losses(
        self,
        views: CameraBatch,
        draws: Mapping[str, Tensor],
        image: RenderOutput,
        names: Collection[str],
    ) -> dict[str, Tensor]:
        """Those of PICTURE_LOSSES that are among `names`; the first view is the picture's."""
        losses = {}
        truth = self.get_buffer(f"picture_{views.height}")
        if "rgb" in names:
            behind = draws["paint"][:1, None, None, :3]
            losses["rgb"] = color_error(image.rgb[:1], truth, behind)
        if "mask" in names:
            losses["mask"] = F.mse_loss(image.opacity[:1], truth[..., 3:])
        if "normal_smooth" in names:
            losses["normal_smooth"] = normal_smoothness(image.normal)
        if "normal_smooth_3d" in names:
            losses["normal_smooth_3d"] = surface_smoothness(
                self.field, views, image, draws["offsets"]
            )
        return losses


def color_error(rgb: Tensor, truth: Tensor, behind: Tensor) -> Tensor:
    """Mean squared error of a rendering [B,h,w,3] to a picture [B,h,w,4] over one background."""
    alpha = truth[..., 3:]
    return F.mse_loss(rgb, truth[..., :3] * alpha + behind * (1 - alpha))


def normal_smoothness(normal: Tensor) -> Tensor:
    """Mean squared difference of neighbours in normal images [B,h,w,3], down plus across."""
    return normal.diff(dim=1).square().mean() + normal.diff(dim=2).square().mean()


def surface_smoothness(
    field: Field, views: CameraBatch, image: RenderOutput, offsets: Tensor
) -> Tensor:
    """Mean absolute difference of the field's normals at points of the surface and beside them.

    The points are where pixels spread evenly over the views see the surface: at their mean depth,
    where they are more opaque than not. 0-dim; zero where no pixel is.

    Args:
        offsets: [N,3] from points to their neighbours, on the field's device; pixels beyond N have
            no point.
    """
    n_pixels = image.opacity.numel()
    pixels = torch.arange(len(offsets), device=offsets.device) * n_pixels // len(offsets)

    def seen(values: Tensor) -> Tensor:
        return values.detach().reshape(n_pixels, -1).index_select(0, pixels)

    opacity = seen(image.opacity)
    depth = seen(image.depth) / opacity.clamp_min(1e-5)
    points = seen(views.rays_o) + depth * seen(views.rays_d)
    radius = field.cfg.radius
    beside = (points + offsets).clamp(-radius, radius)
    normals = field(torch.cat([points.clamp(-radius, radius), beside])).normal
    here, there = normals.chunk(2)
    is_there = (opacity > OPAQUE).to(here.dtype)
    return ((here - there).abs() * is_there).sum() / (3 * is_there.sum()).clamp_min(1)
