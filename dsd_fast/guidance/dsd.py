"""Diverse Score Distillation: the gradient, and the guidance that a training loop calls.

One step (DSD_SPEC 3.3), for a rendering x in latent space at level t:
1. simulate the seed's own trajectory from 999 down to t_delta >= t, and take its noise
   prediction eps_o there;
2. put the rendering on that trajectory: x_delta = alpha x + sigma eps_o at t_delta, x_t at t;
3. gradient = (1 - abar_t) (eps(x_t; scale) - eps(x_delta; 1)).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dsd_fast.diffusion.model import DiffusionModel
from dsd_fast.diffusion.noise_schedule import NUM_TRAIN_TIMESTEPS
from dsd_fast.diffusion.text import PromptEmbeddings
from dsd_fast.guidance.prompt import combine, expand_rows, view_embeddings, wrapped
from dsd_fast.guidance.schedule import random_timesteps, shifted_level, timestep
from dsd_fast.guidance.trajectory import (
    Predictor,
    TrajectoryCache,
    ViewBins,
    signal_and_noise,
    simulate,
)
from dsd_fast.schedules import Schedule, ScheduleValue
from dsd_fast.upload import upload

TRAJECTORIES = ("exact", "cached")
WEIGHTINGS = ("sds", "ddim")

# The rendering's own noise prediction is taken at this scale, the target's at guidance_scale.
_RENDERING_SCALE = 1.0


@dataclass
class GuidanceConfig:
    """Settings of Diverse Score Distillation; the defaults are the official values."""

    # Classifier-free guidance scale of the trajectory and of the target prediction.
    guidance_scale: float = 7.5
    # Perp-Neg: interpolate the view prompts by azimuth and push away from the other views.
    use_perp_neg: bool = True
    # Lowest noise level, as a share of 1000: a number or a schedule.
    min_step_percent: ScheduleValue = 0.32
    # Highest noise level, as a share of 1000: a number or a schedule.
    max_step_percent: ScheduleValue = 0.98
    # Let t fall from the highest to the lowest level over the run; otherwise t is random per view.
    t_anneal: bool = True
    # Anneal by the square root of the progress, fast at first.
    sqrt_anneal: bool = True
    # Lower bound of t_delta.
    delta_min: int = 1
    # Intervals of the full trajectory from 999 to 0.
    n_ddim_steps: int = 10
    # "exact" simulates the trajectory at every step; "cached" keeps it per azimuth bin.
    trajectory: Literal["exact", "cached"] = "exact"
    # Bins of |azimuth| in [0, 180] degrees that share a cached trajectory.
    azimuth_bins: int = 24
    # Views from azimuth < 0 follow the mirror image of the trajectory of those from azimuth > 0.
    # Officially both follow the same picture, so that a thing seen from the side faces the same way
    # from both sides and grows two backs; mirrored, they agree on a mirror-symmetric object.
    mirror_trajectory: bool = False
    # Weight of the gradient: "sds" is 1 - abar_t (official), "ddim" is sigma_t / alpha_t, the step
    # that the trajectory itself takes.
    weighting: Literal["sds", "ddim"] = "sds"
    # Without Perp-Neg: the usual guidance convention instead of the official one (a scale higher).
    standard_cfg: bool = False
    # At scale 1 use the conditional prediction alone, without negatives or extrapolation.
    pure_conditional: bool = False

    def validate(self) -> None:
        """Raise ValueError for a value outside its choices."""
        for name, value, choices in (
            ("trajectory", self.trajectory, TRAJECTORIES),
            ("weighting", self.weighting, WEIGHTINGS),
        ):
            if value not in choices:
                raise ValueError(
                    f"guidance.{name}: expected one of {', '.join(choices)}, got {value!r}"
                )
        if not 0 <= self.delta_min < NUM_TRAIN_TIMESTEPS:
            raise ValueError(f"guidance.delta_min: expected 0 to 999, got {self.delta_min}")


class GuidanceOutput(NamedTuple):
    """Result of one guidance call for B views; everything but `loss` is detached."""

    # 0.5 sum (x - target)^2 / B; its gradient with respect to the latents is exactly grad / B.
    loss: Tensor
    # Norm of `grad` over all elements, 0-dim.
    grad_norm: Tensor
    # Levels, int64 [B] on the CPU.
    t: Tensor
    t_delta: Tensor
    # x, target = x - grad, grad, and x at level t_delta: [B,C,h,w] float32.
    latents: Tensor
    target: Tensor
    grad: Tensor
    latents_noisy: Tensor
    # 0-dim bool on the device: whether grad is free of NaN and infinity. Not read here, so that a
    # step need not wait for the device; a loop that finds it false skips the step.
    finite: Tensor


@torch.no_grad()
def dsd_gradient(
    latents: Tensor,
    *,
    noise: Tensor,
    t: Tensor | int,
    t_delta: Tensor | int,
    predict: Predictor,
    alphas_cumprod: Tensor,
    n_ddim_steps: int = 10,
    guidance_scale: float = 7.5,
    weighting: str = "sds",
) -> Tensor:
    """The gradient of Diverse Score Distillation with respect to latents, without a model.

    Args:
        latents: renderings x, [B,C,h,w] float32.
        noise: seed noise, [1,C,h,w] shared by the items, or [B,C,h,w].
        t, t_delta: levels 0 to 999, one number or [B].
        predict: `predict(z [B,C,h,w], t int64 [B], scale) -> [B,C,h,w]`, noise prediction with
            guidance applied; row i of every call belongs to item i.
        alphas_cumprod: [1000].
        n_ddim_steps: intervals of the full trajectory.
        guidance_scale: scale of the trajectory and of the target prediction.
        weighting: "sds" (official) or "ddim".
    Returns:
        (1 - abar_t) (eps_t - eps_delta), [B,C,h,w].
    Raises:
        ValueError: shapes or levels that do not fit.

    Example:
        >>> abar = torch.linspace(0.999, 0.005, 1000)
        >>> x, n = torch.zeros(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
        >>> grad = dsd_gradient(x, noise=n, t=500, t_delta=520,
        ...                     predict=lambda z, t, scale: scale * z, alphas_cumprod=abar)
    """
    noise = _per_item(noise, latents)
    t, t_delta = _levels("t", t, latents), _levels("t_delta", t_delta, latents)
    t_device, t_delta_device = upload(t, latents.device), upload(t_delta, latents.device)

    def pair(x_delta: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor]:
        return (
            predict(x_delta, t_delta_device, _RENDERING_SCALE),
            predict(x_t, t_device, guidance_scale),
        )

    z = simulate(noise, t_delta, predict, alphas_cumprod, n_ddim_steps, guidance_scale)
    eps_o = predict(z, t_delta_device, guidance_scale)
    grad, _ = _linked_gradient(latents, eps_o, t, t_delta, pair, alphas_cumprod, weighting)
    return grad


class DSDGuidance:
    """Guidance of a training loop: an image in, a scalar loss with the DSD gradient out.

    The seed noise is the only state that must survive a resume (`state_dict`); cached
    trajectories follow from it and are rebuilt as needed.

    Args:
        cfg: settings.
        model: frozen diffusion model.
        prompts: embeddings of the four views.
        noise: seed noise [1,C,h,w] of `seed_noise`, the size of the model's latents.
        max_steps: horizon of the annealing, the length of the run (Q25).
    """

    def __init__(
        self,
        cfg: GuidanceConfig,
        model: DiffusionModel,
        prompts: PromptEmbeddings,
        noise: Tensor,
        max_steps: int,
    ):
        cfg.validate()
        self.cfg = cfg
        self.model = model
        self.max_steps = max_steps
        self.min_percent = Schedule.parse(cfg.min_step_percent)
        self.max_percent = Schedule.parse(cfg.max_step_percent)
        self._text = prompts.text_vd.to(model.device)
        self._uncond = prompts.uncond_vd.to(model.device)
        self._bins = ViewBins(cfg.azimuth_bins, cfg.use_perp_neg)
        self.load_state_dict({"noise": noise})

    def __call__(
        self,
        rgb: Tensor,
        elevation_deg: Tensor,
        azimuth_deg: Tensor,
        step: int,
        generator: torch.Generator,
    ) -> GuidanceOutput:
        """Encode renderings and compute the loss.

        Args:
            rgb: [B,H,W,3] float32 in [0,1], any size, on the model's device.
            elevation_deg, azimuth_deg: [B] nominal camera angles; on the CPU they cost no
                synchronisation.
            step: optimizer steps completed.
            generator: CPU generator of the posterior noise and of t_delta.
        """
        latents = self.encode(rgb, generator)
        return self.from_latents(latents, elevation_deg, azimuth_deg, step, generator)

    def encode(self, rgb: Tensor, generator: torch.Generator) -> Tensor:
        """Latents [B,C,h,w] of renderings [B,H,W,3] in [0,1], with gradient to them."""
        if rgb.ndim != 4 or rgb.shape[-1] != 3 or rgb.shape[0] == 0:
            raise ValueError(f"guidance: expected rgb [B,H,W,3] with B > 0, got {tuple(rgb.shape)}")
        image = _resize(rgb.permute(0, 3, 1, 2).float(), self.model.image_size)
        return self.model.encode_images(image, generator)

    def from_latents(
        self,
        latents: Tensor,
        elevation_deg: Tensor,
        azimuth_deg: Tensor,
        step: int,
        generator: torch.Generator,
    ) -> GuidanceOutput:
        """The same for latents [B,C,h,w] of any size: a 2D image optimised in latent space."""
        if latents.ndim != 4 or latents.shape[1] != self.model.latent_channels:
            raise ValueError(
                f"guidance: expected latents [B,{self.model.latent_channels},h,w], "
                f"got {tuple(latents.shape)}"
            )
        latents = _resize(latents.float(), self.model.latent_size)
        t, t_delta = self.levels(latents.shape[0], step, generator)
        return self.at_levels(latents, elevation_deg, azimuth_deg, t, t_delta)

    def levels(self, n_items: int, step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """t and t_delta of a step, int64 [B] on the CPU."""
        low, high = self.min_percent(step), self.max_percent(step)
        if self.cfg.t_anneal:
            level = timestep(step, self.max_steps, low, high, self.cfg.sqrt_anneal)
            t = torch.full((n_items,), level)
        else:
            t = random_timesteps(n_items, low, high, generator)
        u = torch.rand(n_items, generator=generator)
        return t, shifted_level(t, u, low, self.cfg.delta_min)

    def at_levels(
        self,
        latents: Tensor,
        elevation_deg: Tensor,
        azimuth_deg: Tensor,
        t: Tensor,
        t_delta: Tensor,
    ) -> GuidanceOutput:
        """Loss for latents [B,C,h,w] of the model's size at given levels [B]; draws nothing."""
        n_items = latents.shape[0]
        t, t_delta = _levels("t", t, latents), _levels("t_delta", t_delta, latents)
        elevation = torch.as_tensor(elevation_deg, dtype=torch.float32).reshape(-1).cpu()
        azimuth = torch.as_tensor(azimuth_deg, dtype=torch.float32).reshape(-1).cpu()
        if not elevation.numel() == azimuth.numel() == n_items:
            raise ValueError(
                f"guidance: expected {n_items} elevations and azimuths, one an item, "
                f"got {elevation.numel()} and {azimuth.numel()}"
            )
        x = latents.detach()
        with torch.no_grad():
            predict = self._predictor(elevation, azimuth)
            eps_o = self._trajectory_noise(x, elevation, azimuth, t_delta, predict)
            if self.cfg.mirror_trajectory:
                negative = upload(wrapped(azimuth) < 0, x.device).view(-1, 1, 1, 1)
                eps_o = torch.where(negative, eps_o.flip(-1), eps_o)
            grad, x_delta = _linked_gradient(
                x,
                eps_o,
                t,
                t_delta,
                lambda x_delta, x_t: predict.pair(x_delta, t_delta, x_t, t),
                self.model.alphas_cumprod,
                self.cfg.weighting,
            )
            value = 0.5 * grad.square().sum() / n_items
        # The quadratic 0.5 |x - sg(x - grad)|^2 would give grad only up to the rounding of
        # x - (x - grad); this has its value, and grad / B as its gradient.
        linear = (latents * grad).sum() / n_items
        return GuidanceOutput(
            loss=value + (linear - linear.detach()),
            grad_norm=grad.norm(),
            t=t,
            t_delta=t_delta,
            latents=x,
            target=x - grad,
            grad=grad,
            latents_noisy=x_delta,
            finite=grad.isfinite().all(),
        )

    def state_dict(self) -> dict[str, Tensor]:
        """The seed noise, on the CPU (Q12)."""
        return {"noise": self.noise.cpu()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over a seed noise; trajectories cached for another one are dropped."""
        model, noise = self.model, state["noise"]
        expected = (1, model.latent_channels, model.latent_size, model.latent_size)
        if noise.shape != expected:
            raise ValueError(
                f"guidance: expected seed noise {list(expected)}, the size of the model's latents, "
                f"got {list(noise.shape)}"
            )
        self.noise = noise.to(model.device, torch.float32)
        self._cache = TrajectoryCache(
            self.noise, model.alphas_cumprod, self.cfg.n_ddim_steps, self.cfg.guidance_scale
        )

    def _predictor(self, elevation: Tensor, azimuth: Tensor) -> _GuidedUNet:
        rows, weights = view_embeddings(
            self._text, self._uncond, elevation, azimuth, self.cfg.use_perp_neg
        )
        return _GuidedUNet(self.cfg, self.model, rows, weights)

    def _trajectory_noise(
        self,
        x: Tensor,
        elevation: Tensor,
        azimuth: Tensor,
        t_delta: Tensor,
        predict: _GuidedUNet,
    ) -> Tensor:
        """eps_o: the trajectory's own noise prediction at t_delta, [B,C,h,w]."""
        noise = _per_item(self.noise, x)
        if self.cfg.trajectory == "exact":
            z = simulate(
                noise,
                t_delta,
                predict,
                self.model.alphas_cumprod,
                self.cfg.n_ddim_steps,
                self.cfg.guidance_scale,
            )
            return predict(z, upload(t_delta, x.device), self.cfg.guidance_scale)
        bins = self._bins.index(elevation, azimuth)
        cameras = torch.tensor([self._bins.camera(index) for index in bins])  # [B,2]
        states = []
        for i, (index, level) in enumerate(zip(bins, t_delta.tolist())):
            # Bound to this item now: text rows are only built if the cache lacks a level.
            camera = cameras[i : i + 1]

            def of_bin(z: Tensor, t: Tensor, scale: float, camera: Tensor = camera) -> Tensor:
                return self._predictor(camera[:, 0], camera[:, 1])(z, t, scale)

            states.append(self._cache.state(index, level, of_bin))
        # The bin's own text rows again: eps_o continues the bin's trajectory.
        predict_bins = self._predictor(cameras[:, 0], cameras[:, 1])
        return predict_bins(torch.cat(states), upload(t_delta, x.device), self.cfg.guidance_scale)


class _GuidedUNet:
    """Noise prediction with guidance for the text rows of one batch of cameras."""

    def __init__(
        self, cfg: GuidanceConfig, model: DiffusionModel, rows: Tensor, weights: Tensor | None
    ):
        self.cfg = cfg
        self.model = model
        self.rows = rows
        self.weights = weights

    def __call__(self, z: Tensor, t: Tensor, scale: float) -> Tensor:
        eps = self.model.predict_noise(self._expand(z), self._expand(t), self.rows)
        return self._combine(eps, scale)

    def pair(
        self, x_delta: Tensor, t_delta: Tensor, x_t: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor]:
        """eps_delta at scale 1 and eps_t at the guidance scale, in one batch; t [B] on the CPU.

        At equal levels both have the same inputs, and one batch of half the rows serves both (Q8).
        """
        if torch.equal(t, t_delta):
            levels = self._expand(upload(t, x_t.device))
            eps_delta = eps_t = self.model.predict_noise(self._expand(x_t), levels, self.rows)
        else:
            latents = torch.cat([self._expand(x_delta), self._expand(x_t)])
            levels = upload(torch.cat([self._expand(t_delta), self._expand(t)]), x_t.device)
            eps = self.model.predict_noise(latents, levels, torch.cat([self.rows, self.rows]))
            eps_delta, eps_t = eps.chunk(2)
        return (
            self._combine(eps_delta, _RENDERING_SCALE),
            self._combine(eps_t, self.cfg.guidance_scale),
        )

    def _expand(self, items: Tensor) -> Tensor:
        return expand_rows(items, self.weights is not None)

    def _combine(self, eps: Tensor, scale: float) -> Tensor:
        return combine(
            eps,
            self.weights,
            scale,
            standard_cfg=self.cfg.standard_cfg,
            pure_conditional=self.cfg.pure_conditional,
        )


def _linked_gradient(
    x: Tensor,
    eps_o: Tensor,
    t: Tensor,
    t_delta: Tensor,
    pair: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    alphas_cumprod: Tensor,
    weighting: str,
) -> tuple[Tensor, Tensor]:
    """Gradient, and x at t_delta, for renderings linked to a trajectory by its noise eps_o.

    `pair(x_delta, x_t)` predicts the noise of both. Levels [B] on the CPU.
    """
    alpha_delta, sigma_delta = signal_and_noise(alphas_cumprod, t_delta, x)
    alpha, sigma = signal_and_noise(alphas_cumprod, t, x)
    x_delta = alpha_delta * x + sigma_delta * eps_o
    x_t = alpha * x + sigma * eps_o
    eps_delta, eps_t = pair(x_delta, x_t)
    if weighting == "sds":
        weight = sigma.square()
    elif weighting == "ddim":
        weight = sigma / alpha
    else:
        raise ValueError(f"weighting: expected one of {', '.join(WEIGHTINGS)}, got {weighting!r}")
    return weight * (eps_t - eps_delta), x_delta


def _per_item(noise: Tensor, latents: Tensor) -> Tensor:
    if (
        noise.ndim != 4
        or noise.shape[0] not in (1, latents.shape[0])
        or (noise.shape[1:] != latents.shape[1:])
    ):
        raise ValueError(
            f"expected seed noise {[1, *latents.shape[1:]]} for latents {list(latents.shape)}, "
            f"got {list(noise.shape)}"
        )
    return noise.to(latents.device).expand_as(latents)


def _levels(name: str, value: Tensor | int, latents: Tensor) -> Tensor:
    """One level an item, int64 [B] on the CPU."""
    levels = torch.as_tensor(value).reshape(-1).cpu()
    if levels.is_floating_point() or levels.numel() not in (1, latents.shape[0]):
        raise ValueError(
            f"{name}: expected one integer or {latents.shape[0]} of them, "
            f"got {levels.dtype} {tuple(levels.shape)}"
        )
    if bool(((levels < 0) | (levels >= NUM_TRAIN_TIMESTEPS)).any()):
        raise ValueError(f"{name}: expected levels from 0 to 999, got {levels.tolist()}")
    return levels.long().expand(latents.shape[0])


def _resize(image: Tensor, size: int) -> Tensor:
    """Bilinear to size x size, without antialiasing, as the original does (Q28)."""
    if image.shape[-2:] == (size, size):
        return image
    return F.interpolate(image, (size, size), mode="bilinear", align_corners=False)
