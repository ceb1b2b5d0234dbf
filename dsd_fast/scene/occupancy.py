"""Which cells of the box hold density: a grid of decaying maxima, refreshed during training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Interval
from torch import Tensor, nn

from dsd_fast import ops
from dsd_fast.ranges import Count, CountOrNone, NonNegative, Share, check
from dsd_fast.upload import upload

# Lower corner, upper corner.
Box = tuple[float, float, float, float, float, float]


@dataclass
class OccupancyConfig:
    # Cells per axis.
    resolution: Annotated[int, Interval(ge=1, le=512)] = 32
    # Steps between updates.
    update_interval: Count = 16
    # Steps during which every update visits all cells; later updates visit a part of them.
    warmup_steps: CountOrNone = 256
    # Factor on the stored value of a visited cell, before the maximum with the new one.
    decay: Share = 0.95
    # Upper bound of the threshold; the mean over the cells is used when it is lower.
    max_threshold: NonNegative = 0.01
    # Visit the six neighbours of occupied cells too. One point a cell misses what reaches into it
    # by a corner: of an object with sharp surfaces such cells cut pieces out of the outline.
    grow: bool = False


class OccupancyGrid(nn.Module):
    """A G³ grid over [-radius, radius]³ in x-major order.

    `occs` [G³] float32: decaying maximum of density·step of each cell. `binary` [G,G,G] bool: the
    cells that a march visits. Both are buffers and belong to the checkpoint.
    """

    occs: Tensor
    binary: Tensor

    def __init__(self, cfg: OccupancyConfig, radius: float, step_size: float) -> None:
        super().__init__()
        check(cfg)
        self.cfg = cfg
        self.radius = float(radius)
        self.step_size = float(step_size)
        g = cfg.resolution
        self.register_buffer("occs", torch.zeros(g**3))
        self.register_buffer("binary", torch.zeros(g, g, g, dtype=torch.bool))
        # The occupied cells of an update on their way to the host, for the next one: that they have
        # arrived, they, and the version of `binary` that they are of.
        self._on_host: tuple[torch.cuda.Event, Tensor, int] | None = None

    @property
    def aabb(self) -> Box:
        """The box: lower corner, upper corner."""
        r = self.radius
        return (-r, -r, -r, r, r, r)

    def tight(self) -> tuple[Tensor, Box]:
        """The smallest cube of cells that holds all occupied ones, bool [g,g,g], and its box.

        A march through it finds the samples that one through the whole grid finds, for the lattice
        of a ray does not begin at the box; but for a middle that lies on a cell's border to the
        last bit. Waits for the device.
        """
        occupied = self.binary.nonzero()
        if not len(occupied):
            return self.binary, self.aabb
        low, high = occupied.amin(0), occupied.amax(0) + 1
        g, cell = self.cfg.resolution, 2 * self.radius / self.cfg.resolution
        n = int((high - low).max())
        # Within the grid also where the cube is longer than what is occupied.
        x, y, z = low.clamp(max=g - n).tolist()
        part = self.binary[x : x + n, y : y + n, z : z + n].contiguous()
        corners = [-self.radius + cell * at for at in (x, y, z, x + n, y + n, z + n)]
        return part, tuple(corners)

    def alpha_threshold(self) -> Tensor:
        """Opacity under which a sample is dropped: min(max_threshold, mean of the cells), 0-dim.

        Far below max_threshold in practice (about 3e-4 at the start): official behaviour. Stays on
        the device: no step waits for it.
        """
        return self.occs.mean().clamp(max=self.cfg.max_threshold)

    def fill(self) -> None:
        """Mark every cell as occupied."""
        self.occs.fill_(1.0)
        self.binary.fill_(True)

    @torch.no_grad()
    def update(
        self, step: int, density_fn: Callable[[Tensor], Tensor], generator: torch.Generator
    ) -> bool:
        """Refresh the grid if `step` asks for it; returns whether it did.

        `density_fn` maps points [K,3] to densities [K]. One point is drawn in every visited cell,
        from the CPU `generator`.
        """
        if step % self.cfg.update_interval:
            return False
        indices = self._cells_to_visit(step, generator)
        g = self.cfg.resolution
        device = self.occs.device
        jitter = torch.rand(len(indices), 3, generator=generator)
        corners = torch.stack([indices // (g * g), indices // g % g, indices % g], dim=-1)
        points = ((corners + jitter) / g * 2.0 - 1.0) * self.radius
        values = density_fn(upload(points, device)) * self.step_size
        ops.occupancy_update(self.occs, upload(indices, device), values, self.cfg.decay)
        binary, _ = ops.occupancy_threshold(self.occs, self.cfg.max_threshold)
        binary = binary.reshape(g, g, g)
        self.binary.copy_(_grown(binary) if self.cfg.grow else binary)
        if device.type == "cuda":
            # Fetched now, it is there long before the next update asks for it: nobody waits.
            host = torch.empty(g**3, dtype=torch.bool, pin_memory=True)
            host.copy_(self.binary.reshape(-1), non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
            self._on_host = (arrived, host, self.binary._version)
        return True

    def _occupied(self) -> Tensor:
        """Indices of the occupied cells, on the CPU."""
        if self._on_host is not None and self._on_host[2] == self.binary._version:
            arrived, host, _ = self._on_host
            arrived.synchronize()
            return host.nonzero()[:, 0]
        return self.binary.flatten().cpu().nonzero()[:, 0]

    def _cells_to_visit(self, step: int, generator: torch.Generator) -> Tensor:
        n_cells = self.occs.numel()
        if step < self.cfg.warmup_steps:
            return torch.arange(n_cells)
        n_uniform = n_cells // 4
        uniform = torch.randint(n_cells, (n_uniform,), generator=generator)
        occupied = self._occupied()
        if len(occupied) > n_uniform:
            chosen = torch.randint(len(occupied), (n_uniform,), generator=generator)
            occupied = occupied[chosen]
        return torch.cat([uniform, occupied])


def _grown(binary: Tensor) -> Tensor:
    """Cells [G,G,G] that are set or share a face with one that is."""
    grown = binary.clone()
    for axis in range(3):
        n = binary.shape[axis] - 1
        grown.narrow(axis, 1, n).logical_or_(binary.narrow(axis, 0, n))
        grown.narrow(axis, 0, n).logical_or_(binary.narrow(axis, 1, n))
    return grown
