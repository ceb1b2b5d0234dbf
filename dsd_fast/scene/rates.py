"""How a scene's parameters are updated."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class OptimizerConfig:
    # Learning rate of the field: hash grid and networks.
    geometry_lr: float = 0.01
    # Another one for the field's networks; None takes that of the field.
    network_lr: float | None = None
    # Learning rate of the background network.
    background_lr: float = 0.001
    # Adam's decay rates.
    betas: tuple[float, float] = (0.9, 0.99)
    # Adam's epsilon.
    eps: float = 1e-15
