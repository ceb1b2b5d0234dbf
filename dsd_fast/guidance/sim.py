"""Score implicit matching: a divergence of scores in the place of KL (Luo et al. 2024, arXiv
2410.16794; of 3D: Dive3D, Bai et al. 2025, arXiv 2506.13594), mathematics.md 12.1.

SDS and VSD go down KL(p || q) of what renderings look like, p, and what they should, q, at level t.
Here it is w E d(s_p(x_t) - s_q(x_t)), s the scores and d the pseudo-Huber distance
d(y) = sqrt(|y|^2 + c^2) - c, which pulls as hard from far away as from near. With y = e_q - e_p,
the noises that the two predict (the teacher's e_q = e^s at the guided scale, the student's e_p),
the gradient is that of

    (sigma / alpha) sqrt(D) / sqrt(|y|^2 + D c^2) <y, e_p(x_t) - eps>

with respect to x, of both predictions too, but not of the student's weights (Luo et al., Theorem
3.1; w = sigma^2 / alpha, the authors'). Norms are over the D numbers of an item. sqrt(D) gives the
gradient the size of SDS's, so that other losses keep their weight beside it.

`dive3d` is what the authors do: the student is learned, as VSD's. `sim` takes the rendering itself
for the student, as SDS does: e_p(x_t) = (x_t - alpha x) / sigma is eps, its derivative 1 / sigma,
and what is left is sqrt(D) y / sqrt(|y|^2 + D c^2): SDS at one length. Dive3D's reward is left out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dsd_fast.diffusion.condition import Condition
from dsd_fast.diffusion.noise_path import NoisePath
from dsd_fast.guidance.baselines import ANY_LEVEL, SDS
from dsd_fast.guidance.passes import Gradient
from dsd_fast.guidance.plan import Plan
from dsd_fast.guidance.registry import formulation
from dsd_fast.guidance.rows import combine
from dsd_fast.guidance.vsd import VSD

# c of the pseudo-Huber distance, by number: that of consistency models (Song and Dhariwal 2023,
# arXiv 2310.14189). The authors' code has none, and divides by zero where y is.
HUBER = 0.00054
# Theirs is 7.5 by the convention e_y + s (e_y - e_0).
SCALE = 8.5


def slope(y: Tensor, c: float = HUBER) -> Tensor:
    """sqrt(D) y / sqrt(|y|^2 + D c^2), the slope of the pseudo-Huber distance, of items [B,...]."""
    mean = y.square().flatten(1).mean(1).view(-1, *[1] * (y.ndim - 1))
    return y / (mean + c**2).sqrt()


def matching_gradient(
    x: Tensor,
    eps: Tensor,
    t: Tensor,
    path: NoisePath,
    predict: Callable[[Tensor], tuple[Tensor, Tensor]],
    c: float = HUBER,
) -> Tensor:
    """The gradient of score implicit matching with respect to x, through both predictions.

    Args:
        x, eps: [B,C,h,w]; t: int64 [B].
        predict: x_t [B,C,h,w] -> the noises that teacher and student predict, differentiable.
    Returns:
        [B,C,h,w]; its items do not see each other.
    """
    alpha, sigma = path.at(t)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        teacher, student = predict(path.noisy(x, eps, t))
        matched = sigma / alpha * slope(teacher - student, c) * (student - eps)
        return torch.autograd.grad(matched.sum(), x)[0]


@formulation
class SIM(SDS):
    """sqrt(D) y / sqrt(|y|^2 + D c^2), y = e^s(x_t) - eps with fresh eps: see the module.

    `weighting` does not count: w is part of it.
    """

    name, works_with = "sim", ("text", "views")
    defaults = ANY_LEVEL | {"guidance_scale": SCALE}

    def _gradient(self, x: Tensor, plan: Plan) -> tuple[Gradient, Tensor]:
        difference, noisy = self._difference(x, plan)
        return Gradient.of(slope(difference), x), noisy


@formulation
class Dive3D(VSD):
    """The gradient of the module, with VSD's adapters for the student; see `VSD` for errors.

    It goes back through the UNet twice, with the plain forward whatever the engine: that takes the
    memory of a training step of the UNet.
    """

    name = "dive3d"
    defaults = ANY_LEVEL | {"guidance_scale": SCALE}

    def _gradient(self, x: Tensor, plan: Plan) -> tuple[Gradient, Tensor]:
        tensors = plan.tensors
        t, eps, condition = tensors["t"], tensors["eps"], self.conditions.condition(tensors)
        positive, camera = condition.tokens[: len(x)], self._camera(plan)

        def predict(noisy: Tensor) -> tuple[Tensor, Tensor]:
            teacher = self._teacher(noisy, t, condition, plan)
            return teacher, self._own(noisy, t, positive, camera)

        grad = matching_gradient(x, eps, t, self._path, predict)
        self._learn_of(x, plan, positive, camera)
        return Gradient.of(grad, x), self._path.noisy(x, eps, t)

    def _teacher(self, noisy: Tensor, t: Tensor, condition: Condition, plan: Plan) -> Tensor:
        """e^s [B,C,h,w] float32, differentiable, which an engine's is not."""
        batch = self._rows(noisy, t)
        eps = self._plain(self.model.unet, batch.rows, batch.levels, condition.tokens)
        eps = self._path.noise(eps, batch.rows.float(), batch.levels)
        weights = plan.tensors["weights"] if self.cfg.use_perp_neg else None
        return combine(eps, weights, self.cfg.guidance_scale, standard_cfg=True)
