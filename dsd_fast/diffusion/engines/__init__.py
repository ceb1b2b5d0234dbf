"""How the UNet is run; `make_engine` chooses."""

from __future__ import annotations

import logging
import os
import time

import torch
from torch import Tensor, nn

from dsd_fast.diffusion.condition import Condition, forward
from dsd_fast.diffusion.engines.base import EagerEngine, Forward, GraphEngine, UNetEngine

log = logging.getLogger(__name__)

ENGINES = ("auto", "eager", "graph", "fused", "compiled", "tensorrt")


def _compiled(unet: nn.Module) -> Forward:
    """The module through torch.compile: a minute at the first call of a shape, logged.

    Inductor keeps what it made on disk (TORCHINDUCTOR_CACHE_DIR), which later runs load in seconds;
    TORCHINDUCTOR_FX_GRAPH_CACHE=0 turns that off.
    """
    os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "1")
    module = torch.compile(unet, fullgraph=True, dynamic=False)
    seen: set[tuple] = set()

    @torch.no_grad()
    def compiled(latents: Tensor, t: Tensor, condition: Condition) -> Tensor:
        key = (latents.shape, condition.shapes)
        began = time.monotonic()
        latents = latents.contiguous(memory_format=torch.channels_last)
        with torch.autocast(latents.device.type, enabled=False):
            result = forward(module, latents, t, condition)
        if key not in seen:
            seen.add(key)
            seconds = time.monotonic() - began
            log.info("compiled the UNet for %s in %.1f s", list(latents.shape), seconds)
        return result

    return compiled


def make_engine(
    unet: nn.Module,
    device: torch.device,
    kind: str = "auto",
    products: torch.dtype | None = None,
) -> UNetEngine:
    """Engine for a UNet that already sits on `device`.

    Args:
        kind: "eager", "graph" (eager in a CUDA graph), "fused" (`engines.fused`),
            "compiled" (torch.compile in a CUDA graph), "tensorrt" ("auto" where TensorRT does not
            support the GPU) or "auto": on the CPU `engines.dense` with `products`, else eager; on
            CUDA fused for what FusedUNet supports in half precision, else graph, both with eager
            as their fallback.
        products: dtype of the products on a CPU, of `on_cpu`; None for the module's own forward.
    Raises:
        ValueError: unknown kind, any but "auto" and "eager" on a device that is not CUDA, or
            "fused" or "tensorrt" for a UNet that it does not support.
        ImportError: "tensorrt" without its package.
    """
    if kind not in ENGINES:
        raise ValueError(f"unknown UNet engine {kind!r}, expected one of {', '.join(ENGINES)}")
    if kind == "auto" and device.type == "cpu" and products is not None:
        from dsd_fast.diffusion.engines.dense import DenseEngine

        return DenseEngine(unet, products)
    if kind == "eager" or (kind == "auto" and device.type != "cuda"):
        return EagerEngine(unet)
    if device.type != "cuda":
        raise ValueError(f"the {kind} engine needs a CUDA device, got {device}")
    if kind == "tensorrt":
        if getattr(unet, "n_views", 1) > 1:
            raise ValueError("the tensorrt engine does not support multi-view UNets: use auto")
        from dsd_fast.diffusion.engines.tensorrt import make_tensorrt

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
    compiled = _compiled(unet) if kind == "compiled" else None
    return GraphEngine(unet, fallback=kind == "auto", forward=compiled)


def on_cpu(unet: nn.Module, kind: str, asked: torch.dtype | None) -> torch.dtype | None:
    """What `make_engine` is to be told of products for a float32 UNet on the CPU.

    Args:
        asked: bfloat16 or float32; None for the fastest that the processor has.
    Returns:
        bfloat16 or float32; None where the module's own forward is to run.
    """
    if kind != "auto":
        return None
    from dsd_fast.diffusion.engines.dense import cannot_run

    reason = "it was not tried"
    for products in (torch.bfloat16, torch.float32) if asked is None else (asked,):
        reason = cannot_run(unet, products)
        if reason is None:
            log.debug("UNet on the CPU with products in %s", str(products).removeprefix("torch."))
            return products
    log.info("UNet on the CPU by its own forward: %s", reason)
    return None
