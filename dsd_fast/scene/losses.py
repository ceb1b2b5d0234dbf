"""The regularisers of a rendering and their weights over the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from dsd_fast.ranges import Weight
from dsd_fast.resize import bilinear
from dsd_fast.scene.renderer import OPAQUE, RenderOutput
from dsd_fast.schedules import Schedule

# Side of the normal image that convexity looks at.
_CONVEX_SIZE = 8
# Schedules below this switch the convexity off.
_CONVEX_MIN_WEIGHT = 1e-6
# Differences of normals below this, in radians, count by their squares.
_ROUND = 1e-3


@dataclass
class LossConfig:
    # Weight of the distillation loss; each weight is a number or a schedule [s0, v0, v1, s1, …].
    lambda_dsd: Weight = 1.0
    # Weight against normals that face away from the camera.
    lambda_orient: Weight = 0.1
    # Weight against opacity.
    lambda_sparsity: Weight = (0, 0.15, 0.0, 3000)
    # Weight for pixels that are either empty or opaque.
    lambda_opaque: Weight = 0.1
    # Weight for convex shapes.
    lambda_convex: Weight = (0, 1.0, 1.0, 5000)
    # Weight against fog: variance of depth along a ray.
    lambda_z_variance: Weight = 1.0
    # Weight against rough surfaces: normals that differ from pixel to pixel.
    lambda_roughness: Weight = 0.0


def regularizers(
    output: RenderOutput, cfg: LossConfig, step: int, epoch: int = 0
) -> dict[str, tuple[Tensor, float]]:
    """name -> (value, weight); add Σ value·weight to the distillation loss.

    Terms of weight zero are left out. Values are 0-dim and finite for an empty rendering too.
    """
    weights = regularizer_weights(cfg, step, epoch)
    return {name: (REGULARIZERS[name](output), weight) for name, weight in weights.items()}


def regularizer_weights(cfg: LossConfig, step: int, epoch: int = 0) -> dict[str, float]:
    """The weights of a step, by the names of `REGULARIZERS`; those of weight zero are left out."""
    weights = {
        name: Schedule.parse(getattr(cfg, f"lambda_{name}"))(step, epoch) for name in REGULARIZERS
    }
    if weights["convex"] <= _CONVEX_MIN_WEIGHT:
        del weights["convex"]
    return {name: weight for name, weight in weights.items() if weight != 0}


def orientation(output: RenderOutput) -> Tensor:
    """Σ_samples w·max(0, n·d)² / number of rays that hit anything; w detached."""
    n_hit = (output.opacity > 0).sum().clamp(min=1)
    return output.orientation.sum() / n_hit


def sparsity(output: RenderOutput) -> Tensor:
    """Mean of √(opacity² + 0.01)."""
    return (output.opacity.square() + 0.01).sqrt().mean()


def opaqueness(output: RenderOutput) -> Tensor:
    """Mean binary entropy of the opacity, clamped to [0.001, 0.999]."""
    opacity = output.opacity.clamp(1e-3, 1.0 - 1e-3)
    return -(opacity * opacity.log() + (1.0 - opacity) * (1.0 - opacity).log()).mean()


def depth_variance(output: RenderOutput) -> Tensor:
    """Mean variance of depth along the ray over opaque pixels; zero if there is none."""
    n_opaque = (output.opacity > OPAQUE).sum().clamp(min=1)
    return output.z_variance.sum() / n_opaque


def convexity(output: RenderOutput) -> Tensor:
    """Minus the mean z-components of cross products of neighbours in a small normal image.

    The image holds (n+1)/2·opacity in world axes, as the official loss takes it: z is the world's
    up, the value depends on opacity and is not invariant to rotations. It may be negative.
    Horizontally left × right, vertically lower × upper.
    """
    normals = bilinear(output.normal.permute(0, 3, 1, 2), (_CONVEX_SIZE, _CONVEX_SIZE))
    x, y = normals[:, 0], normals[:, 1]
    horizontal = x[:, :, :-1] * y[:, :, 1:] - y[:, :, :-1] * x[:, :, 1:]
    vertical = x[:, 1:] * y[:, :-1] - y[:, 1:] * x[:, :-1]
    return -(horizontal.mean() + vertical.mean())


def roughness(output: RenderOutput) -> Tensor:
    """Mean length of the difference of the unit normals of neighbouring pixels, down and across.

    In radians where it is small: what `python -m dsd_fast.evaluate` calls roughness. By the length
    and not its square, a crease costs what the same turn over many pixels does (total variation;
    Rudin, Osher and Fatemi 1992). Over the pairs that are both opaque; zero if there is none.
    Opacity decides which pairs count and has no gradient: a surface shall not vanish to be smooth.
    (The normal smoothness of Magic3D in threestudio takes squares in an image of (N+1)/2·opacity,
    where outlines count most; `picture_scene.normal_smoothness`.)
    """
    inside = output.opacity.detach() > OPAQUE
    # (N+1)/2·opacity as N·opacity: the length carries no meaning here.
    normals = F.normalize(2.0 * output.normal - output.opacity, dim=-1, eps=1e-6)
    down, across = inside[:, 1:] & inside[:, :-1], inside[:, :, 1:] & inside[:, :, :-1]
    change = (_lengths(normals.diff(dim=1)) * down).sum()
    change = change + (_lengths(normals.diff(dim=2)) * across).sum()
    return change / (down.sum() + across.sum()).clamp(min=1)


def _lengths(vectors: Tensor) -> Tensor:
    """[...,3] -> [...,1], with a gradient at zero: less by at most _ROUND."""
    return (vectors.square().sum(-1, keepdim=True) + _ROUND**2).sqrt() - _ROUND


REGULARIZERS: dict[str, Callable[[RenderOutput], Tensor]] = {
    "orient": orientation,
    "sparsity": sparsity,
    "opaque": opaqueness,
    "z_variance": depth_variance,
    "convex": convexity,
    "roughness": roughness,
}
