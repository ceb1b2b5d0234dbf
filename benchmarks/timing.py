"""Times of calls on the CPU and on CUDA, and the copy and GEMM rates to hold them against."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dsd_fast.graphs import captured

# More repeats tell nothing new.
_MAX_REPEATS = 1000
# Well beyond the caches: bytes of each of the two buffers that are copied.
_COPY_BYTES = {"cpu": 1 << 27, "cuda": 1 << 30}
# Rows and columns of the square matrices that are multiplied.
_GEMM_SIZE = {"cpu": 1024, "cuda": 8192}


@dataclass(frozen=True)
class Times:
    """Milliseconds of one call."""

    median: float
    p20: float
    p80: float
    n_repeats: int


def measure(
    calls: Sequence[Callable[[], object]],
    device: torch.device,
    budget_s: float,
    capture: bool = False,
    min_repeats: int = 5,
) -> Times:
    """Times `calls` in turn, for about `budget_s` seconds after a warm-up.

    The calls do the same with different inputs, so that no call finds its own inputs in a cache.
    On CUDA `capture` puts each into a CUDA graph, which leaves the host's time out; without, the
    device's wait for the host counts.
    """
    if device.type == "cuda" and capture:
        calls = [captured(call) for call in calls]
    run = _run_cuda if device.type == "cuda" else _run_cpu
    run(calls, len(calls))
    estimate = max(run(calls, 1)[0], 1e-3)
    ms = run(calls, max(min(int(1e3 * budget_s / estimate), _MAX_REPEATS), min_repeats))
    p20, median, p80 = np.percentile(ms, [20, 50, 80]).tolist()
    return Times(median, p20, p80, len(ms))


def copy_bandwidth(device: torch.device, budget_s: float) -> float:
    """Bytes per second, read and written, of a plain copy of a large buffer."""
    size = _COPY_BYTES[device.type]
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    copy = torch.empty_like(source)
    times = measure([lambda: copy.copy_(source)], device, budget_s)
    return 2 * size / (1e-3 * times.median)


def gemm_rate(device: torch.device, budget_s: float, dtype: torch.dtype) -> float:
    """Multiplications and additions per second of a product of two large square matrices."""
    n = _GEMM_SIZE[device.type]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    times = measure([lambda: a @ b], device, budget_s)
    return 2 * n**3 / (1e-3 * times.median)


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Memory that a call needs at its peak beyond what is held already; CUDA only."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _run_cpu(calls: Sequence[Callable[[], object]], n: int) -> list[float]:
    ms = []
    for i in range(n):
        start = time.perf_counter()
        calls[i % len(calls)]()
        ms.append(1e3 * (time.perf_counter() - start))
    return ms


def _run_cuda(calls: Sequence[Callable[[], object]], n: int) -> list[float]:
    # No waiting in between: a device with work in its queue does not see the host's launches.
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(n)]
    for i, (start, end) in enumerate(events):
        start.record()
        calls[i % len(calls)]()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]
