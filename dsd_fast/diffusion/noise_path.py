"""The noise levels a diffusion model was trained on, from its scheduler configuration.

Only the cumulative products are needed: every sampler here is written in terms of
alpha_t = sqrt(abar_t) and sigma_t = sqrt(1 - abar_t).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

NUM_TRAIN_TIMESTEPS = 1000
PREDICTION_TYPES = ("epsilon", "v_prediction")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")

# squaredcos_cap_v2 caps each beta here, so that abar never reaches zero.
_MAX_COSINE_BETA = 0.999


def alphas_cumprod(config: Mapping[str, Any]) -> Tensor:
    """Cumulative products abar_t of (1 - beta_t) of a diffusers scheduler configuration.

    Args:
        config: the content of `scheduler_config.json`; absent keys take the diffusers defaults.
    Returns:
        [1000] float32 on the CPU, computed in float64.
    Raises:
        ValueError: number of timesteps other than 1000, unknown schedule, or zero terminal SNR.
    """
    n_steps = int(config.get("num_train_timesteps", NUM_TRAIN_TIMESTEPS))
    if n_steps != NUM_TRAIN_TIMESTEPS:
        raise ValueError(
            f"scheduler: num_train_timesteps must be {NUM_TRAIN_TIMESTEPS}, got {n_steps}"
        )
    if config.get("rescale_betas_zero_snr"):
        raise ValueError(
            "scheduler: rescale_betas_zero_snr is set, so the first level of the trajectory has "
            "no signal and its clean image is undefined; use a model trained without it"
        )
    product = torch.cumprod(1.0 - _betas(config), dim=0)
    if not bool(((product > 0) & (product < 1)).all()):
        raise ValueError("scheduler: every beta must lie in (0, 1)")
    return product.float()


def prediction_type(config: Mapping[str, Any]) -> str:
    """What the UNet predicts: "epsilon" or "v_prediction"; anything else is a ValueError."""
    kind = config.get("prediction_type", "epsilon")
    if kind not in PREDICTION_TYPES:
        raise ValueError(
            f"scheduler: prediction_type {kind!r} is not supported, "
            f"expected one of {', '.join(PREDICTION_TYPES)}"
        )
    return kind


def noise_of_velocity(velocity: Tensor, noisy: Tensor, abar: Tensor) -> Tensor:
    """The noise that a v-prediction implies (Salimans and Ho 2022).

    With z = alpha x0 + sigma eps and v = alpha eps - sigma x0, eps = alpha v + sigma z.

    Args:
        velocity, noisy: v and z, [R,C,h,w].
        abar: alpha squared of each row's level, [R].
    """
    abar = abar.view(-1, 1, 1, 1)
    return abar.sqrt() * velocity + (1 - abar).sqrt() * noisy


def _betas(config: Mapping[str, Any]) -> Tensor:
    trained = config.get("trained_betas")
    if trained is not None:
        betas = torch.tensor(trained, dtype=torch.float64)
        if betas.shape != (NUM_TRAIN_TIMESTEPS,):
            raise ValueError(
                f"scheduler: trained_betas must hold {NUM_TRAIN_TIMESTEPS} numbers, "
                f"got shape {tuple(betas.shape)}"
            )
        return betas
    schedule = config.get("beta_schedule", "linear")
    start = float(config.get("beta_start", 0.0001))
    end = float(config.get("beta_end", 0.02))
    if schedule == "linear":
        return torch.linspace(start, end, NUM_TRAIN_TIMESTEPS, dtype=torch.float64)
    if schedule == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, NUM_TRAIN_TIMESTEPS, dtype=torch.float64) ** 2
    if schedule == "squaredcos_cap_v2":
        # Nichol and Dhariwal 2021: abar(u) = cos^2((u + 0.008) / 1.008 * pi / 2).
        u = torch.linspace(0, 1, NUM_TRAIN_TIMESTEPS + 1, dtype=torch.float64)
        abar = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - abar[1:] / abar[:-1]).clamp(max=_MAX_COSINE_BETA)
    raise ValueError(
        f"scheduler: beta_schedule {schedule!r} is not supported, "
        f"expected one of {', '.join(BETA_SCHEDULES)} or trained_betas"
    )
