"""The engine on CPUs with AVX-512: `DenseUNet`, with products in bfloat16 or float32."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsd_fast.diffusion.condition import Condition, beside
from dsd_fast.diffusion.networks.dense_unet import DenseUNet, unsupported
from dsd_fast.ops import dense


class DenseEngine:
    """`DenseUNet` on the CPU; see there. The module keeps weights of its own.

    Args:
        unet: a UNet for which `cannot_run` has nothing to say, in eval mode.
        products: dtype of the products' factors, bfloat16 or float32.
    """

    def __init__(self, unet: nn.Module, products: torch.dtype):
        self.dense = DenseUNet(unet, products)

    def __call__(self, latents: Tensor, t: Tensor, condition: Condition) -> Tensor:
        if others := set(condition) - {"tokens", "image", "camera"}:
            raise ValueError(f"the UNet on the CPU does not read {', '.join(sorted(others))}")
        latents = beside(latents, condition.get("image"))
        return self.dense(latents, t, condition.tokens.contiguous(), condition.get("camera"))

    def release_graphs(self) -> None:
        """It has none."""


def cannot_run(unet: nn.Module, products: torch.dtype) -> str | None:
    """Why the engine cannot run this module with products in a dtype; None if it can."""
    fastest = dense.precision()
    if fastest is None:
        return "this processor has no AVX-512, or the build none for it"
    if products == torch.bfloat16 and fastest != torch.bfloat16:
        return "this processor has no AVX512-BF16"
    return unsupported(unet)
