"""Rows of the UNet's batch, and the predictions of those rows combined (mathematics.md 2.4, 3.4).

Two layouts of B items, the items innermost:
- perp-neg (Armandpour et al. 2023): [B positive | B unconditional | 2B negative], the two
  negatives of an item next to each other, with their weights [B,2];
- plain: [B positive | B unconditional], no weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MIN_SQUARED_NORM = 1e-6


def mixed_rows(bank: Tensor, first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    """share bank[first] + (1 - share) bank[second]: [N,L,D] in the bank's dtype, on its device."""
    share = share.view(-1, 1, 1).to(bank.dtype)
    return share * bank[first] + (1 - share) * bank[second]


def expand_rows(items: Tensor, perp_neg: bool) -> Tensor:
    """Repeat per-item values [B,...] (latents, levels) to the rows of a batch."""
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
    plain: e_y + s (e_y - e_0), the original's convention, a scale higher (deviations.md Q1).

    Args:
        eps: [4B,C,h,w] with weights, [2B,C,h,w] without, rows as in this module.
        weights: [B,2] or None.
        standard_cfg: plain mode by the usual convention e_0 + s (e_y - e_0).
        pure_conditional: at scale 1 return e_y alone, without negatives (deviations.md Q2).
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
