"""Triton kernels of `dsd_fast.material.shade`: colours of samples, and their gradients.

Lighting comes as eight numbers on the device, so that one CUDA graph serves every way of lighting:
the colours of the ambient and of the point light, then whether the albedo and whether the light
count (0 or 1). Rows from `n_valid` on are not read and get zeros. Arguments are checked by the
caller; tensors are float32, contiguous and on one device.
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
def shade_fwd_kernel(
    p_features, p_points, p_normals, p_lights, p_numbers, p_valid, p_colors, n,
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
        tl.store(p_colors + 3 * o_n + c, tl.where(m_n, color, 0.0), mask=o_n < n)


@triton.jit
def shade_bwd_kernel(
    p_features, p_points, p_normals, p_lights, p_numbers, p_valid, p_grad, p_to_features,
    p_to_normals, n, LIGHT_ROWS: tl.constexpr, BLOCK: tl.constexpr,
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
        tl.store(p_to_features + 3 * o_n + c, tl.where(m_n, to_feature, 0.0), mask=o_n < n)
    to_cosine = tl.where(m_n, to_cosine * lit, 0.0)
    tl.store(p_to_normals + 3 * o_n, tl.where(m_n, to_cosine * x, 0.0), mask=o_n < n)
    tl.store(p_to_normals + 3 * o_n + 1, tl.where(m_n, to_cosine * y, 0.0), mask=o_n < n)
    tl.store(p_to_normals + 3 * o_n + 2, tl.where(m_n, to_cosine * z, 0.0), mask=o_n < n)


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
            features, points, normals, lights, numbers, n_valid, colors, n,
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
            features, points, normals, lights, numbers, n_valid, grad, to_features, to_normals, n,
            LIGHT_ROWS=len(lights) > 1, BLOCK=_BLOCK,
        )  # fmt: skip
    return to_features, to_normals
