"""What a person sees while a command works: a line that changes on a terminal, lines elsewhere."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections import deque
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column
from rich.text import Text

console = Console(stderr=True)

# Where there is no terminal (a log file, a job queue): no line sooner after the last than this; and
# none later, or sooner than a run's share has grown by so much.
PLAIN_LINE_SECONDS = 15.0
LONGEST_SILENCE_SECONDS = 300.0
PLAIN_LINE_PERCENT = 5
# Columns of a terminal with a live line.
NARROWEST = 40
# The time left is told by the pace of so many of the newest reports: the first steps, in which
# kernels are compiled and tables filled, are no measure of the rest.
PACE_REPORTS = 16
# Styles of a message's first word, for those that are more than news.
_STYLES = {logging.WARNING: "yellow", logging.ERROR: "bold red"}


def _is_wide_terminal() -> bool:
    """Columns beside each other leave no room for words in a very narrow one."""
    return console.is_terminal and console.width >= NARROWEST


class _TerminalLines(logging.Handler):
    """Messages as sentences above the live line, not broken: what is copied from them works."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = Text(self.format(record))
            style = _STYLES.get(record.levelno)
            if style:
                text = Text.assemble((f"{record.levelname.lower()}: ", style), text)
            console.print(text, soft_wrap=True)
        except Exception:
            self.handleError(record)


def set_up_logging() -> None:
    """Route the package's log to the console. For commands; a library leaves logging alone."""
    if _is_wide_terminal():
        handler: logging.Handler = _TerminalLines()
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logger = logging.getLogger("dsd_fast")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)


def memory_mib(device: torch.device) -> float:
    """Peak memory so far: allocated on the GPU, or resident in the process; 0 if unknown.

    Asks the allocator, not the device: no synchronisation.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


class Reporter:
    """Tells a person how far a run of `total` steps is. Use as a context manager.

    A call tells of steps that are done; `say` of work that is not in steps. Neither ever names a
    number that only an expert can read: those are in metrics.jsonl.

    Args:
        first_step: steps that were done before, in an earlier session.
        enabled: False shows nothing, and only keeps the time.
    """

    def __init__(self, first_step: int, total: int, enabled: bool = True) -> None:
        self.first_step, self.total = first_step, total
        self.enabled = enabled
        self.started = time.monotonic()
        # What was last told on a line of its own: what was done, percent, when.
        self._told = ("", -math.inf, -math.inf)
        self._pace: deque[tuple[int, float]] = deque(maxlen=PACE_REPORTS)
        self._bar: Progress | None = None
        if enabled and _is_wide_terminal():
            one_line = Column(no_wrap=True, overflow="ellipsis")
            self._bar = Progress(
                TextColumn("{task.fields[doing]}", markup=False),
                BarColumn(bar_width=20),
                TextColumn("{task.percentage:.0f} %", markup=False),
                TextColumn("{task.description}", markup=False, table_column=one_line),
                console=console,
                # What is seen last is what the run has come to.
                transient=True,
            )
            self._task = self._bar.add_task("", total=total, completed=first_step, doing="starting")

    def __enter__(self) -> Reporter:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar:
            self._bar.stop()

    def seconds(self) -> float:
        """Wall time since training (re)started."""
        return time.monotonic() - self.started

    def rate(self, step: int) -> float:
        """Steps a second since training (re)started; ``step`` steps are done."""
        return (step - self.first_step) / max(self.seconds(), 1e-9)

    def __call__(self, step: int, doing: str, picture: Path | None = None) -> None:
        """Show that ``step`` steps are done.

        Args:
            doing: what the run does now, such as "shaping".
            picture: the newest one to look at, if there is any.
        """
        if not self.enabled:
            return
        self._pace.append((step, self.seconds()))
        left = self._time_left()
        if self._bar:
            # The folder is in the line that began the run.
            where = "/".join(picture.parts[-2:]) if picture else ""
            words = "  ".join(word for word in (left, where) if word)
            self._bar.update(self._task, completed=step, description=words, doing=doing)
            return
        percent = 100 * step // self.total
        if self._is_due(doing, percent):
            words = [f"{doing}, {percent} %", left, f"newest picture: {picture}" if picture else ""]
            self._print(", ".join(word for word in words if word), doing, percent)

    def say(self, doing: str) -> None:
        """Show what is done beside the steps."""
        if not self.enabled:
            return
        if self._bar:
            self._bar.update(self._task, description="", doing=doing)
        else:
            self._print(doing, doing, self._told[1])

    def _time_left(self) -> str:
        (first, since), (step, now) = self._pace[0], self._pace[-1]
        if step <= first or step >= self.total:
            return ""
        return f"{left_in_words((self.total - step) * (now - since) / (step - first))} left"

    def _is_due(self, doing: str, percent: int) -> bool:
        told, told_percent, told_at = self._told
        silence = self.seconds() - told_at
        if doing != told or silence <= PLAIN_LINE_SECONDS:
            return doing != told
        return percent - told_percent >= PLAIN_LINE_PERCENT or silence > LONGEST_SILENCE_SECONDS

    def _print(self, words: str, doing: str, percent: float) -> None:
        self._told = (doing, percent, self.seconds())
        print(words, file=sys.stderr, flush=True)


def in_words(seconds: float) -> str:
    """A duration to the second, or to the minute from an hour on: "3 min 12 s"."""
    whole = int(min(max(seconds, 0.0), 359_999_999) + 0.5)
    minutes, rest = divmod(whole, 60)
    hours, minutes_of_hour = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes_of_hour} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def left_in_words(seconds: float) -> str:
    """An estimate as no more than it is: to ten seconds, a minute from two on, an hour from ten."""
    if seconds < 120:
        return f"about {max(math.ceil(seconds / 10) * 10, 10)} s"
    minutes = math.ceil(min(seconds, 359_999_999) / 60)
    if minutes >= 600:
        return f"about {math.ceil(minutes / 60)} h"
    hours, minutes = divmod(minutes, 60)
    return f"about {hours} h {minutes} min" if hours else f"about {minutes} min"
