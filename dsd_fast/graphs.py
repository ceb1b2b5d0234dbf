"""CUDA graphs of functions without arguments: captured once, replayed as often as asked for.

A function that a graph is to hold must neither wait for the device nor draw from anything but
torch's generator of the device, and it finds its inputs where they were at the capture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Generic, TypeVar

import torch

from dsd_fast._backend import deterministic

# Eager runs before a capture: they compile, load code, choose kernels and make workspaces.
WARM_UP_RUNS = 3

Key = TypeVar("Key")
Result = TypeVar("Result")


class CannotCapture(RuntimeError):
    """The function does what a graph cannot hold."""


@dataclass(frozen=True)
class Held(Generic[Result]):
    """A captured function."""

    graph: torch.cuda.CUDAGraph
    # What the function returned; each replay writes to its tensors.
    result: Result

    def replay(self) -> None:
        self.graph.replay()


class GraphCache(dict[Key, Held[Result]]):
    """Graphs by what they hold for, which the key names.

    Args:
        shared: in the pool of all (`shared_pool`), else each in one of its own.
    """

    def __init__(self, shared: bool = True) -> None:
        super().__init__()
        self._shared = shared

    def capture(
        self,
        key: Key,
        function: Callable[[], Result],
        device: torch.device | int,
        warm_up: Callable[[], object] | None = None,
    ) -> Held[Result]:
        """Keep `function` under `key`. Nothing is computed yet: replay it.

        Args:
            warm_up: run before, on the stream of the capture. Without one the function must have
                run before.
        Raises:
            CannotCapture: what a graph cannot hold, in the function or its warm-up.
            torch.OutOfMemoryError: as it is, for it is no matter of graphs.
        """
        try:
            with torch.cuda.device(device):
                stream = side_stream(torch.cuda.current_device())
                if warm_up is not None:
                    # On the side stream its allocations stay off the one that the caller uses.
                    stream.wait_stream(torch.cuda.current_stream())
                    with torch.cuda.stream(stream):
                        warm_up()
                    torch.cuda.current_stream().wait_stream(stream)
                graph = torch.cuda.CUDAGraph()
                pool = shared_pool() if self._shared else None
                # thread_local: another thread (a process group's watchdog, an image writer, a
                # viewer) may call CUDA meanwhile.
                with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
                    result = function()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise CannotCapture(str(error)) from error
        self[key] = Held(graph, result)
        return self[key]


def captured(function: Callable[[], object]) -> Callable[[], None]:
    """`function` as a CUDA graph on the current device; call the result to replay it.

    It is run a few times first; what it returns is dropped. CannotCapture for what a graph cannot
    hold.
    """

    def warm_up() -> None:
        for _ in range(WARM_UP_RUNS):
            function()

    def call() -> None:
        function()

    graphs: GraphCache[str, None] = GraphCache(shared=False)
    return graphs.capture("function", call, torch.cuda.current_device(), warm_up).replay


@cache
def side_stream(device_index: int) -> torch.cuda.Stream:
    """The stream on which graphs are warmed up and captured, one for all.

    cuBLAS keeps a workspace for every stream that it has seen, 32 MiB on a large GPU, for good.
    """
    return torch.cuda.Stream(device_index)


@cache
def shared_pool() -> Any:
    """The memory pool of graphs that never run side by side, and whose results are copied out."""
    return torch.cuda.graph_pool_handle()


def give_up_pool() -> None:
    """Return to the device what graphs that are gone have held; later graphs get another pool.

    A pool keeps its memory as long as one of its graphs is there, and only graphs can use it.
    """
    shared_pool.cache_clear()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


@contextmanager
def tuned_convolutions() -> Iterator[None]:
    """Within it cuDNN measures its convolutions once a shape, and uses the fastest ones.

    While it measures, it takes as much memory as it gets, and returns it to torch's allocator. It
    does not measure where results must be deterministic: the fastest are not the same each time.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = not deterministic()
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
