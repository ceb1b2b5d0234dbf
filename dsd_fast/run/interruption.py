"""Ctrl-C, a scheduler's SIGTERM and a closed terminal, which lose nothing."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# Exit code of a command that was interrupted, whichever signal it was.
EXIT_CODE = 130


def _numbers() -> list[signal.Signals]:
    numbers = [signal.SIGINT, signal.SIGTERM]
    # Windows has none, and `nohup` has it ignored.
    hang_up = getattr(signal, "SIGHUP", None)
    if hang_up is not None and signal.getsignal(hang_up) != signal.SIG_IGN:
        numbers.append(hang_up)
    return numbers


def end_while_loading() -> None:
    """From here on a signal ends the process with a line and the exit code of an interruption.

    For a command that still loads its libraries, in the midst of which no exception is safe.
    """

    def end(number: int, frame: FrameType | None) -> None:
        try:
            print("interrupted before anything was begun", file=sys.stderr, flush=True)
        finally:
            os._exit(EXIT_CODE)

    for number in _numbers():
        signal.signal(number, end)


class Interruption:
    """While active, SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt.

    In a block of `patience` the first of them sets `requested` and no more.

    Outside the main thread, where Python allows no signal handlers, it does nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        # Whether KeyboardInterrupt was, of which a library may make an error of its own.
        self.raised = False
        self._patient = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in _numbers():
                self._previous[number] = signal.signal(number, self._handle)
        return self

    @contextmanager
    def patience(self) -> Iterator[None]:
        """Within it work ends by itself soon after `requested` is set; a second signal raises."""
        self._patient = True
        try:
            yield
        finally:
            self._patient = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        wait = self._patient and not self.requested
        self.requested = True
        if not wait:
            self.raised = True
            raise KeyboardInterrupt

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
