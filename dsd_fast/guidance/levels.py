"""Which noise levels a step uses: t, t_delta and the ODE grid (mathematics.md 3.1 to 3.3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsd_fast.diffusion.noise_path import NUM_TRAIN_TIMESTEPS

LAST_LEVEL = NUM_TRAIN_TIMESTEPS - 1

# t_delta exceeds t by up to this share of (t - min): "t-plus" of asynchronous score distillation.
_T_PLUS_RATIO = 0.1


def timestep(
    step: int, max_steps: int, min_percent: float, max_percent: float, sqrt: bool = True
) -> int:
    """The annealed level t = int(1000 ((max - min)(1 - rho) + min)), rho = sqrt(step/max_steps).

    Args:
        step: optimizer steps completed; beyond max_steps the last level stays (deviations.md Q25).
        sqrt: anneal by the square root, fast at first; otherwise linearly.
    """
    if max_steps <= 0 or step < 0:
        raise ValueError(f"timestep: expected step >= 0 < max_steps, got {step} and {max_steps}")
    rho = min(step / max_steps, 1.0)
    if sqrt:
        rho = math.sqrt(rho)
    t = int(NUM_TRAIN_TIMESTEPS * ((max_percent - min_percent) * (1 - rho) + min_percent))
    return min(max(t, 0), LAST_LEVEL)


def random_timesteps(
    n_items: int, min_percent: float, max_percent: float, generator: torch.Generator
) -> Tensor:
    """Uniform levels between both ends (included), one an item: int64 [B] on the CPU."""
    low, high = (int(NUM_TRAIN_TIMESTEPS * share) for share in (min_percent, max_percent))
    if not 0 <= low <= high <= NUM_TRAIN_TIMESTEPS:
        raise ValueError(
            "expected 0 <= min_step_percent <= max_step_percent <= 1, "
            f"got {min_percent} and {max_percent}"
        )
    return torch.randint(low, high + 1, (n_items,), generator=generator).clamp(max=LAST_LEVEL)


def shifted_level(t: Tensor, u: Tensor, min_percent: float, delta_min: int = 1) -> Tensor:
    """t_delta = clamp(t + floor(u h), delta_min, 999) with h = min(0.1 (t - min), 999 - t) >= 0.

    Args:
        t: int64 [B].
        u: uniform draws in [0,1), [B].
    Returns:
        int64 [B].
    """
    low = int(NUM_TRAIN_TIMESTEPS * min_percent)
    room = (_T_PLUS_RATIO * (t - low).double()).clamp_min(0).minimum((LAST_LEVEL - t).double())
    return (t + (u.double() * room).floor().long()).clamp(delta_min, LAST_LEVEL)


def ode_grid(n_steps: int, first: int = LAST_LEVEL) -> tuple[int, ...]:
    """n_steps + 1 levels of the ODE path from `first` to 0, descending (deviations.md Q5)."""
    if n_steps < 1:
        raise ValueError(f"n_ddim_steps must be at least 1, got {n_steps}")
    return tuple(first * (n_steps - i) // n_steps for i in range(n_steps + 1))


def n_nodes(t_delta: int, grid: tuple[int, ...]) -> int:
    """How many grid levels lie above t_delta: the UNet calls of one simulated trajectory."""
    return sum(level > t_delta for level in grid)
