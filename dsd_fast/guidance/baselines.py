"""The formulations that DSD is compared with, on the same engine (mathematics.md 12).

x_t = alpha_t x + sigma_t eps, w = sigma_t^2 (or sigma_t / alpha_t, `weighting`), e_y and e_0 the
predictions with and without the prompt, p = e_y - e_0, in Perp-Neg with its weighted negatives
added; e^s = e_0 + s p, the usual convention. Each class has its gradient with respect to x, the
paper that it is from, and that paper's scale and noise levels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from dsd_fast.diffusion.condition import Condition
from dsd_fast.diffusion.noise_path import NUM_TRAIN_TIMESTEPS
from dsd_fast.guidance import passes
from dsd_fast.guidance.base import Asked, Guidance
from dsd_fast.guidance.conditions.multiview import MultiViewConditions
from dsd_fast.guidance.conditions.text import TextConditions
from dsd_fast.guidance.contrast import rescaled
from dsd_fast.guidance.passes import Batch, Gradient, Guide
from dsd_fast.guidance.plan import Noise, Plan, PlanKind
from dsd_fast.guidance.registry import formulation
from dsd_fast.guidance.rows import expand_rows

_LAST_LEVEL = NUM_TRAIN_TIMESTEPS - 1
# Most papers': any level at any time, and the scale of samplers.
ANY_LEVEL = {
    "guidance_scale": 7.5,
    "t_anneal": False,
    "min_step_percent": 0.02,
    "max_step_percent": 0.98,
}


class Parts(NamedTuple):
    """A UNet batch taken apart: e_0 and p of each item, [B,C,h,w] float32."""

    unconditional: Tensor
    toward: Tensor

    def at(self, scale: float) -> Tensor:
        """e^s."""
        return self.unconditional + scale * self.toward


class Baseline(Guidance):
    """A formulation whose gradient is w (a - b), of predictions at noisy renderings.

    Subclasses say what they draw and what a - b is. A batch of several views' objects has one level
    t, as MVDream's.
    """

    noise_kind: ClassVar[Noise] = "drawn"
    # Names of what `draw_noise` draws.
    draws: ClassVar[tuple[str, ...]] = ("eps",)

    def draw_noise(self, n_items: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Noise eps [B,C,h,w], fresh every step, where the formulation draws it."""
        if "eps" not in self.draws:
            return {}
        size = self.model.latent_size
        shape = (n_items, self.model.latent_channels, size, size)
        return {"eps": torch.randn(shape, generator=generator)}

    def _levels(self, n_items: int, step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        if self.n_views == 1:
            return super()._levels(n_items, step, generator)
        t, _ = super()._levels(1, step, generator)
        return t.expand(n_items), t.expand(n_items)

    def _plan(self, asked: Asked) -> Plan:
        n_items, t, t_delta = len(asked.t), asked.t, asked.t_delta
        if missing := set(self.draws) - asked.chance.keys():
            raise ValueError(
                f"guidance: {self.name} needs {min(missing)!r} of draw_noise for {n_items} items, "
                "got none"
            )
        rows = self.conditions.rows(asked.elevation, asked.azimuth)
        tensors = {"t": t, "t_delta": t_delta, "elevation": asked.elevation}
        tensors |= {"azimuth": asked.azimuth, **rows.columns, **asked.chance}
        if rows.weights is not None:
            tensors["weights"] = rows.weights
        strides = self._strides(t, t_delta)
        if strides:
            tensors["path"] = torch.stack([torch.stack(stride) for stride in strides])
        kind = PlanKind(n_items, self.noise_kind, False, len(strides))
        return Plan(kind, t, t_delta, tensors, self.model.device)

    def _gradient(self, x: Tensor, plan: Plan) -> tuple[Gradient, Tensor]:
        """w (a - b), and x at the level that a is of."""
        difference, noisy = self._difference(x, plan)
        weight = self._path.weight(plan.tensors["t"], self.cfg.weighting)
        return Gradient.of(weight * difference, x), noisy

    def _difference(self, x: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        """a - b of the formulation, and x at the level that a is of: [B,C,h,w] float32."""
        raise NotImplementedError

    def _strides(self, t: Tensor, t_delta: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The levels, [B] on the CPU each, from and to which strides of an inversion go; items that
        have arrived stay where they are."""
        return []

    def _rows(self, z: Tensor, t: Tensor) -> Batch:
        """The UNet's batch for z [B,C,h,w] at levels t [B]."""
        perp_neg = self.cfg.use_perp_neg
        return Batch(z, expand_rows(z, perp_neg).to(self.model.dtype), expand_rows(t, perp_neg))

    def _parts(self, z: Tensor, t: Tensor, condition: Condition, plan: Plan) -> Parts:
        """Predictions at z [B,C,h,w], levels t [B]: one UNet call."""
        return self._taken_apart(self._predict(self._rows(z, t), condition), plan)

    def _at_noise(self, x: Tensor, eps: Tensor, plan: Plan) -> tuple[Parts, Tensor]:
        """Predictions at x with noise eps, and x with it, at the plan's level t."""
        t = plan.tensors["t"]
        noisy = self._path.noisy(x, eps, t)
        return self._parts(noisy, t, self.conditions.condition(plan.tensors), plan), noisy

    def _taken_apart(self, eps: Tensor, plan: Plan) -> Parts:
        weights = plan.tensors["weights"] if self.cfg.use_perp_neg else None
        n_items = plan.kind.n_items
        unconditional = eps[n_items : 2 * n_items].float()
        return Parts(unconditional, passes.combine(eps, Guide(weights, True), 1.0) - unconditional)


@formulation
class SDS(Baseline):
    """w (e^s(x_t) - eps) with fresh eps: DreamFusion (Poole et al. 2022, Eq. 3), s = 100."""

    name, works_with = "sds", None
    defaults = ANY_LEVEL | {"guidance_scale": 100.0}

    def _difference(self, x: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        eps = plan.tensors["eps"]
        parts, noisy = self._at_noise(x, eps, plan)
        return parts.at(self.cfg.guidance_scale) - eps, noisy


@formulation
class CSD(Baseline):
    """w p(x_t), the classifier's part of SDS alone (Yu et al. 2023); s multiplies it."""

    name, works_with = "csd", None
    defaults = ANY_LEVEL | {"guidance_scale": 1.0}

    def _difference(self, x: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        parts, noisy = self._at_noise(x, plan.tensors["eps"], plan)
        return self.cfg.guidance_scale * parts.toward, noisy


@formulation
class NFSD(Baseline):
    """w (delta_D + s p), delta_D = e_0(x_t) where t < 200, else e_0 - e_neg: Noise-Free Score
    Distillation (Katzir et al. 2023), e_neg the prediction for a prompt of what is
    poor (`poor` of the embeddings)."""

    name, needs_poor = "nfsd", True
    defaults = ANY_LEVEL
    FREE_OF_NOISE = 200
    conditions: TextConditions

    def _prepare(self) -> None:
        poor = self.conditions.prompts.poor
        if poor is None:
            raise ValueError("guidance: nfsd needs the embedding of a poor prompt, `poor`")
        self._poor = poor.to(self.model.device, self.model.dtype)

    def _difference(self, x: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        t = plan.tensors["t"]
        noisy = self._path.noisy(x, plan.tensors["eps"], t)
        batch, n_items = self._rows(noisy, t), len(x)
        rows = torch.cat([batch.rows, noisy.to(self.model.dtype)])
        poor = Condition(self._poor.expand(n_items, -1, -1))
        condition = Condition.cat([self.conditions.condition(plan.tensors), poor])
        eps = self._predict(Batch(noisy, rows, torch.cat([batch.levels, t])), condition)
        parts = self._taken_apart(eps[:-n_items].contiguous(), plan)
        has_noise = (t >= self.FREE_OF_NOISE).view(-1, 1, 1, 1)
        domain = parts.unconditional - torch.where(has_noise, eps[-n_items:].float(), 0.0)
        return domain + self.cfg.guidance_scale * parts.toward, noisy


@formulation
class ASD(Baseline):
    """w (e^s(x_t) - e_y(x_t+)), the same fresh eps at both levels and t+ >= t: Asynchronous Score
    Distillation (ScaleDreamer, Ma et al. 2024)."""

    name, works_with = "asd", None
    defaults = ANY_LEVEL

    def _difference(self, x: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        tensors = plan.tensors
        t, later, eps = tensors["t"], tensors["t_delta"], tensors["eps"]
        noisy, condition = self._path.noisy(x, eps, t), self.conditions.condition(tensors)
        batch, n_items = self._rows(noisy, t), len(x)
        rows = torch.cat([batch.rows, self._path.noisy(x, eps, later).to(self.model.dtype)])
        condition = Condition.cat([condition, condition.rows(0, n_items)])
        predicted = self._predict(Batch(noisy, rows, torch.cat([batch.levels, later])), condition)
        parts = self._taken_apart(predicted[:-n_items].contiguous(), plan)
        return parts.at(self.cfg.guidance_scale) - predicted[-n_items:].float(), noisy


@formulation
class FSD(Baseline):
    """w (e^s(x_t) - eps(c)), eps(c) fixed for the run: Flow Score Distillation (Yan et al. 2024).

    The noise of a view c is the seed noise as a map of the world around the object: it is shifted
    by the view's azimuth and elevation, whole pixels at a time, and meets itself after a turn.
    """

    name = "fsd"
    defaults = ANY_LEVEL | {"t_anneal": True}
    draws = ()

    def _difference(self, x: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        eps = self.noise_of_views(plan.tensors["elevation"], plan.tensors["azimuth"])
        parts, noisy = self._at_noise(x, eps, plan)
        return parts.at(self.cfg.guidance_scale) - eps, noisy

    def noise_of_views(self, elevation_deg: Tensor, azimuth_deg: Tensor) -> Tensor:
        """eps(c) [B,C,h,w] of angles [B] on the device."""
        n_items, size = len(azimuth_deg), self.model.latent_size
        channels = self.model.latent_channels
        place = torch.arange(size, device=self.model.device)
        columns = place + (azimuth_deg[:, None] * (size / 360)).round().long()
        rows = place + (elevation_deg[:, None] * (size / 180)).round().long()
        index = (rows.remainder(size) * size)[:, :, None] + columns.remainder(size)[:, None, :]
        flat = self.noise.expand(n_items, -1, -1, -1).flatten(2)
        index = index.flatten(1)[:, None].expand(-1, channels, -1)
        return flat.gather(2, index).view(n_items, channels, size, size)


@formulation
class ISM(Baseline):
    """(sigma / alpha) (e^s(x_t) - e_0(x_s)), s = t - 50: Interval Score Matching (LucidDreamer,
    Liang et al. 2023).

    x_s is x inverted without prompt (DDIM inversion: Song et al. 2021) in strides of 200 from level
    0; x_t is 50 levels more. `t_delta` of its plans is s.
    """

    name = "ism"
    defaults = ANY_LEVEL | {"weighting": "ddim"}
    noise_kind = "inverted"
    draws = ()
    STRIDE, INTERVAL = 200, 50

    def _other_level(
        self, t: Tensor, t_delta: Tensor | int, chance: Mapping[str, Tensor]
    ) -> Tensor | int:
        """s; the t_delta given is not looked at."""
        return (t - self.INTERVAL).clamp_min(0)

    def _strides(self, t: Tensor, t_delta: Tensor) -> list[tuple[Tensor, Tensor]]:
        starts = range(0, int(t_delta.max()), self.STRIDE)
        return [(t_delta.clamp_max(i), t_delta.clamp_max(i + self.STRIDE)) for i in starts]

    def _difference(self, x: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        n_items, tensors = len(x), plan.tensors
        condition = self.conditions.condition(tensors)
        unconditional = condition.rows(n_items, 2 * n_items)

        def e_0(z: Tensor, level: Tensor) -> Tensor:
            return self._predict(Batch(z, z.to(self.model.dtype), level), unconditional).float()

        z = x
        for i in range(plan.kind.strides):
            here, there = tensors["path"][i]
            z = self._path.step(z, e_0(z, here), here, there)
        at_s = e_0(z, tensors["t_delta"])
        noisy = self._path.step(z, at_s, tensors["t_delta"], tensors["t"])
        parts = self._parts(noisy, tensors["t"], condition, plan)
        return parts.at(self.cfg.guidance_scale) - at_s, noisy


@formulation
class SDI(Baseline):
    """(sigma / alpha) (e^s(x_t) - kappa) = x - x0(x_t): Score Distillation via Inversion
    (Lukoianov et al. 2024).

    kappa is the noise that x has when it is inverted with the prompt at a scale of -7.5 to a level
    up to a stride above t, in strides of 100, each with a little fresh noise (eta = 0.3), as the
    authors' code does. `t_delta` of its plans is that level.
    """

    name = "sdi"
    defaults = ANY_LEVEL | {
        "weighting": "ddim",
        "t_anneal": True,
        "sqrt_anneal": False,
        "min_step_percent": 0.25,
    }
    noise_kind = "inverted"
    draws = ("eps", "above")
    N_STEPS, SCALE, ETA = 10, -7.5, 0.3
    STRIDE = NUM_TRAIN_TIMESTEPS // N_STEPS

    def draw_noise(self, n_items: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Noise of every stride [B,N_STEPS,C,h,w], and how far above t the inversion ends [B]."""
        size = self.model.latent_size
        shape = (n_items, self.N_STEPS, self.model.latent_channels, size, size)
        return {
            "eps": torch.randn(shape, generator=generator),
            "above": torch.rand(n_items, generator=generator),
        }

    def _other_level(
        self, t: Tensor, t_delta: Tensor | int, chance: Mapping[str, Tensor]
    ) -> Tensor | int:
        """Where the inversion ends; the t_delta given is not looked at."""
        if "above" not in chance:
            return t
        return (t + (chance["above"] * self.STRIDE).long()).clamp_max(_LAST_LEVEL)

    def _strides(self, t: Tensor, t_delta: Tensor) -> list[tuple[Tensor, Tensor]]:
        """They begin below t; the last goes to the end."""
        strides = []
        for start in range(0, int(t.max()), self.STRIDE):
            here, there = torch.full_like(t, start), torch.full_like(t, start + self.STRIDE)
            there = torch.where(there < t, there, t_delta)
            strides.append((here, torch.where(here < t, there, here)))
        return strides

    def _difference(self, x: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        condition, t = self.conditions.condition(plan.tensors), plan.tensors["t"]
        kappa = self._inverted(x, condition, plan)
        noisy = self._path.noisy(x, kappa, t)
        parts = self._parts(noisy, t, condition, plan)
        return parts.at(self.cfg.guidance_scale) - kappa, noisy

    def _inverted(self, x: Tensor, condition: Condition, plan: Plan) -> Tensor:
        """The noise of x after inversion."""
        z, path, tensors = x, self._path, plan.tensors
        for i in range(plan.kind.strides):
            here, there = tensors["path"][i]
            eps = self._parts(z, here, condition, plan).at(self.SCALE)
            # DDIM's variance between the two levels (Song et al. 2021, Eq. 16); zero between equal
            # ones, and no root of less than that.
            (alpha, sigma), (alpha_there, sigma_there) = path.at(here), path.at(there)
            kept = (alpha_there / alpha).square()
            spread = self.ETA * ((sigma / sigma_there).square() * (1 - kept)).clamp_min(0).sqrt()
            z = path.step(z, eps, here, there) + spread * tensors["eps"][:, i]
        alpha, sigma = path.at(tensors["t_delta"])
        return (z - alpha * x) / sigma


@formulation
class Reconstruction(SDS):
    """x - y, MVDream's own loss (Shi et al. 2023, Sec. 3.2 and appendix), of multi-view models.

    y = r f x0^s + (1 - r) x0^s, where x0^s and x0^y are the clean images that e^s and e_y imply,
    f = std(x0^y) / std(x0^s) over an object's views, and r is `recon_std_rescale`.
    """

    name, works_with = "recon", ("views",)
    defaults: ClassVar = {}  # its preset has them
    conditions: MultiViewConditions

    def _gradient(self, x: Tensor, plan: Plan) -> tuple[Gradient, Tensor]:
        t = plan.tensors["t"]
        parts, noisy = self._at_noise(x, plan.tensors["eps"], plan)
        clean, plain = (
            self._path.clean(noisy, parts.at(scale), t) for scale in (self.cfg.guidance_scale, 1.0)
        )
        share = self.conditions.views.recon_std_rescale
        return Gradient.of(x - rescaled(clean, plain, share), x), noisy
