"""Scalars that change over a run, in the notation of the official configuration files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeGuard

Number = int | float
# What a configuration may hold: a constant, or the numbers of a piecewise linear schedule. Integers
# stay integers (no float()): the type of an end step says whether it counts steps or epochs.
ScheduleValue = int | float | tuple[int | float, ...]


@dataclass(frozen=True)
class Schedule:
    """A piecewise linear function of the step.

    `knots` are (position, value) pairs; one knot is a constant. Positions are steps if the end
    position of a segment is an int, epochs if it is a float ("1000" and "1000." differ).
    """

    knots: tuple[tuple[Number, Number], ...]

    @classmethod
    def parse(cls, value: Schedule | ScheduleValue | Sequence[Number]) -> Schedule:
        """Read a number or a list.

        - number: constant
        - [v0, v1, s1]: from v0 at step 0 to v1 at s1
        - [s0, v0, v1, s1]: from v0 at s0 to v1 at s1, constant outside
        - [s0, v0, v1, s1, v2, s2, ...]: further segments

        Raises TypeError for anything that is not made of numbers, ValueError for a wrong length or
        for steps that do not grow.
        """
        if isinstance(value, Schedule):
            return value
        if _is_number(value):
            return cls(((0, value),))
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise TypeError(f"schedule: expected a number or a list of numbers, got {value!r}")
        numbers = list(value)
        if not all(_is_number(number) for number in numbers):
            raise TypeError(f"schedule: expected a list of numbers, got {numbers!r}")
        if len(numbers) == 3:
            numbers.insert(0, 0)
        if len(numbers) < 4 or len(numbers) % 2:
            raise ValueError(
                "schedule: expected [v0, v1, s1], [s0, v0, v1, s1] or "
                f"[s0, v0, v1, s1, v2, s2, ...], got {len(numbers)} numbers: {numbers}"
            )
        knots = [(numbers[0], numbers[1])]
        knots += [(numbers[i + 1], numbers[i]) for i in range(2, len(numbers), 2)]
        for (start, _), (end, _) in pairwise(knots):
            if not end > start:
                raise ValueError(
                    f"schedule: steps must grow, got {start} before {end} in {numbers}"
                )
        return cls(tuple(knots))

    def __call__(self, step: int, epoch: int = 0) -> float:
        """The value at a step (and an epoch, for the segments whose end is a float)."""
        if len(self.knots) == 1:
            return float(self.knots[0][1])
        # The segment is chosen by the step alone, whatever its end counts: official behaviour.
        segment = 0
        for index in range(1, len(self.knots) - 1):
            if step >= self.knots[index][0]:
                segment = index
        (start, from_value), (end, to_value) = self.knots[segment], self.knots[segment + 1]
        current = step if isinstance(end, int) else epoch
        fraction = min(max((current - start) / (end - start), 0.0), 1.0)
        return float(from_value + (to_value - from_value) * fraction)

    @property
    def maximum(self) -> float:
        """The largest value the schedule takes."""
        return float(max(value for _, value in self.knots))


def _is_number(value: object) -> TypeGuard[Number]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
