"""Consistent Flow Distillation: (sigma / alpha) (e^s(x_t) - eps(theta, c)), with levels that fall
and noise eps(theta, c) that sticks to the object (Yan et al. 2025, arXiv 2501.05445).

With fixed noise eps, x = (x_t - sigma eps) / alpha is the clean variable of the probability flow:
dx = d(sigma / alpha) (e^s(alpha x + sigma eps) - eps) (their clean flow). A picture that
follows it ends at the sample that the ODE makes of eps. Views of an object follow it together if
what they see of the same surface has the same noise: `surface_noise`. Left out is the SDE, whose
noise is slowly renewed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from dsd_fast.guidance.baselines import Baseline
from dsd_fast.guidance.plan import Plan
from dsd_fast.guidance.registry import formulation
from dsd_fast.guidance.surface_noise import SurfaceNoise


@formulation
class CFD(Baseline):
    """See the module. Without a surface, as of a picture, the noise is the seed noise."""

    name, works_with = "cfd", ("text", "views")
    needs_surface = True
    # Of the authors' configuration for Stable Diffusion, with that for multi-view models at 50.
    defaults: ClassVar = {"guidance_scale": 70.0, "weighting": "ddim", "t_anneal": False}
    draws = ()

    @classmethod
    def settings(cls, max_steps: int) -> dict[str, Any]:
        """One level for each step: from 980 to 692 over a tenth of the run, to 404 until its half,
        to 212 at its end, as in the authors' configuration for Stable Diffusion."""
        first = max(max_steps // 10, 1)
        half = max(max_steps // 2, first + 1)
        level = (0, 0.98, 0.692, first, 0.404, half, 0.212, max(max_steps, half + 1))
        return cls.defaults | {"min_step_percent": level, "max_step_percent": level}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a seed noise, of which all noise is made."""
        super().load_state_dict(state)
        self._noise = SurfaceNoise(self._unfold(self.noise), self.n_views)

    def _difference(self, x: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        eps = self._fold(self.noise_of_views(plan))
        parts, noisy = self._at_noise(x, eps, plan)
        return parts.at(self.cfg.guidance_scale) - eps, noisy

    @torch.no_grad()
    def noise_of_views(self, plan: Plan) -> Tensor:
        """eps(theta, c) [B*V,C,h,w] of a plan's views."""
        if plan.surface is None:
            return self._noise.behind(plan.kind.n_items * self.n_views)
        return self._noise.of_views(plan.surface)
