"""How the UNet is run: `engine(latents, t, text) -> prediction`.

All engines take the same tensors on the model's device and return a tensor the caller owns:
latents [R,C,h,w] and text [R,L,D] in the UNet's dtype, t [R] int64. Guidance never differentiates
through the UNet, so no engine keeps a graph for autograd.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from dsd_fast.graphs import shared_pool, side_stream, tuned_convolutions

log = logging.getLogger(__name__)

ENGINES = ("auto", "eager", "graph", "fused", "compiled", "tensorrt")

# Kernel selection differs between capture and eager runs; half precision then differs by a few ulp
# through the network. Anything above this is a wrong result, not rounding.
_PARITY_TOLERANCE = 2e-2
_WARM_UP_RUNS = 3


class UNetEngine(Protocol):
    """Runs a UNet without gradient; see the module's text for shapes and dtypes."""

    def __call__(self, latents: Tensor, t: Tensor, text: Tensor) -> Tensor: ...

    def release_graphs(self) -> None:
        """Drop what is made again when it is asked for; nothing may be running."""


Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


class EagerEngine:
    """Plain call of the module, on any device."""

    def __init__(self, unet: nn.Module):
        self.unet = unet

    @torch.no_grad()
    def __call__(self, latents: Tensor, t: Tensor, text: Tensor) -> Tensor:
        # Half precision is chosen by the weights; an outer autocast must not change it.
        with torch.autocast(latents.device.type, enabled=False):
            return self.unet(latents, t, encoder_hidden_states=text, return_dict=False)[0]

    def release_graphs(self) -> None:
        """It has none."""


@dataclass
class _Captured:
    """A recorded forward and the buffers it reads and writes."""

    graph: torch.cuda.CUDAGraph
    latents: Tensor
    t: Tensor
    text: Tensor
    output: Tensor

    def replay(self, latents: Tensor, t: Tensor, text: Tensor) -> Tensor:
        self.latents.copy_(latents)
        self.t.copy_(t)
        self.text.copy_(text)
        self.graph.replay()
        return self.output


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
        forward: what is captured, `forward(latents, t, text)` with the module's result; default the
            module's own.
    """

    def __init__(self, unet: nn.Module, fallback: bool = False, forward: Forward | None = None):
        self.eager = EagerEngine(unet)
        self.forward = forward or self.eager
        self.fallback = fallback
        self._graphs: dict[tuple, _Captured] = {}
        self._disabled = False

    @torch.no_grad()
    def __call__(self, latents: Tensor, t: Tensor, text: Tensor) -> Tensor:
        if self._disabled:
            return self.eager(latents, t, text)
        if torch.cuda.is_current_stream_capturing():
            # A larger graph is being made, which has seen this forward work.
            return self.forward(latents, t, text)
        key = (latents.shape, text.shape)
        captured = self._graphs.get(key)
        if captured is None:
            try:
                with torch.cuda.device(latents.device):
                    captured = self._graphs[key] = self._capture(latents, t, text)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                if not self.fallback:
                    raise RuntimeError(
                        f"CUDA graph capture of the UNet failed ({error}); use the eager engine"
                    ) from error
                if self.forward is not self.eager:
                    log.warning("UNet: %s; running the module's own forward instead", error)
                    self.forward = self.eager
                    self._graphs.clear()
                    return self(latents, t, text)
                log.warning("CUDA graph capture of the UNet failed, running eagerly: %s", error)
                self._disabled = True
                self._graphs.clear()
                return self.eager(latents, t, text)
        return captured.replay(latents, t, text).clone()

    def release_graphs(self) -> None:
        """The next call of each shape captures anew."""
        self._graphs.clear()

    def _capture(self, latents: Tensor, t: Tensor, text: Tensor) -> _Captured:
        # Static inputs live outside the pool: they persist between replays.
        inputs = (latents.clone(), t.clone(), text.clone())
        current = torch.cuda.current_stream(latents.device)
        side = side_stream(latents.device.index)
        # Warm-up lets cuDNN and cuBLAS choose kernels and make their workspaces before capture;
        # the side stream keeps those allocations off the stream the caller is using.
        side.wait_stream(current)
        with torch.cuda.stream(side), tuned_convolutions():
            expected = self.eager(*inputs)
            for _ in range(_WARM_UP_RUNS):
                self.forward(*inputs)
        current.wait_stream(side)
        expected = expected.float()
        torch.cuda.synchronize(latents.device)

        graph = torch.cuda.CUDAGraph()
        # thread_local: a background thread (image writer, viewer) may use CUDA during the capture.
        with (
            tuned_convolutions(),
            torch.cuda.graph(
                graph, pool=shared_pool(), stream=side, capture_error_mode="thread_local"
            ),
        ):
            output = self.forward(*inputs)
        captured = _Captured(graph, *inputs, output)

        result = captured.replay(latents, t, text).float()
        error = float((result - expected).norm() / expected.norm().clamp_min(1e-12))
        # A model that overflows gives NaN in both; that is for the guidance to report.
        if expected.isfinite().all() and not error < _PARITY_TOLERANCE:
            raise RuntimeError(f"replay differs from the eager forward by {error:.2e} (relative)")
        return captured


def _compiled(unet: nn.Module) -> Forward:
    """The module through torch.compile: a minute at the first call of a shape, logged.

    Inductor keeps what it made on disk (TORCHINDUCTOR_CACHE_DIR), which later runs load in seconds;
    TORCHINDUCTOR_FX_GRAPH_CACHE=0 turns that off.
    """
    os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "1")
    module = torch.compile(unet, fullgraph=True, dynamic=False)
    seen: set[tuple] = set()

    @torch.no_grad()
    def forward(latents: Tensor, t: Tensor, text: Tensor) -> Tensor:
        key = (latents.shape, text.shape)
        began = time.monotonic()
        latents = latents.contiguous(memory_format=torch.channels_last)
        with torch.autocast(latents.device.type, enabled=False):
            result = module(latents, t, encoder_hidden_states=text, return_dict=False)[0]
        if key not in seen:
            seen.add(key)
            seconds = time.monotonic() - began
            log.info("compiled the UNet for %s in %.1f s", list(latents.shape), seconds)
        return result

    return forward


def make_engine(unet: nn.Module, device: torch.device, kind: str = "auto") -> UNetEngine:
    """Engine for a UNet that already sits on `device`.

    Args:
        kind: "eager", "graph" (eager in a CUDA graph), "fused" (`engines.fused`),
            "compiled" (torch.compile in a CUDA graph), "tensorrt" ("auto" where TensorRT does not
            support the GPU) or "auto": eager where there is no CUDA; on it fused for what
            FusedUNet supports in half precision, else graph, both with eager as their fallback.
    Raises:
        ValueError: unknown kind, any but "auto" and "eager" on a device that is not CUDA, or
            "fused" or "tensorrt" for a UNet that it does not support.
        ImportError: "tensorrt" without its package.
    """
    if kind not in ENGINES:
        raise ValueError(f"unknown UNet engine {kind!r}, expected one of {', '.join(ENGINES)}")
    if kind == "eager" or (kind == "auto" and device.type != "cuda"):
        return EagerEngine(unet)
    if device.type != "cuda":
        raise ValueError(f"the {kind} engine needs a CUDA device, got {device}")
    if kind == "tensorrt":
        if getattr(unet, "n_views", 1) > 1:
            raise ValueError("the tensorrt engine does not support multi-view UNets: use auto")
        from dsd_fast.diffusion.engines.tensorrt import make_tensorrt  # it imports this module

        return make_tensorrt(unet, device, fallback=make_engine(unet, device))
    if kind in ("auto", "fused"):
        # diffusers' names and the kernels are of no interest to the other engines
        from dsd_fast.diffusion.engines.fused import FusedEngine, cannot_fuse

        reason = cannot_fuse(unet)
        if reason is None:
            return FusedEngine(unet, fallback=kind == "auto")
        if kind == "fused":
            raise ValueError(f"the fused engine does not support this UNet: {reason}")
        log.info("UNet in a CUDA graph without fused passes: %s", reason)
    forward = _compiled(unet) if kind == "compiled" else None
    return GraphEngine(unet, fallback=kind == "auto", forward=forward)
