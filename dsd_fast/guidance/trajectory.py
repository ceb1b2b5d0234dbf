"""The noise trajectory of a seed: deterministic DDIM from t = 999 down to t_delta (DSD_SPEC 3.3).

A trajectory never sees the rendering. It depends on the seed noise, the prompt and the camera's
text rows only, and its state at a grid level does not depend on t_delta, which is what
`tables.TrajectoryTables` lives on.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from dsd_fast.guidance.conditions.text import OVERHEAD, direction, wrapped
from dsd_fast.guidance.levels import ode_grid
from dsd_fast.upload import upload

# predict(z [B,C,h,w], t int64 [B] on z's device, scale) -> guided noise prediction [B,C,h,w]
Predictor = Callable[[Tensor, Tensor, float], Tensor]


def seed_noise(generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    """The noise n ~ N(0, I) that makes a seed: float32 on the CPU, shape [1,C,h,w]."""
    return torch.randn(shape, generator=generator)


def signal_and_noise(alphas_cumprod: Tensor, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """alpha_t and sigma_t [B,1,1,1] on the device of `like`, for t [B] on that of the table."""
    abar = upload(alphas_cumprod[t], like.device).view(-1, 1, 1, 1)
    return abar.sqrt(), (1 - abar).sqrt()


def ddim_step(z: Tensor, eps: Tensor, t: Tensor, t_next: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """DDIM with eta = 0 (Song et al. 2021): z at t with noise prediction eps, moved to t_next.

    z, eps [B,C,h,w] float32; t, t_next int64 [B] on the device of alphas_cumprod [1000].
    """
    alpha, sigma = signal_and_noise(alphas_cumprod, t, z)
    alpha_next, sigma_next = signal_and_noise(alphas_cumprod, t_next, z)
    return alpha_next * ((z - sigma * eps) / alpha) + sigma_next * eps


def simulate(
    noise: Tensor,
    t_delta: Tensor,
    predict: Predictor,
    alphas_cumprod: Tensor,
    n_ddim_steps: int,
    guidance_scale: float,
) -> Tensor:
    """z at level t_delta, item by item, from the seed noise taken as the state at 999.

    Items whose t_delta lies higher stop earlier: they stay in the batch, so that rows keep their
    text, and their value no longer changes.

    Args:
        noise: [B,C,h,w] float32.
        t_delta: int64 [B] on the CPU.
    Returns:
        [B,C,h,w] float32.
    """
    z = noise
    grid = ode_grid(n_ddim_steps)
    for level, lower in pairwise(grid):
        t, t_next = t_delta.clamp_min(level), t_delta.clamp_min(lower)
        moving = t > t_next
        if not moving.any():
            break
        eps = predict(z, upload(t, z.device), guidance_scale)
        moved = ddim_step(z, eps, t, t_next, alphas_cumprod)
        # A step of zero length is the identity only up to rounding.
        z = torch.where(upload(moving, z.device).view(-1, 1, 1, 1), moved, z)
    return z


class ViewBins:
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


class CameraGrid:
    """Cameras grouped into equal bins of azimuth and elevation; a bin's middle stands for it.

    Index elevation_bin * n_azimuth + azimuth_bin. Azimuths are taken modulo the width of their
    range, elevations beyond theirs take its ends.

    Args:
        n_azimuth, n_elevation: how many bins.
        azimuth_range, elevation_range: (lowest, highest) in degrees.
    Raises:
        ValueError: fewer than one bin, or an empty range.
    """

    def __init__(
        self,
        n_azimuth: int,
        n_elevation: int,
        azimuth_range: tuple[float, float],
        elevation_range: tuple[float, float],
    ) -> None:
        self.n_azimuth, self.n_elevation = n_azimuth, n_elevation
        self.start, self.low, self.high = azimuth_range[0], *elevation_range
        self.width = azimuth_range[1] - self.start
        if min(n_azimuth, n_elevation) < 1 or self.low > self.high:
            raise ValueError(
                "view bins: expected at least one of azimuth and of elevation and a range of "
                f"elevations, got {n_azimuth}, {n_elevation}, {self.low} to {self.high}"
            )

    def __len__(self) -> int:
        return self.n_azimuth * self.n_elevation

    def index(self, elevation_deg: Tensor, azimuth_deg: Tensor) -> list[int]:
        """Bin of each camera; angles [B] on the CPU."""
        # In float64, so that no middle is rounded out of its own bin.
        around = (azimuth_deg.double() - self.start) % self.width / self.width
        across = (around * self.n_azimuth).long().clamp(max=self.n_azimuth - 1)
        height = (elevation_deg.double() - self.low) / max(self.high - self.low, 1e-9)
        up = (height * self.n_elevation).floor().long().clamp(0, self.n_elevation - 1)
        return (up * self.n_azimuth + across).tolist()

    def camera(self, index: int) -> tuple[float, float]:
        """(elevation, azimuth) in degrees of a bin's middle."""
        up, across = divmod(index, self.n_azimuth)
        elevation = self.low + (up + 0.5) * (self.high - self.low) / self.n_elevation
        return elevation, self.start + (across + 0.5) * self.width / self.n_azimuth

    def snap(self, elevation_deg: Tensor, azimuth_deg: Tensor) -> tuple[Tensor, Tensor]:
        """The middles of the bins that cameras fall into, float32 [B] each: `cameras.Lattice`."""
        middles = torch.tensor([self.camera(i) for i in self.index(elevation_deg, azimuth_deg)])
        return middles[:, 0], middles[:, 1]
