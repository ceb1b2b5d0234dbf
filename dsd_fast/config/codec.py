"""Configurations as nested dictionaries of JSON values, and settings by their dotted paths."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from dsd_fast.ranges import ConfigError, convert, field_types, shown

T = TypeVar("T")

# Characters of a setting's path in a message; those that exist are shorter.
LONGEST_KEY = 100


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass tree as nested dictionaries of JSON values."""
    return dataclasses.asdict(config, dict_factory=_json_dict)


def from_dict(cls: type[T], values: dict[str, Any], where: str = "") -> T:
    """The dataclass tree that `to_dict` made; absent fields take their defaults.

    Raises ConfigError for a name that does not exist (with the nearest one) and for a value of the
    wrong type or out of its range. A class whose fields were others once has a static method
    `of_older` that gives old values as today's.
    """
    if not isinstance(values, dict):
        name = where.removesuffix(".") or "the configuration"
        raise ConfigError(f"{name}: expected a group of settings, got {shown(values)}")
    values = getattr(cls, "of_older", dict)(values)
    types_of = field_types(cls)
    arguments = {}
    for name, value in values.items():
        path = f"{where}{name}"
        if name not in types_of:
            path = path if len(path) <= LONGEST_KEY else f"{path[:LONGEST_KEY]}..."
            raise ConfigError(f"{path}: there is no such setting{nearest(name, types_of)}")
        kind = types_of[name]
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            arguments[name] = from_dict(kind, value, f"{path}.")
        else:
            arguments[name] = convert(cls, name, value, path)
    return cls(**arguments)


def set_value(config: object, path: str, value: Any) -> None:
    """Set one value of a dataclass tree by its dotted path, with the checks of `from_dict`."""
    *parents, name = path.split(".")
    for parent in parents:
        config = getattr(config, parent)
    setattr(config, name, convert(type(config), name, value, path))


def leaves(config: Any, where: str = "") -> dict[str, Any]:
    """Dotted path -> value of every leaf of a dataclass tree."""
    found: dict[str, Any] = {}
    for spec in dataclasses.fields(config):
        value, path = getattr(config, spec.name), f"{where}{spec.name}"
        if dataclasses.is_dataclass(value):
            found |= leaves(value, f"{path}.")
        else:
            found[path] = value
    return found


def nearest(name: object, names: Iterable[str]) -> str:
    """The end of an error message: "; did you mean ...?", or nothing when nothing is near."""
    if not isinstance(name, str) or len(name) > LONGEST_KEY:
        return ""
    matches = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]}?" if matches else ""


def _json_dict(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in items}
