"""Diverse Score Distillation: the gradient, and the guidance that a training loop calls.

One step (DSD_SPEC 3.3), for a rendering x in latent space at level t:
1. simulate the seed's own trajectory from 999 down to t_delta >= t, and take its noise
   prediction eps_o there;
2. put the rendering on that trajectory: x_delta = alpha x + sigma eps_o at t_delta, x_t at t;
3. gradient = (1 - abar_t) (eps(x_t; scale) - eps(x_delta; 1)). Of what is subtracted a share may be
   the trajectory's own noise: (1 - share) eps(x_delta; 1) + share eps_o (`trajectory_share`), and
   the trajectory may have a scale of its own (`trajectory_scale`).

A step has two parts. `DSDGuidance.plan`, the host's, draws levels, looks up where the trajectories
of its views are in the tables, and adds what they lack. `DSDGuidance.at_plan`, the device's, takes
latents and plan to the loss without a look at the host.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from dsd_fast.diffusion.model import DiffusionModel
from dsd_fast.diffusion.noise_path import NUM_TRAIN_TIMESTEPS
from dsd_fast.diffusion.text import PromptEmbeddings
from dsd_fast.guidance import passes
from dsd_fast.guidance.base import (
    Guidance,
    GuidanceConfig,
    GuidanceOutput,
    angles,
    distillation_loss,
    levels_of,
    row_columns,
)
from dsd_fast.guidance.conditions.text import TextMix, expand_rows, wrapped
from dsd_fast.guidance.levels import ode_grid
from dsd_fast.guidance.passes import WEIGHTINGS, Batch, Guide
from dsd_fast.guidance.plan import Plan, PlanKind
from dsd_fast.guidance.tables import TrajectoryTables
from dsd_fast.guidance.trajectory import Predictor, ViewBins, signal_and_noise, simulate
from dsd_fast.schedules import Schedule
from dsd_fast.upload import upload

# The rendering's own noise prediction is taken at this scale, the target's at guidance_scale.
_RENDERING_SCALE = 1.0


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
    trajectory_share: Tensor | float = 0.0,
    trajectory_scale: float | None = None,
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
        guidance_scale: scale of the target prediction and of the trajectory.
        weighting: "sds" (official) or "ddim".
        trajectory_share: share of eps_o in what is subtracted, 0 (official) to 1: one or [B].
        trajectory_scale: scale of the trajectory where it is not guidance_scale (official).
    Returns:
        (1 - abar_t) (eps_t - (1 - share) eps_delta - share eps_o), [B,C,h,w].
    Raises:
        ValueError: shapes, levels, shares or choices that do not fit.

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

    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting: expected one of {', '.join(WEIGHTINGS)}, got {weighting!r}")
    share = torch.as_tensor(trajectory_share, dtype=torch.float32).reshape(-1)
    if len(share) not in (1, n_items) or not bool(((share >= 0) & (share <= 1)).all()):
        raise ValueError(
            f"trajectory_share: expected a share of 0 to 1, or {n_items}, got {share.tolist()}"
        )
    share = share.to(latents.device).view(-1, 1, 1, 1)
    own_scale = guidance_scale if trajectory_scale is None else trajectory_scale
    z = simulate(noise, t_delta, predict, abar, n_ddim_steps, own_scale)
    eps_o = predict(z, t_delta_device, own_scale)
    alpha, sigma = signal_and_noise(abar, t, latents)
    alpha_delta, sigma_delta = signal_and_noise(abar, t_delta, latents)
    x_delta = alpha_delta * latents + sigma_delta * eps_o
    eps_delta = predict(x_delta, t_delta_device, _RENDERING_SCALE)
    eps_t = predict(alpha * latents + sigma * eps_o, t_device, guidance_scale)
    weight = sigma / alpha if weighting == "ddim" else sigma.square()
    return weight * (eps_t - ((1 - share) * eps_delta + share * eps_o))


class DSDGuidance(Guidance):
    """Diverse Score Distillation (arXiv 2412.06780); cached trajectories are rebuilt as needed."""

    def __init__(
        self,
        cfg: GuidanceConfig,
        model: DiffusionModel,
        prompts: PromptEmbeddings,
        noise: Tensor,
        max_steps: int,
    ):
        self._grid = ode_grid(cfg.n_ddim_steps)
        self._share = Schedule.parse(cfg.trajectory_share)
        own = cfg.trajectory_scale
        self._trajectory_scale = cfg.guidance_scale if own is None else own
        self._done = torch.zeros((), dtype=torch.int32, device=model.device)
        super().__init__(cfg, model, prompts, noise, max_steps)

    @torch.no_grad()
    def plan_levels(
        self,
        elevation_deg: Tensor | float,
        azimuth_deg: Tensor | float,
        t: Tensor | int,
        t_delta: Tensor | int,
        chance: Mapping[str, Tensor] | None = None,
    ) -> Plan:
        """Trajectories found, and made where they lack; else as `Guidance.plan_levels`."""
        elevation, azimuth = angles(elevation_deg, azimuth_deg)
        n_items = elevation.numel()
        self._check_seeds(n_items)
        t, t_delta = levels_of("t", t, n_items), levels_of("t_delta", t_delta, n_items)
        share = torch.tensor([self._share(level) for level in t.tolist()])
        shared = torch.equal(t, t_delta) or bool((share == 1).all())
        views = self._rows_of(elevation, azimuth)
        tensors = {"t": t, "t_delta": t_delta, "mirrored": wrapped(azimuth) < 0}
        if self._share.maximum > 0:
            tensors["trajectory_share"] = share
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
        columns = [row_columns(mix) for mix in calls]
        for name in columns[0]:
            tensors[name] = torch.cat([column[name] for column in columns])
        if views.weights is not None:
            tensors["weights"] = views.weights
        kind = PlanKind(n_items, noise, shared)
        return Plan(kind, t, t_delta, tensors, self.model.device)

    def at_plan(self, latents: Tensor, plan: Plan) -> GuidanceOutput:
        """As `Guidance.at_plan`.

        With cached trajectories it asks the host for nothing but `plan.kind`, so that a CUDA graph
        can hold it; `Plan.copy_` gives the graph another plan of that kind, and levels are then
        that plan's, not the output's. An exact trajectory takes as many UNet calls as t_delta asks
        for.
        """
        self._check_latents(latents, plan.kind.n_items)
        x = latents.detach().float().contiguous()
        tensors, cfg = plan.tensors, self.cfg
        guide = self._guide(tensors["weights"] if cfg.use_perp_neg else None)
        with torch.no_grad():
            text = self._text(tensors)
            linked = self._link(x, plan, guide, text)
            eps = self._predict(linked, text[-len(linked.rows) :])
            share = tensors["trajectory_share"] if self._share.maximum > 0 else None
            result = passes.gradient(
                eps,
                guide,
                (_RENDERING_SCALE, cfg.guidance_scale),
                x,
                tensors["t"],
                self._abar,
                cfg.weighting,
                self._done,
                None if share is None else linked.value,
                share,
            )
        return GuidanceOutput(
            loss=distillation_loss(latents, result.grad, result.loss),
            grad_norm=result.grad_norm,
            t=plan.t,
            t_delta=plan.t_delta,
            latents=x,
            target=result.target,
            grad=result.grad,
            latents_noisy=linked.rows[: len(x)].float(),
            finite=result.finite,
        )

    @property
    def can_capture(self) -> bool:
        """As `Guidance.can_capture`."""
        return self.cfg.trajectory == "cached"

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a seed noise; trajectories cached for another one are dropped."""
        super().load_state_dict(state)
        cfg, model = self.cfg, self.model
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
        """The trajectories' noise, and the UNet's batch of renderings put on them."""
        tensors, cfg, kind = plan.tensors, self.cfg, plan.kind
        levels = (tensors["t"], tensors["t_delta"], self._abar, self.model.dtype)
        mirrored = tensors["mirrored"] if cfg.mirror_trajectory else None
        pair = not kind.shared
        if kind.noise == "tabulated":
            return passes.link_table(
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
            at_z = passes.state(
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
        return passes.link(eps, own, self._trajectory_scale, x, *levels, mirrored, pair)

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
            at_z = passes.step(
                self._predict(at_z, text),
                guide,
                self._trajectory_scale,
                at_z.value,
                upload(t, x.device),
                upload(t_next, x.device),
                self._abar,
                self.model.dtype,
            )
        return at_z

    def _predict_bin(self, batch: Batch, view: int) -> Tensor:
        """Guided noise of one item on the trajectory of a bin, [1,C,h,w]."""
        device = self.model.device
        mix = self._bin_text([view])
        rows = {name: upload(column, device) for name, column in row_columns(mix).items()}
        eps = self._predict(batch, self._text(rows))
        weights = None if mix.weights is None else upload(mix.weights, device)
        return passes.combine(eps, self._guide(weights), self._trajectory_scale)

    def _bin_text(self, bins: list[int]) -> TextMix:
        cameras = torch.tensor([self._bins.camera(view) for view in bins])  # [B,2]
        return self._rows_of(cameras[:, 0], cameras[:, 1])

    def _condition(self, prompts: PromptEmbeddings) -> None:
        super()._condition(prompts)
        self._bins = ViewBins(self.cfg.azimuth_bins, self.cfg.use_perp_neg)

    def _guide(self, weights: Tensor | None) -> Guide:
        return Guide(weights, self.cfg.standard_cfg, self.cfg.pure_conditional)


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
