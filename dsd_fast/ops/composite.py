"""Volume rendering of packed samples: weights, colours, depths, normals along rays."""

from typing import NamedTuple

import torch
from torch import Tensor

# Floor of the opacity that normalises the weights of the z-variance.
MIN_OPACITY = 1e-5


class Composited(NamedTuple):
    """What `composite_full` returns; R rays, S samples."""

    color: Tensor  # [R, 3]  sum of w c
    opacity: Tensor  # [R, 1]  sum of w
    depth: Tensor  # [R, 1]  sum of w t, not normalised
    z_variance: Tensor  # [R, 1]  variance of t under w / opacity
    normal: Tensor  # [R, 3]  sum of w n, not normalised
    weights: Tensor  # [S]


def _ray_sums(values: Tensor, ray_indices: Tensor, n_rays: int) -> Tensor:
    """Sum of values [S, C] over each ray -> [R, C]."""
    return values.new_zeros(n_rays, values.shape[1]).index_add(0, ray_indices, values)


def _optical_depth_before(thickness: Tensor, ray_indices: Tensor, n_rays: int) -> Tensor:
    """For each sample the sum of `thickness` over the samples before it on its ray -> [S].

    Sums within a ray only (a padded [R, K] table): one cumulative sum over all rays, minus its
    value at the ray's start, would lose digits and carry an infinity into every later ray.
    """
    offsets = ray_offsets(ray_indices, n_rays)
    place = torch.arange(thickness.shape[0], device=thickness.device) - offsets[ray_indices]
    longest = int((offsets[1:] - offsets[:-1]).max()) if thickness.numel() else 0
    table = thickness.new_zeros(n_rays, longest + 1)
    table = table.index_put((ray_indices, place + 1), thickness)
    return table.cumsum(1)[ray_indices, place]


def _weights(
    sigmas: Tensor, t_starts: Tensor, t_ends: Tensor, ray_indices: Tensor, n_rays: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(transmittance before, alpha, weight) of each sample."""
    thickness = sigmas * (t_ends - t_starts)
    before = _optical_depth_before(thickness, ray_indices, n_rays)
    transmittance, alpha = torch.exp(-before), -torch.expm1(-thickness)
    return transmittance, alpha, transmittance * alpha


def ray_offsets(ray_indices: Tensor, n_rays: int) -> Tensor:
    """Where each ray's samples begin in the packed arrays, int64 [R + 1]; the last entry is S."""
    bounds = torch.arange(n_rays + 1, device=ray_indices.device)
    return torch.searchsorted(ray_indices, bounds)


def visibility_reference(
    sigmas: Tensor,
    t_starts: Tensor,
    t_ends: Tensor,
    ray_indices: Tensor,
    n_rays: int,
    alpha_threshold: float | Tensor,
    transmittance_threshold: float = 1e-4,
) -> Tensor:
    """`visibility` in pure torch."""
    transmittance, alpha, _ = _weights(sigmas, t_starts, t_ends, ray_indices, n_rays)
    return (transmittance >= transmittance_threshold) & (alpha >= alpha_threshold)


def composite_full_reference(
    sigmas: Tensor,
    rgbs: Tensor,
    normals: Tensor,
    t_starts: Tensor,
    t_ends: Tensor,
    ray_indices: Tensor,
    n_rays: int,
) -> Composited:
    """`composite_full` in pure torch, differentiable by autograd."""
    weights = _weights(sigmas, t_starts, t_ends, ray_indices, n_rays)[2][:, None]
    middle = 0.5 * (t_starts + t_ends)[:, None]
    opacity = _ray_sums(weights, ray_indices, n_rays)
    depth = _ray_sums(weights * middle, ray_indices, n_rays)
    share = weights / opacity.clamp(min=MIN_OPACITY)[ray_indices]
    mean = _ray_sums(share * middle, ray_indices, n_rays)
    z_variance = _ray_sums(share * (middle - mean[ray_indices]) ** 2, ray_indices, n_rays)
    return Composited(
        color=_ray_sums(weights * rgbs, ray_indices, n_rays),
        opacity=opacity,
        depth=depth,
        z_variance=z_variance,
        normal=_ray_sums(weights * normals, ray_indices, n_rays),
        weights=weights[:, 0],
    )


def composite_reference(
    sigmas: Tensor,
    rgbs: Tensor,
    t_starts: Tensor,
    t_ends: Tensor,
    ray_indices: Tensor,
    n_rays: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`composite` in pure torch, differentiable by autograd."""
    weights = _weights(sigmas, t_starts, t_ends, ray_indices, n_rays)[2][:, None]
    middle = 0.5 * (t_starts + t_ends)[:, None]
    return (
        _ray_sums(weights * rgbs, ray_indices, n_rays),
        _ray_sums(weights, ray_indices, n_rays),
        _ray_sums(weights * middle, ray_indices, n_rays),
        weights[:, 0],
    )


visibility = visibility_reference
composite = composite_reference
composite_full = composite_full_reference
