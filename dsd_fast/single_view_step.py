"""A step of reconstruction from one picture: the reference view and random views in one rendering.

The reference view is held against the picture, the random views are guided; both are regularised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dsd_fast.cameras import CameraBatch, eval_camera
from dsd_fast.field import Field
from dsd_fast.guidance import Plan, distillation_loss
from dsd_fast.losses import REGULARIZERS, regularizer_weights
from dsd_fast.renderer import OPAQUE, Draws, RenderOutput
from dsd_fast.schedules import Schedule
from dsd_fast.state import TrainState
from dsd_fast.step import TrainStep

PICTURE_LOSSES = ("rgb", "mask", "normal_smooth", "normal_smooth_3d")
NUMBERS = (
    "dsd",
    *PICTURE_LOSSES,
    *REGULARIZERS,
    "loss",
    "guidance_norm",
    "gradient_norm",
    "opacity",
    "loss_scale",
    "skipped",
    "bad_run",
    "samples",
)
# How far from a point on the surface its neighbour lies, a standard deviation an axis, and how many
# points are looked at.
NEIGHBOUR_DISTANCE = 0.01
NEIGHBOURS = 4096


@dataclass(frozen=True)
class _Drawn:
    """What chance decided for one run, on the CPU.

    The first of `views` is the reference view; the angles of `views` are those of the others, which
    guidance is asked about.
    """

    views: CameraBatch
    draws: Draws
    noise: Tensor | None  # of the posterior
    offsets: Tensor  # [N,3] to the neighbours of points on the surface
    t: Tensor
    t_delta: Tensor
    chance: dict[str, Tensor]  # of the guidance, beside its levels

    def tensors(self) -> dict[str, Tensor]:
        """What the device needs of it, by name."""
        named = {
            "c2w": self.views.c2w,
            "fovy": self.views.fovy,
            "lights": self.views.light_positions,
            "shading": self.draws.shading.numbers(),
            "jitter": self.draws.jitter,
            "paint": self.draws.paint,
            "noise": self.noise,
            "offsets": self.offsets,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def replaced(self, tensors: dict[str, Tensor]) -> _Drawn:
        """The same with tensors on the device."""
        views = replace(
            self.views,
            c2w=tensors["c2w"],
            fovy=tensors["fovy"],
            light_positions=tensors["lights"],
        )
        draws = Draws(tensors.get("jitter"), tensors["shading"], tensors["paint"])
        return replace(
            self,
            views=views,
            draws=draws,
            noise=tensors.get("noise"),
            offsets=tensors["offsets"],
        )


class SingleViewStep(TrainStep):
    """Steps of runs that differ in their seed alone; see `TrainStep`."""

    names = NUMBERS

    def _weights(self, step: int) -> dict[str, float]:
        own = {
            name: Schedule.parse(value)(step)
            for name, value in self.cfg.single_view.schedules().items()
        }
        return {
            "dsd": self._dsd_weight(step),
            **{name: weight for name, weight in own.items() if weight != 0},
            **regularizer_weights(self.cfg.loss, step),
        }

    def _draw(self, state: TrainState, step: int) -> _Drawn:
        """In the order of a text run, then neighbours."""
        scene, rng, model = state.scene, state.rng, self.guidance.model
        views = self.with_reference(self.cameras.sample(step, rng.cameras))
        n_views = len(views) - 1
        scene.field.set_step(step)
        scene.renderer.update_occupancy(scene.field, step, rng.sampler)
        draws = scene.renderer.draw(scene.background, views, step, rng.sampler)
        # The model knows objects on white alone.
        draws = replace(draws, paint=torch.ones(len(views), 4))
        noise = None
        if self.cfg.guidance.sample_posterior:
            noise = model.draw_posterior(n_views, rng.guidance)
        t, t_delta = self.guidance.levels(n_views, step, rng.guidance)
        chance = self.guidance.draw_noise(n_views, rng.guidance)
        offsets = NEIGHBOUR_DISTANCE * torch.randn(NEIGHBOURS, 3, generator=rng.sampler)
        return _Drawn(views, draws, noise, offsets, t, t_delta, chance)

    def with_reference(self, views: CameraBatch) -> CameraBatch:
        """Random views behind the reference view; the angles stay those of the random ones."""
        at = eval_camera(
            self.cfg.cameras,
            0.0,
            self.cfg.single_view.elevation,
            size=(views.height, views.width),
        )
        joined = {
            name: torch.cat([getattr(at, name), getattr(views, name)])
            for name in ("c2w", "fovy", "light_positions")
        }
        return replace(views, **joined)

    def _run(
        self,
        drawn: Sequence[_Drawn],
        plan: Plan,
        weights: dict[str, float] | dict[str, Tensor],
    ) -> Tensor:
        """The device's part; the numbers [runs, len(NUMBERS)]."""
        images, latents = [], []
        for state, d in zip(self.states, drawn):
            scene = state.scene
            with self._phase("render"):
                images.append(
                    scene.renderer.render(scene.field, scene.background, d.views, d.draws, True)
                )
            with self._phase("encode"):
                latents.append(self.guidance.encode(images[-1].rgb[1:], d.noise))
        together = torch.cat(latents).detach()
        with self._phase("guidance"):
            guided = self.guidance.at_plan(together, plan)
        gradients = guided.grad.split([len(part) for part in latents])
        rows = []
        for state, d, image, x, gradient in zip(self.states, drawn, images, latents, gradients):
            losses = self._losses(state, d, image, weights)
            losses["dsd"] = distillation_loss(x, gradient)
            loss = sum(weights[name] * value for name, value in losses.items())
            # One run's bad gradient leaves the others' steps alone.
            with self._phase("backward and update"):
                norm = state.optimizer.step(loss, gradient.isfinite().all())
            missing = loss.new_full((), float("nan"))
            values = [losses.get(name, missing) for name in ("dsd", *PICTURE_LOSSES, *REGULARIZERS)]
            values += [loss, gradient.norm(), norm, image.opacity.mean(), state.optimizer.scale]
            values += [state.optimizer.skipped, state.optimizer.bad_run, image.n_samples]
            rows.append(torch.stack([value.detach().reshape(()).float() for value in values]))
        return torch.stack(rows)

    def _losses(
        self,
        state: TrainState,
        d: _Drawn,
        image: RenderOutput,
        weights: dict[str, float] | dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """The losses that count, but for that of the guidance."""
        losses = {}
        truth = state.scene.picture(d.views.height)
        if "rgb" in weights:
            behind = d.draws.paint[:1, None, None, :3].to(truth.device)
            losses["rgb"] = color_error(image.rgb[:1], truth, behind)
        if "mask" in weights:
            losses["mask"] = F.mse_loss(image.opacity[:1], truth[..., 3:])
        if "normal_smooth" in weights:
            losses["normal_smooth"] = normal_smoothness(image.normal)
        if "normal_smooth_3d" in weights:
            offsets = d.offsets.to(truth.device)
            losses["normal_smooth_3d"] = surface_smoothness(
                state.scene.field, d.views, image, offsets
            )
        for name in REGULARIZERS:
            if name in weights:
                # Against emptiness the reference view has its picture.
                of = _of_views(image, 1) if name == "sparsity" else image
                losses[name] = REGULARIZERS[name](of)
        return losses


def color_error(rgb: Tensor, truth: Tensor, behind: Tensor) -> Tensor:
    """Mean squared error of a rendering [B,h,w,3] to a picture [B,h,w,4] over the same background.
    """
    alpha = truth[..., 3:]
    return F.mse_loss(rgb, truth[..., :3] * alpha + behind * (1 - alpha))


def normal_smoothness(normal: Tensor) -> Tensor:
    """Mean squared difference of neighbours in normal images [B,h,w,3], down plus across."""
    return normal.diff(dim=1).square().mean() + normal.diff(dim=2).square().mean()


def surface_smoothness(
    field: Field, views: CameraBatch, image: RenderOutput, offsets: Tensor
) -> Tensor:
    """Mean absolute difference of the field's normals at points of the surface and beside them.

    The points are where pixels spread evenly over the views see the surface: at their mean depth,
    where they are more opaque than not. 0-dim; zero where no pixel is.

    Args:
        offsets: [N,3] from points to their neighbours, on the field's device; pixels beyond N have
            no point.
    """
    n_pixels = image.opacity.numel()
    pixels = torch.arange(len(offsets), device=offsets.device) * n_pixels // len(offsets)

    def seen(values: Tensor) -> Tensor:
        return values.detach().reshape(n_pixels, -1).index_select(0, pixels)

    opacity = seen(image.opacity)
    depth = seen(image.depth) / opacity.clamp_min(1e-5)
    points = seen(views.rays_o) + depth * seen(views.rays_d)
    radius = field.cfg.radius
    beside = (points + offsets).clamp(-radius, radius)
    normals = field(torch.cat([points.clamp(-radius, radius), beside])).normal
    here, there = normals.chunk(2)
    is_there = (opacity > OPAQUE).to(here.dtype)
    return ((here - there).abs() * is_there).sum() / (3 * is_there.sum()).clamp_min(1)


def _of_views(image: RenderOutput, first: int) -> RenderOutput:
    """The views from number `first` on; the count of samples is that of all."""
    parts = {
        name: value[first:] for name, value in vars(image).items() if name != "n_samples"
    }
    return RenderOutput(**parts, n_samples=image.n_samples)

