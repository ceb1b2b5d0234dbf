"""Guidance by a model of views: one picture of an object, and the pose of the view that is asked.

In the place of text rows stand the reference picture's tokens with each view's pose, and the
reference's latents beside the noisy ones (`diffusion.view_model`); unconditional rows have zeros
for both. Predictions are combined as e_0 + s (e_c - e_0) (Zero-1-to-3, Liu et al. 2023).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dsd_fast.diffusion.condition import Condition
from dsd_fast.diffusion.reference_picture import relative_pose
from dsd_fast.diffusion.view_model import ViewModel
from dsd_fast.guidance.conditions.base import Conditions, Rows
from dsd_fast.guidance.conditions.bins import CameraGrid
from dsd_fast.guidance.config import GuidanceConfig


@dataclass(frozen=True)
class Reference:
    """Where the reference picture was taken from, and which views are asked for.

    All views are taken from the reference's distance: the pose's last entry is zero, or, with
    `polar`, the reference's polar angle in radians, which Stable Zero123 was trained with.
    """

    # Degrees.
    elevation: float
    azimuth: float
    # Lowest and highest elevation of the views in degrees.
    elevation_range: tuple[float, float]
    # Bins of cached trajectories over the circle, and over the range of elevations.
    azimuth_bins: int
    elevation_bins: int
    polar: bool = False


class OrbitBins(CameraGrid):
    """Cameras grouped into bins of azimuth, all around, and elevation; each has one trajectory.

    Unlike text, which sees |azimuth| alone, a picture tells left from right and how high the camera
    is.
    """

    def __init__(self, reference: Reference) -> None:
        bins = (reference.azimuth_bins, reference.elevation_bins)
        super().__init__(*bins, (-180.0, 180.0), reference.elevation_range)


class PoseConditions(Conditions):
    """The picture, and each view's pose.

    A trajectory is that of (seed noise, reference picture, view): an exact one that of the view
    itself, a cached one that of the centre of its bin (`OrbitBins`), and training cameras are to
    stand on those centres.

    Args:
        reference: where the picture was taken from.
        model: conditioned on the picture.
        cfg: settings of the guidance.
    Raises:
        ValueError: settings that do not fit a model of views.
    """

    kind, title = "pose", "a model of views"
    required: ClassVar = {
        "use_perp_neg": (False, "a picture has no negative views"),
        "standard_cfg": (True, "models of views are guided by e_0 + s (e_c - e_0)"),
        "mirror_trajectory": (False, "a picture tells left from right"),
    }

    def __init__(self, reference: Reference, model: ViewModel, cfg: GuidanceConfig) -> None:
        super().__init__(cfg)
        self.reference = reference
        self.bins = OrbitBins(reference)
        self._model = model

    def rows(self, elevation_deg: Tensor, azimuth_deg: Tensor) -> Rows:
        at = self.reference
        last = math.radians(90 - at.elevation) if at.polar else 0.0
        last = torch.full_like(elevation_deg, last)
        pose = relative_pose(elevation_deg, azimuth_deg, last, at.elevation, at.azimuth, 0.0)
        known = torch.cat([torch.ones(len(pose)), torch.zeros(len(pose))])
        return Rows({"pose": torch.cat([pose, pose]), "known": known})

    def condition(self, columns: Mapping[str, Tensor]) -> Condition:
        return self._model.conditions(columns["pose"], columns["known"])
