"""Guidance by a model that predicts the four views of an object at once (MVDream, DSD_SPEC 11.3).

An item is an object: its four views' latents stand side by side as 4C channels, with one level and
one trajectory, so that trajectories, tables and passes are those of single views. Only the UNet's
batch has a row a view, and with the text each view's camera. Two formulations:

- `MultiViewDSD`, Diverse Score Distillation. The seed noise is [4,C,h,w], one for each quarter of
  the circle; the trajectory depends on the four cameras' rotations, which elevation and the first
  azimuth, modulo 90 degrees, decide.
- `MultiViewSDS`, MVDream's own: the loss of the reconstructed clean image ("recon", Shi et al.
  2023, Sec. 3.2 and appendix), or Score Distillation Sampling ("sds").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dsd_fast.diffusion.model import DiffusionModel
from dsd_fast.diffusion.networks.multiview_unet import CAMERA_NUMBERS, with_cameras
from dsd_fast.diffusion.text import PromptEmbeddings
from dsd_fast.guidance.base import (
    Guidance,
    GuidanceConfig,
    GuidanceOutput,
    angles,
    distillation_loss,
    levels_of,
)
from dsd_fast.guidance.baselines import SDS
from dsd_fast.guidance.conditions.text import text_mix
from dsd_fast.guidance.dsd import DSDGuidance
from dsd_fast.guidance.passes import Batch
from dsd_fast.guidance.plan import Plan
from dsd_fast.guidance.trajectory import CameraGrid
from dsd_fast.ranges import Bins, Share, check
from dsd_fast.scene.cameras import camera_condition
from dsd_fast.upload import Pack

# Keeps the ratio of two standard deviations finite.
_STD_EPS = 1e-8
# Degrees by which angles of views that belong together may be off, for their rounding.
_TOLERANCE = 1e-2


@dataclass
class MultiViewConfig:
    # Cached trajectories: bins of the first view's azimuth, within a quarter of the circle ...
    azimuth_bins: Bins = 12
    # ... and of the elevation, within --cameras.elevation-range. Training views are at the middle
    # of the bins; each of the azimuth_bins x elevation_bins has a trajectory of its own.
    elevation_bins: Bins = 4
    # For "recon": the share of the reconstruction whose contrast is brought back to that without
    # guidance; 0 leaves it as it is.
    recon_std_rescale: Share = 0.5


class QuarterBins(CameraGrid):
    """Cameras of objects grouped into bins of elevation and of the first view's azimuth.

    A bin's trajectory is that of the four cameras of its middle.

    Args:
        cfg: how many bins.
        elevation_range: lowest and highest elevation of the cameras in degrees.
        n_views: views of an object; azimuths are taken modulo 360 / n_views.
    """

    def __init__(
        self, cfg: MultiViewConfig, elevation_range: tuple[float, float], n_views: int
    ) -> None:
        check(cfg)
        quarter = (0.0, 360.0 / n_views)
        super().__init__(cfg.azimuth_bins, cfg.elevation_bins, quarter, elevation_range)


class ViewRows(NamedTuple):
    """What decides the text rows of G objects, [G conditional | G unconditional]."""

    first: Tensor  # int64 [2G,V]: rows of a bank [text | uncond]
    camera: Tensor  # float32 [2G,V,16]
    weights: None = None


class _MultiView(Guidance):
    """What both formulations share: views folded into objects, and the rows of the UNet's batch.

    Args:
        cfg: settings, without Perp-Neg and mirrored trajectories.
        model: predicts several views at once.
        prompts: embeddings of the four view directions, of which each view takes its own's.
        noise: seed noise [V,C,h,w] for V views at once; or [S*V,C,h,w] for S seeds, object i of a
            batch of S then belonging to seed i.
        max_steps: horizon of the annealing.
        views: settings of multi-view guidance.
        elevation_range: that of the cameras, degrees.
    Raises:
        ValueError: settings or a model that do not fit, or views that do not belong together.
    """

    def __init__(
        self,
        cfg: GuidanceConfig,
        model: DiffusionModel,
        prompts: PromptEmbeddings,
        noise: Tensor,
        max_steps: int,
        views: MultiViewConfig,
        elevation_range: tuple[float, float],
    ) -> None:
        check_settings(cfg)
        if model.n_views == 1:
            raise ValueError("multi-view guidance: expected a model of several views, got one view")
        self.n_views = model.n_views
        self.views = views
        self._bins = QuarterBins(views, elevation_range, self.n_views)
        self._slots = torch.arange(self.n_views) * (360.0 / self.n_views)
        super().__init__(cfg, model, prompts, noise, max_steps)

    # ---- an object's views as one item ----------------------------------------------------------

    @property
    def _item_channels(self) -> int:
        return self.n_views * self.model.latent_channels

    def _fold(self, views: Tensor) -> Tensor:
        """[G*V,C,...] -> [G,V*C,...]."""
        return views.unflatten(0, (-1, self.n_views)).flatten(1, 2)

    def _unfold(self, objects: Tensor) -> Tensor:
        """[G,V*C,...] -> [G*V,C,...]."""
        return objects.unflatten(1, (self.n_views, -1)).flatten(0, 1)

    def state_dict(self) -> dict[str, Tensor]:
        """The seed noise [S*V,C,h,w], on the CPU."""
        return {"noise": self._unfold(self.noise).cpu()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a seed noise [S*V,C,h,w]."""
        super().load_state_dict({"noise": self._folded_noise(state["noise"])})

    def _folded_noise(self, noise: Tensor) -> Tensor:
        """The noise [S,V*C,h,w] of S seeds, whose number it settles."""
        size = self.model.latent_size
        rest = (self.model.latent_channels, size, size)
        if noise.shape[1:] != rest or not len(noise) or len(noise) % self.n_views:
            raise ValueError(
                f"guidance: expected seed noise {[self.n_views, *rest]}, one for each view, the "
                f"size of the model's latents, got {list(noise.shape)}"
            )
        self._n_seeds = len(noise) // self.n_views
        return self._fold(noise)

    def levels(self, n_items: int, step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """t and t_delta of a step for n_items views, int64 [B] on the CPU: one an object."""
        n_objects = self._n_objects(n_items)
        t, t_delta = super().levels(n_objects, step, generator)
        return t.repeat_interleave(self.n_views), t_delta.repeat_interleave(self.n_views)

    def _n_objects(self, n_items: int) -> int:
        if n_items == 0 or n_items % self.n_views:
            raise ValueError(
                f"guidance: expected the {self.n_views} views of every object, got {n_items} views"
            )
        return n_items // self.n_views

    def _objects(
        self,
        elevation_deg: Tensor | float,
        azimuth_deg: Tensor | float,
        t: Tensor | int,
        t_delta: Tensor | int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Elevation, first azimuth, t and t_delta of the objects, [G] on the CPU."""
        elevation, azimuth = angles(elevation_deg, azimuth_deg)
        n_items = azimuth.numel()
        shape = (self._n_objects(n_items), self.n_views)
        elevation, azimuth = elevation.expand(n_items).view(shape), azimuth.view(shape)
        first = azimuth[:, :1]
        off = (azimuth - first - self._slots + 180) % 360 - 180
        part = 360.0 / self.n_views
        if (
            bool((off.abs() > _TOLERANCE).any())
            or bool(((elevation - elevation[:, :1]).abs() > _TOLERANCE).any())
            or bool(((first < -_TOLERANCE) | (first > part + _TOLERANCE)).any())
        ):
            raise ValueError(
                f"guidance: expected the {self.n_views} views of an object at one elevation, their "
                f"azimuths {part:g} degrees apart and rising from one in [0, {part:g}), as cameras "
                f"with n_view = {self.n_views} have them; got elevations {elevation.tolist()} and "
                f"azimuths {azimuth.tolist()}"
            )
        levels = []
        for name, value in (("t", t), ("t_delta", t_delta)):
            level = levels_of(name, value, n_items).reshape(shape)
            if not torch.equal(level, level[:, :1].expand(shape)):
                raise ValueError(
                    f"{name}: expected one level for the views of an object, got {level.tolist()}"
                )
            levels.append(level[:, 0].contiguous())
        return elevation[:, 0], first[:, 0], *levels

    # ---- rows of the UNet's batch ---------------------------------------------------------------

    def _condition(self, prompts: PromptEmbeddings) -> None:
        Guidance._condition(self, prompts)  # past DSD's, whose bins are of single views
        if self._bank.shape[-1] < CAMERA_NUMBERS:
            raise ValueError(
                f"multi-view guidance: expected text embeddings at least {CAMERA_NUMBERS} wide, "
                f"got {self._bank.shape[-1]}"
            )

    def _rows_of(self, elevation_deg: Tensor, azimuth_deg: Tensor) -> ViewRows:
        azimuth = (azimuth_deg[:, None] + self._slots).flatten()
        elevation = elevation_deg.repeat_interleave(self.n_views)
        first = text_mix(elevation, azimuth, perp_neg=False).first.view(-1, self.n_views)
        cameras = camera_condition(elevation, azimuth).view(-1, self.n_views, CAMERA_NUMBERS)
        return ViewRows(first, torch.cat([cameras, cameras]))

    def _text(self, rows: Mapping[str, Tensor] | Pack) -> Tensor:
        """[N,V,L+1,D]: rows of objects, for each view its text and its camera."""
        first, cameras = rows["first"], rows["camera"]
        text = self._bank.index_select(0, first.flatten()).to(self.model.dtype)
        return with_cameras(text, cameras.flatten(0, 1)).unflatten(0, first.shape)

    def _predict(self, batch: Batch, text: Tensor) -> Tensor:
        """As for single views, for rows of objects [N,V*C,h,w] and text [N,V,L+1,D]."""
        rows = self._unfold(batch.rows)
        levels = batch.levels.repeat_interleave(self.n_views)
        return self._fold(super()._predict(Batch(rows, rows, levels), text.flatten(0, 1)))

    @torch.no_grad()
    def plan_levels(
        self,
        elevation_deg: Tensor | float,
        azimuth_deg: Tensor | float,
        t: Tensor | int,
        t_delta: Tensor | int,
        chance: Mapping[str, Tensor] | None = None,
    ) -> Plan:
        """As for single views; angles, levels and chance [B] of B = 4G views, the plan of G
        objects."""
        objects = self._objects(elevation_deg, azimuth_deg, t, t_delta)
        n_items = len(objects[0]) * self.n_views
        for name, drawn in (chance or {}).items():
            if len(drawn) != n_items:
                raise ValueError(
                    f"guidance: expected {name!r} of draw_noise for {n_items} views, "
                    f"got that of {len(drawn)}"
                )
        chance = {name: self._fold(drawn) for name, drawn in (chance or {}).items()}
        return super().plan_levels(*objects, chance)

    def at_plan(self, latents: Tensor, plan: Plan) -> GuidanceOutput:
        """As for single views, for latents [4G,C,h,w]."""
        self._n_objects(len(latents))
        return self._per_view(latents, super().at_plan(self._fold(latents.detach()), plan))

    def _per_view(self, latents: Tensor, output: GuidanceOutput) -> GuidanceOutput:
        """An output for objects as that for their views; the loss is a mean over views."""
        grad = self._unfold(output.grad)
        return GuidanceOutput(
            loss=distillation_loss(latents, grad, output.loss.detach() / self.n_views),
            grad_norm=output.grad_norm,
            t=output.t.repeat_interleave(self.n_views),
            t_delta=output.t_delta.repeat_interleave(self.n_views),
            latents=self._unfold(output.latents),
            target=self._unfold(output.target),
            grad=grad,
            latents_noisy=self._unfold(output.latents_noisy),
            finite=output.finite,
        )


class MultiViewDSD(_MultiView, DSDGuidance):
    """Diverse Score Distillation by a multi-view model; arguments and errors: `_MultiView`.

    With `cached` trajectories those of a bin's middle serve the bin (`QuarterBins`); cameras are to
    be there (`camera_lattice`), where they are the cameras' own.
    """


class MultiViewSDS(_MultiView, SDS):
    """MVDream's own guidance; arguments and errors: `_MultiView`.

    With fresh noise e, x_t = alpha x + sigma e and e^s = e_0 + s (e_y - e_0):
    - "sds": gradient w (e^s(x_t) - e), w = 1 - abar_t or the `weighting`;
    - "recon": gradient x - y, y = r f x0^s + (1 - r) x0^s, where x0^s and x0^y are the clean images
      that e^s and e_y imply, f = std(x0^y) / std(x0^s) over an object's views, and r is
      `recon_std_rescale`.

    A batch has one level t, as in the original.
    """

    def levels(self, n_items: int, step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """One t for all views; t_delta is t."""
        self._n_objects(n_items)
        t, _ = super().levels(self.n_views, step, generator)
        t = t[:1].expand(n_items)
        return t, t

    def _gradient(self, x: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        if self.cfg.method != "recon":
            return super()._gradient(x, plan)
        tensors = plan.tensors
        alpha, sigma = self._signal(tensors["t"])
        noisy = self._noisy(x, tensors["eps"], tensors["t"])
        parts = self._parts(noisy, tensors["t"], self._text(tensors), plan)
        clean, plain = (
            (noisy - sigma * parts.at(scale)) / alpha for scale in (self.cfg.guidance_scale, 1.0)
        )
        return x - rescaled(clean, plain, self.views.recon_std_rescale), noisy


def rescaled(clean: Tensor, plain: Tensor, share: float) -> Tensor:
    """Clean images with a share of their contrast brought to that of plain ones (Lin et al. 2023,
    arXiv 2305.08891, Sec. 3.4, on clean images).

    Args:
        clean, plain: [G,...], with and without guidance; standard deviations are over an item.
        share: 0 to 1.
    """
    if share == 0:
        return clean
    of_plain, of_clean = (
        image.flatten(1).std(1).view(-1, *[1] * (image.ndim - 1)) + _STD_EPS
        for image in (plain, clean)
    )
    return share * (of_plain / of_clean) * clean + (1 - share) * clean


_CLASSES: dict[str, type[_MultiView]] = {
    "dsd": MultiViewDSD,
    "sds": MultiViewSDS,
    "recon": MultiViewSDS,
}


def check_settings(cfg: GuidanceConfig) -> None:
    """ValueError for settings of the guidance that do not fit a multi-view model."""
    if cfg.method not in _CLASSES:
        raise ValueError(
            f"guidance.method: expected one of {', '.join(_CLASSES)} with a multi-view model, got "
            f"{cfg.method!r}"
        )
    for name, why in (
        ("use_perp_neg", "the model is told the cameras, and needs no negative views"),
        ("mirror_trajectory", "an object's views are one trajectory, which has no mirror image"),
    ):
        if getattr(cfg, name):
            flag = name.replace("_", "-")
            raise ValueError(
                f"guidance.{name}: expected False with a multi-view model ({why}), got True; pass "
                f"--guidance.no-{flag}"
            )


def camera_lattice(
    cfg: GuidanceConfig,
    views: MultiViewConfig,
    elevation_range: tuple[float, float],
    n_views: int,
) -> QuarterBins | None:
    """Where training cameras are to be: the middles of the bins that have cached trajectories."""
    if cfg.method != "dsd" or cfg.trajectory != "cached":
        return None
    return QuarterBins(views, elevation_range, n_views)


def make_multiview_guidance(
    cfg: GuidanceConfig,
    model: DiffusionModel,
    prompts: PromptEmbeddings,
    noise: Tensor,
    max_steps: int,
    views: MultiViewConfig,
    elevation_range: tuple[float, float],
) -> Guidance:
    """The formulation that `cfg.method` names; arguments and errors: `_MultiView`."""
    check_settings(cfg)
    return _CLASSES[cfg.method](cfg, model, prompts, noise, max_steps, views, elevation_range)
