"""The fused engine: our own UNet forward (`FusedUNet`) in CUDA graphs.

On an H100 in float16 it needs neither a minute of torch.compile nor a tuned engine file: kernels
compile in seconds at the first call, and Triton keeps them on disk (TRITON_CACHE_DIR).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsd_fast._backend import backend
from dsd_fast.diffusion.condition import Condition, beside
from dsd_fast.diffusion.engines.base import GraphEngine
from dsd_fast.diffusion.networks import Network
from dsd_fast.diffusion.networks.fused_unet import FusedUNet, unsupported


class FusedEngine(GraphEngine):
    """`FusedUNet` in a CUDA graph a shape, checked against the module's own forward first.

    The module stays usable and shares its weights with the fused one, so that memory holds them
    once; it must not be moved afterwards.

    Args:
        unet: a UNet2DConditionModel on a CUDA device, in eval mode.
        fallback: as in GraphEngine.
    Raises:
        ValueError: the module is not supported, see `cannot_fuse`.
    """

    def __init__(self, unet: nn.Module, fallback: bool = False):
        if reason := cannot_fuse(unet):
            raise ValueError(f"the fused engine does not support this UNet: {reason}")
        self.fused = FusedUNet(unet)
        super().__init__(unet, fallback, forward=self._guarded)

    def _guarded(self, latents: Tensor, t: Tensor, condition: Condition) -> Tensor:
        try:
            return self.plain(latents, t, condition)
        except RuntimeError:
            raise
        # what a compiler raises has no common base: no C compiler, no ptxas, too few registers
        except Exception as error:
            raise RuntimeError(f"{type(error).__name__}: {error}") from error

    def plain(self, latents: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The forward without a graph, for a larger one that is being captured.

        Launches only, nothing waits for the device. Run it once before the capture, for Triton and
        cuDNN to choose kernels. Arguments and result as of every engine.

        Raises:
            RuntimeError: conditions that the network does not read.
        """
        if others := set(condition) - {"tokens", "image"}:
            raise RuntimeError(f"the fused UNet does not read {', '.join(sorted(others))}")
        return self.fused(beside(latents, condition.get("image")), t, condition.tokens)


def cannot_fuse(unet: Network) -> str | None:
    """Why the fused engine cannot run this module; None if it can."""
    if reason := unsupported(unet):
        return reason
    if unet.dtype not in (torch.float16, torch.bfloat16):
        return f"its weights are {unet.dtype}, not half precision"
    found = backend(unet.device)
    if found == "torch":
        return "DSD_BACKEND=torch asks for the pure-torch reference"
    return None if found == "triton" else "Triton is not installed, or not for its device"
