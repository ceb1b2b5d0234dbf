"""The exact form of Diverse Score Distillation: DDIM, written as steps of optimisation.

DDIM from level tau to t < tau moves its clean image by -sigma_t / alpha_t (eps_t - eps_tau), with
eps_t = eps(alpha_t x + sigma_t eps_tau, t): the project page's DSD*, DSD_SPEC 3.9. The practical
form puts the rendering's own prediction in the place of eps_tau, and another weight in that of
sigma_t / alpha_t. With one step a level, of unit length, x - grad, the optimisation is the sampler.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dsd_fast.diffusion.model import DiffusionModel
from dsd_fast.diffusion.sampling import ddim_levels
from dsd_fast.diffusion.text import PromptEmbeddings
from dsd_fast.guidance.base import Guidance, GuidanceConfig, GuidanceOutput, distillation_loss
from dsd_fast.guidance.plan import Plan, PlanKind
from dsd_fast.guidance.prompt import combine, expand_rows, mixed_rows, text_mix
from dsd_fast.guidance.trajectory import ddim_step, signal_and_noise


class ExactForm(Guidance):
    """Guidance for latents alone, one step a level.

    The levels are those at which the model's own DDIM scheduler asks the UNet. Step k goes from
    level k - 1 to level k, with the seed's own prediction at level k - 1 for the noise that links x
    to level k; step 0 links x = 0 by the seed noise itself, so that it lands on the first clean
    image. What is kept between steps follows from the seed noise and is found again after a resume.

    Args:
        cfg: `guidance_scale`, `use_perp_neg`, `standard_cfg` count.
        model: frozen diffusion model, of a folder.
        prompts: embeddings of the four views.
        noise: seed noise [S,C,h,w], item i of a batch of S belonging to seed i.
        max_steps: DDIM steps.
    Raises:
        ValueError: noise of another size than the model's latents, or more steps than DDIM takes.
    """

    def __init__(
        self,
        cfg: GuidanceConfig,
        model: DiffusionModel,
        prompts: PromptEmbeddings,
        noise: Tensor,
        max_steps: int,
    ):
        self.schedule = ddim_levels(model, max_steps)
        super().__init__(cfg, model, prompts, noise, max_steps)

    def levels(self, n_items: int, step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """t and t_delta of a step, int64 [B] on the CPU; nothing is drawn."""
        if not 0 <= step < len(self.schedule):
            raise ValueError(f"exact form: expected a step below {len(self.schedule)}, got {step}")
        levels = torch.tensor([self.schedule[step], self.schedule[max(step - 1, 0)]])
        t, t_delta = levels.unsqueeze(1).expand(2, n_items)
        return t, t_delta

    @torch.no_grad()
    def plan_levels(
        self,
        elevation_deg: Tensor,
        azimuth_deg: Tensor,
        t: Tensor,
        t_delta: Tensor,
        chance: Mapping[str, Tensor] | None = None,
    ) -> Plan:
        """For the levels of `levels`: the linking noise is found here, by the UNet."""
        if len(azimuth_deg) != len(self.noise):
            raise ValueError(
                f"exact form: expected a view for each of the {len(self.noise)} seeds, "
                f"got {len(azimuth_deg)}"
            )
        mix = text_mix(elevation_deg.cpu(), azimuth_deg.cpu(), self.cfg.use_perp_neg)
        tensors = {"t": t, "t_delta": t_delta, "first": mix.first, "second": mix.second}
        tensors["share"] = mix.share
        if mix.weights is not None:
            tensors["weights"] = mix.weights
        plan = Plan(PlanKind(len(t), "simulated", False), t, t_delta, tensors, self.model.device)
        self._follow(-1 if torch.equal(t, t_delta) else self.schedule.index(int(t_delta[0])), plan)
        return plan

    def encode(self, rgb: Tensor, noise: Tensor | None) -> Tensor:
        """ValueError: an encoded image is not the latent that DDIM leaves."""
        raise ValueError("the exact form optimises latents: there is no rendering to encode")

    def at_plan(self, latents: Tensor, plan: Plan) -> GuidanceOutput:
        """The device's part of a step, for latents [B,C,h,w]; x - grad is where DDIM would be."""
        if latents.shape != self.noise.shape:
            raise ValueError(
                f"exact form: expected latents {list(self.noise.shape)}, got {list(latents.shape)}"
            )
        x = latents.detach().float()
        with torch.no_grad():
            alpha, sigma = signal_and_noise(self._abar, plan.tensors["t"], x)
            noisy = alpha * x + sigma * self._link
            grad = sigma / alpha * (self._guided(noisy, plan.tensors["t"], plan) - self._link)
        return GuidanceOutput(
            loss=distillation_loss(latents, grad),
            grad_norm=grad.norm(),
            t=plan.t,
            t_delta=plan.t_delta,
            latents=x,
            target=x - grad,
            grad=grad,
            latents_noisy=noisy,
            finite=grad.isfinite().all(),
        )

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a seed noise; the trajectory begins again."""
        super().load_state_dict(state)
        # The noise that links x to a step's level, always at one address: a CUDA graph reads it.
        self._link = torch.empty_like(self.noise)
        self._restart()

    def _restart(self) -> None:
        """The trajectory stands before its first level, where noise itself is the link: x is 0."""
        self._at = -1
        self._z = self.noise
        first = torch.full((len(self.noise),), self.schedule[0], device=self.noise.device)
        self._link.copy_(self.noise / signal_and_noise(self._abar, first, self.noise)[1])

    def _follow(self, index: int, plan: Plan) -> None:
        """Take the trajectory to a level of the schedule, and link by its prediction there."""
        if index < self._at:
            self._restart()
        while self._at < index:
            if self._at >= 0:
                here, there = (
                    torch.full((len(self.noise),), self.schedule[i], device=self.noise.device)
                    for i in (self._at, self._at + 1)
                )
                self._z = ddim_step(self._z, self._link, here, there, self._abar)
            self._at += 1
            t = torch.full((len(self.noise),), self.schedule[self._at], device=self.noise.device)
            self._link.copy_(self._guided(self._z, t, plan))

    def _guided(self, z: Tensor, t: Tensor, plan: Plan) -> Tensor:
        """Guided noise prediction [B,C,h,w] at levels t [B]."""
        tensors, perp_neg = plan.tensors, self.cfg.use_perp_neg
        text = mixed_rows(self._bank, *(tensors[name] for name in ("first", "second", "share")))
        rows, levels = expand_rows(z, perp_neg), expand_rows(t, perp_neg)
        return combine(
            self.model.predict_noise(rows, levels, text),
            tensors["weights"] if perp_neg else None,
            self.cfg.guidance_scale,
            standard_cfg=self.cfg.standard_cfg,
            pure_conditional=self.cfg.pure_conditional,
        )
