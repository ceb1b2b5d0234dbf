"""The exact form of Diverse Score Distillation: DDIM, written as steps of optimisation.

DDIM from level tau to t < tau moves its clean image by -sigma_t / alpha_t (eps_t - eps_tau), with
eps_t = eps(alpha_t x + sigma_t eps_tau, t): the project page's DSD*, mathematics.md 3.9. The
practical form puts the rendering's own prediction in the place of eps_tau, and another weight in
that of sigma_t / alpha_t. With one step a level, of unit length, x - grad, the optimisation is the
sampler.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsd_fast.diffusion.ddim import ddim_levels
from dsd_fast.guidance.base import Asked, Guidance
from dsd_fast.guidance.passes import Gradient
from dsd_fast.guidance.plan import Plan, PlanKind
from dsd_fast.guidance.rows import combine, expand_rows


class ExactForm(Guidance):
    """Guidance for latents alone, one step a level.

    The levels are those at which the model's own DDIM scheduler asks the UNet. A step to level t
    links x by `link`, the guided prediction of the step before, which it replaces by its own. Step
    0 links by the seed noise, so that it takes x = 0 to the first clean image.

    The link is taken from the optimisation's own last step, not from a trajectory simulated beside
    it: the two are equal but for rounding, which guidance magnifies from step to step where the
    link cannot answer to it (50 steps at scale 4 of the embedded model: by six orders).

    Attributes: `link` [S,C,h,w] float32, state that must survive a resume beside the seed noise,
    always at one address.

    Args:
        cfg: `guidance_scale`, `use_perp_neg`, `standard_cfg` and `pure_conditional` count.
        model: frozen diffusion model, of a folder.
        conditions: as of every `Guidance`.
        noise: seed noise [S,C,h,w], item i of a batch of S belonging to seed i.
        max_steps: DDIM steps.
    Raises:
        ValueError: noise of another size than the model's latents, or more steps than DDIM takes.
    """

    name = "exact"

    def _prepare(self) -> None:
        self.schedule = ddim_levels(self.model, self.max_steps)
        self.link = torch.zeros_like(self.noise)

    def _levels(self, n_items: int, step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """t of a step, and that of the step before for t_delta."""
        if not 0 <= step < len(self.schedule):
            raise ValueError(f"exact form: expected a step below {len(self.schedule)}, got {step}")
        t, t_delta = self.schedule[step], self.schedule[max(step - 1, 0)]
        return torch.full((n_items,), t), torch.full((n_items,), t_delta)

    def _plan(self, asked: Asked) -> Plan:
        """t = t_delta is the first step."""
        t, t_delta = asked.t, asked.t_delta
        if len(t) != len(self.noise):
            raise ValueError(
                f"exact form: expected a view for each of the {len(self.noise)} seeds, got {len(t)}"
            )
        rows = self.conditions.rows(asked.elevation, asked.azimuth)
        tensors = {"t": t, "t_delta": t_delta, **rows.columns}
        if rows.weights is not None:
            tensors["weights"] = rows.weights
        kind = PlanKind(len(t), "predicted", torch.equal(t, t_delta))
        return Plan(kind, t, t_delta, tensors, self.model.device)

    def encode(self, rgb: Tensor, noise: Tensor | None) -> Tensor:
        """ValueError: an encoded image is not the latent that DDIM leaves."""
        raise ValueError("the exact form optimises latents: there is no rendering to encode")

    def _gradient(self, x: Tensor, plan: Plan) -> tuple[Gradient, Tensor]:
        """x - grad is where DDIM would be.

        Called once a plan: it takes `link` along, of items whose gradient is finite.
        """
        t = plan.tensors["t"]
        alpha, sigma = self._path.at(t)
        link = self.noise / sigma if plan.kind.shared else self.link
        noisy = self._path.noisy(x, link, t)
        eps = self._guided(noisy, plan)
        grad = sigma / alpha * (eps - link)
        sound = grad.isfinite().flatten(1).all(1).view(-1, 1, 1, 1)
        self.link.copy_(torch.where(sound, eps, link))
        return Gradient.of(grad, x), noisy

    def _guided(self, z: Tensor, plan: Plan) -> Tensor:
        """Guided noise prediction [B,C,h,w] at the plan's level."""
        tensors, perp_neg = plan.tensors, self.cfg.use_perp_neg
        condition = self.conditions.condition(tensors)
        rows, levels = expand_rows(z, perp_neg), expand_rows(tensors["t"], perp_neg)
        return combine(
            self.model.predict_noise(rows, levels, condition),
            tensors["weights"] if perp_neg else None,
            self.cfg.guidance_scale,
            standard_cfg=self.cfg.standard_cfg,
            pure_conditional=self.cfg.pure_conditional,
        )
