"""CUDA graphs of functions without arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch

# Eager runs before the capture: they compile, load code and make workspaces.
_WARM_UP_RUNS = 3


def captured(function: Callable[[], object]) -> Callable[[], None]:
    """`function` as a CUDA graph on the current device; call the result to replay it.

    It is run a few times first. It must neither wait for the device nor draw from anything but
    torch's generator of the device; what it returns is dropped.

    Raises:
        RuntimeError: the function does what a graph cannot hold.
    """
    stream = side_stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP_RUNS):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # thread_local: other threads, such as a process group's watchdog, may call CUDA meanwhile
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        function()
    return graph.replay


@cache
def side_stream(device_index: int) -> torch.cuda.Stream:
    """The stream on which graphs are warmed up and captured, one for all.

    cuBLAS keeps a workspace for every stream that it has seen, 32 MiB on a large GPU, for good.
    """
    return torch.cuda.Stream(device_index)


_pool: tuple[int, int] | None = None


def shared_pool() -> tuple[int, int]:
    """The memory pool of graphs that never run side by side, and whose results are copied out."""
    global _pool
    if _pool is None:
        _pool = torch.cuda.graph_pool_handle()
    return _pool


def give_up_pool() -> None:
    """Return to the device what graphs that are gone have held; later graphs get another pool.

    A pool keeps its memory as long as one of its graphs is there, and only graphs can use it.
    """
    global _pool
    _pool = None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


@contextmanager
def tuned_convolutions() -> Iterator[None]:
    """Within it cuDNN measures its convolutions once a shape, and uses the fastest ones.

    While it measures, it takes as much memory as it gets, and returns it to torch's allocator.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
