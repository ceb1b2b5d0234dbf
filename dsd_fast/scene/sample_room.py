"""How much room samples get where nobody waits to count them."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsd_fast.ops import PackedSamples

log = logging.getLogger(__name__)

# Room beyond what was needed lately: views differ, and counts come a few renderings late.
MARGIN = 1.25
# What was needed is forgotten at this rate a rendering, half of it in 1400. Close views, which need
# several times the room of others, come once in some hundred.
DECAY = 0.9995
# The room stays as it is while what it should be lies within these factors of it: a CUDA graph
# holds for one room only.
SHRINK, GROW = 0.5, 1.1
# Renderings whose samples are counted before there is room for others'.
LESSONS = 16
# The least room that is learnt: 100 MB, and small pictures never outgrow it.
FLOOR = 1 << 20
# A count is looked at when so many newer ones are on their way: always as late, so that the room of
# a rendering, and with it what is dropped, does not depend on how far ahead the host runs.
LAG = 2


class _Count(NamedTuple):
    """What a rendering found, on its way to the host."""

    # Samples and dropped ones, int64 [2] on the host.
    numbers: Tensor
    # That they are there; None where they have been from the beginning.
    arrived: torch.cuda.Event | None
    n_rays: int

    def wait(self) -> tuple[int, int, int]:
        """(samples, dropped ones, rays)."""
        if self.arrived is not None:
            self.arrived.synchronize()
        n_samples, n_dropped = self.numbers.tolist()
        return n_samples, n_dropped, self.n_rays


class SampleRoom:
    """Room for the samples of a rendering, learnt from those before.

    Counts are copied to the host in the background and looked at a few renderings later, so no
    rendering waits for its own.

    Args:
        what: "marched" or "kept", for messages.
        per_ray: room for so many samples a ray, for good; None learns.
    """

    def __init__(self, what: str, per_ray: float | None = None) -> None:
        self._what = what
        self._fixed = per_ray
        self._per_ray = 0.0
        self._n_lessons = 0
        self._settled: dict[int, int] = {}  # rays -> room
        # Samples and dropped ones of the newest rendering, on the device.
        self._counts: Tensor | None = None
        self._coming: deque[_Count] = deque()
        self.n_dropped = 0
        self._n_overflows = 0

    def room(self, n_rays: int) -> int | None:
        """Room for the samples of so many rays; None before enough was learnt."""
        capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        if not capturing:
            self._look()
        if self._fixed is not None:
            return math.ceil(self._fixed * n_rays)
        if self._n_lessons < LESSONS:
            if capturing:
                raise ValueError(
                    "a CUDA graph cannot hold a rendering whose room for samples is not learnt "
                    f"yet: render {LESSONS} times first, or set sample_room in the renderer's "
                    "configuration"
                )
            return None
        wanted = max(math.ceil(MARGIN * self._per_ray * n_rays), FLOOR)
        settled = self._settled.get(n_rays)
        if settled is None or not SHRINK * settled <= wanted <= GROW * settled:
            settled = self._settled[n_rays] = wanted
        return settled

    def learn(self, n_samples: int, n_rays: int) -> None:
        """Take a count that is known."""
        if self._fixed is None and n_rays:
            self._per_ray = max(n_samples / n_rays, DECAY * self._per_ray)
            self._n_lessons += 1

    def watch(self, packed: PackedSamples, n_rays: int) -> None:
        """Take a count that is on its way. A graph leaves it on the device: see `watch_replay`."""
        if not packed.offsets.is_cuda:
            self._take(int(packed.offsets[-1]), int(packed.n_dropped), n_rays)
            return
        counts = torch.stack([packed.offsets[-1], packed.n_dropped])
        # One place for good, which every graph writes to.
        if self._counts is None:
            self._counts = counts
        else:
            self._counts.copy_(counts)
        if not torch.cuda.is_current_stream_capturing():
            self.watch_replay(n_rays)

    def watch_replay(self, n_rays: int) -> None:
        """Take the count of a rendering that a CUDA graph replayed."""
        assert self._counts is not None  # `watch` has seen the capture
        host = torch.empty(2, dtype=torch.int64, pin_memory=True)
        host.copy_(self._counts, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._coming.append(_Count(host, arrived, n_rays))

    def state(self) -> dict[str, Any]:
        """What was learnt, in values of JSON; waits for the counts on their way."""
        return {
            "per_ray": self._per_ray,
            "n_lessons": self._n_lessons,
            "settled": [list(pair) for pair in self._settled.items()],
            "coming": [list(count.wait()) for count in self._coming],
            "n_dropped": self.n_dropped,
            "n_overflows": self._n_overflows,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on as the one whose `state` it was: later renderings get the same room.

        Raises:
            AttributeError, KeyError, TypeError, ValueError: it is no such state.
        """
        per_ray = float(state["per_ray"])
        if not 0.0 <= per_ray < math.inf:
            raise ValueError(f"per_ray: expected 0 or more, got {per_ray}")
        self._per_ray, self._n_lessons = per_ray, int(state["n_lessons"])
        self._settled = {int(n_rays): int(room) for n_rays, room in state["settled"]}
        self._coming = deque(
            _Count(torch.tensor([int(n_samples), int(n_dropped)]), None, int(n_rays))
            for n_samples, n_dropped, n_rays in state["coming"]
        )
        self.n_dropped, self._n_overflows = int(state["n_dropped"]), int(state["n_overflows"])

    def _look(self) -> None:
        while len(self._coming) > LAG:
            self._take(*self._coming.popleft().wait())

    def _take(self, n_samples: int, n_dropped: int, n_rays: int) -> None:
        self.learn(n_samples + n_dropped, n_rays)
        if not n_dropped:
            return
        self.n_dropped += n_dropped
        self._n_overflows += 1
        if self._n_overflows & (self._n_overflows - 1) == 0:  # the 1st, 2nd, 4th, 8th, ...
            log.warning(
                "%d of %d samples %s found no room in one rendering (%d times so far)%s",
                n_dropped,
                n_samples + n_dropped,
                self._what,
                self._n_overflows,
                "; the next ones have more" if self._fixed is None else "; raise sample_room",
            )
