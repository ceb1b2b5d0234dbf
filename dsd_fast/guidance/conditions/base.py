"""What the views of a step ask for: from camera angles to the rows of the UNet's batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from torch import Tensor

from dsd_fast.diffusion.condition import Condition
from dsd_fast.guidance.conditions.bins import CameraBins
from dsd_fast.guidance.config import GuidanceConfig
from dsd_fast.guidance.registry import FORMULATIONS

if TYPE_CHECKING:
    from dsd_fast.guidance.base import Guidance


class Rows(NamedTuple):
    """What the host decides about the rows of B items, in the order of `guidance.rows`."""

    # By name, on the CPU, an entry a row: [R*B,...].
    columns: dict[str, Tensor]
    # Of Perp-Neg's negatives, float32 [B,2]; None where there are none.
    weights: Tensor | None = None


class Conditions(ABC):
    """What predictions are conditioned on, view by view: a new kind is one class.

    The host's part, `rows`, takes camera angles to a few numbers a row; the device's, `condition`,
    takes those numbers to tensors without waiting, so that a CUDA graph can hold it.

    Attributes:
        kind: the name by which formulations say that they work with it (`Guidance.works_with`).
        title: the same in an error text: "... with a model of single views".
        required: settings of the guidance that have one value here, and why.
        n_views: views that the UNet predicts together; they are one item of guidance.
        bins: cameras that share a cached trajectory.

    Args:
        cfg: settings of the guidance.
    Raises:
        ValueError: settings that do not fit.
    """

    kind: ClassVar[str]
    title: ClassVar[str]
    required: ClassVar[dict[str, tuple[bool, str]]] = {}
    n_views: int = 1
    bins: CameraBins

    def __init__(self, cfg: GuidanceConfig) -> None:
        self.check(cfg)

    @classmethod
    def suit(cls, formulation: type[Guidance]) -> bool:
        """Whether a formulation works with these conditions."""
        return formulation.works_with is None or cls.kind in formulation.works_with

    @classmethod
    def check(cls, cfg: GuidanceConfig) -> None:
        """ValueError for a formulation or a setting that does not fit; asks for no model."""
        fitting = [name for name, f in FORMULATIONS.items() if cls.suit(f)]
        if cfg.method not in fitting:
            raise ValueError(
                f"guidance.method: expected one of {', '.join(fitting)} with {cls.title}, got "
                f"{cfg.method!r}"
            )
        for name, (wanted, why) in cls.required.items():
            if getattr(cfg, name) != wanted:
                flag = f"--guidance.{'' if wanted else 'no-'}{name.replace('_', '-')}"
                raise ValueError(
                    f"guidance.{name}: expected {wanted} with {cls.title} ({why}), got "
                    f"{getattr(cfg, name)}; pass {flag}"
                )

    def items(self, elevation_deg: Tensor, azimuth_deg: Tensor) -> tuple[Tensor, Tensor]:
        """Angles of the items [B] that views [B*n_views] at these angles are; on the CPU.

        Raises:
            ValueError: views that do not belong together.
        """
        return elevation_deg, azimuth_deg

    @abstractmethod
    def rows(self, elevation_deg: Tensor, azimuth_deg: Tensor) -> Rows:
        """Rows of items at these angles [B] on the CPU."""

    @abstractmethod
    def condition(self, columns: Mapping[str, Tensor]) -> Condition:
        """What the rows of such columns, on the device, are conditioned on: in the model's dtype.

        [R*B,...], or [R*B,n_views,...] where views are predicted together.
        """
