"""Guidance by a model of views: one picture of an object, and the pose of the view that is asked.

In the place of text rows stand the reference picture's tokens with each view's pose, and the
reference's latents beside the noisy ones (`diffusion.view_model`); unconditional rows have zeros
for both. Predictions are combined as e_0 + s (e_c - e_0) (Zero-1-to-3, Liu et al. 2023).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dsd_fast.diffusion.reference_picture import relative_pose
from dsd_fast.diffusion.view_model import ViewModel
from dsd_fast.guidance.base import Guidance, GuidanceConfig
from dsd_fast.guidance.baselines import SDS
from dsd_fast.guidance.dsd import DSDGuidance
from dsd_fast.guidance.trajectory import CameraGrid
from dsd_fast.upload import Pack


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


class PoseRows(NamedTuple):
    """What decides the context of B views, [B conditional | B unconditional]."""

    pose: Tensor  # float32 [2B,4]
    known: Tensor  # float32 [2B]: 1, and 0 for unconditional rows
    weights: None = None


class _OfViews(Guidance):
    """What predictions of a model of views are conditioned on: the picture, and each view's pose.

    Args:
        cfg: settings; without Perp-Neg and mirrored trajectories, with the standard convention.
        model: conditioned on its picture.
        prompts: see `Reference`.
        noise, max_steps: as for `Guidance`.
    Raises:
        ValueError: settings that do not fit a model of views.
    """

    model: ViewModel

    def __init__(
        self,
        cfg: GuidanceConfig,
        model: ViewModel,
        prompts: Reference,
        noise: Tensor,
        max_steps: int,
    ) -> None:
        check_settings(cfg)
        super().__init__(cfg, model, prompts, noise, max_steps)

    def _condition(self, prompts: Reference) -> None:
        self.reference = prompts
        self._bins = OrbitBins(prompts)
        self._base = self.model.base_context
        self._to_context = self.model.pose_weight.T.contiguous()

    def _rows_of(self, elevation_deg: Tensor, azimuth_deg: Tensor) -> PoseRows:
        at = self.reference
        last = math.radians(90 - at.elevation) if at.polar else 0.0
        last = torch.full_like(elevation_deg, last)
        pose = relative_pose(elevation_deg, azimuth_deg, last, at.elevation, at.azimuth, 0.0)
        known = torch.cat([torch.ones(len(pose)), torch.zeros(len(pose))])
        return PoseRows(torch.cat([pose, pose]), known)

    def _text(self, rows: Mapping[str, Tensor] | Pack) -> Tensor:
        # A sum of four products: as a matrix product it would be rounded as the GPU's settings say.
        moved = (rows["pose"][:, :, None] * self._to_context).sum(1)
        context = (self._base + moved[:, None]) * rows["known"][:, None, None]
        return context.to(self.model.dtype)


class ViewDSD(_OfViews, DSDGuidance):
    """Diverse Score Distillation by a model of views; arguments and errors: `_OfViews`.

    A trajectory is that of (seed noise, reference picture, view): with `exact` that of the view
    itself, with `cached` that of the centre of its bin (`OrbitBins`), and training cameras are to
    stand on those centres.
    """


class ViewSDS(_OfViews, SDS):
    """Score Distillation Sampling by a model of views, the baseline; arguments and errors:
    `_OfViews`."""


_CLASSES: dict[str, type[_OfViews]] = {"dsd": ViewDSD, "sds": ViewSDS}


def check_settings(cfg: GuidanceConfig) -> None:
    """ValueError for settings that do not fit a model of views."""
    if cfg.method not in _CLASSES:
        raise ValueError(
            f"guidance.method: expected one of {', '.join(_CLASSES)} with a model of views, got "
            f"{cfg.method!r}"
        )
    for name, wanted, why in (
        ("use_perp_neg", False, "a picture has no negative views"),
        ("standard_cfg", True, "models of views are guided by e_0 + s (e_c - e_0)"),
        ("mirror_trajectory", False, "a picture tells left from right"),
    ):
        if getattr(cfg, name) != wanted:
            flag = name.replace("_", "-")
            raise ValueError(
                f"guidance.{name}: expected {wanted} ({why}), got {getattr(cfg, name)}; pass "
                f"--guidance.{'' if wanted else 'no-'}{flag}"
            )


def make_view_guidance(
    cfg: GuidanceConfig, model: ViewModel, reference: Reference, noise: Tensor, max_steps: int
) -> Guidance:
    """The formulation that `cfg.method` names; arguments and errors: `_OfViews`."""
    check_settings(cfg)
    return _CLASSES[cfg.method](cfg, model, reference, noise, max_steps)
