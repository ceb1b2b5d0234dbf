"""What an engine is, `engine(latents, t, condition) -> prediction`, and the two that need no more.

All engines take the same tensors on the model's device and return a tensor the caller owns:
latents [R,C,h,w] and the condition of R rows in the UNet's dtype, t [R] int64. Guidance never
differentiates through the UNet, so no engine keeps a graph for autograd.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from dsd_fast.diffusion.condition import Condition, forward
from dsd_fast.graphs import WARM_UP_RUNS, CannotCapture, GraphCache, Held, tuned_convolutions

log = logging.getLogger(__name__)

# Kernel selection differs between capture and eager runs; half precision then differs by a few ulp
# through the network. Anything above this is a wrong result, not rounding.
_PARITY_TOLERANCE = 2e-2


class UNetEngine(Protocol):
    """Runs a UNet without gradient; see the module's text for shapes and dtypes."""

    def __call__(self, latents: Tensor, t: Tensor, condition: Condition) -> Tensor: ...

    def release_graphs(self) -> None:
        """Drop what is made again when it is asked for; nothing may be running."""


Forward = Callable[[Tensor, Tensor, Condition], Tensor]


class EagerEngine:
    """Plain call of the module, on any device."""

    def __init__(self, unet: nn.Module):
        self.unet = unet

    @torch.no_grad()
    def __call__(self, latents: Tensor, t: Tensor, condition: Condition) -> Tensor:
        # Half precision is chosen by the weights; an outer autocast must not change it.
        with torch.autocast(latents.device.type, enabled=False):
            return forward(self.unet, latents, t, condition)

    def release_graphs(self) -> None:
        """It has none."""


class _Key(NamedTuple):
    """The shapes that a graph of a forward holds for."""

    latents: torch.Size
    condition: tuple[tuple[str, torch.Size], ...]


class _Buffers(NamedTuple):
    """What a recorded forward reads and writes."""

    latents: Tensor
    t: Tensor
    condition: Condition
    output: Tensor


class GraphEngine:
    """CUDA graph replay: one launch instead of the thousands of a UNet forward.

    A graph is captured on the first call of each shape (guidance uses one or two) and checked
    against the eager forward before it is used. All graphs share one memory pool, which is safe
    because they run on one stream and every output is cloned before the next replay. While another
    graph is captured, the forward becomes a part of that one.

    Args:
        unet: a module on a CUDA device, in eval mode.
        fallback: on a failed capture, log one warning and go on with the module's own forward, at
            last with eager calls; without it the failure is raised as RuntimeError.
        forward: what is captured, `forward(latents, t, condition)` with the module's result;
            default the module's own.
    """

    def __init__(self, unet: nn.Module, fallback: bool = False, forward: Forward | None = None):
        self.eager = EagerEngine(unet)
        self.forward = forward or self.eager
        self.fallback = fallback
        self._graphs: GraphCache[_Key, _Buffers] = GraphCache()
        self._disabled = False

    @torch.no_grad()
    def __call__(self, latents: Tensor, t: Tensor, condition: Condition) -> Tensor:
        if self._disabled:
            return self.eager(latents, t, condition)
        if torch.cuda.is_current_stream_capturing():
            # A larger graph is being made, which has seen this forward work.
            return self.forward(latents, t, condition)
        key = _Key(latents.shape, condition.shapes)
        held = self._graphs.get(key)
        if held is None:
            try:
                held = self._capture(key, latents, t, condition)
            except CannotCapture as error:
                self._graphs.clear()
                if not self.fallback:
                    raise RuntimeError(
                        f"CUDA graph capture of the UNet failed ({error}); use the eager engine"
                    ) from error
                if self.forward is not self.eager:
                    log.warning("UNet: %s; running the module's own forward instead", error)
                    self.forward = self.eager
                    return self(latents, t, condition)
                log.warning("CUDA graph capture of the UNet failed, running eagerly: %s", error)
                self._disabled = True
                return self.eager(latents, t, condition)
        return _replayed(held, latents, t, condition).clone()

    def release_graphs(self) -> None:
        """The next call of each shape captures anew."""
        self._graphs.clear()

    def _capture(
        self, key: _Key, latents: Tensor, t: Tensor, condition: Condition
    ) -> Held[_Buffers]:
        # Static inputs live outside the pool: they persist between replays.
        inputs = (latents.clone(), t.clone(), condition.map(Tensor.clone))
        expected: list[Tensor] = []

        def warm_up() -> None:
            expected.append(self.eager(*inputs))
            for _ in range(WARM_UP_RUNS):
                self.forward(*inputs)

        def function() -> _Buffers:
            return _Buffers(*inputs, self.forward(*inputs))

        with tuned_convolutions():
            held = self._graphs.capture(key, function, latents.device, warm_up)
        want, got = expected[0].float(), _replayed(held, latents, t, condition).float()
        error = float((got - want).norm() / want.norm().clamp_min(1e-12))
        # A model that overflows gives NaN in both; that is for the guidance to report.
        if want.isfinite().all() and not error < _PARITY_TOLERANCE:
            raise CannotCapture(f"replay differs from the eager forward by {error:.2e} (relative)")
        return held


def _replayed(held: Held[_Buffers], latents: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """The output of a graph for these inputs, in the buffer that the next replay writes to."""
    buffers = held.result
    buffers.latents.copy_(latents)
    buffers.t.copy_(t)
    buffers.condition.copy_(condition)
    held.replay()
    return buffers.output


@dataclass(frozen=True)
class UNetShape:
    """Sizes of a UNet's inputs, but for the number of rows: of the noisy latents [C,h,w], and of
    each tensor of the condition by its name."""

    latents: tuple[int, ...]
    condition: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, latents: Tensor, condition: Condition) -> UNetShape:
        """Sizes of inputs."""
        of_rows = tuple((name, tuple(shape[1:])) for name, shape in condition.shapes)
        return cls(tuple(latents.shape[1:]), of_rows)

    def inputs(self, rows: int) -> dict[str, tuple[int, ...]]:
        """Shape of each input by name, for a number of rows."""
        condition = {name: (rows, *shape) for name, shape in self.condition}
        return {"latents": (rows, *self.latents), "t": (rows,), **condition}

    def sample(
        self, rows: int, dtype: torch.dtype, device: torch.device | str, seed: int = 0
    ) -> tuple[Tensor, Tensor, Condition]:
        """Random latents and condition in `dtype`, and int64 levels, the same on every device."""
        generator = torch.Generator().manual_seed(seed)
        shapes = self.inputs(rows)
        latents = torch.randn(shapes.pop("latents"), generator=generator)
        t = torch.randint(0, 1000, shapes.pop("t"), generator=generator)
        drawn = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        condition = Condition(**drawn).map(lambda tensor: tensor.to(device, dtype))
        return latents.to(device, dtype), t.to(device), condition
