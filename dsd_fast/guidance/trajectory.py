"""The noise trajectory of a seed: DDIM from t = 999 down to t_delta (mathematics.md 3.3).

A trajectory never sees the rendering. It depends on the seed noise, the prompt and the camera's
text rows only, and its state at a grid level does not depend on t_delta, which is what
`tables.TrajectoryTables` lives on.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from dsd_fast.diffusion.noise_path import NoisePath
from dsd_fast.guidance.levels import ode_grid
from dsd_fast.upload import upload

# predict(z [B,C,h,w], t int64 [B] on z's device, scale) -> guided noise prediction [B,C,h,w]
Predictor = Callable[[Tensor, Tensor, float], Tensor]


def seed_noise(generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    """The noise n ~ N(0, I) that makes a seed: float32 on the CPU, shape [1,C,h,w]."""
    return torch.randn(shape, generator=generator)


def simulate(
    noise: Tensor,
    t_delta: Tensor,
    predict: Predictor,
    path: NoisePath,
    n_ddim_steps: int,
    guidance_scale: float,
) -> Tensor:
    """z at level t_delta, item by item, from the seed noise taken as the state at 999.

    Items whose t_delta lies higher stop earlier: they stay in the batch, so that rows keep their
    text, and their value no longer changes.

    Args:
        noise: [B,C,h,w] float32.
        t_delta: int64 [B] on the CPU.
        path: of the model, on the device of the noise.
    Returns:
        [B,C,h,w] float32.
    """
    z = noise
    for level, lower in pairwise(ode_grid(n_ddim_steps)):
        t, t_next = t_delta.clamp_min(level), t_delta.clamp_min(lower)
        if torch.equal(t, t_next):
            break
        eps = predict(z, upload(t, z.device), guidance_scale)
        z = path.step(z, eps, t, t_next)
    return z
