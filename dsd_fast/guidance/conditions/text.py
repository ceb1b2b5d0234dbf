"""Text rows for a camera, and the predictions of those rows combined (DSD_SPEC 2.3, 2.4, 3.4).

Two layouts of B items, the items innermost:
- perp-neg (Armandpour et al. 2023): [B positive | B unconditional | 2B negative], the two
  negatives of an item next to each other, with their weights [B,2];
- plain: [B positive | B unconditional], no weights.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dsd_fast.upload import upload

SIDE, FRONT, BACK, OVERHEAD = range(4)
# Where the unconditional rows of the four begin in a bank [text | uncond].
_UNCONDITIONAL = 4

_OVERHEAD_DEG = 60.0
_HALF_FRONT_DEG = 45.0
_HALF_BACK_DEG = 45.0

# Decay f(A, b, C; r) = A exp(-b r) + C of a negative's weight over the interpolation weight r.
# The offsets are rounded in the original, so weights meant to be zero are about -1e-4 (Q32).
_DECAY = 0.5
_FRONT_HALF = (4.0, -2.426)
_BACK_HALF_SIDE = (1.0, -0.606)
_BACK_HALF_FRONT = (1.0, 0.967)

_MIN_SQUARED_NORM = 1e-6


def direction(elevation_deg: Tensor, azimuth_deg: Tensor) -> Tensor:
    """View index of each camera: 0 side, 1 front, 2 back, 3 overhead; int64 [B]."""
    a = wrapped(azimuth_deg).abs()
    index = torch.where(a < _HALF_FRONT_DEG, FRONT, SIDE)
    index = index.masked_fill(a > 180.0 - _HALF_BACK_DEG, BACK)
    return index.masked_fill(elevation_deg > _OVERHEAD_DEG, OVERHEAD)


class TextMix(NamedTuple):
    """Text rows of B cameras, each share bank[first] + (1 - share) bank[second].

    The bank is [text | uncond], [8,L,D]; the R*B rows have the order of this module.
    """

    first: Tensor  # int64 [R*B]
    second: Tensor  # int64 [R*B]
    share: Tensor  # float32 [R*B]
    weights: Tensor | None  # of the negatives, float32 [B,2]; None in plain mode


def text_mix(elevation_deg: Tensor, azimuth_deg: Tensor, perp_neg: bool = True) -> TextMix:
    """What `view_embeddings` mixes for cameras of these angles [B], on their device."""
    index = direction(elevation_deg, azimuth_deg)
    unconditional = index + _UNCONDITIONAL
    if not perp_neg:
        rows = torch.cat([index, unconditional])
        return TextMix(rows, rows, torch.ones_like(rows, dtype=torch.float32), None)

    overhead = elevation_deg > _OVERHEAD_DEG
    front_half, r = mix_of_views(azimuth_deg)
    # (from, to) of the interpolation; overhead is a constant, with weightless negatives.
    first = torch.where(front_half, FRONT, SIDE).masked_fill(overhead, OVERHEAD)
    second = torch.where(front_half, SIDE, BACK).masked_fill(overhead, OVERHEAD)
    negatives = torch.stack(
        [torch.where(front_half, FRONT, SIDE), torch.where(front_half, SIDE, FRONT)], dim=1
    )
    negatives = torch.where(overhead.unsqueeze(1), unconditional.unsqueeze(1), negatives)
    weights = torch.stack(
        [
            torch.where(front_half, _decay(_FRONT_HALF, r), _decay(_BACK_HALF_SIDE, r)),
            torch.where(front_half, _decay(_FRONT_HALF, 1 - r), _decay(_BACK_HALF_FRONT, r)),
        ],
        dim=1,
    )
    weights = torch.where(overhead.unsqueeze(1), torch.zeros_like(weights), -weights)
    constant = torch.cat([unconditional, negatives.flatten()])
    return TextMix(
        torch.cat([first, constant]),
        torch.cat([second, constant]),
        torch.cat([r, torch.ones_like(constant, dtype=r.dtype)]),
        weights,
    )


def mixed_rows(bank: Tensor, first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    """The rows [N,L,D] that a `TextMix` describes, in the bank's dtype and on its device."""
    share = share.view(-1, 1, 1).to(bank.dtype)
    return share * bank[first] + (1 - share) * bank[second]


def view_embeddings(
    text: Tensor,
    uncond: Tensor,
    elevation_deg: Tensor | float,
    azimuth_deg: Tensor | float,
    perp_neg: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Text rows of the UNet for B cameras.

    Args:
        text, uncond: [4,L,D] in the order side, front, back, overhead.
        elevation_deg, azimuth_deg: [B] degrees, any range; azimuth 0 is the front.
        perp_neg: interpolate the views by azimuth and add two weighted negatives an item;
            otherwise take the view the camera falls in.
    Returns:
        (embeddings [4B,L,D], weights [B,2]) with perp_neg, ([2B,L,D], None) without, in the row
        order of this module, on the device of `text`.
    Raises:
        ValueError: embeddings that are not a pair of [4,L,D], or angles that are not a pair of [B].
    """
    if text.ndim != 3 or text.shape[0] != 4 or uncond.shape != text.shape:
        raise ValueError(
            "view_embeddings: expected text and uncond of one shape [4,L,D], "
            f"got {tuple(text.shape)} and {tuple(uncond.shape)}"
        )
    elevation = _angles(elevation_deg, text.device)
    azimuth = _angles(azimuth_deg, text.device)
    if elevation.shape != azimuth.shape:
        raise ValueError(
            "view_embeddings: elevation_deg and azimuth_deg must have one length, "
            f"got {elevation.numel()} and {azimuth.numel()}"
        )
    mix = text_mix(elevation, azimuth, perp_neg)
    rows = mixed_rows(torch.cat([text, uncond]), mix.first, mix.second, mix.share)
    return rows, mix.weights


def expand_rows(items: Tensor, perp_neg: bool) -> Tensor:
    """Repeat per-item values [B,...] (latents, levels) to the rows of `view_embeddings`."""
    if not perp_neg:
        return torch.cat([items, items])
    return torch.cat([items, items, items.repeat_interleave(2, dim=0)])


def combine(
    eps: Tensor,
    weights: Tensor | None,
    scale: float,
    *,
    standard_cfg: bool = False,
    pure_conditional: bool = False,
) -> Tensor:
    """Guided noise prediction from the stacked predictions of one batch, in float32 (float64 kept).

    perp-neg: e_0 + s (p + sum_i w_i perp(e_i - e_0, p)) with p = e_y - e_0;
    plain: e_y + s (e_y - e_0), the original's convention, one unit above the usual scale (Q1).

    Args:
        eps: [4B,C,h,w] with weights, [2B,C,h,w] without, rows as in `view_embeddings`.
        weights: [B,2] or None.
        standard_cfg: plain mode by the usual convention e_0 + s (e_y - e_0).
        pure_conditional: at scale 1 return e_y alone, without negatives or extrapolation (Q2).
    Returns:
        [B,C,h,w] float32.
    """
    rows_per_item = 2 if weights is None else 4
    n_items = eps.shape[0] // rows_per_item
    if eps.ndim != 4 or n_items * rows_per_item != eps.shape[0]:
        raise ValueError(f"combine: expected eps [{rows_per_item}B,C,h,w], got {tuple(eps.shape)}")
    if weights is not None and weights.shape != (n_items, 2):
        raise ValueError(
            f"combine: expected weights [{n_items},2] for {eps.shape[0]} rows, "
            f"got {tuple(weights.shape)}"
        )
    eps = eps if eps.dtype == torch.float64 else eps.float()
    positive, unconditional = eps[:n_items], eps[n_items : 2 * n_items]
    if pure_conditional and scale == 1.0:
        return positive
    toward = positive - unconditional  # [B,C,h,w]
    if weights is None:
        return (unconditional if standard_cfg else positive) + scale * toward
    away = eps[2 * n_items :].unflatten(0, (n_items, 2)) - unconditional.unsqueeze(1)
    p = toward.unsqueeze(1)  # [B,1,C,h,w]
    image = (2, 3, 4)
    squared = p.square().sum(image, keepdim=True).clamp_min(_MIN_SQUARED_NORM)
    perpendicular = away - (away * p).sum(image, keepdim=True) / squared * p
    accumulated = (weights.to(eps).view(n_items, 2, 1, 1, 1) * perpendicular).sum(1)
    return unconditional + scale * (toward + accumulated)


def _angles(value: Tensor | float, device: torch.device) -> Tensor:
    return upload(torch.as_tensor(value, dtype=torch.float32).reshape(-1), device)


def mix_of_views(azimuth_deg: Tensor) -> tuple[Tensor, Tensor]:
    """Which two views Perp-Neg interpolates at each azimuth (Armandpour et al. 2023).

    Returns:
        bool [B], front and side where True, side and back elsewhere, and the first one's share [B].
    """
    a = wrapped(azimuth_deg).abs()
    front_half = a < 90
    return front_half, torch.where(front_half, 1 - a / 90, 2 - a / 90)


def wrapped(azimuth_deg: Tensor) -> Tensor:
    """Azimuth in [-180, 180)."""
    return (azimuth_deg + 180) % 360 - 180


def _decay(parameters: tuple[float, float], r: Tensor) -> Tensor:
    amplitude, offset = parameters
    return amplitude * torch.exp(-_DECAY * r) + offset
