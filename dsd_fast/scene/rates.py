"""How a scene's parameters are updated."""

from __future__ import annotations

from dataclasses import dataclass

from dsd_fast.ranges import Decay, Epsilon, NonNegative, ShareOverRun
from dsd_fast.schedules import Schedule


@dataclass
class OptimizerConfig:
    # Learning rate of the field: hash grid and networks.
    geometry_lr: NonNegative = 0.01
    # Another one for the field's networks; None takes that of the field.
    network_lr: NonNegative | None = None
    # Learning rate of the background network.
    background_lr: NonNegative = 0.001
    # Share of these rates that a step takes: a number or a schedule [s0, v0, v1, s1, ...]. What
    # falls towards the end leaves less of single steps' noise in the object.
    lr_share: ShareOverRun = 1.0
    # Adam's decay rates.
    betas: tuple[Decay, Decay] = (0.9, 0.99)
    # Adam's epsilon.
    eps: Epsilon = 1e-15

    def share(self, step: int) -> float | None:
        """The share of the rates at a step; None where it is always all of them."""
        return None if self.lr_share == 1 else Schedule.parse(self.lr_share)(step)
