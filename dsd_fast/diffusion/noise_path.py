"""Where picture and noise meet: the levels of a model, and what its network predicts there.

z_t = alpha_t x + sigma_t eps. A `NoisePath` holds alpha and sigma as a pair of tables and is the
one place that converts between what a network predicts and the noise; all else is written in terms
of it. For diffusion models alpha^2 + sigma^2 = 1; for rectified flows alpha = 1 - sigma.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dsd_fast.upload import upload

NUM_TRAIN_TIMESTEPS = 1000
PREDICTION_TYPES = ("epsilon", "v_prediction", "flow")
WEIGHTINGS = ("sds", "ddim")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")

# squaredcos_cap_v2 caps each beta here, so that abar never reaches zero.
_MAX_COSINE_BETA = 0.999


@dataclass(frozen=True)
class NoisePath:
    """alpha and sigma over the levels, and the kind of prediction that a network makes there.

    Levels t are int64 [B], 0 to len(path) - 1, on any device; z, x and eps are [B,C,h,w] on that of
    the path. Nothing here waits for the device, and all of it can be differentiated.

    Attributes:
        alpha, sigma: [levels], float32 unless made otherwise, on one device.
        prediction: "epsilon"; "v_prediction", alpha eps - sigma x (Salimans and Ho 2022); or
            "flow", eps - x, the velocity of a rectified flow (Liu et al. 2022).
    """

    alpha: Tensor
    sigma: Tensor
    prediction: str = "epsilon"

    def __post_init__(self) -> None:
        if self.alpha.ndim != 1 or self.alpha.shape != self.sigma.shape:
            raise ValueError(
                "noise path: expected alpha and sigma of one shape [levels], got "
                f"{list(self.alpha.shape)} and {list(self.sigma.shape)}"
            )
        if self.prediction not in PREDICTION_TYPES:
            raise ValueError(
                f"scheduler: prediction_type {self.prediction!r} is not supported, "
                f"expected one of {', '.join(PREDICTION_TYPES)}"
            )

    @classmethod
    def diffusion(cls, alphas_cumprod: Tensor, prediction: str = "epsilon") -> NoisePath:
        """That of a diffusion model, from the products abar_t = alpha_t^2: [levels]."""
        return cls(alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt(), prediction)

    @classmethod
    def of_scheduler(cls, config: Mapping[str, Any]) -> NoisePath:
        """That of a diffusers scheduler configuration: float32 on the CPU.

        Args:
            config: the content of `scheduler_config.json`; absent keys take the diffusers defaults.
        Raises:
            ValueError: number of levels other than 1000, unknown schedule, zero terminal SNR, or a
                prediction that a diffusion model does not make.
        """
        kind = config.get("prediction_type", "epsilon")
        if kind == "flow":
            raise ValueError("scheduler: a flow has no betas, which this scheduler describes")
        return cls.diffusion(alphas_cumprod(config), kind)

    def __len__(self) -> int:
        return len(self.alpha)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> NoisePath:
        """The same on a device."""
        alpha, sigma = (table.to(device, dtype) for table in (self.alpha, self.sigma))
        return replace(self, alpha=alpha, sigma=sigma)

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma of levels, [B,1,1,1] on the path's device."""
        t = upload(t, self.alpha.device)
        return self.alpha[t].view(-1, 1, 1, 1), self.sigma[t].view(-1, 1, 1, 1)

    def noisy(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """z = alpha x + sigma eps."""
        alpha, sigma = self.at(t)
        return alpha * x + sigma * eps

    def clean(self, z: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x = (z - sigma eps) / alpha."""
        alpha, sigma = self.at(t)
        return (z - sigma * eps) / alpha

    def noise(self, prediction: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """eps that a network's prediction for z stands for; a prediction of noise as it is."""
        if self.prediction == "epsilon":
            return prediction
        alpha, sigma = self.at(t)
        if self.prediction == "v_prediction":
            return alpha * prediction + sigma * z
        return (alpha * prediction + z) / (alpha + sigma)

    def target(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the network is to predict for z = alpha x + sigma eps."""
        if self.prediction == "epsilon":
            return eps
        alpha, sigma = self.at(t)
        return alpha * eps - sigma * x if self.prediction == "v_prediction" else eps - x

    def step(self, z: Tensor, eps: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        """z at t moved along eps to t_next: DDIM with eta = 0 (Song et al. 2021); of a flow Euler's
        step. Where both levels are one, z itself, which that formula gives only up to rounding."""
        moved = self.noisy(self.clean(z, eps, t), eps, t_next)
        stays = upload(t == t_next, z.device).view(-1, 1, 1, 1)
        return torch.where(stays, z, moved)

    def weight(self, t: Tensor, weighting: str) -> Tensor:
        """Weight [B,1,1,1] of a difference of noises: "sds" sigma^2, "ddim" sigma / alpha."""
        alpha, sigma = self.at(t)
        return sigma / alpha if weighting == "ddim" else sigma.square()


def alphas_cumprod(config: Mapping[str, Any]) -> Tensor:
    """Cumulative products abar_t of 1 - beta_t of a diffusers scheduler configuration.

    [1000] float32 on the CPU, computed in float64. Errors: `NoisePath.of_scheduler`.
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
