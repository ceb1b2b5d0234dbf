"""Trajectories of a seed kept as tables on the device: states, and the noise predicted there."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from dsd_fast.guidance import passes
from dsd_fast.guidance.levels import n_nodes
from dsd_fast.guidance.passes import Batch, Form
from dsd_fast.upload import upload


class Reach(NamedTuple):
    """Where a level of one trajectory is to be found in the tables."""

    # Slot of `states`, and of `predictions`, at `level`: one DDIM step from it leads to z.
    state: int
    prediction: int
    level: int
    # Slot of `predictions` below, and how far from `prediction` to it the level lies: 0 to 1.
    below: int
    mix: float


class TrajectoryTables:
    """Trajectories of every seed and bin, as tables on the device, filled when first needed.

    `states` hold z at the levels of the grid (999, 899, ...); `predictions` hold the guided
    prediction there and, with a `table_step`, at every so many levels below each, where z is one
    DDIM step away. Between two of those eps_o is interpolated; never across a grid level, where the
    path bends, for each is an entry. A slot is entry * n_tracks + track, track = seed * n_bins +
    bin.

    As t falls during a run, a track gains one entry at a time; each costs one guided prediction,
    once. Every entry is computed alone, with a batch of one item, so tables rebuilt after a resume
    hold the same numbers whatever order the cameras came in.

    Memory: 8 C h w bytes a bin and grid level, and 4 C h w more an entry between. Stable
    Diffusion's latents (64 KiB in float32), 48 bins and the one of overhead views, down to level
    320: 43 MiB, with a table step of 20 129 MiB; a seed.

    Args:
        starts: [S*n_bins,C,h,w] float32, where each track begins: z at the first level of the
            grid, on the device of the tables.
        form: of the UNet's batches, there too.
        grid: levels of DDIM steps, falling.
        n_bins: trajectories of a seed.
        table_step: levels between the entries of `predictions`; 0 for those of the grid alone.
        lowest: the lowest level that room is made for now. Levels below it enlarge the tables:
            they move, and a CUDA graph that reads them must be captured again.
    """

    def __init__(
        self,
        starts: Tensor,
        form: Form,
        grid: tuple[int, ...],
        n_bins: int,
        table_step: int,
        lowest: int,
    ):
        self.form = form
        self.n_bins = n_bins
        self.n_tracks = starts.shape[0]
        self.grid = grid
        self.table_step = table_step
        # Of the entries of `predictions`, falling.
        self.levels = _table_levels(self.grid, table_step)
        self._negative_levels = [-level for level in self.levels]  # rising, for bisection
        self.states = starts
        self.predictions = starts.new_empty((0, *starts.shape[1:]))
        self._filled: set[int] = set()
        self._make_room(lowest)

    def reach(
        self, seed: int, view: int, level: int, predict: Callable[[Batch, int], Tensor]
    ) -> Reach:
        """How to come to `level` on the trajectory of a seed in bin `view`.

        `predict(batch, view) -> [1,C,h,w]` is asked for the guided predictions that are not there
        yet; the batch holds rows and levels for the UNet.
        """
        track = seed * self.n_bins + view
        self._make_room(level)
        node = self._node_above(level)
        entry = below = self.levels.index(self.grid[node])
        mix = 0.0
        # From noise itself, at the first level, nothing leads on: there is no step to take.
        needed = [] if level == self.grid[0] else [entry]
        if self.table_step:
            entry = bisect_right(self._negative_levels, -level) - 1
            below = entry if self.levels[entry] == level else entry + 1
            upper, lower = self.levels[entry], self.levels[below]
            mix = 0.0 if upper == lower else (upper - level) / (upper - lower)
            needed = [entry, below]
        for number in needed:
            self._fill(number, track, predict)
        return Reach(
            node * self.n_tracks + track,
            entry * self.n_tracks + track,
            self.grid[node],
            below * self.n_tracks + track,
            mix,
        )

    def node(
        self, seed: int, view: int, level: int, predict: Callable[[Batch, int], Tensor]
    ) -> Reach:
        """The grid level above `level` on a trajectory: the state there, and what is predicted of
        it. Arguments as of `reach`."""
        track = seed * self.n_bins + view
        self._make_room(level)
        node = self._node_above(level)
        entry = self.levels.index(self.grid[node])
        self._fill(entry, track, predict)
        slot = entry * self.n_tracks + track
        return Reach(node * self.n_tracks + track, slot, self.grid[node], slot, 0.0)

    def _fill(self, entry: int, track: int, predict: Callable[[Batch, int], Tensor]) -> None:
        """Make sure that an entry of a track is there, and all that it stands on."""
        slot = entry * self.n_tracks + track
        if slot in self._filled:
            return
        level = self.levels[entry]
        node = self._node_above(level)
        source = self.levels.index(self.grid[node])
        if source != entry:
            self._fill(source, track, predict)
        here = self._move(node, source, track, level)
        if level in self.grid[:-1]:
            self.states[self.grid.index(level) * self.n_tracks + track] = here.value[0]
        self.predictions[slot] = predict(here, track % self.n_bins)[0]
        self._filled.add(slot)

    def _move(self, node: int, entry: int, track: int, level: int) -> Batch:
        """z of a track at `level`, one step from the state and prediction of a node."""
        state, prediction = node * self.n_tracks + track, entry * self.n_tracks + track
        numbers = torch.tensor([[state], [prediction], [self.grid[node]], [level]])
        slot, slot_eps, t, t_next = upload(numbers, self.states.device).unbind()
        return passes.state(self.states, self.predictions, slot, slot_eps, t, t_next, self.form)

    def _node_above(self, level: int) -> int:
        """Grid level from which one DDIM step leads to `level`; the first is its own."""
        return max(n_nodes(level, self.grid) - 1, 0)

    def _make_room(self, lowest: int) -> None:
        n_entries = n_grid = self._node_above(lowest) + 1
        if self.table_step:
            n_entries = 1 + next(i for i, level in enumerate(self.levels) if level <= lowest)
            n_grid = sum(level >= self.levels[n_entries - 1] for level in self.grid[:-1])
        self.states = _enlarged(self.states, n_grid * self.n_tracks)
        self.predictions = _enlarged(self.predictions, n_entries * self.n_tracks)


def _table_levels(grid: tuple[int, ...], step: int) -> tuple[int, ...]:
    if not step:
        return grid[:-1]
    between = (range(upper, lower, -step) for upper, lower in pairwise(grid))
    return (*(level for levels in between for level in levels), grid[-1])


def _enlarged(table: Tensor, n_slots: int) -> Tensor:
    if n_slots <= len(table):
        return table
    return torch.cat([table, table.new_empty((n_slots - len(table), *table.shape[1:]))])
