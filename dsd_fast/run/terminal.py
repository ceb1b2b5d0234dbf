"""Standard streams without tracebacks: closed, full, gone, or of another encoding."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

# What a shell reports for a command that SIGPIPE ended.
_SIGPIPE_EXIT_CODE = 141


class Unfailing:
    """A text stream whose output is lost where it cannot be written, without an error.

    The reader of a pipe may have left, the disk of a log may be full, the terminal closed.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except (OSError, ValueError):
            return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def set_up() -> None:
    """Make the process's standard streams take whatever is written to them.

    A stream that the process was started without leads nowhere, and characters that its encoding
    lacks are written as escapes. Errors of standard error are swallowed (`Unfailing`); those of
    standard output are the reader's, who has asked for it (`reader_may_leave`).
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The lowest number that is free: no other file shall be taken for a standard stream.
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            nowhere = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
            setattr(sys, name, nowhere)
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if not isinstance(sys.stderr, Unfailing):
        sys.stderr = Unfailing(sys.stderr)


@contextmanager
def reader_may_leave() -> Iterator[None]:
    """Set up the streams; the reader of the output (`| head`) may leave without a traceback."""
    set_up()
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more when it ends: give it a place that takes what is left.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(_SIGPIPE_EXIT_CODE) from None
