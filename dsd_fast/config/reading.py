"""Files of settings, which may be anybody's: opened with care, read with bounds.

Whatever a file holds, reading it takes a moment and ends in values or in a ConfigError with the
file, and the line or key.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsd_fast.config.codec import from_dict
from dsd_fast.config.tree import TrainConfig
from dsd_fast.ranges import ConfigError, check_path, shown

# Far above what files of settings have: a config.json takes 8 kB and nests 3 levels.
MOST_BYTES = 1 << 18
DEEPEST = 32
# Of a number; the largest that a setting takes has 19.
MOST_DIGITS = 40


def read_text(path: Path) -> str:
    """The UTF-8 text of a regular file, without a byte order mark.

    Raises:
        ConfigError: it is missing, too large, no regular file or no text.
    """
    try:
        check_path(path)
        # Opening a pipe waits for who writes it, unless it is told not to.
        file = os.open(
            path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        )
        with open(file, "rb") as opened:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise ConfigError(f"the configuration {path} is not a regular file")
            content = opened.read(MOST_BYTES + 1)
    except ConfigError:
        raise
    except OSError as error:
        # Some systems do not open folders at all.
        reason = "it is a folder" if os.path.isdir(path) else error.strerror
        raise ConfigError(f"cannot read the configuration {path}: {reason}") from error
    except ValueError as error:
        raise ConfigError(f"cannot read the configuration: {error}") from error
    if len(content) > MOST_BYTES:
        raise ConfigError(
            f"the configuration {path} is larger than {MOST_BYTES >> 10} KiB: it is not one"
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        utf16 = content[:2] in (b"\xff\xfe", b"\xfe\xff")
        mend = "save it as UTF-8, it is UTF-16" if utf16 else f"byte {error.start} is not UTF-8"
        raise ConfigError(f"cannot read the configuration {path} as text: {mend}") from None


def read_config(path: Path) -> TrainConfig:
    """The configuration in a run's config.json.

    Raises:
        ConfigError: the file cannot be read, or holds what is no setting, with its path.
    """
    text = read_text(path)
    try:
        values = json.loads(text, object_pairs_hook=_unique, parse_int=integer, parse_float=_float)
    except RecursionError:
        raise ConfigError(f"{path} is not a JSON file of settings: it nests too deep") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not a JSON file of settings: {error}") from error
    return naming(path, from_dict, TrainConfig, values)


def naming(path: Path, function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function gives; its ConfigErrors begin with the file that is to blame."""
    try:
        return function(*arguments)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def integer(digits: str) -> int:
    """An integer of a file; ValueError for one so long that no setting takes it."""
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"expected at most {MOST_DIGITS} digits, got a number of {len(digits)}")
    return int(digits)


def _float(digits: str) -> float:
    if len(digits) > 10 * MOST_DIGITS:
        raise ValueError(f"expected a shorter number, got one of {len(digits)} digits")
    return float(digits)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON's object; of two values of one name the first would be lost without a word."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{shown(twice)} is there twice")
    return values
