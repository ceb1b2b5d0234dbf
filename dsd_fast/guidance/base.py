"""What every formulation of score distillation shares: levels, encoding, and the loss.

A guidance takes renderings to a scalar loss whose gradient is the formulation's. A step has two
parts. `plan`, the host's, draws levels and noise and finds the text rows of the views; `at_plan`,
the device's, takes latents and plan to the loss without a look at the host, where the formulation
allows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsd_fast.diffusion.condition import Condition
from dsd_fast.diffusion.model import DiffusionModel
from dsd_fast.diffusion.noise_path import NUM_TRAIN_TIMESTEPS
from dsd_fast.diffusion.text import PromptEmbeddings
from dsd_fast.guidance.conditions.base import Conditions
from dsd_fast.guidance.conditions.text import TextConditions
from dsd_fast.guidance.config import GuidanceConfig
from dsd_fast.guidance.levels import random_timesteps, shifted_level, timestep
from dsd_fast.guidance.passes import Batch, Form, Gradient
from dsd_fast.guidance.plan import Plan
from dsd_fast.ranges import check
from dsd_fast.resize import bilinear
from dsd_fast.schedules import Schedule


class GuidanceOutput(NamedTuple):
    """Result of one guidance call for B views; everything but `loss` is detached."""

    # 0.5 sum (x - target)^2 / B; its gradient with respect to the latents is exactly grad / B.
    loss: Tensor
    # Norm of `grad` over all elements, 0-dim.
    grad_norm: Tensor
    # Levels, int64 [B] on the CPU.
    t: Tensor
    t_delta: Tensor
    # x, target = x - grad, grad, and x at level t_delta, or at t where nothing is asked about that,
    # as exact as the UNet's input: [B,C,h,w] float32.
    latents: Tensor
    target: Tensor
    grad: Tensor
    latents_noisy: Tensor
    # 0-dim bool on the device: whether grad is free of NaN and infinity. Not read here, so that a
    # step need not wait for the device; a loop that finds it false skips the step.
    finite: Tensor


class Asked(NamedTuple):
    """What the host's part of a step is asked: of B items, on the CPU."""

    elevation: Tensor  # degrees, float32 [B]
    azimuth: Tensor
    t: Tensor  # levels, int64 [B]
    t_delta: Tensor
    chance: dict[str, Tensor]  # of `Guidance.draw_noise`, [B,...]
    anchored: bool  # `GuidanceConfig.anchors`


class Guidance(ABC):
    """Guidance of a training loop: an image in, a scalar loss with the gradient out.

    A formulation is one class: it says its name, its paper's settings and what it needs, implements
    `_plan` and `_gradient`, and is registered by `registry.formulation`. The seed noise is the
    state that must survive a resume, and, of formulations that learn, `learned_state`.

    Where the model predicts several views at once (`Conditions.n_views`), views are folded into
    items: B*V views are B items of V*C channels, with one level and one trajectory each.

    Args:
        cfg: settings.
        model: frozen diffusion model.
        conditions: what predictions are conditioned on, or the embeddings of the four views, which
            stand for `TextConditions`.
        noise: seed noise [V,C,h,w] of `seed_noise`, the size of the model's latents; or [S*V,C,h,w]
            for as many seeds at once, item i of a batch of S then belonging to seed i.
        max_steps: horizon of the annealing, the length of the run (deviations.md Q25).
    Raises:
        ValueError: settings, conditions or noise that do not fit.
    """

    # The formulation's name: a value of `--guidance.method`.
    name: ClassVar[str]
    # Kinds of `Conditions` that it works with; None for any.
    works_with: ClassVar[tuple[str, ...] | None] = ("text",)
    # Whether it wants the embedding of what a picture should not be (`PromptEmbeddings.poor`).
    needs_poor: ClassVar[bool] = False
    # Whether it learns along with one run, so that runs side by side cannot share it.
    one_run: ClassVar[bool] = False
    # Whether it wants to know where the pixels of views see the object (`Plan.seeing`), of tasks
    # that can say so.
    needs_surface: ClassVar[bool] = False
    # Fields of GuidanceConfig that it brings along: its paper's.
    defaults: ClassVar[dict[str, Any]] = {}

    @classmethod
    def settings(cls, max_steps: int) -> dict[str, Any]:
        """`defaults` for a run of so many steps."""
        return cls.defaults

    def __init__(
        self,
        cfg: GuidanceConfig,
        model: DiffusionModel,
        conditions: Conditions | PromptEmbeddings,
        noise: Tensor,
        max_steps: int,
    ):
        check(cfg)
        if isinstance(conditions, PromptEmbeddings):
            conditions = TextConditions(conditions, model, cfg)
        if not conditions.suit(type(self)):
            raise ValueError(f"guidance: {self.name} does not work with {conditions.title}")
        self.cfg, self.model, self.conditions = cfg, model, conditions
        self.n_views = conditions.n_views
        self.max_steps = max_steps
        self.min_percent = Schedule.parse(cfg.min_step_percent)
        self.max_percent = Schedule.parse(cfg.max_step_percent)
        self._path = model.noise_path
        self._form = Form(model.noise_path, model.dtype, cfg.use_perp_neg)
        self._n_seeds = max(len(noise) // self.n_views, 1)
        if self.one_run and self._n_seeds != 1:
            raise ValueError(
                f"--guidance.method {self.name} trains adapters for one run: drop --num-seeds"
            )
        self.load_state_dict({"noise": noise})
        self._prepare()

    def _prepare(self) -> None:
        """Make what the formulation needs once, of what `Guidance` has by now."""
        return

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
            generator: CPU generator of the posterior noise, the levels and the noise.
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
        image = resized(rgb.permute(0, 3, 1, 2).float(), self.model.image_size)
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
        latents = resized(latents.float(), self.model.latent_size)
        self._check_views(elevation_deg, azimuth_deg, latents.shape[0])
        return self.at_plan(latents, self.plan(elevation_deg, azimuth_deg, step, generator))

    def levels(self, n_items: int, step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """t and t_delta of a step for so many views, int64 [B] on the CPU; one an item."""
        t, t_delta = self._levels(self._n_items(n_items), step, generator)
        return t.repeat_interleave(self.n_views), t_delta.repeat_interleave(self.n_views)

    def _levels(self, n_items: int, step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
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
        chance: Mapping[str, Tensor] | None = None,
    ) -> GuidanceOutput:
        """Loss for latents [B,C,h,w] of the model's size at given levels [B]; draws nothing.

        `chance` is that of `draw_noise`.
        """
        self._check_views(elevation_deg, azimuth_deg, latents.shape[0])
        plan = self.plan_levels(elevation_deg, azimuth_deg, t, t_delta, chance)
        return self.at_plan(latents, plan)

    def plan(
        self,
        elevation_deg: Tensor | float,
        azimuth_deg: Tensor | float,
        step: int,
        generator: torch.Generator,
    ) -> Plan:
        """The host's part of a step: all that is drawn, and all that is known before.

        Args: as for a call; `generator` draws t where it is random, then t_delta, then noise.
        """
        elevation, azimuth = angles(elevation_deg, azimuth_deg)
        t, t_delta = self.levels(elevation.numel(), step, generator)
        chance = self.draw_noise(elevation.numel(), generator)
        anchored = self.cfg.is_anchored(step)
        return self.plan_levels(elevation, azimuth, t, t_delta, chance, anchored)

    @torch.no_grad()
    def plan_levels(
        self,
        elevation_deg: Tensor | float,
        azimuth_deg: Tensor | float,
        t: Tensor | int,
        t_delta: Tensor | int,
        chance: Mapping[str, Tensor] | None = None,
        anchored: bool = False,
    ) -> Plan:
        """The same at given levels, one or [B], with what `draw_noise` drew; draws nothing.

        `anchored` views stand on their trajectories (`GuidanceConfig.anchors`).
        """
        elevation, azimuth = angles(elevation_deg, azimuth_deg)
        n_views, chance = azimuth.numel(), dict(chance or {})
        n_items = self._n_items(n_views)
        if self._n_seeds not in (1, n_items):
            raise ValueError(
                f"guidance: expected a view for each of the {self._n_seeds} seeds, got {n_items}"
            )
        elevation, azimuth = self.conditions.items(elevation, azimuth)
        t_delta = self._other_level(torch.as_tensor(t), t_delta, chance)
        t, t_delta = (
            self._of_items(name, levels_of(name, level, n_views))
            for name, level in (("t", t), ("t_delta", t_delta))
        )
        for name, drawn in chance.items():
            if len(drawn) != n_views:
                raise ValueError(
                    f"guidance: expected {name!r} of draw_noise for {n_views} views, "
                    f"got that of {len(drawn)}"
                )
        folded = {name: self._fold(drawn) for name, drawn in chance.items()}
        return self._plan(Asked(elevation, azimuth, t, t_delta, folded, anchored))

    @abstractmethod
    def _plan(self, asked: Asked) -> Plan:
        """The formulation's own part of `plan_levels`."""

    def _other_level(
        self, t: Tensor, t_delta: Tensor | int, chance: Mapping[str, Tensor]
    ) -> Tensor | int:
        """The second level of a formulation that has one of its own."""
        return t_delta

    def at_plan(self, latents: Tensor, plan: Plan) -> GuidanceOutput:
        """The device's part of a step: the loss for latents [B,C,h,w] of the model's size."""
        size = self.model.latent_size
        expected = (plan.kind.n_items * self.n_views, self.model.latent_channels, size, size)
        if latents.shape != expected:
            raise ValueError(
                f"guidance: expected latents {list(expected)}, got {list(latents.shape)}"
            )
        x = latents.detach().float().contiguous()
        with torch.no_grad():
            found, noisy = self._gradient(self._fold(x), plan)
            grad = self._unfold(found.grad)
            # A mean over views.
            loss = found.loss if self.n_views == 1 else found.loss / self.n_views
        return GuidanceOutput(
            loss=distillation_loss(latents, grad, loss),
            grad_norm=found.grad_norm,
            t=plan.t.repeat_interleave(self.n_views),
            t_delta=plan.t_delta.repeat_interleave(self.n_views),
            latents=x,
            target=self._unfold(found.target),
            grad=grad,
            latents_noisy=self._unfold(noisy),
            finite=found.finite,
        )

    @abstractmethod
    def _gradient(self, x: Tensor, plan: Plan) -> tuple[Gradient, Tensor]:
        """The formulation's own part of `at_plan`, for items x [B,C,h,w] float32: the gradient, and
        x at the level t_delta or t."""

    @property
    def can_capture(self) -> bool:
        """Whether a CUDA graph can hold `at_plan`: its course does not depend on the levels."""
        return True

    def state_dict(self) -> dict[str, Tensor]:
        """The seed noise [S*V,C,h,w], on the CPU (deviations.md Q12)."""
        return {"noise": self._unfold(self.noise).cpu()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a seed noise."""
        model, noise = self.model, state["noise"]
        size = model.latent_size
        expected = (self._n_seeds * self.n_views, model.latent_channels, size, size)
        if noise.shape != expected:
            raise ValueError(
                f"guidance: expected seed noise {list(expected)}, the size of the model's latents, "
                f"got {list(noise.shape)}"
            )
        self.noise = self._fold(noise.to(model.device, torch.float32))

    def learned_state(self) -> dict[str, Any]:
        """What a formulation has learned so far, for the checkpoint of its one run."""
        return {}

    def load_learned_state(self, state: Mapping[str, Any]) -> None:
        """Take over a `learned_state`."""
        return

    def _predict(self, batch: Batch, condition: Condition) -> Tensor:
        """The UNet's noise for a batch of rows, in its own dtype where it predicts noise."""
        rows, levels = batch.rows, batch.levels
        if self.n_views > 1:
            rows, levels = self._unfold(rows), levels.repeat_interleave(self.n_views)
            condition = condition.map(lambda tensor: tensor.flatten(0, 1))
        prediction = self.model.engine(rows, levels, condition)
        if self._path.prediction != "epsilon":
            prediction = self._path.noise(prediction.float(), rows.float(), levels)
        return self._fold(prediction)

    # ---- views folded into items ----------------------------------------------------------------

    def _fold(self, views: Tensor) -> Tensor:
        """[B*V,C,...] -> [B,V*C,...]."""
        if self.n_views == 1:
            return views
        return views.unflatten(0, (-1, self.n_views)).flatten(1, 2)

    def _unfold(self, items: Tensor) -> Tensor:
        """[B,V*C,...] -> [B*V,C,...]."""
        if self.n_views == 1:
            return items
        return items.unflatten(1, (self.n_views, -1)).flatten(0, 1)

    def _n_items(self, n_views: int) -> int:
        if n_views == 0 or n_views % self.n_views:
            raise ValueError(
                f"guidance: expected the {self.n_views} views of every object, got {n_views} views"
            )
        return n_views // self.n_views

    def _of_items(self, name: str, levels: Tensor) -> Tensor:
        """[B] of [B*V] levels, one for all views of an item."""
        each = levels.reshape(-1, self.n_views)
        if not torch.equal(each, each[:, :1].expand_as(each)):
            raise ValueError(
                f"{name}: expected one level for the views of an object, got {each.tolist()}"
            )
        return each[:, 0].contiguous()

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


def resized(image: Tensor, size: int) -> Tensor:
    """Bilinear to size x size, without antialiasing, as the original does (deviations.md Q28)."""
    if image.shape[-2:] == (size, size):
        return image
    return bilinear(image, (size, size))
