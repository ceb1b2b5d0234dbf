"""Cameras grouped into bins that share one cached trajectory."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class CameraBins(ABC):
    """Cameras grouped into bins, each stood for by one camera."""

    @abstractmethod
    def __len__(self) -> int:
        """How many there are."""

    @abstractmethod
    def index(self, elevation_deg: Tensor, azimuth_deg: Tensor) -> list[int]:
        """Bin of each camera; angles [B] on the CPU."""

    @abstractmethod
    def camera(self, index: int) -> tuple[float, float]:
        """(elevation, azimuth) in degrees that stand for a bin."""


class CameraGrid(CameraBins):
    """Equal bins of azimuth and elevation; a bin's middle stands for it.

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
