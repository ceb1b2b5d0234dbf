"""The legal range of every setting: declared on its field, enforced by one function.

    @dataclass
    class FanConfig:
        # Turns a second.
        speed: Positive = 2.0

    check(FanConfig(speed=-1.0))  # ConfigError: speed: expected more than 0, got -1.0

Numbers are finite unless a field says otherwise (`pydantic.AllowInfNan`), and a bool is no number.
What several fields of one class must have in common is the matter of its method `validate`, whose
ConfigErrors begin with the name of a field, as all do.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro
from annotated_types import Interval
from pydantic import AfterValidator, ConfigDict, Strict, TypeAdapter, ValidationError

from dsd_fast.schedules import Schedule, ScheduleValue

T = TypeVar("T")

# Numbers meet in float32, which ends at 3.4e38, and some are squared.
LARGEST = 1e18
MOST = 2**31 - 1


class ConfigError(ValueError):
    """A setting that does not exist, does not fit, or cannot work."""


def _ordered(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError(f"expected (low, high), got {pair}")
    return pair


def _schedule(low: float, high: float) -> AfterValidator:
    """A number or a schedule with values in a range."""

    def checked(value: ScheduleValue) -> ScheduleValue:
        values = [value for _, value in Schedule.parse(value).knots]
        if not all(low <= v <= high for v in values):
            raise ValueError(f"expected values of {low:g} to {high:g}, got {values}")
        return value

    return AfterValidator(checked)


Number = Annotated[float, Interval(ge=-LARGEST, le=LARGEST)]
Positive = Annotated[float, Interval(gt=0, le=LARGEST)]
NonNegative = Annotated[float, Interval(ge=0, le=LARGEST)]
Share = Annotated[float, Interval(ge=0, le=1)]
# A share of what was before.
Decay = Annotated[float, Interval(ge=0, lt=1)]
# What keeps a quotient finite: more than zero in float32 too.
Epsilon = Annotated[float, Interval(ge=1e-30, le=LARGEST)]
# In units of the world, where an object's size is about 1.
Length = Annotated[float, Interval(ge=1e-3, le=1e6)]
Spread = Annotated[float, Interval(ge=0, le=1e6)]
# Degrees.
Elevation = Annotated[float, Interval(ge=-90, le=90)]
# Degrees of a view that looks level at least a little: straight up or down no side is up.
ViewElevation = Annotated[float, Interval(gt=-90, lt=90)]
FieldOfView = Annotated[float, Interval(ge=0.1, le=179)]

Count = Annotated[int, Interval(ge=1, le=MOST)]
# Steps, or another number of things of which there may be none.
CountOrNone = Annotated[int, Interval(ge=0, le=MOST)]
Bins = Annotated[int, Interval(ge=1, le=3600)]
Pixels = Annotated[int, Interval(ge=1, le=8192)]
Neurons = Annotated[int, Interval(ge=1, le=4096)]
Layers = Annotated[int, Interval(ge=1, le=64)]

Color = tuple[Share, Share, Share]
# The lower one first.
Span = Annotated[tuple[T, T], AfterValidator(_ordered)]
# One for the whole run, or one for each resolution stage.
Stages = T | tuple[T, ...]
Weight = Annotated[ScheduleValue, _schedule(0, LARGEST)]
ShareOverRun = Annotated[ScheduleValue, _schedule(0, 1)]
# JSON has texts for paths.
AnyPath = Annotated[Path, Strict(False)]


class Registered:
    """A field whose choices are known at run time alone, because more may be registered.

    Its type is `Annotated[str, choices.check, choices.flag]`; `flag` lists the names in --help.
    """

    def __init__(self, names: Callable[[], Iterable[str]]) -> None:
        def known(value: str) -> str:
            if value not in names():
                raise ValueError(f"expected one of {', '.join(names())}, got {value!r}")
            return value

        self.check = AfterValidator(known)
        self.flag = tyro.conf.arg(
            constructor_factory=lambda: typing.cast(type, Literal[tuple(names())]),
            # tyro takes the default of such a type for a list of words.
            help_behavior_hint=lambda default: f"(default: {default.strip(chr(39) + '[]')})",
        )


def check(config: Any, flags: bool = False, where: str = "") -> None:
    """Raise ConfigError for the first value of a dataclass tree that cannot work.

    With `flags` the message names the command line's flag; `where` is the path of `config`.
    """
    for name, kind in field_types(type(config)).items():
        value, path = getattr(config, name), f"{where}{name}"
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            if not isinstance(value, kind):
                raise ConfigError(f"{path}: expected a {kind.__name__}, got {value!r}")
            check(value, flags, f"{path}.")
            continue
        try:
            convert(type(config), name, value, path)
        except ConfigError as error:
            flag = f": pass another --{path.replace('_', '-')}" * flags
            raise ConfigError(f"{error}{flag}") from None
    if hasattr(config, "validate"):
        try:
            config.validate()
        except ConfigError as error:
            raise ConfigError(f"{where}{error}") from None


def convert(cls: type, name: str, value: Any, path: str) -> Any:
    """A value, as JSON, YAML or Python give it, as that of a field; ConfigError naming `path`."""
    try:
        return _adapters(cls)[name].validate_python(
            tuple(value) if isinstance(value, list) else value
        )
    except ValidationError as error:
        raise ConfigError(f"{path}: {_in_words(error, value)}") from None


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """Name -> type of a dataclass's fields, with the ranges."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {spec.name: hints[spec.name] for spec in dataclasses.fields(cls)}


@functools.cache
def _adapters(cls: type) -> dict[str, TypeAdapter]:
    strict = ConfigDict(strict=True, allow_inf_nan=False)
    return {
        name: TypeAdapter(kind, config=strict)
        for name, kind in field_types(cls).items()
        if not dataclasses.is_dataclass(kind)
    }


# What pydantic misses, in words: another type, which one of several ways to write a value may take,
_TYPES = {
    "bool_type": "true or false",
    "float_type": "a number",
    "int_type": "an integer",
    "literal_error": "{expected}",
    "none_required": "nothing",
    "path_type": "a path",
    "string_type": "a text",
    "tuple_type": "a list",
}
# or another value.
_VALUES = {
    "finite_number": "a finite number",
    "greater_than": "more than {gt:.10g}",
    "greater_than_equal": "{ge:.10g} or more",
    "less_than": "less than {lt:.10g}",
    "less_than_equal": "{le:.10g} or less",
    "missing": "{length} values",
    "too_long": "{max_length} values",
}


def _in_words(error: ValidationError, value: Any) -> str:
    # A value of the right type for one of several ways to write it is told what that one wants.
    errors = [e for e in error.errors() if e["type"] not in _TYPES] or error.errors()
    expected, words = {}, _TYPES | _VALUES
    for item in errors:
        kind, context = item["type"], item.get("ctx", {})
        if kind == "value_error":
            return str(context["error"])
        if kind == "missing":
            context = {"length": int(item["loc"][-1]) + 1}
        expected[kind] = words[kind].format(**context) if kind in words else item["msg"]
    return f"expected {' or '.join(expected.values())}, got {value!r}"
