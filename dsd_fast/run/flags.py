"""Flags of all commands, read alike."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import tyro

from dsd_fast.run.terminal import reader_may_leave

T = TypeVar("T")

# Columns of --help and of messages about flags: under the first tyro does not end, and a terminal
# that says it has millions would be filled with spaces.
_NARROWEST, _WIDEST = 40, 250


def parse(kind: type[T], module: str, argv: Sequence[str] | None, **default: Any) -> T:
    """The dataclass that flags give.

    Args:
        module: what follows `python -m`.
        argv: the flags, by default those of the process.
        default: the starting values, as `default=`, where they are not those of the class.
    Raises:
        SystemExit: --help (code 0), or flags that do not exist or cannot be read (code 2).
        ConfigError: of the dataclass's own checks.
    """
    args = None if argv is None else list(argv)
    with reader_may_leave(), _readable_width():
        return tyro.cli(kind, prog=f"python -m {module}", args=args, **default)


@contextmanager
def _readable_width() -> Iterator[None]:
    columns = shutil.get_terminal_size().columns
    readable = min(max(columns, _NARROWEST), _WIDEST)
    before = os.environ.get("COLUMNS")
    if readable == columns:
        yield
        return
    os.environ["COLUMNS"] = str(readable)
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before
