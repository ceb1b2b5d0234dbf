"""A step of reconstruction from one picture: the reference view and random views in one rendering.

The reference view is held against the picture, the random views are guided; both are regularised.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dsd_fast.run.state import TrainState
from dsd_fast.scene.cameras import CameraBatch, eval_camera
from dsd_fast.scene.field import Field
from dsd_fast.scene.losses import REGULARIZERS, regularizer_weights
from dsd_fast.scene.renderer import OPAQUE, RenderOutput
from dsd_fast.schedules import Schedule
from dsd_fast.tasks.step import Drawn, TrainStep

PICTURE_LOSSES = ("rgb", "mask", "normal_smooth", "normal_smooth_3d")
# How far from a point on the surface its neighbour lies, a standard deviation an axis, and how many
# points are looked at.
NEIGHBOUR_DISTANCE = 0.01
NEIGHBOURS = 4096


@dataclass(frozen=True)
class PictureDrawn(Drawn):
    """The first of `views` is the reference view; the angles of `views` are those of the others,
    which guidance is asked about."""

    offsets: Tensor  # [N,3] to the neighbours of points on the surface

    def tensors(self) -> dict[str, Tensor]:
        return super().tensors() | {"offsets": self.offsets}

    def replaced(self, tensors: dict[str, Tensor]) -> PictureDrawn:
        return replace(super().replaced(tensors), offsets=tensors["offsets"])


class SingleViewStep(TrainStep):
    """Steps of runs that differ in their seed alone; see `TrainStep`."""

    losses = ("dsd", *PICTURE_LOSSES, *REGULARIZERS)

    def _weights(self, step: int) -> dict[str, float]:
        own = {
            name: Schedule.parse(value)(step)
            for name, value in self.cfg.single_view.schedules().items()
        }
        return {
            "dsd": self._dsd_weight(step),
            **{name: weight for name, weight in own.items() if weight != 0},
            **regularizer_weights(self.cfg.loss, step),
        }

    def _draw(self, state: TrainState, step: int) -> PictureDrawn:
        """In the order of a text run, then neighbours."""
        drawn = super()._draw(state, step)
        offsets = NEIGHBOUR_DISTANCE * torch.randn(NEIGHBOURS, 3, generator=state.rng.sampler)
        # The model knows objects on white alone.
        draws = replace(drawn.draws, paint=torch.ones(len(drawn.views), 4))
        return PictureDrawn(**vars(drawn) | {"draws": draws}, offsets=offsets)

    def _views(self, step: int, generator: torch.Generator) -> CameraBatch:
        return self.with_reference(super()._views(step, generator))

    def with_reference(self, views: CameraBatch) -> CameraBatch:
        """Random views behind the reference view; the angles stay those of the random ones."""
        at = eval_camera(
            self.cfg.cameras,
            0.0,
            self.cfg.single_view.elevation,
            size=(views.height, views.width),
        )
        joined = {
            name: torch.cat([getattr(at, name), getattr(views, name)])
            for name in ("c2w", "fovy", "light_positions")
        }
        return replace(views, **joined)

    def _guided(self, rgb: Tensor) -> Tensor:
        return rgb[1:]

    def _losses(
        self,
        state: TrainState,
        drawn: PictureDrawn,
        image: RenderOutput,
        weights: Mapping[str, float | Tensor],
    ) -> dict[str, Tensor]:
        """The losses that count, but for that of the guidance."""
        losses = {}
        truth = state.scene.picture(drawn.views.height)
        if "rgb" in weights:
            behind = drawn.draws.paint[:1, None, None, :3].to(truth.device)
            losses["rgb"] = color_error(image.rgb[:1], truth, behind)
        if "mask" in weights:
            losses["mask"] = F.mse_loss(image.opacity[:1], truth[..., 3:])
        if "normal_smooth" in weights:
            losses["normal_smooth"] = normal_smoothness(image.normal)
        if "normal_smooth_3d" in weights:
            losses["normal_smooth_3d"] = surface_smoothness(
                state.scene.field, drawn.views, image, drawn.offsets
            )
        for name in REGULARIZERS:
            if name in weights:
                # Against emptiness the reference view has its picture.
                of = _of_views(image, 1) if name == "sparsity" else image
                losses[name] = REGULARIZERS[name](of)
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


def _of_views(image: RenderOutput, first: int) -> RenderOutput:
    """The views from number `first` on; the count of samples is that of all."""
    parts = {name: value[first:] for name, value in vars(image).items() if name != "n_samples"}
    return RenderOutput(**parts, n_samples=image.n_samples)
