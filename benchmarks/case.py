"""What a benchmark case is, and the check that it must pass before it may be timed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

# Any call of a workload: one tensor or several.
Call = Callable[[], Tensor | Sequence[Tensor]]


@dataclass(frozen=True)
class Workload:
    """One set of inputs, and what is done with it.

    `n_bytes` is the least memory traffic that the task needs: every input read once, every output
    written once, nothing in between. A kernel that moves more shows a lower rate, which is the aim.
    """

    compiled: Call
    reference: Call  # the same by the pure-torch reference
    outputs: tuple[str, ...]  # names of what both return, for messages
    n_items: int  # points, samples or cells
    n_bytes: int | None = None
    n_flops: int | None = None
    peers: Mapping[str, Call] = field(default_factory=dict)  # the same by other packages
    capture_peers: bool = False  # whether CUDA graphs can hold the peers


@dataclass(frozen=True)
class Case:
    """A task, in sizes that differ with the device."""

    # (size, device, generator on the CPU) -> random inputs; the description is its doc string.
    prepare: Callable[[int, torch.device, torch.Generator], Workload]
    # What the size counts: "points", "numbers", or "px" and "cells" along an edge.
    unit: str
    sizes: Mapping[str, tuple[int, ...]]  # by device type
    check_size: int
    # Largest accepted ‖compiled − reference‖ / ‖reference‖ of an output, both in float32.
    tolerance: float = 1e-5
    # Whether a CUDA graph can hold it: it must not wait for the device.
    captures: bool = True


class CheckFailed(RuntimeError):
    """The compiled backend does not agree with the reference."""


def check(workload: Workload, tolerance: float) -> float:
    """Largest relative error of the compiled outputs; integers and booleans must be equal.

    Raises:
        CheckFailed: an output has another shape, type or value.
    """
    got, want = _as_tuple(workload.compiled()), _as_tuple(workload.reference())
    if not len(got) == len(want) == len(workload.outputs):
        raise CheckFailed(f"{len(got)} outputs, wanted {len(want)}: {workload.outputs}")
    worst = 0.0
    for name, a, b in zip(workload.outputs, got, want):
        if a.shape != b.shape or a.dtype != b.dtype:
            raise CheckFailed(
                f"{name} is {a.dtype} {list(a.shape)}, the reference's {b.dtype} {list(b.shape)}"
            )
        error = relative_error(a, b)
        if not error <= (tolerance if a.is_floating_point() else 0.0):  # NaN fails too
            raise CheckFailed(f"{name} differs from the reference: relative error {error:.3g}")
        worst = max(worst, error)
    return worst


def relative_error(got: Tensor, want: Tensor) -> float:
    """‖got − want‖ / ‖want‖ in float64; absolute where `want` is zero."""
    got, want = got.detach().double(), want.detach().double()
    norm = want.norm().item()
    return (got - want).norm().item() / (norm or 1.0)


@contextmanager
def pure_torch() -> Iterator[None]:
    """Within it every operator runs its pure-torch reference."""
    before = os.environ.get("DSD_BACKEND")
    os.environ["DSD_BACKEND"] = "torch"
    try:
        yield
    finally:
        if before is None:
            del os.environ["DSD_BACKEND"]
        else:
            os.environ["DSD_BACKEND"] = before


def by_reference(call: Call) -> Call:
    """The same call with every operator's pure-torch reference."""

    def reference() -> Tensor | Sequence[Tensor]:
        with pure_torch():
            return call()

    return reference


def backward_of(forward: Call, inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> Call:
    """A call of the backward pass alone: the graph of `forward` is built at the first call."""
    graph = cache(forward)
    return lambda: torch.autograd.grad(graph(), inputs, grads, retain_graph=True)


def _as_tuple(outputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
