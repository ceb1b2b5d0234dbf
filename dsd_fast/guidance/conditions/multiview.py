"""Conditions of a model that predicts four views at once (MVDream, mathematics.md 11.3).

An item of guidance is then an object: its four views' latents stand side by side as 4C channels,
with one level and one trajectory, so that trajectories, tables and passes are those of single
views. Only the UNet's batch has a row a view, and with the text each view's camera.

The seed noise is [4,C,h,w], one for each quarter of the circle; a trajectory depends on the four
cameras' rotations, which elevation and the first azimuth, modulo 90 degrees, decide.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dsd_fast.diffusion.condition import Condition
from dsd_fast.diffusion.model import DiffusionModel
from dsd_fast.diffusion.networks.multiview_unet import CAMERA_NUMBERS
from dsd_fast.diffusion.text import PromptEmbeddings
from dsd_fast.guidance.conditions.base import Conditions, Rows
from dsd_fast.guidance.conditions.bins import CameraGrid
from dsd_fast.guidance.conditions.text import text_mix
from dsd_fast.guidance.config import GuidanceConfig
from dsd_fast.ranges import Bins, Share, check
from dsd_fast.scene.cameras import camera_condition

# Degrees by which angles of views that belong together may be off, for their rounding.
_TOLERANCE = 1e-2


@dataclass
class MultiViewConfig:
    # Cached trajectories: bins of the first view's azimuth, within a quarter of the circle ...
    azimuth_bins: Bins = 12
    # ... and of the elevation, within --cameras.elevation-range. Each of the azimuth_bins x
    # elevation_bins has a trajectory of its own, that of the cameras in its middle.
    elevation_bins: Bins = 4
    # Train on views from the bins' middles alone, whose trajectories are their own; without it from
    # everywhere, each with the noise of the nearest one's.
    at_bins: bool = True
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


class MultiViewConditions(Conditions):
    """The text of each view's side, and its camera.

    With cached trajectories those of a bin's middle serve the bin (`QuarterBins`); cameras are to
    be there (`camera_lattice`), where they are the cameras' own.

    Args:
        prompts: embeddings of the four view directions, of which each view takes its own's.
        model: predicts several views at once.
        cfg: settings of the guidance, without Perp-Neg and mirrored trajectories.
        views: settings of multi-view guidance.
        elevation_range: that of the cameras, degrees.
    Raises:
        ValueError: settings or a model that do not fit.
    """

    kind, title = "views", "a multi-view model"
    required: ClassVar = {
        "use_perp_neg": (False, "the model is told the cameras, and needs no negative views"),
        "mirror_trajectory": (False, "an object's views are one trajectory, without mirror image"),
    }

    def __init__(
        self,
        prompts: PromptEmbeddings,
        model: DiffusionModel,
        cfg: GuidanceConfig,
        views: MultiViewConfig,
        elevation_range: tuple[float, float],
    ) -> None:
        super().__init__(cfg)
        if model.n_views == 1:
            raise ValueError("multi-view guidance: expected a model of several views, got one view")
        self.n_views, self.views = model.n_views, views
        self.bins = QuarterBins(views, elevation_range, self.n_views)
        self._slots = torch.arange(self.n_views) * (360.0 / self.n_views)
        self._bank = torch.cat([prompts.text_vd, prompts.uncond_vd]).to(model.device)
        self._dtype = model.dtype

    def items(self, elevation_deg: Tensor, azimuth_deg: Tensor) -> tuple[Tensor, Tensor]:
        """Elevation and first azimuth of the objects: [G] of [G*n_views]."""
        azimuth = azimuth_deg.view(-1, self.n_views)
        elevation = elevation_deg.expand(azimuth.numel()).view_as(azimuth)
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
        return elevation[:, 0], first[:, 0]

    def rows(self, elevation_deg: Tensor, azimuth_deg: Tensor) -> Rows:
        azimuth = (azimuth_deg[:, None] + self._slots).flatten()
        elevation = elevation_deg.repeat_interleave(self.n_views)
        first = text_mix(elevation, azimuth, perp_neg=False).first.view(-1, self.n_views)
        cameras = camera_condition(elevation, azimuth).view(-1, self.n_views, CAMERA_NUMBERS)
        return Rows({"first": first, "camera": torch.cat([cameras, cameras])})

    def condition(self, columns: Mapping[str, Tensor]) -> Condition:
        first = columns["first"]
        text = self._bank.index_select(0, first.flatten()).to(self._dtype)
        return Condition(text.unflatten(0, first.shape), camera=columns["camera"].to(self._dtype))


def camera_lattice(
    cfg: GuidanceConfig,
    views: MultiViewConfig,
    elevation_range: tuple[float, float],
    n_views: int,
) -> QuarterBins | None:
    """Where training cameras are to be, of all steps or of the anchored ones: the middles of the
    bins that have cached trajectories."""
    if cfg.method != "dsd" or cfg.trajectory != "cached":
        return None
    if not (views.at_bins or cfg.has_anchors):
        return None
    return QuarterBins(views, elevation_range, n_views)
