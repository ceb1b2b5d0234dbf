"""What a person sees while a run goes on: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time

import torch
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

console = Console(stderr=True)

# Seconds between lines where there is no terminal (a log file, a job queue).
PLAIN_LINE_SECONDS = 15.0
# Columns of a terminal with a live line.
NARROWEST = 40


def _is_wide_terminal() -> bool:
    """Columns beside each other leave no room for words in a very narrow one."""
    return console.is_terminal and console.width >= NARROWEST


def set_up_logging() -> None:
    """Route the package's log to the console. For commands; a library leaves logging alone."""
    if _is_wide_terminal():
        handler: logging.Handler = RichHandler(console=console, show_path=False)
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:  # One line each, whatever its length, for log files.
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
    """Progress of ``total`` steps. Use as a context manager and call with the values of a step."""

    def __init__(self, first_step: int, total: int, enabled: bool = True) -> None:
        self.first_step, self.total = first_step, total
        self.enabled = enabled
        self.started = time.monotonic()
        self._last_line = float("-inf")
        self._bar: Progress | None = None
        if enabled and _is_wide_terminal():
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=20),
                TextColumn("{task.description}"),
                console=console,
            )
            self._task = self._bar.add_task("", total=total, completed=first_step)

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

    def __call__(self, step: int, values: dict[str, float]) -> None:
        """Show that ``step`` steps are done; ``values`` are those of the newest logged one."""
        if not self.enabled:
            return
        rate = self.rate(step)
        opacity = f"opacity {values['opacity']:.3f}  " if "opacity" in values else ""
        text = (
            f"{rate:.2f} step/s  ETA {_clock((self.total - step) / max(rate, 1e-9))}  "
            f"t {values['t']:.0f}  loss {values['loss']:.3f}  dsd {values['dsd']:.3f}  "
            f"{opacity}{values['memory_mib'] / 1024:.1f} GiB"
        )
        if self._bar:
            self._bar.update(self._task, completed=step, description=text)
        elif self.seconds() - self._last_line > PLAIN_LINE_SECONDS or step == self.total:
            self._last_line = self.seconds()
            print(f"step {step}/{self.total}  {text}", file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(min(seconds, 359_999)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
