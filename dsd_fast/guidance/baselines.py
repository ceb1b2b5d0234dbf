"""The formulations that DSD is compared with, on the same engine (DSD_SPEC 12).

x_t = alpha_t x + sigma_t eps, w = 1 - abar_t (or sigma_t / alpha_t, `weighting`), e_y and e_0 the
predictions with and without the prompt, p = e_y - e_0, in Perp-Neg with its weighted negatives
added; e^s = e_0 + s p, the usual convention. Each class has its gradient with respect to x, and the
paper that it is from; `SETTINGS` has the papers' scales and noise levels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

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
from dsd_fast.guidance.conditions.text import expand_rows
from dsd_fast.guidance.passes import Batch, Guide
from dsd_fast.guidance.plan import Plan, PlanKind
from dsd_fast.guidance.trajectory import ddim_step

_LAST_LEVEL = NUM_TRAIN_TIMESTEPS - 1
_ANY_LEVEL = {"t_anneal": False, "min_step_percent": 0.02, "max_step_percent": 0.98}


class Parts(NamedTuple):
    """A UNet batch taken apart: e_0 and p of each item, [B,C,h,w] float32."""

    unconditional: Tensor
    toward: Tensor

    def at(self, scale: float) -> Tensor:
        """e^s."""
        return self.unconditional + scale * self.toward


class Rival(Guidance):
    """A formulation whose gradient is w (a - b), of predictions at noisy renderings.

    Subclasses say what they draw and what a - b is.
    """

    noise = "drawn"
    # Names of what `draw_noise` draws.
    draws: tuple[str, ...] = ("eps",)

    def draw_noise(self, n_items: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Noise eps [B,C,h,w], fresh every step."""
        size = self.model.latent_size
        shape = (n_items, self.model.latent_channels, size, size)
        return {"eps": torch.randn(shape, generator=generator)}

    @torch.no_grad()
    def plan_levels(
        self,
        elevation_deg: Tensor | float,
        azimuth_deg: Tensor | float,
        t: Tensor | int,
        t_delta: Tensor | int,
        chance: Mapping[str, Tensor] | None = None,
    ) -> Plan:
        """As `Guidance.plan_levels`."""
        elevation, azimuth = angles(elevation_deg, azimuth_deg)
        n_items = elevation.numel()
        self._check_seeds(n_items)
        t, t_delta = levels_of("t", t, n_items), levels_of("t_delta", t_delta, n_items)
        mix = self._rows_of(elevation, azimuth)
        tensors = {"t": t, "t_delta": t_delta, "elevation": elevation, "azimuth": azimuth}
        tensors |= row_columns(mix)
        if mix.weights is not None:
            tensors["weights"] = mix.weights
        chance = dict(chance or {})
        for name in self.draws:
            if name not in chance or len(chance[name]) != n_items:
                got = f"that of {len(chance[name])}" if name in chance else "none"
                raise ValueError(
                    f"guidance: {self.cfg.method} needs {name!r} of draw_noise for {n_items} "
                    f"items, got {got}"
                )
        strides = self._strides(t, t_delta)
        if strides:
            tensors["path"] = torch.stack([torch.stack(stride) for stride in strides])
        kind = PlanKind(n_items, self.noise, False, len(strides))
        return Plan(kind, t, t_delta, tensors | chance, self.model.device)

    def at_plan(self, latents: Tensor, plan: Plan) -> GuidanceOutput:
        """As `Guidance.at_plan`."""
        self._check_latents(latents, plan.kind.n_items)
        x = latents.detach().float().contiguous()
        with torch.no_grad():
            grad, noisy = self._gradient(x, plan)
            finite = grad.isfinite().all()
            loss = 0.5 * grad.square().sum() / len(x)
        return GuidanceOutput(
            loss=distillation_loss(latents, grad, loss),
            grad_norm=grad.norm(),
            t=plan.t,
            t_delta=plan.t_delta,
            latents=x,
            target=x - grad,
            grad=grad,
            latents_noisy=noisy,
            finite=finite,
        )

    def _gradient(self, x: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        """w (a - b), and x at the level that a is of: [B,C,h,w] float32."""
        alpha, sigma = self._signal(plan.tensors["t"])
        weight = sigma / alpha if self.cfg.weighting == "ddim" else sigma.square()
        difference, noisy = self._difference(x, plan)
        return weight * difference, noisy

    def _difference(self, x: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        """a - b of the formulation, and x at the level that a is of: [B,C,h,w] float32."""
        raise NotImplementedError

    def _strides(self, t: Tensor, t_delta: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The levels, [B] on the CPU each, from and to which strides of an inversion go; items that
        have arrived stay where they are."""
        return []

    def _signal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma [B,1,1,1] of levels [B] on the device."""
        abar = self._abar[t].view(-1, 1, 1, 1)
        return abar.sqrt(), (1 - abar).sqrt()

    def _noisy(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self._signal(t)
        return alpha * x + sigma * eps

    def _rows(self, z: Tensor, t: Tensor) -> Batch:
        """The UNet's batch for z [B,C,h,w] at levels t [B]."""
        perp_neg = self.cfg.use_perp_neg
        return Batch(z, expand_rows(z, perp_neg).to(self.model.dtype), expand_rows(t, perp_neg))

    def _parts(self, z: Tensor, t: Tensor, text: Tensor, plan: Plan) -> Parts:
        """Predictions at z [B,C,h,w], levels t [B]: one UNet call."""
        return self._taken_apart(self._predict(self._rows(z, t), text), plan)

    def _taken_apart(self, eps: Tensor, plan: Plan) -> Parts:
        weights = plan.tensors["weights"] if self.cfg.use_perp_neg else None
        n_items = plan.kind.n_items
        unconditional = eps[n_items : 2 * n_items].float()
        return Parts(unconditional, passes.combine(eps, Guide(weights, True), 1.0) - unconditional)


class SDS(Rival):
    """w (e^s(x_t) - eps) with fresh eps: DreamFusion (Poole et al. 2022, Eq. 3), s = 100."""

    def _difference(self, x: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        eps = plan.tensors["eps"]
        noisy = self._noisy(x, eps, plan.tensors["t"])
        parts = self._parts(noisy, plan.tensors["t"], self._text(plan.tensors), plan)
        return parts.at(self.cfg.guidance_scale) - eps, noisy


class CSD(Rival):
    """w p(x_t), the classifier's part of SDS alone (Yu et al. 2023); s multiplies it."""

    def _difference(self, x: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        noisy = self._noisy(x, plan.tensors["eps"], plan.tensors["t"])
        parts = self._parts(noisy, plan.tensors["t"], self._text(plan.tensors), plan)
        return self.cfg.guidance_scale * parts.toward, noisy


class NFSD(Rival):
    """w (delta_D + s p), delta_D = e_0(x_t) where t < 200, else e_0 - e_neg: Noise-Free Score
    Distillation (Katzir et al. 2023), e_neg the prediction for a prompt of what is
    poor (`poor` of the embeddings)."""

    FREE_OF_NOISE = 200

    def __init__(
        self,
        cfg: GuidanceConfig,
        model: DiffusionModel,
        prompts: PromptEmbeddings,
        noise: Tensor,
        max_steps: int,
    ):
        super().__init__(cfg, model, prompts, noise, max_steps)
        if prompts.poor is None:
            raise ValueError("guidance: nfsd needs the embedding of a poor prompt, `poor`")
        self._poor = prompts.poor.to(model.device, model.dtype)

    def _difference(self, x: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        t = plan.tensors["t"]
        noisy = self._noisy(x, plan.tensors["eps"], t)
        batch, n_items = self._rows(noisy, t), len(x)
        rows = torch.cat([batch.rows, noisy.to(self.model.dtype)])
        text = torch.cat([self._text(plan.tensors), self._poor.expand(n_items, -1, -1)])
        eps = self._predict(Batch(noisy, rows, torch.cat([batch.levels, t])), text)
        parts = self._taken_apart(eps[:-n_items].contiguous(), plan)
        has_noise = (t >= self.FREE_OF_NOISE).view(-1, 1, 1, 1)
        domain = parts.unconditional - torch.where(has_noise, eps[-n_items:].float(), 0.0)
        return domain + self.cfg.guidance_scale * parts.toward, noisy


class ASD(Rival):
    """w (e^s(x_t) - e_y(x_t+)), the same fresh eps at both levels and t+ >= t: Asynchronous Score
    Distillation (ScaleDreamer, Ma et al. 2024)."""

    def _difference(self, x: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        tensors = plan.tensors
        t, later, eps = tensors["t"], tensors["t_delta"], tensors["eps"]
        noisy, text = self._noisy(x, eps, t), self._text(plan.tensors)
        batch, n_items = self._rows(noisy, t), len(x)
        rows = torch.cat([batch.rows, self._noisy(x, eps, later).to(self.model.dtype)])
        text = torch.cat([text, text[:n_items]])
        predicted = self._predict(Batch(noisy, rows, torch.cat([batch.levels, later])), text)
        parts = self._taken_apart(predicted[:-n_items].contiguous(), plan)
        return parts.at(self.cfg.guidance_scale) - predicted[-n_items:].float(), noisy


class FSD(Rival):
    """w (e^s(x_t) - eps(c)), eps(c) fixed for the run: Flow Score Distillation (Yan et al. 2024).

    The noise of a view c is the seed noise as a map of the world around the object: it is shifted
    by the view's azimuth and elevation, whole pixels at a time, and meets itself after a turn.
    """

    draws = ()

    def draw_noise(self, n_items: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Nothing: the seed noise is all."""
        return {}

    def _difference(self, x: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        eps = self.noise_of_views(plan.tensors["elevation"], plan.tensors["azimuth"])
        noisy = self._noisy(x, eps, plan.tensors["t"])
        parts = self._parts(noisy, plan.tensors["t"], self._text(plan.tensors), plan)
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


class ISM(Rival):
    """(sigma / alpha) (e^s(x_t) - e_0(x_s)), s = t - 50: Interval Score Matching (LucidDreamer,
    Liang et al. 2023).

    x_s is x inverted without prompt (DDIM inversion: Song et al. 2021) in strides of 200 from level
    0; x_t is 50 levels more. `t_delta` of its plans is s.
    """

    noise = "inverted"
    draws = ()
    STRIDE, INTERVAL = 200, 50

    def draw_noise(self, n_items: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Nothing: the inversion has no chance in it."""
        return {}

    @torch.no_grad()
    def plan_levels(
        self,
        elevation_deg: Tensor | float,
        azimuth_deg: Tensor | float,
        t: Tensor | int,
        t_delta: Tensor | int,
        chance: Mapping[str, Tensor] | None = None,
    ) -> Plan:
        """As `Guidance.plan_levels`; the t_delta given is not looked at."""
        s = (torch.as_tensor(t) - self.INTERVAL).clamp_min(0)
        return super().plan_levels(elevation_deg, azimuth_deg, t, s, chance)

    def _strides(self, t: Tensor, t_delta: Tensor) -> list[tuple[Tensor, Tensor]]:
        starts = range(0, int(t_delta.max()), self.STRIDE)
        return [(t_delta.clamp_max(i), t_delta.clamp_max(i + self.STRIDE)) for i in starts]

    def _difference(self, x: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        text, n_items, tensors = self._text(plan.tensors), len(x), plan.tensors
        unconditional = text[n_items : 2 * n_items]

        def e_0(z: Tensor, level: Tensor) -> Tensor:
            return self._predict(Batch(z, z.to(self.model.dtype), level), unconditional).float()

        z = x
        for i in range(plan.kind.strides):
            here, there = tensors["path"][i]
            z = _moved(z, e_0(z, here), here, there, self._abar)
        at_s = e_0(z, tensors["t_delta"])
        noisy = _moved(z, at_s, tensors["t_delta"], tensors["t"], self._abar)
        parts = self._parts(noisy, tensors["t"], text, plan)
        return parts.at(self.cfg.guidance_scale) - at_s, noisy


class SDI(Rival):
    """(sigma / alpha) (e^s(x_t) - kappa) = x - x0(x_t): Score Distillation via Inversion
    (Lukoianov et al. 2024).

    kappa is the noise that x has when it is inverted with the prompt at a scale of -7.5 to a level
    up to a stride above t, in strides of 100, each with a little fresh noise (eta = 0.3), as the
    authors' code does. `t_delta` of its plans is that level.
    """

    noise = "inverted"
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

    @torch.no_grad()
    def plan_levels(
        self,
        elevation_deg: Tensor | float,
        azimuth_deg: Tensor | float,
        t: Tensor | int,
        t_delta: Tensor | int,
        chance: Mapping[str, Tensor] | None = None,
    ) -> Plan:
        """As `Guidance.plan_levels`; the t_delta given is not looked at."""
        end = torch.as_tensor(t)
        if chance and "above" in chance:
            end = (end + (chance["above"] * self.STRIDE).long()).clamp_max(_LAST_LEVEL)
        return super().plan_levels(elevation_deg, azimuth_deg, t, end, chance)

    def _strides(self, t: Tensor, t_delta: Tensor) -> list[tuple[Tensor, Tensor]]:
        """They begin below t; the last goes to the end."""
        strides = []
        for start in range(0, int(t.max()), self.STRIDE):
            here, there = torch.full_like(t, start), torch.full_like(t, start + self.STRIDE)
            there = torch.where(there < t, there, t_delta)
            strides.append((here, torch.where(here < t, there, here)))
        return strides

    def _difference(self, x: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        text, t = self._text(plan.tensors), plan.tensors["t"]
        kappa = self._inverted(x, text, plan)
        noisy = self._noisy(x, kappa, t)
        parts = self._parts(noisy, t, text, plan)
        return parts.at(self.cfg.guidance_scale) - kappa, noisy

    def _inverted(self, x: Tensor, text: Tensor, plan: Plan) -> Tensor:
        """The noise of x after inversion."""
        z, abar, tensors = x, self._abar, plan.tensors
        for i in range(plan.kind.strides):
            here, there = tensors["path"][i]
            eps = self._parts(z, here, text, plan).at(self.SCALE)
            # DDIM's variance between the two levels (Song et al. 2021, Eq. 16); zero between equal
            # ones, and no root of less than that.
            a, b = abar[here], abar[there]
            spread = self.ETA * ((1 - a) / (1 - b) * (1 - b / a)).clamp_min(0).sqrt()
            z = _moved(z, eps, here, there, abar)
            z = z + spread.view(-1, 1, 1, 1) * tensors["eps"][:, i]
        alpha, sigma = self._signal(tensors["t_delta"])
        return (z - alpha * x) / sigma


def _moved(z: Tensor, eps: Tensor, here: Tensor, there: Tensor, abar: Tensor) -> Tensor:
    """z [B,C,h,w] at levels `here` [B] by eps to levels `there`; where both are one, z."""
    moved = ddim_step(z, eps, here, there, abar)
    return torch.where((here == there).view(-1, 1, 1, 1), z, moved)


# What a formulation sets of a `GuidanceConfig`: its paper's, and 1/5 of the run for VSD's change of
# levels, after 5,000 of 25,000 steps in its authors' code.
def settings(method: str, max_steps: int) -> dict[str, Any]:
    """Fields of GuidanceConfig that `--guidance.method` brings along; none for DSD."""
    later = max(max_steps // 5, 1)
    by_method: dict[str, dict[str, Any]] = {
        "dsd": {},
        "sds": {"guidance_scale": 100.0, **_ANY_LEVEL},
        "csd": {"guidance_scale": 1.0, **_ANY_LEVEL},
        "nfsd": {"guidance_scale": 7.5, **_ANY_LEVEL},
        "asd": {"guidance_scale": 7.5, **_ANY_LEVEL},
        "ism": {"guidance_scale": 7.5, "weighting": "ddim", **_ANY_LEVEL},
        "vsd": {
            "guidance_scale": 7.5,
            **_ANY_LEVEL,
            "max_step_percent": (later, 0.98, 0.5, later + 1),
        },
        "fsd": {
            "guidance_scale": 7.5,
            "t_anneal": True,
            "min_step_percent": 0.02,
            "max_step_percent": 0.98,
        },
        "sdi": {
            "guidance_scale": 7.5,
            "weighting": "ddim",
            "t_anneal": True,
            "sqrt_anneal": False,
            "min_step_percent": 0.25,
            "max_step_percent": 0.98,
        },
    }
    return by_method[method]
