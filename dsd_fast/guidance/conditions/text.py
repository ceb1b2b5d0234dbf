"""Text rows for a camera: what the words of its side are (mathematics.md 2.3, 2.4)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from dsd_fast.diffusion.condition import Condition
from dsd_fast.diffusion.model import DiffusionModel
from dsd_fast.diffusion.text import PromptEmbeddings
from dsd_fast.guidance import passes
from dsd_fast.guidance.conditions.base import Conditions, Rows
from dsd_fast.guidance.conditions.bins import CameraBins
from dsd_fast.guidance.config import GuidanceConfig
from dsd_fast.guidance.rows import mixed_rows
from dsd_fast.upload import upload

SIDE, FRONT, BACK, OVERHEAD = range(4)
# Where the unconditional rows of the four begin in a bank [text | uncond].
_UNCONDITIONAL = 4

_OVERHEAD_DEG = 60.0
_HALF_FRONT_DEG = 45.0
_HALF_BACK_DEG = 45.0

# Decay f(A, b, C; r) = A exp(-b r) + C of a negative's weight over the interpolation weight r.
# The original rounds the offsets, so weights meant to be zero are about -1e-4 (deviations.md Q32).
_DECAY = 0.5
_FRONT_HALF = (4.0, -2.426)
_BACK_HALF_SIDE = (1.0, -0.606)
_BACK_HALF_FRONT = (1.0, 0.967)


def direction(elevation_deg: Tensor, azimuth_deg: Tensor) -> Tensor:
    """View index of each camera: 0 side, 1 front, 2 back, 3 overhead; int64 [B]."""
    a = wrapped(azimuth_deg).abs()
    index = torch.where(a < _HALF_FRONT_DEG, FRONT, SIDE)
    index = index.masked_fill(a > 180.0 - _HALF_BACK_DEG, BACK)
    return index.masked_fill(elevation_deg > _OVERHEAD_DEG, OVERHEAD)


class TextMix(NamedTuple):
    """Text rows of B cameras, each share bank[first] + (1 - share) bank[second].

    The bank is [text | uncond], [8,L,D]; the R*B rows have the order of `guidance.rows`.
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
        order of `guidance.rows`, on the device of `text`.
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


class ViewBins(CameraBins):
    """Cameras grouped into bins that share one trajectory.

    With perp-neg the text rows depend on |azimuth| alone: [0, 180] degrees in `n_bins` equal bins,
    each stood for by its centre, and one more for overhead views. In plain mode they depend on
    the view direction: four bins, and nothing is approximated.
    """

    def __init__(self, n_bins: int, perp_neg: bool):
        if n_bins < 1:
            raise ValueError(f"azimuth_bins must be at least 1, got {n_bins}")
        self.n_bins = n_bins
        self.perp_neg = perp_neg

    def __len__(self) -> int:
        """How many there are, the one of overhead views included."""
        return self.n_bins + 1 if self.perp_neg else 4

    def index(self, elevation_deg: Tensor, azimuth_deg: Tensor) -> list[int]:
        """Bin of each camera; angles [B] on the CPU."""
        view = direction(elevation_deg, azimuth_deg)
        if not self.perp_neg:
            return view.tolist()
        folded = wrapped(azimuth_deg).abs()
        bins = (folded * (self.n_bins / 180)).long().clamp(max=self.n_bins - 1)
        return bins.masked_fill(view == OVERHEAD, self.n_bins).tolist()

    def camera(self, index: int) -> tuple[float, float]:
        """(elevation, azimuth) in degrees that stand for a bin."""
        if self.perp_neg:
            if index == self.n_bins:
                return 90.0, 0.0
            return 0.0, (index + 0.5) * 180 / self.n_bins
        return ((0.0, 90.0), (0.0, 0.0), (0.0, 180.0), (90.0, 0.0))[index]


class TextConditions(Conditions):
    """The words of a view: embeddings of four sides, mixed and negated by azimuth (Perp-Neg).

    Args:
        prompts: embeddings of the four views.
        cfg: `use_perp_neg` and `azimuth_bins` count.
    """

    kind, title = "text", "a model of single views"

    def __init__(
        self, prompts: PromptEmbeddings, model: DiffusionModel, cfg: GuidanceConfig
    ) -> None:
        super().__init__(cfg)
        self.prompts = prompts
        self.bins = ViewBins(cfg.azimuth_bins, cfg.use_perp_neg)
        # What rows are mixed from.
        self._bank = torch.cat([prompts.text_vd, prompts.uncond_vd]).to(model.device)
        self._dtype, self._perp_neg = model.dtype, cfg.use_perp_neg

    def rows(self, elevation_deg: Tensor, azimuth_deg: Tensor) -> Rows:
        mix = text_mix(elevation_deg, azimuth_deg, self._perp_neg)
        return Rows({"first": mix.first, "second": mix.second, "share": mix.share}, mix.weights)

    def condition(self, columns: Mapping[str, Tensor]) -> Condition:
        first, second, share = (columns[name] for name in ("first", "second", "share"))
        return Condition(passes.text(self._bank, first, second, share, self._dtype))
