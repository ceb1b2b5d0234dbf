"""Diverse Score Distillation: the gradient, and the guidance that a training loop calls.

One step (mathematics.md 3.3), for a rendering x in latent space at level t:
1. simulate the seed's own trajectory from 999 down to t_delta >= t, and take its noise
   prediction eps_o there;
2. put the rendering on that trajectory: x_delta = alpha x + sigma eps_o at t_delta, x_t at t;
3. gradient = (1 - abar_t) (eps(x_t; scale) - eps(x_delta; 1)). Of what is subtracted a share may be
   the trajectory's own noise: (1 - share) eps(x_delta; 1) + share eps_o (`trajectory_share`), and
   the trajectory may have a scale of its own (`trajectory_scale`).

Of an anchored step the trajectory is that of the views themselves, and the gradient is x - c with
the clean image c of the trajectory: what the exact form has for a rendering (`anchors`).

The host's part of a step, `plan`, draws levels, looks up where the trajectories of its views are in
the tables, and adds what they lack. The device's, `at_plan`, takes latents and plan to the loss
without a look at the host.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from dsd_fast.diffusion.condition import Condition
from dsd_fast.diffusion.noise_path import NUM_TRAIN_TIMESTEPS, WEIGHTINGS, NoisePath
from dsd_fast.guidance import passes
from dsd_fast.guidance.base import Asked, Guidance, levels_of
from dsd_fast.guidance.conditions.base import Rows
from dsd_fast.guidance.conditions.text import wrapped
from dsd_fast.guidance.contrast import rescaled_noise
from dsd_fast.guidance.levels import ode_grid
from dsd_fast.guidance.passes import Batch, Gradient, Guide
from dsd_fast.guidance.plan import Noise, Plan, PlanKind
from dsd_fast.guidance.registry import formulation
from dsd_fast.guidance.rows import expand_rows
from dsd_fast.guidance.tables import TrajectoryTables
from dsd_fast.guidance.trajectory import Predictor, simulate
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
    path = NoisePath.diffusion(alphas_cumprod.to(latents.device))
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
    z = simulate(noise, t_delta, predict, path, n_ddim_steps, own_scale)
    eps_o = predict(z, t_delta_device, own_scale)
    eps_delta = predict(path.noisy(latents, eps_o, t_delta), t_delta_device, _RENDERING_SCALE)
    eps_t = predict(path.noisy(latents, eps_o, t), t_device, guidance_scale)
    return path.weight(t, weighting) * (eps_t - ((1 - share) * eps_delta + share * eps_o))


@formulation
class DSDGuidance(Guidance):
    """Diverse Score Distillation (arXiv 2412.06780); cached trajectories are rebuilt as needed.

    With cached trajectories `at_plan` asks the host for nothing but `plan.kind`, so that a CUDA
    graph can hold it; `Plan.copy_` gives the graph another plan of that kind, and levels are then
    that plan's, not the output's. An exact trajectory takes as many UNet calls as t_delta asks for.
    """

    name, works_with = "dsd", None

    # Where trajectories begin: pictures [n_bins,C,h,w], or None for noise alone.
    _pictures: Tensor | None = None

    def _prepare(self) -> None:
        cfg = self.cfg
        self._share = Schedule.parse(cfg.trajectory_share)
        self._anchor_percent = Schedule.parse(cfg.anchor_percent)
        own = cfg.trajectory_scale
        self._trajectory_scale = cfg.guidance_scale if own is None else own
        self._done = torch.zeros((), dtype=torch.int32, device=self.model.device)

    def _levels(self, n_items: int, step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        t, t_delta = super()._levels(n_items, step, generator)
        if self.cfg.is_anchored(step):
            level = round(NUM_TRAIN_TIMESTEPS * self._anchor_percent(step))
            t = t_delta = torch.full((n_items,), min(level, NUM_TRAIN_TIMESTEPS - 1))
        return t, t_delta

    def begin_from(self, pictures: Tensor) -> None:
        """Let trajectories begin from pictures in the seed's noise, at the run's highest level, in
        place of noise alone at 999 (SDEdit, Meng et al. 2021): what a trajectory comes to then has
        the pictures' shapes.

        Args:
            pictures: latents [n_bins*V,C,h,w], of what the camera of each bin of the conditions
                sees; of a multi-view model its V views.
        Raises:
            ValueError: other shapes, or trajectories that are not cached.
        """
        if self.cfg.trajectory != "cached":
            raise ValueError(
                "guidance: trajectories that begin from pictures are those of the bins, expected "
                f"--guidance.trajectory cached, got {self.cfg.trajectory}"
            )
        n_bins, size = len(self.conditions.bins), self.model.latent_size
        expected = (n_bins * self.n_views, self.model.latent_channels, size, size)
        if pictures.shape != expected:
            raise ValueError(
                f"guidance: expected pictures {list(expected)}, one of each bin and view, got "
                f"{list(pictures.shape)}"
            )
        self._pictures = self._fold(pictures.detach().to(self.model.device, torch.float32))
        self.load_state_dict(self.state_dict())

    @property
    def _grid(self) -> tuple[int, ...]:
        """Levels of the trajectories' DDIM steps."""
        n_steps = self.cfg.n_ddim_steps
        return ode_grid(n_steps) if self._pictures is None else ode_grid(n_steps, self._highest)

    @property
    def _highest(self) -> int:
        """The highest level of the run."""
        percents = [knot[1] for knot in self.max_percent.knots]
        return min(int(NUM_TRAIN_TIMESTEPS * max(percents)), NUM_TRAIN_TIMESTEPS - 1)

    def _starts(self) -> Tensor:
        """Where every track begins: [S*n_bins,C,h,w]."""
        n_bins = len(self.conditions.bins)
        noise = self.noise.repeat_interleave(n_bins, dim=0)
        if self._pictures is None:
            return noise
        level = torch.full((len(noise),), self._highest, device=noise.device)
        return self._path.noisy(self._pictures.repeat(self._n_seeds, 1, 1, 1), noise, level)

    def _other_level(
        self, t: Tensor, t_delta: Tensor | int, chance: Mapping[str, Tensor]
    ) -> Tensor | int:
        """Above where they begin there are no trajectories."""
        if self._pictures is None:
            return t_delta
        return torch.as_tensor(t_delta).clamp_max(self._highest)

    def _plan(self, asked: Asked) -> Plan:
        if asked.anchored:
            return self._anchored(asked)
        t, t_delta = asked.t, asked.t_delta
        share = torch.tensor([self._share(level) for level in t.tolist()])
        shared = torch.equal(t, t_delta) or bool((share == 1).all())
        views = self.conditions.rows(asked.elevation, asked.azimuth)
        tensors = {"t": t, "t_delta": t_delta, "mirrored": wrapped(asked.azimuth) < 0}
        if self._share.maximum > 0:
            tensors["trajectory_share"] = share
        if views.weights is not None:
            tensors["weights"] = views.weights
        calls = [views] if shared else [views, views]
        noise: Noise = "simulated"
        if self.cfg.trajectory == "cached":
            noise = "tabulated" if self.cfg.noise_table_step else "predicted"
            bins = self.conditions.bins.index(asked.elevation, asked.azimuth)
            tensors |= self._reached(bins, t_delta)
            if noise == "predicted":
                # The bins' own text: eps_o continues the bins' trajectories.
                own = self._of_bins(bins)
                calls.insert(0, own)
                if own.weights is not None:
                    tensors["bin_weights"] = own.weights
        for name in views.columns:
            tensors[name] = torch.cat([call.columns[name] for call in calls])
        kind = PlanKind(len(t), noise, shared)
        return Plan(kind, t, t_delta, tensors, self.model.device)

    def _anchored(self, asked: Asked) -> Plan:
        bins = self.conditions.bins.index(asked.elevation, asked.azimuth)
        own = torch.tensor([self.conditions.bins.camera(view) for view in bins])
        given = torch.stack([asked.elevation, asked.azimuth], dim=1)
        if not torch.allclose(given, own, rtol=0.0, atol=1e-2):
            raise ValueError(
                "anchored step: expected views where their trajectories have them, at elevation "
                f"and azimuth {own.tolist()}, got {given.tolist()}"
            )
        nodes = [
            self._tables.node(i if self._n_seeds > 1 else 0, view, level, self._predict_bin)
            for i, (view, level) in enumerate(zip(bins, asked.t.tolist()))
        ]
        names = ("state", "prediction", "level")
        tensors = {name: torch.tensor([getattr(node, name) for node in nodes]) for name in names}
        kind = PlanKind(len(nodes), "anchored", True)
        return Plan(kind, asked.t, asked.t_delta, tensors, self.model.device)

    def _reached(self, bins: list[int], t_delta: Tensor) -> dict[str, Tensor]:
        """Where the tables have the trajectories of bins at t_delta [B], after they got what they
        lacked: [B] by the names of `Reach`."""
        reaches = [
            self._tables.reach(i if self._n_seeds > 1 else 0, view, level, self._predict_bin)
            for i, (view, level) in enumerate(zip(bins, t_delta.tolist()))
        ]
        names = ("prediction", "state", "level")
        if self.cfg.noise_table_step:
            names = ("prediction", "below", "mix")
        return {name: torch.tensor([getattr(reach, name) for reach in reaches]) for name in names}

    def _gradient(self, x: Tensor, plan: Plan) -> tuple[Gradient, Tensor]:
        tensors, cfg = plan.tensors, self.cfg
        if plan.kind.noise == "anchored":
            z = self._tables.states[tensors["state"]]
            eps = self._tables.predictions[tensors["prediction"]]
            return Gradient.of(x - self._path.clean(z, eps, tensors["level"]), x), z
        guide = self._guide(tensors["weights"] if cfg.use_perp_neg else None)
        condition = self.conditions.condition(tensors)
        linked = self._link(x, plan, guide, condition)
        eps = self._predict(linked, condition.rows(-len(linked.rows)))
        if cfg.rescale:
            eps = self._rescaled(eps, guide, linked.rows, tensors["t"])
        share = tensors["trajectory_share"] if self._share.maximum > 0 else None
        found = passes.gradient(
            eps,
            guide,
            (_RENDERING_SCALE, cfg.guidance_scale),
            x,
            tensors["t"],
            self._path,
            cfg.weighting,
            self._done,
            None if share is None else linked.value,
            share,
        )
        return found, linked.rows[: len(x)].float()

    def _rescaled(self, eps: Tensor, guide: Guide, rows: Tensor, t: Tensor) -> Tensor:
        """The same stack with each row of the target replaced by what they come to, rescaled; alike
        as they are then, they come to that at any scale."""
        own = guide.rows * len(t)
        target = eps[-own:].contiguous()
        guided = passes.combine(target, guide, self.cfg.guidance_scale)
        plain, z = target[: len(t)].float(), rows[-own : len(rows) - own + len(t)].float()
        found = rescaled_noise(guided, plain, z, t, self._path, self.cfg.rescale)
        return torch.cat([eps[:-own], found.to(eps.dtype).repeat(guide.rows, 1, 1, 1)])

    @property
    def can_capture(self) -> bool:
        """As `Guidance.can_capture`."""
        return self.cfg.trajectory == "cached"

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a seed noise; trajectories cached for another one are dropped."""
        super().load_state_dict(state)
        cfg = self.cfg
        if cfg.trajectory == "cached":
            schedules = [self.min_percent, self.max_percent]
            if cfg.has_anchors:
                schedules.append(Schedule.parse(cfg.anchor_percent))
            percents = [value for schedule in schedules for _, value in schedule.knots]
            lowest = int(NUM_TRAIN_TIMESTEPS * min(percents))
            self._tables = TrajectoryTables(
                self._starts(),
                self._form,
                self._grid,
                len(self.conditions.bins),
                cfg.noise_table_step,
                min(max(lowest, 0), NUM_TRAIN_TIMESTEPS - 1),
            )

    def _link(self, x: Tensor, plan: Plan, guide: Guide, condition: Condition) -> Batch:
        """The trajectories' noise, and the UNet's batch of renderings put on them."""
        tensors, cfg, kind = plan.tensors, self.cfg, plan.kind
        levels = (tensors["t"], tensors["t_delta"], self._form)
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
                self._form,
            )
            own = self._guide(tensors["bin_weights"] if cfg.use_perp_neg else None)
        else:
            at_z = self._simulate(x, plan, guide, condition.rows(None, n_rows))
        eps = self._predict(at_z, condition.rows(None, n_rows))
        return passes.link(eps, own, self._trajectory_scale, x, *levels, mirrored, pair)

    def _simulate(self, x: Tensor, plan: Plan, guide: Guide, condition: Condition) -> Batch:
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
                self._predict(at_z, condition),
                guide,
                self._trajectory_scale,
                at_z.value,
                upload(t, x.device),
                upload(t_next, x.device),
                self._form,
            )
        return at_z

    def _predict_bin(self, batch: Batch, view: int) -> Tensor:
        """Guided noise of one item on the trajectory of a bin, [1,C,h,w]."""
        device = self.model.device
        rows = self._of_bins([view])
        columns = {name: upload(column, device) for name, column in rows.columns.items()}
        eps = self._predict(batch, self.conditions.condition(columns))
        weights = None if rows.weights is None else upload(rows.weights, device)
        return passes.combine(eps, self._guide(weights), self._trajectory_scale)

    def _of_bins(self, bins: list[int]) -> Rows:
        cameras = torch.tensor([self.conditions.bins.camera(view) for view in bins])  # [B,2]
        return self.conditions.rows(cameras[:, 0], cameras[:, 1])

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
