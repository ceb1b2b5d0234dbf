"""How a scene's parameters are updated."""

from __future__ import annotations

from dataclasses import dataclass

from dsd_fast.ranges import Decay, Epsilon, NonNegative


@dataclass
class OptimizerConfig:
    # Learning rate of the field: hash grid and networks.
    geometry_lr: NonNegative = 0.01
    # Another one for the field's networks; None takes that of the field.
    network_lr: NonNegative | None = None
    # Learning rate of the background network.
    background_lr: NonNegative = 0.001
    # Adam's decay rates.
    betas: tuple[Decay, Decay] = (0.9, 0.99)
    # Adam's epsilon.
    eps: Epsilon = 1e-15
