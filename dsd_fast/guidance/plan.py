"""What the host decides about a guidance step, in the form in which the device reads it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dsd_fast.upload import Pack

# Where the trajectory's noise eps_o comes from: the whole trajectory simulated, one UNet call from
# a cached state, or a table of earlier such calls.
# Other formulations take noise that was drawn, or find it by inversion of the rendering.
# Anchored views have the trajectory's clean image instead, and no UNet call.
Noise = Literal["simulated", "predicted", "tabulated", "anchored", "drawn", "inverted"]


class PlanKind(NamedTuple):
    """All that a step's course on the device depends on: a CUDA graph for each kind."""

    n_items: int
    noise: Noise
    # Whether one batch, that of t, is all the UNet is asked for beside the trajectory: t = t_delta
    # for every item (deviations.md Q8), or the trajectory's own noise has the place of the
    # prediction at t_delta.
    shared: bool
    # UNet calls of an inversion.
    strides: int = 0


class Plan:
    """The host's part of a guidance step, made by `Guidance.plan`.

    Attributes: `kind`; `t`, `t_delta`: int64 [B] on the CPU; `tensors`: a `Pack` on the device with
    - t, t_delta: int64 [B]; mirrored: bool [B], views that see the trajectory's mirror image;
    - first, second: int64 [N] and share: float32 [N], the text rows of every UNet call of the step,
      one call after the other (`conditions.text.TextMix`), or the columns of other `Conditions`;
    - weights: float32 [B,2], of the views' negatives, where there are any;
    - trajectory_share: float32 [B], where it is not zero throughout;
    - predicted: state, prediction, level: int64 [B] (`tables.Reach`), bin_weights: as weights;
    - anchored: state, prediction, level: int64 [B] (`tables.Reach`), the other names left out;
    - tabulated: prediction, below: int64 [B], mix: float32 [B];
    - of other formulations than DSD what they drew (`Guidance.draw_noise`), by name;
    - inverted: path, int64 [strides,2,B], the levels between which each stride goes.

    Of a multi-view model an item is an object.

    Beside what the host decides: `surface`, None or what `seeing` was told.
    """

    def __init__(
        self,
        kind: PlanKind,
        t: Tensor,
        t_delta: Tensor,
        tensors: Mapping[str, Tensor],
        device: torch.device,
    ):
        self.kind = kind
        self.t = t
        self.t_delta = t_delta
        self._host = Pack(tensors, device)
        self._device = device
        self._tensors: Pack | None = None
        self.surface: Tensor | None = None

    @property
    def tensors(self) -> Pack:
        """On the device from the first use on, always at the same address."""
        if self._tensors is None:
            self._tensors = self._host.to(self._device)
        return self._tensors

    def copy_(self, other: Plan) -> None:
        """Take over another plan of the same kind: one copy from the host to the same addresses.

        A CUDA graph of `at_plan` with this plan then runs the other one's step.
        """
        if other.kind != self.kind:
            raise ValueError(f"expected a plan of {self.kind}, got one of {other.kind}")
        self.t, self.t_delta = other.t, other.t_delta
        self.tensors.copy_(other._host)

    def seeing(self, surface: Tensor) -> Plan:
        """This plan, with the same tensors, for a formulation that `needs_surface`.

        Args:
            surface: [B*V,H,W,4] float32 on the device, of each view's pixels: the point at which
                they see the object, in half edges of the box around it, its centre at the origin;
                and their opacity. Where that is zero the point may be anywhere.
        """
        if surface.ndim != 4 or surface.shape[-1] != 4:
            raise ValueError(
                "guidance: expected a surface [B,H,W,4], points and opacity, got "
                f"{list(surface.shape)}"
            )
        _ = self.tensors  # made once, for both
        told = copy.copy(self)
        told.surface = surface
        return told
