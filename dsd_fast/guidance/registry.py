"""The formulations by name; each registers itself once, where it is defined."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from dsd_fast.guidance.base import Guidance

# What `--guidance.method` chooses from.
FORMULATIONS: dict[str, type[Guidance]] = {}

Formulation = TypeVar("Formulation", bound="type[Guidance]")


def formulation(cls: Formulation) -> Formulation:
    """Class decorator: register a `Guidance` under its `name`."""
    if FORMULATIONS.get(cls.name, cls).__qualname__ != cls.__qualname__:
        raise ValueError(f"there is a formulation {cls.name!r} already: {FORMULATIONS[cls.name]}")
    FORMULATIONS[cls.name] = cls
    return cls
