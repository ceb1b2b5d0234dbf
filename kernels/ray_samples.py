"""Triton kernels of samples on rays: where they lie, their colours, and the colours' gradients.

Lighting comes as eight numbers on the device, so that one CUDA graph serves every way of lighting:
the colours of the ambient and of the point light, then whether the albedo and whether the light
count (0 or 1). There may be room behind the samples: rows from `n_valid` on are neither read nor
written. Arguments are checked by the callers (`scene.material`, `scene.renderer`);
tensors are float32 but for indices, contiguous and on one device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 512
_MIN_DISTANCE = tl.constexpr(1e-12)  # of torch's normalize


@triton.jit
def _light(p_points, p_normals, p_lights, o_n, m_n, LIGHT_ROWS: tl.constexpr):
    """Unit direction to the light and its cosine with the normal, not clamped."""
    o_l = o_n * 3 if LIGHT_ROWS else o_n * 0
    x = tl.load(p_lights + o_l, mask=m_n, other=0.0) - tl.load(p_points + 3 * o_n, mask=m_n)
    y = tl.load(p_lights + o_l + 1, mask=m_n, other=0.0) - tl.load(p_points + 3 * o_n + 1, mask=m_n)
    z = tl.load(p_lights + o_l + 2, mask=m_n, other=0.0) - tl.load(p_points + 3 * o_n + 2, mask=m_n)
    inverse = 1.0 / tl.maximum(tl.sqrt(x * x + y * y + z * z), _MIN_DISTANCE)
    x, y, z = x * inverse, y * inverse, z * inverse
    cosine = x * tl.load(p_normals + 3 * o_n, mask=m_n)
    cosine += y * tl.load(p_normals + 3 * o_n + 1, mask=m_n)
    cosine += z * tl.load(p_normals + 3 * o_n + 2, mask=m_n)
    return x, y, z, cosine


@triton.jit
def points_kernel(
    p_origins, p_dirs, p_rays, p_starts, p_ends, p_valid, p_points, BLOCK: tl.constexpr
):  # fmt: skip
    o_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < tl.load(p_valid)
    o_ray = 3 * tl.load(p_rays + o_n, mask=m_n, other=0).to(tl.int64)
    middle = 0.5 * (tl.load(p_starts + o_n, mask=m_n) + tl.load(p_ends + o_n, mask=m_n))
    for d in tl.static_range(3):
        origin = tl.load(p_origins + o_ray + d, mask=m_n)
        step = tl.load(p_dirs + o_ray + d, mask=m_n) * middle
        tl.store(p_points + 3 * o_n + d, origin + step, mask=m_n)


@triton.jit
def shade_fwd_kernel(
    p_features, p_points, p_normals, p_lights, p_numbers, p_valid, p_colors,
    LIGHT_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    o_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < tl.load(p_valid)
    albedo_counts, light_counts = tl.load(p_numbers + 6), tl.load(p_numbers + 7)
    _, _, _, cosine = _light(p_points, p_normals, p_lights, o_n, m_n, LIGHT_ROWS)
    cosine = tl.maximum(cosine, 0.0)
    for c in tl.static_range(3):
        light = cosine * tl.load(p_numbers + 3 + c) + tl.load(p_numbers + c)
        albedo = tl.sigmoid(tl.load(p_features + 3 * o_n + c, mask=m_n, other=0.0))
        color = (light_counts * light + (1.0 - light_counts)) * (
            albedo_counts * albedo + (1.0 - albedo_counts)
        )
        tl.store(p_colors + 3 * o_n + c, color, mask=m_n)


@triton.jit
def shade_bwd_kernel(
    p_features, p_points, p_normals, p_lights, p_numbers, p_valid, p_grad, p_to_features,
    p_to_normals, LIGHT_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    o_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < tl.load(p_valid)
    albedo_counts, light_counts = tl.load(p_numbers + 6), tl.load(p_numbers + 7)
    x, y, z, cosine = _light(p_points, p_normals, p_lights, o_n, m_n, LIGHT_ROWS)
    lit = tl.where(cosine > 0.0, light_counts, 0.0)
    cosine = tl.maximum(cosine, 0.0)
    to_cosine = tl.zeros([BLOCK], tl.float32)
    for c in tl.static_range(3):
        diffuse = tl.load(p_numbers + 3 + c)
        light = cosine * diffuse + tl.load(p_numbers + c)
        albedo = tl.sigmoid(tl.load(p_features + 3 * o_n + c, mask=m_n, other=0.0))
        grad = tl.load(p_grad + 3 * o_n + c, mask=m_n, other=0.0)
        to_cosine += grad * diffuse * (albedo_counts * albedo + (1.0 - albedo_counts))
        to_albedo = grad * albedo_counts * (light_counts * light + (1.0 - light_counts))
        to_feature = to_albedo * albedo * (1.0 - albedo)
        tl.store(p_to_features + 3 * o_n + c, to_feature, mask=m_n)
    to_cosine *= lit
    tl.store(p_to_normals + 3 * o_n, to_cosine * x, mask=m_n)
    tl.store(p_to_normals + 3 * o_n + 1, to_cosine * y, mask=m_n)
    tl.store(p_to_normals + 3 * o_n + 2, to_cosine * z, mask=m_n)


def points(
    origins: Tensor,
    dirs: Tensor,
    ray_indices: Tensor,
    t_starts: Tensor,
    t_ends: Tensor,
    n_valid: Tensor,
) -> Tensor:
    """Midpoints [N,3] of intervals [N] on rays [R,3]; ray_indices int32 [N]."""
    n = len(ray_indices)
    result = t_starts.new_empty(n, 3)
    if n:
        points_kernel[(triton.cdiv(n, _BLOCK),)](
            origins, dirs, ray_indices, t_starts, t_ends, n_valid, result, BLOCK=_BLOCK
        )
    return result


def shade_fwd(
    features: Tensor,
    points: Tensor,
    normals: Tensor,
    lights: Tensor,
    numbers: Tensor,
    n_valid: Tensor,
) -> Tensor:
    """Colours [N,3] of features, points and unit normals [N,3], lights [N,3] or [1,3]."""
    colors = torch.empty_like(features)
    n = len(features)
    if n:
        shade_fwd_kernel[(triton.cdiv(n, _BLOCK),)](
            features, points, normals, lights, numbers, n_valid, colors,
            LIGHT_ROWS=len(lights) > 1, BLOCK=_BLOCK,
        )  # fmt: skip
    return colors


def shade_bwd(
    features: Tensor,
    points: Tensor,
    normals: Tensor,
    lights: Tensor,
    numbers: Tensor,
    n_valid: Tensor,
    grad: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients [N,3] to features and normals."""
    to_features, to_normals = torch.empty_like(features), torch.empty_like(normals)
    n = len(features)
    if n:
        shade_bwd_kernel[(triton.cdiv(n, _BLOCK),)](
            features, points, normals, lights, numbers, n_valid, grad, to_features, to_normals,
            LIGHT_ROWS=len(lights) > 1, BLOCK=_BLOCK,
        )  # fmt: skip
    return to_features, to_normals
