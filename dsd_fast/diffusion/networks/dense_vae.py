"""`DenseEncoder`: the encoder of an AutoencoderKL on CPUs with AVX-512, with a backward pass.

As `FusedEncoder` it is differentiable in the images alone, keeps the inputs of its norms and their
statistics, and takes the gradient of a convolution as one with the flipped transpose. Its passes
are those of `dsd_fast.ops.dense`: products, in bfloat16 or float32, everything else in float32.
Images are encoded one after the other, so that what a layer writes the next finds in the cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dsd_fast.diffusion.networks import Network, fused_vae
from dsd_fast.ops import dense

_LANES = 16
# From so many channels on a convolution's weights leave a core's cache while it reads them.
_WIDEST = 640


def unsupported(vae: Network) -> str | None:
    """Why `DenseEncoder` cannot run a VAE, or None where it can."""
    config: Mapping[str, Any] = getattr(vae, "config", {})
    if reason := fused_vae.unsupported({**config, "_class_name": type(vae).__name__}):
        return reason
    encoder = vae.encoder
    if any(attention is not None for attention in encoder.mid_block.attentions):
        return "attention over its pixels"
    if encoder.conv_in.weight.dtype != torch.float32:
        return "weights that are not float32"
    for module in encoder.modules():
        if isinstance(module, nn.GroupNorm) and module.num_channels % _LANES:
            return f"{module.num_channels} channels, no multiple of {_LANES}"
        if isinstance(module, nn.Conv2d) and module.in_channels > _WIDEST:
            return f"{module.in_channels} channels, more than {_WIDEST}"
    return None


class _Conv:
    """A 3x3 convolution and its gradient to the input."""

    def __init__(self, weight: Tensor, bias: Tensor, dtype: torch.dtype):
        self.weight, self.bias = dense.Weight(weight, dtype), bias.detach()
        self.back = dense.Weight(_transposed(weight), dtype)

    def __call__(self, framed: Tensor, residual: Tensor | None = None) -> Tensor:
        return dense.convolve(framed, self.weight, self.bias, residual=residual)

    def gradient(self, framed: Tensor) -> Tensor:
        return dense.convolve(framed, self.back)


def _bias(conv: nn.Conv2d) -> Tensor:
    assert conv.bias is not None  # those of diffusers have one
    return conv.bias.detach()


def _transposed(weight: Tensor) -> Tensor:
    """[I,O,3,3] of the convolution that is the gradient of [O,I,3,3] to its input."""
    return weight.detach().transpose(0, 1).flip(2, 3)


class _Norm:
    """GroupNorm and SiLU."""

    def __init__(self, norm: nn.GroupNorm, dtype: torch.dtype):
        self.weight, self.bias = norm.weight.detach(), norm.bias.detach()
        self.groups, self.eps, self.dtype = norm.num_groups, norm.eps, dtype

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The framed result, and the statistics."""
        stats = x.new_empty(len(x), self.groups, 2)
        y = dense.group_norm(
            x, self.weight, self.bias, self.groups, self.eps, True, self.dtype, stats=stats
        )
        return y, stats

    def gradient(self, grad: Tensor, x: Tensor, stats: Tensor, **more: Tensor) -> Tensor:
        """To x, framed; see `dense.group_norm_grad`."""
        return dense.group_norm_grad(
            grad, x, self.weight, self.bias, stats, True, self.dtype, **more
        )


class _Residual:
    """Norm, convolution, norm, convolution and a skip connection, 1x1 where channels change."""

    def __init__(self, block: Network, dtype: torch.dtype):
        self.norms = _Norm(block.norm1, dtype), _Norm(block.norm2, dtype)
        self.convs = tuple(_Conv(c.weight, c.bias, dtype) for c in (block.conv1, block.conv2))
        self.shortcut: tuple[dense.Weight, dense.Weight] | None = None
        if block.conv_shortcut is not None:
            matrix = block.conv_shortcut.weight.detach().flatten(1)
            there, back = (dense.Weight(m, torch.float32) for m in (matrix, matrix.T))
            self.shortcut = there, back
            self.bias = block.conv_shortcut.bias.detach()

    def __call__(self, x: Tensor, tape: list) -> Tensor:
        y, stats = self.norms[0](x)
        h = self.convs[0](y)
        y, stats_2 = self.norms[1](h)
        tape.append((x, stats, h, stats_2))
        skip = x if self.shortcut is None else dense.linear(x, self.shortcut[0], self.bias)
        return self.convs[1](y, skip)

    def gradient(self, d: Tensor, framed: Tensor, tape: list) -> tuple[Tensor, Tensor]:
        """To the input, as it is and framed, from that to the result."""
        x, stats, h, stats_2 = tape.pop()
        dh = self.convs[1].gradient(framed)
        dy = self.convs[0].gradient(self.norms[1].gradient(dh, h, stats_2))
        skip = d if self.shortcut is None else dense.linear(d, self.shortcut[1])
        dx = torch.empty_like(x)
        return dx, self.norms[0].gradient(dy, x, stats, residual=skip, plain=dx)


class _Downsample:
    """A convolution of stride 2 over the image with one more row and column of zeros."""

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype):
        self.weight = dense.Weight(conv.weight, dtype)
        self.back = dense.halving_gradient(conv.weight, dtype)
        self.bias, self.dtype = _bias(conv), dtype

    def __call__(self, x: Tensor, tape: list) -> Tensor:
        framed = dense.framed(x, self.dtype)
        return dense.convolve(framed, self.weight, self.bias, stride=2, border=0)

    def gradient(self, d: Tensor, framed: Tensor, tape: list) -> tuple[Tensor, Tensor]:
        dx = dense.convolve_phases(framed, self.back)
        return dx, dense.framed(dx, self.dtype)


class DenseEncoder:
    """Moments of the posterior of images, differentiable in the images alone.

    Args:
        vae: AutoencoderKL in float32 on the CPU; its weights are copied.
        dtype: of the products: bfloat16, where `dense.precision()` says so, or float32.
    Raises:
        ValueError: `unsupported(vae)`.
    """

    @torch.no_grad()
    def __init__(self, vae: Network, dtype: torch.dtype):
        if reason := unsupported(vae):
            raise ValueError(f"DenseEncoder does not support {reason}")
        encoder = vae.encoder
        self.dtype = dtype
        self.factor = 2 ** (len(encoder.down_blocks) - 1)
        first = encoder.conv_in
        self.conv_in, self.bias = dense.Weight(first.weight, torch.float32), _bias(first)
        self.back = dense.Weight(_transposed(first.weight), dtype)
        self.blocks: list[_Residual | _Downsample] = []
        for block in encoder.down_blocks:
            self.blocks += [_Residual(resnet, dtype) for resnet in block.resnets]
            self.blocks += [_Downsample(d.conv, dtype) for d in block.downsamplers or ()]
        self.blocks += [_Residual(resnet, dtype) for resnet in encoder.mid_block.resnets]
        self.norm_out = _Norm(encoder.conv_norm_out, torch.float32)
        weight, bias = encoder.conv_out.weight.detach(), encoder.conv_out.bias.detach()
        if vae.quant_conv is not None:
            mix = vae.quant_conv.weight.detach().flatten(1)
            weight = torch.einsum("oi,ichw->ochw", mix, weight)
            bias = mix @ bias + vae.quant_conv.bias.detach()
        self.conv_out = _Conv(weight, bias, torch.float32)

    def moments(self, rgb: Tensor) -> Tensor:
        """Mean and log variance of the posterior, before any clamp.

        Args:
            rgb: [B,3,H,W] float32 in [0,1], in any memory format; H and W multiples of `factor`.
        Returns:
            [B,2C,h,w] float32.
        """
        if rgb.ndim != 4 or rgb.shape[1] != 3:
            raise ValueError(f"DenseEncoder: expected rgb [B,3,H,W], got {tuple(rgb.shape)}")
        if rgb.shape[2] % self.factor or rgb.shape[3] % self.factor:
            raise ValueError(
                f"DenseEncoder: expected sides that {self.factor} divides, got {tuple(rgb.shape)}"
            )
        return _Encode.apply(rgb, self)

    def forward(self, rgb: Tensor, tape: list) -> Tensor:
        """`moments`, leaving on the tape what `gradient` takes from it."""
        pixels = (rgb * 2 - 1).permute(0, 2, 3, 1).contiguous()
        x = dense.convolve(dense.framed(pixels, torch.float32), self.conv_in, self.bias)
        for block in self.blocks:
            x = block(x, tape)
        y, stats = self.norm_out(x)
        tape.append((x, stats))
        return self.conv_out(y).permute(0, 3, 1, 2)

    def gradient(self, d: Tensor, tape: list) -> Tensor:
        """To rgb, [B,3,H,W], of `forward`'s result; empties the tape."""
        x, stats = tape.pop()
        d = d.permute(0, 2, 3, 1).contiguous()
        dy, d = self.conv_out.gradient(dense.framed(d, torch.float32)), torch.empty_like(x)
        norm = self.norm_out
        framed = dense.group_norm_grad(
            dy, x, norm.weight, norm.bias, stats, True, self.dtype, plain=d
        )
        for block in reversed(self.blocks):
            d, framed = block.gradient(d, framed, tape)
        d = dense.convolve(framed, self.back)
        return 2 * d.permute(0, 3, 1, 2)


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rgb: Tensor, encoder: DenseEncoder) -> Tensor:
        ctx.encoder, ctx.tapes = encoder, [[] for _ in rgb]
        with dense.crew():
            parts = [encoder.forward(rgb[i : i + 1], tape) for i, tape in enumerate(ctx.tapes)]
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx, d: Tensor) -> tuple[Tensor, None]:
        if not all(ctx.tapes):
            raise RuntimeError("DenseEncoder: the gradient was taken already; encode once more")
        with dense.crew():
            parts = [ctx.encoder.gradient(d[i : i + 1], tape) for i, tape in enumerate(ctx.tapes)]
        return torch.cat(parts), None
