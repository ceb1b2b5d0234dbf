"""The legal range of every setting: declared on its field, enforced by one function.

    @dataclass
    class FanConfig:
        # Turns a second.
        speed: Positive = 2.0

    check(FanConfig(speed=-1.0))  # ConfigError: speed: expected more than 0, got -1.0

Numbers are finite unless a field says otherwise (`pydantic.AllowInfNan`), and a bool is no number.
Texts are such as files, terminals and tokenizers take (`check_text`), paths such as systems do.
What several fields of one class must have in common is the matter of its method `validate`, whose
ConfigErrors begin with the name of a field, as all do.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import typing
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path, PureWindowsPath
from typing import Annotated, Any, Literal, TypeVar

import tyro
from annotated_types import Interval
from pydantic import AfterValidator, ConfigDict, Strict, TypeAdapter, ValidationError

from dsd_fast.schedules import Schedule, ScheduleValue

T = TypeVar("T")

# Numbers meet in float32, which ends at 3.4e38, and some are squared.
LARGEST = 1e18
MOST = 2**31 - 1
# Characters of a text: far more than any text encoder reads.
LONGEST = 10_000
# Runs side by side in one process.
MOST_SEEDS = 1024
# Bytes of a name in a folder, on the usual file systems.
LONGEST_NAME = 255


class ConfigError(ValueError):
    """A setting that does not exist, does not fit, or cannot work."""


def _ordered(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError(f"expected (low, high), got {pair}")
    return pair


def _folder_name(name: str) -> str:
    """A name, or names one below the other, of folders that lie where they are looked for."""
    check_text(name)
    for part in re.split(r"[/\\]", name):
        if part.strip() in ("", ".", "..") or PureWindowsPath(part).anchor or ":" in part:
            raise ValueError(
                f"expected the name of a folder inside another one, got {shown(name)}: it may not "
                'be empty, absolute, "." or "..", or have a colon'
            )
        if len(part.encode()) > LONGEST_NAME:
            raise ValueError(
                f"expected the name of a folder, at most {LONGEST_NAME} bytes, got {shown(name)}"
            )
    return name


def _spelled(path: Path) -> Path:
    """One whose bytes are text: safetensors opens no other."""
    check_encoding(str(path))
    return path


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
# Of checkpoints.
TextPath = Annotated[Path, Strict(False), AfterValidator(_spelled)]
# Of a folder below another one, which it does not leave.
FolderName = Annotated[str, AfterValidator(_folder_name)]
# Of random numbers; what fits 64 bits, so that JSON readers and file names take it.
Seed = Annotated[int, Interval(ge=-(2**63), lt=2**63)]
# The same where numpy draws.
UnsignedSeed = Annotated[int, Interval(ge=0, lt=2**63)]
# Processes.
Workers = Annotated[int, Interval(ge=1, le=1024)]
# Of a graphics device, as EGL numbers them.
DeviceIndex = Annotated[int, Interval(ge=0, le=255)]
# Runs side by side.
Seeds = Annotated[int, Interval(ge=1, le=MOST_SEEDS)]


class Registered:
    """A field whose choices are known at run time alone, because more may be registered.

    Its type is `Annotated[str, choices.check, choices.flag]`; `flag` lists the names in --help.
    """

    def __init__(self, names: Callable[[], Iterable[str]]) -> None:
        def known(value: str) -> str:
            if value not in names():
                raise ValueError(f"expected one of {', '.join(names())}, got {shown(value)}")
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
                raise ConfigError(f"{path}: expected a {kind.__name__}, got {shown(value)}")
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
        value = _adapter(cls, name).validate_python(
            tuple(value) if isinstance(value, list) else value
        )
        _check_texts(value)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_in_words(error, value)}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    return value


def shown(value: object) -> str:
    """A value that came, for a message: `repr`, cut to what a person reads."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, a list in itself
        return f"a {type(value).__name__} that is too long"
    return text if len(text) <= 200 else f"{text[:120]}... ({len(text)} characters)"


def check_text(text: str) -> None:
    """Raise ValueError for text that cannot be written as UTF-8, or has what no text has: control
    characters but tabs and line ends, or more than `LONGEST` characters."""
    if len(text) > LONGEST:
        raise ValueError(f"expected at most {LONGEST} characters, got {len(text)}")
    check_encoding(text)
    for character in text:
        if unicodedata.category(character) == "Cc" and character not in "\t\r\n":
            raise ValueError(
                f"expected text, got {shown(text)} with the control character {character!r}"
            )


def check_encoding(text: str) -> None:
    """Raise ValueError for text that stands for bytes of another encoding than UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(
            f"expected text in UTF-8, got {shown(text)}: type it in a terminal that is set to "
            "UTF-8, with PYTHONUTF8=1 or LANG=C.UTF-8 where the system's encoding is another"
        ) from None


def check_path(path: Path) -> None:
    """Raise ValueError for a path that no system takes: with NUL, or too long."""
    name = str(path)
    try:
        encoded = os.fsencode(name)
    except UnicodeEncodeError:
        raise ValueError(
            f"expected a path that this system's encoding can spell, got {shown(name)}: set "
            "PYTHONUTF8=1 or LANG=C.UTF-8, or rename the file"
        ) from None
    if b"\0" in encoded:
        raise ValueError(f"expected a path, got {shown(name)} with a NUL in it")
    longest = max((len(os.fsencode(part)) for part in path.parts), default=0)
    if longest > LONGEST_NAME or len(encoded) > 4000:
        raise ValueError(
            f"expected a path, its names at most {LONGEST_NAME} bytes, got {shown(name)}"
        )


def _check_texts(value: Any) -> None:
    if isinstance(value, str):
        check_text(value)
    elif isinstance(value, Path):
        check_path(value)
    elif isinstance(value, tuple):
        for item in value:
            _check_texts(item)


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """Name -> type of a dataclass's fields, with the ranges."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {spec.name: hints[spec.name] for spec in dataclasses.fields(cls)}


@functools.cache
def _adapter(cls: type, name: str) -> TypeAdapter:
    strict = ConfigDict(strict=True, allow_inf_nan=False)
    return TypeAdapter(field_types(cls)[name], config=strict)


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
    return f"expected {' or '.join(expected.values())}, got {shown(value)}"
