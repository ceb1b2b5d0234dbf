"""GPU memory: what each phase of a step needs, a bound on it, and settings that need less."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dsd_fast.config import ConfigError, TrainConfig, leaves, set_value
from dsd_fast.run.progress import memory_mib

log = logging.getLogger(__name__)

# What CUDA itself and the kernels' code take of a GPU beside what torch allocates.
CONTEXT_GIB = 0.9

# (GiB of a GPU, settings): a GPU of at most so many takes them on, the smallest that it is under.
# They change no result beyond rounding, but for the views of a step. For Stable Diffusion; the
# embedded model fits any GPU as it is.
SETTINGS: tuple[tuple[float, dict[str, Any]], ...] = (
    (12.0, {"diffusion.dtype": "float16", "cameras.batch_size": 1}),
)


def settings_for(vram: float, preset: str) -> dict[str, Any]:
    """Dotted path -> value of the settings that a GPU of `vram` GiB asks for."""
    if preset == "embedded":
        return {}
    settings = next((dict(settings) for size, settings in SETTINGS if vram <= size), {})
    if preset == "mvdream" and settings:
        settings["cameras.batch_size"] = 4  # one object
    return settings


def choose_settings(cfg: TrainConfig, vram: float) -> None:
    """Set what `settings_for` says in a configuration, with a line in the log for each change."""
    before = leaves(cfg)
    for path, value in settings_for(vram, cfg.preset).items():
        # "auto" is float16 on CUDA.
        if before[path] != value and (path, before[path]) != ("diffusion.dtype", "auto"):
            set_value(cfg, path, value)
            log.info("--vram %g: %s = %s instead of %s", vram, path, value, before[path])


def cap(device: torch.device, vram: float) -> None:
    """Let this process take as much of the GPU as if it had `vram` GiB.

    More raises torch.OutOfMemoryError, though the GPU may have it.

    Raises:
        ConfigError: no CUDA device, or less than CUDA itself takes.
    """
    if device.type != "cuda":
        raise ConfigError(f"--vram is for a CUDA GPU, and this run is on the {device.type}")
    if not vram > CONTEXT_GIB:
        raise ConfigError(f"--vram counts GiB and CUDA itself takes {CONTEXT_GIB}; got {vram:g}")
    cap_allocations(device, vram - CONTEXT_GIB)


def cap_allocations(device: torch.device, gib: float) -> None:
    """Let torch allocate at most `gib` GiB of a CUDA device; CUDA's own comes on top."""
    # "cuda" alone is the current one, and torch wants a number here.
    index = torch.cuda.current_device() if device.index is None else device.index
    total = torch.cuda.get_device_properties(index).total_memory
    torch.cuda.set_per_process_memory_fraction(min(gib * 2**30 / total, 1.0), index)


def savings(cfg: TrainConfig) -> list[str]:
    """What a run can be continued with to need less memory, each flag and why; most first."""
    ways = []
    if cfg.diffusion.dtype == "float32":
        ways.append("--diffusion.dtype float16 (half the diffusion model)")
    in_3d, n_view = cfg.task != "image", cfg.cameras.n_view
    if in_3d and largest(cfg.cameras.batch_size) > n_view:
        one = "one view" if n_view == 1 else "one object"
        ways.append(f"--cameras.batch-size {n_view} ({one} a step)")
    if cfg.diffusion.engine != "eager":
        ways.append("--diffusion.engine eager (no CUDA graphs, which keep their memory)")
    if in_3d:
        height, width = largest(cfg.cameras.height), largest(cfg.cameras.width)
        ways.append(
            f"smaller --cameras.height and --cameras.width (now up to {height} and {width})"
        )
    if cfg.guidance.use_perp_neg:
        ways.append("--guidance.no-use-perp-neg (half the rows of the UNet)")
    if in_3d:
        rays = cfg.renderer.num_samples_per_ray
        ways.append(f"fewer --renderer.num-samples-per-ray (now {rays})")
    return ways


class PhaseMemory:
    """Peaks of what torch has allocated, by phase of a step; on CUDA alone.

    Asks the allocator, not the device: no synchronisation. Work that a CUDA graph holds allocates
    nothing when it is replayed.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.enabled = False
        self._peaks: dict[str, float] = {}
        self._highest = 0.0  # of the process, MiB: measuring forgets it

    def begin(self, enabled: bool) -> None:
        """A step begins; without `enabled` its phases are not looked at."""
        self.enabled = enabled and self.device.type == "cuda"
        if self.enabled:
            self._peaks = {"before": self._allocated()}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Within it a phase runs."""
        if not self.enabled:
            yield
            return
        self._highest = max(self._highest, memory_mib(self.device))
        torch.cuda.reset_peak_memory_stats(self.device)
        yield
        self._peaks[phase] = memory_mib(self.device)

    def peak_mib(self) -> float:
        """As `progress.memory_mib`: the peak so far."""
        return max(self._highest, memory_mib(self.device))

    def report(self, step: int) -> None:
        """A line in the log about the step that was looked at, if it was."""
        if self.enabled:
            peaks = ", ".join(f"{name} {mib / 1024:.2f}" for name, mib in self._peaks.items())
            free, total = torch.cuda.mem_get_info(self.device)
            log.info(
                "memory at step %d, GiB: %s; the GPU has %.2f of %.2f in use",
                step,
                peaks,
                (total - free) / 2**30,
                total / 2**30,
            )

    def _allocated(self) -> float:
        return torch.cuda.memory_allocated(self.device) / 2**20


def largest(value: int | tuple[int, ...]) -> int:
    return value if isinstance(value, int) else max(value)
