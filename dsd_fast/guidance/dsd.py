"""Diverse Score Distillation: the gradient, and the guidance that a training loop calls.

One step (DSD_SPEC 3.3), for a rendering x in latent space at level t:
1. simulate the seed's own trajectory from 999 down to t_delta >= t, and take its noise
   prediction eps_o there;
2. put the rendering on that trajectory: x_delta = alpha x + sigma eps_o at t_delta, x_t at t;
3. gradient = (1 - abar_t) (eps(x_t; scale) - eps(x_delta; 1)).

A step has two parts. `DSDGuidance.plan`, the host's, draws levels, looks up where the trajectories
of its views are in the tables, and adds what they lack. `DSDGuidance.at_plan`, the device's, takes
latents and plan to the loss without a look at the host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsd_fast.diffusion.model import DiffusionModel
from dsd_fast.diffusion.noise_schedule import NUM_TRAIN_TIMESTEPS, noise_of_velocity
from dsd_fast.diffusion.text import PromptEmbeddings
from dsd_fast.guidance import fused
from dsd_fast.guidance.fused import WEIGHTINGS, Batch, Guide
from dsd_fast.guidance.plan import Plan, PlanKind
from dsd_fast.guidance.prompt import TextMix, expand_rows, text_mix, wrapped
from dsd_fast.guidance.schedule import ode_grid, random_timesteps, shifted_level, timestep
from dsd_fast.guidance.tables import TrajectoryTables
from dsd_fast.guidance.trajectory import Predictor, ViewBins, signal_and_noise, simulate
from dsd_fast.schedules import Schedule, ScheduleValue
from dsd_fast.upload import Pack, upload

METHODS = ("dsd", "recon", "sds")
TRAJECTORIES = ("exact", "cached")

# The rendering's own noise prediction is taken at this scale, the target's at guidance_scale.
_RENDERING_SCALE = 1.0


@dataclass
class GuidanceConfig:
    """Settings of Diverse Score Distillation; the defaults are the official values but for
    `trajectory`, of which the official one is "exact"."""

    # The formulation: "dsd"; with a multi-view model also "recon", MVDream's own loss, or "sds".
    method: Literal["dsd", "recon", "sds"] = "dsd"
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
    # "cached" keeps the trajectories of azimuth_bins azimuths and trains on views from those alone;
    # "exact" (official) simulates one at every step, for views from anywhere.
    trajectory: Literal["exact", "cached"] = "cached"
    # Bins of |azimuth| in [0, 180] degrees that share a cached trajectory, that of their centre.
    azimuth_bins: int = 48
    # Levels between the entries of a table of the cached trajectories' noise, which is interpolated
    # between them; 0 asks the UNet for it at every step.
    noise_table_step: int = 20
    # Views from azimuth < 0 follow the mirror image of the trajectory of those from azimuth > 0.
    # Officially both follow the same picture, so that a thing seen from the side faces the same way
    # from both sides and grows two backs; mirrored, they agree on a mirror-symmetric object.
    mirror_trajectory: bool = False
    # Weight of the gradient: "sds" is 1 - abar_t (official), "ddim" is sigma_t / alpha_t, the step
    # that the trajectory itself takes.
    weighting: Literal["sds", "ddim"] = "sds"
    # Draw the rendering's latents from the VAE's posterior; False takes its mean.
    sample_posterior: bool = True
    # Without Perp-Neg: the usual guidance convention instead of the official one (a scale higher).
    standard_cfg: bool = False
    # At scale 1 use the conditional prediction alone, without negatives or extrapolation.
    pure_conditional: bool = False

    def validate(self) -> None:
        """Raise ValueError for a value outside its choices."""
        for name, value, choices in (
            ("method", self.method, METHODS),
            ("trajectory", self.trajectory, TRAJECTORIES),
            ("weighting", self.weighting, WEIGHTINGS),
        ):
            if value not in choices:
                raise ValueError(
                    f"guidance.{name}: expected one of {', '.join(choices)}, got {value!r}"
                )
        if not 0 <= self.delta_min < NUM_TRAIN_TIMESTEPS:
            raise ValueError(f"guidance.delta_min: expected 0 to 999, got {self.delta_min}")
        if self.noise_table_step < 0:
            raise ValueError(
                f"guidance.noise_table_step: expected 0 or more, got {self.noise_table_step}"
            )

    @property
    def lattice(self) -> int | None:
        """Bins of |azimuth| on whose centres training cameras are to be, or None for anywhere.

        There a cached trajectory is that of the camera's own text; elsewhere it is the nearest
        centre's. Without Perp-Neg the text has four views, and nothing is to be gained.
        """
        on_lattice = self.trajectory == "cached" and self.use_perp_neg
        return self.azimuth_bins if on_lattice else None


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
    n_items = latents.shape[0]
    t, t_delta = levels_of("t", t, n_items), levels_of("t_delta", t_delta, n_items)
    abar = alphas_cumprod.cpu()
    t_device, t_delta_device = upload(t, latents.device), upload(t_delta, latents.device)

    def pair(x_delta: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor]:
        return (
            predict(x_delta, t_delta_device, _RENDERING_SCALE),
            predict(x_t, t_device, guidance_scale),
        )

    z = simulate(noise, t_delta, predict, abar, n_ddim_steps, guidance_scale)
    eps_o = predict(z, t_delta_device, guidance_scale)
    return _linked_gradient(latents, eps_o, t, t_delta, pair, abar, weighting)


class DSDGuidance:
    """Guidance of a training loop: an image in, a scalar loss with the DSD gradient out.

    The seed noise is the only state that must survive a resume (`state_dict`); cached
    trajectories follow from it and are rebuilt as needed.

    Args:
        cfg: settings.
        model: frozen diffusion model.
        prompts: embeddings of the four views.
        noise: seed noise [1,C,h,w] of `seed_noise`, the size of the model's latents; or [S,C,h,w]
            for as many seeds at once, item i of a batch of S then belonging to seed i.
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
        self._condition(prompts)
        self._grid = ode_grid(cfg.n_ddim_steps)
        self._abar = model.alphas_cumprod.to(model.device, torch.float32)
        self._done = torch.zeros((), dtype=torch.int32, device=model.device)
        self._n_seeds = noise.shape[0]
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
        noise = None
        if self.cfg.sample_posterior:
            noise = self.model.draw_posterior(len(rgb), generator)
        latents = self.encode(rgb, noise)
        return self.from_latents(latents, elevation_deg, azimuth_deg, step, generator)

    def encode(self, rgb: Tensor, noise: Tensor | None) -> Tensor:
        """Latents [B,C,h,w] of renderings [B,H,W,3] in [0,1], with gradient to them.

        `noise` is that of the posterior, see `DiffusionModel.draw_posterior`.
        """
        if rgb.ndim != 4 or rgb.shape[-1] != 3 or rgb.shape[0] == 0:
            raise ValueError(f"guidance: expected rgb [B,H,W,3] with B > 0, got {tuple(rgb.shape)}")
        image = _resize(rgb.permute(0, 3, 1, 2).float(), self.model.image_size)
        return self.model.encode_with_noise(image, noise)

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
        self._check_views(elevation_deg, azimuth_deg, latents.shape[0])
        return self.at_plan(latents, self.plan(elevation_deg, azimuth_deg, step, generator))

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

    def draw_noise(self, n_items: int, generator: torch.Generator) -> dict[str, Tensor]:
        """What a step draws beside its levels, by name: tensors [B,...] on the CPU."""
        return {}

    def at_levels(
        self,
        latents: Tensor,
        elevation_deg: Tensor,
        azimuth_deg: Tensor,
        t: Tensor,
        t_delta: Tensor,
    ) -> GuidanceOutput:
        """Loss for latents [B,C,h,w] of the model's size at given levels [B]; draws nothing."""
        self._check_views(elevation_deg, azimuth_deg, latents.shape[0])
        return self.at_plan(latents, self.plan_levels(elevation_deg, azimuth_deg, t, t_delta))

    def plan(
        self,
        elevation_deg: Tensor | float,
        azimuth_deg: Tensor | float,
        step: int,
        generator: torch.Generator,
    ) -> Plan:
        """The host's part of a step: levels drawn, trajectories found, and made where they lack.

        Args: as for a call; `generator` draws t where it is random, then t_delta.
        """
        elevation, azimuth = angles(elevation_deg, azimuth_deg)
        t, t_delta = self.levels(elevation.numel(), step, generator)
        chance = self.draw_noise(elevation.numel(), generator)
        return self.plan_levels(elevation, azimuth, t, t_delta, chance)

    @torch.no_grad()
    def plan_levels(
        self,
        elevation_deg: Tensor | float,
        azimuth_deg: Tensor | float,
        t: Tensor | int,
        t_delta: Tensor | int,
        chance: Mapping[str, Tensor] | None = None,
    ) -> Plan:
        """The same at given levels, one or [B], with what `draw_noise` drew; draws nothing."""
        elevation, azimuth = angles(elevation_deg, azimuth_deg)
        n_items = elevation.numel()
        if self._n_seeds not in (1, n_items):
            raise ValueError(
                f"guidance: expected a view for each of the {self._n_seeds} seeds, got {n_items}"
            )
        t, t_delta = levels_of("t", t, n_items), levels_of("t_delta", t_delta, n_items)
        shared = torch.equal(t, t_delta)
        views = self._rows_of(elevation, azimuth)
        tensors = {"t": t, "t_delta": t_delta, "mirrored": wrapped(azimuth) < 0}
        calls = [views] if shared else [views, views]
        if self.cfg.trajectory == "exact":
            noise = "simulated"
        else:
            noise = "tabulated" if self.cfg.noise_table_step else "predicted"
            bins = self._bins.index(elevation, azimuth)
            reaches = [
                self._tables.reach(i if self._n_seeds > 1 else 0, view, level, self._predict_bin)
                for i, (view, level) in enumerate(zip(bins, t_delta.tolist()))
            ]
            tensors["prediction"] = torch.tensor([reach.prediction for reach in reaches])
            if noise == "tabulated":
                tensors["below"] = torch.tensor([reach.below for reach in reaches])
                tensors["mix"] = torch.tensor([reach.mix for reach in reaches])
            else:
                tensors["state"] = torch.tensor([reach.state for reach in reaches])
                tensors["level"] = torch.tensor([reach.level for reach in reaches])
                # The bins' own text: eps_o continues the bins' trajectories.
                own = self._bin_text(bins)
                calls.insert(0, own)
                if own.weights is not None:
                    tensors["bin_weights"] = own.weights
        for name in _row_columns(views):
            tensors[name] = torch.cat([getattr(mix, name) for mix in calls])
        if views.weights is not None:
            tensors["weights"] = views.weights
        kind = PlanKind(n_items, noise, shared)
        return Plan(kind, t, t_delta, tensors, self.model.device)

    def at_plan(self, latents: Tensor, plan: Plan) -> GuidanceOutput:
        """The device's part of a step: the loss for latents [B,C,h,w] of the model's size.

        With cached trajectories it asks the host for nothing but `plan.kind`, so that a CUDA graph
        can hold it; `Plan.copy_` gives the graph another plan of that kind, and levels are then
        that plan's, not the output's. An exact trajectory takes as many UNet calls as t_delta asks
        for.
        """
        size = self.model.latent_size
        expected = (plan.kind.n_items, self._item_channels, size, size)
        if latents.shape != expected:
            raise ValueError(
                f"guidance: expected latents {list(expected)}, got {list(latents.shape)}"
            )
        x = latents.detach().float().contiguous()
        tensors, cfg = plan.tensors, self.cfg
        guide = self._guide(tensors["weights"] if cfg.use_perp_neg else None)
        with torch.no_grad():
            text = self._text(tensors)
            linked = self._link(x, plan, guide, text)
            eps = self._predict(linked, text[-len(linked.rows) :])
            scales = (_RENDERING_SCALE, cfg.guidance_scale)
            result = fused.gradient(
                eps, guide, scales, x, tensors["t"], self._abar, cfg.weighting, self._done
            )
        return GuidanceOutput(
            loss=distillation_loss(latents, result.grad, result.loss),
            grad_norm=result.grad_norm,
            t=plan.t,
            t_delta=plan.t_delta,
            latents=x,
            target=result.target,
            grad=result.grad,
            latents_noisy=linked.value,
            finite=result.finite,
        )

    @property
    def _item_channels(self) -> int:
        """Channels of what is one item to the trajectories: one view's latents."""
        return self.model.latent_channels

    @property
    def can_capture(self) -> bool:
        """Whether a CUDA graph can hold `at_plan`: its course does not depend on the levels."""
        return self.cfg.trajectory == "cached"

    def state_dict(self) -> dict[str, Tensor]:
        """The seed noise, on the CPU (Q12)."""
        return {"noise": self.noise.cpu()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over a seed noise; trajectories cached for another one are dropped."""
        model, cfg, noise = self.model, self.cfg, state["noise"]
        size = model.latent_size
        expected = (self._n_seeds, self._item_channels, size, size)
        if noise.shape != expected:
            raise ValueError(
                f"guidance: expected seed noise {list(expected)}, the size of the model's latents, "
                f"got {list(noise.shape)}"
            )
        self.noise = noise.to(model.device, torch.float32)
        if cfg.trajectory == "cached":
            percents = [knot[1] for knot in (*self.min_percent.knots, *self.max_percent.knots)]
            lowest = int(NUM_TRAIN_TIMESTEPS * min(percents))
            self._tables = TrajectoryTables(
                self.noise,
                self._abar,
                cfg.n_ddim_steps,
                len(self._bins),
                cfg.noise_table_step,
                min(max(lowest, 0), NUM_TRAIN_TIMESTEPS - 1),
                model.dtype,
                cfg.use_perp_neg,
            )

    def _link(self, x: Tensor, plan: Plan, guide: Guide, text: Tensor) -> Batch:
        """Renderings put on their trajectories: x at t_delta, and the UNet's batch of the pair."""
        tensors, cfg, kind = plan.tensors, self.cfg, plan.kind
        levels = (tensors["t"], tensors["t_delta"], self._abar, self.model.dtype)
        mirrored = tensors["mirrored"] if cfg.mirror_trajectory else None
        pair = not kind.shared
        if kind.noise == "tabulated":
            return fused.link_table(
                self._tables.predictions,
                tensors["prediction"],
                tensors["below"],
                tensors["mix"],
                x,
                *levels,
                cfg.use_perp_neg,
                mirrored,
                pair,
            )
        n_rows = guide.rows * kind.n_items
        own = guide
        if kind.noise == "predicted":
            at_z = fused.state(
                self._tables.states,
                self._tables.predictions,
                tensors["state"],
                tensors["prediction"],
                tensors["level"],
                tensors["t_delta"],
                self._abar,
                self.model.dtype,
                cfg.use_perp_neg,
            )
            own = self._guide(tensors["bin_weights"] if cfg.use_perp_neg else None)
        else:
            at_z = self._simulate(x, plan, guide, text[:n_rows])
        eps = self._predict(at_z, text[:n_rows])
        return fused.link(eps, own, cfg.guidance_scale, x, *levels, mirrored, pair)

    def _simulate(self, x: Tensor, plan: Plan, guide: Guide, text: Tensor) -> Batch:
        """z at t_delta from the seed noise, each step taken anew: `trajectory.simulate`."""
        z = _per_item(self.noise, x)
        rows = expand_rows(z, self.cfg.use_perp_neg).to(self.model.dtype)
        levels = torch.full((len(rows),), self._grid[0], device=x.device)
        at_z = Batch(z, rows, levels)
        for upper, lower in pairwise(self._grid):
            t, t_next = plan.t_delta.clamp_min(upper), plan.t_delta.clamp_min(lower)
            if torch.equal(t, t_next):
                break
            at_z = fused.step(
                self._predict(at_z, text),
                guide,
                self.cfg.guidance_scale,
                at_z.value,
                upload(t, x.device),
                upload(t_next, x.device),
                self._abar,
                self.model.dtype,
            )
        return at_z

    def _predict(self, batch: Batch, text: Tensor) -> Tensor:
        """The UNet's noise for a batch of rows, in its own dtype."""
        eps = self.model.engine(batch.rows, batch.levels, text)
        if self.model.prediction_type == "epsilon":
            return eps
        return noise_of_velocity(eps.float(), batch.rows.float(), self._abar[batch.levels])

    def _predict_bin(self, batch: Batch, view: int) -> Tensor:
        """Guided noise of one item on the trajectory of a bin, [1,C,h,w]."""
        device = self.model.device
        mix = self._bin_text([view])
        rows = {name: upload(getattr(mix, name), device) for name in _row_columns(mix)}
        eps = self._predict(batch, self._text(rows))
        weights = None if mix.weights is None else upload(mix.weights, device)
        return fused.combine(eps, self._guide(weights), self.cfg.guidance_scale)

    def _bin_text(self, bins: list[int]) -> TextMix:
        cameras = torch.tensor([self._bins.camera(view) for view in bins])  # [B,2]
        return self._rows_of(cameras[:, 0], cameras[:, 1])

    def _condition(self, prompts: PromptEmbeddings) -> None:
        """Take over what predictions are conditioned on: what rows are made of, and the bins."""
        # What text rows are mixed from.
        self._bank = torch.cat([prompts.text_vd, prompts.uncond_vd]).to(self.model.device)
        self._bins = ViewBins(self.cfg.azimuth_bins, self.cfg.use_perp_neg)

    def _rows_of(self, elevation_deg: Tensor, azimuth_deg: Tensor) -> TextMix:
        """What decides the text rows of cameras at these angles [B], on the CPU."""
        return text_mix(elevation_deg, azimuth_deg, self.cfg.use_perp_neg)

    def _text(self, rows: Mapping[str, Tensor] | Pack) -> Tensor:
        """Text rows [N,L,D] in the UNet's dtype, of the columns of `_rows_of` on the device."""
        return fused.text(
            self._bank, rows["first"], rows["second"], rows["share"], self.model.dtype
        )

    def _guide(self, weights: Tensor | None) -> Guide:
        return Guide(weights, self.cfg.standard_cfg, self.cfg.pure_conditional)

    def _check_views(
        self, elevation_deg: Tensor | float, azimuth_deg: Tensor | float, n_items: int
    ) -> None:
        elevation, azimuth = angles(elevation_deg, azimuth_deg)
        if not elevation.numel() == azimuth.numel() == n_items:
            raise ValueError(
                f"guidance: expected {n_items} elevations and azimuths, one an item, "
                f"got {elevation.numel()} and {azimuth.numel()}"
            )


def distillation_loss(latents: Tensor, grad: Tensor, value: Tensor | None = None) -> Tensor:
    """0.5 sum grad^2 / B (or `value`, if it is known) with grad / B for its gradient to latents.

    The quadratic 0.5 |x - sg(x - grad)|^2 would give grad only up to the rounding of
    x - (x - grad). latents, grad [B,...]; the result is 0-dim.
    """
    if value is None:
        value = 0.5 * grad.square().sum() / grad.shape[0]
    return _Loss.apply(latents, value, grad)


class _Loss(torch.autograd.Function):
    """See `distillation_loss`."""

    @staticmethod
    def forward(ctx, latents: Tensor, value: Tensor, grad: Tensor) -> Tensor:
        ctx.save_for_backward(grad)
        ctx.dtype = latents.dtype
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = ctx.saved_tensors
        n_items = grad.shape[0]
        share = upstream if n_items == 1 else upstream / n_items
        return (share * grad).to(ctx.dtype), None, None


def _linked_gradient(
    x: Tensor,
    eps_o: Tensor,
    t: Tensor,
    t_delta: Tensor,
    pair: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    alphas_cumprod: Tensor,
    weighting: str,
) -> Tensor:
    """Gradient for renderings linked to a trajectory by its noise eps_o.

    `pair(x_delta, x_t)` predicts the noise of both. Levels [B] and alphas_cumprod on the CPU.
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
    return weight * (eps_t - eps_delta)


def _row_columns(mix: TextMix) -> tuple[str, ...]:
    """The fields of a mix that have an entry a row."""
    return tuple(name for name in mix._fields if name != "weights")


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


def angles(elevation_deg: Tensor | float, azimuth_deg: Tensor | float) -> tuple[Tensor, Tensor]:
    """Angles as float32 [B] on the CPU."""
    elevation, azimuth = (
        torch.as_tensor(angle, dtype=torch.float32).reshape(-1).cpu()
        for angle in (elevation_deg, azimuth_deg)
    )
    return elevation, azimuth


def levels_of(name: str, value: Tensor | int, n_items: int) -> Tensor:
    """One level an item, int64 [B] on the CPU."""
    levels = torch.as_tensor(value).reshape(-1).cpu()
    if levels.is_floating_point() or levels.numel() not in (1, n_items):
        raise ValueError(
            f"{name}: expected one integer or {n_items} of them, "
            f"got {levels.dtype} {tuple(levels.shape)}"
        )
    if bool(((levels < 0) | (levels >= NUM_TRAIN_TIMESTEPS)).any()):
        raise ValueError(f"{name}: expected levels from 0 to 999, got {levels.tolist()}")
    return levels.long().expand(n_items)


def _resize(image: Tensor, size: int) -> Tensor:
    """Bilinear to size x size, without antialiasing, as the original does (Q28)."""
    if image.shape[-2:] == (size, size):
        return image
    return F.interpolate(image, (size, size), mode="bilinear", align_corners=False)
