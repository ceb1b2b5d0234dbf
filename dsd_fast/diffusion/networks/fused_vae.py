"""`FusedEncoder`: the encoder of an AutoencoderKL with a backward pass of our own.

The weights are frozen, so that only the gradient to the image is wanted, and only what it needs is
kept: the input of each norm, its statistics and the shares of the attention. Activations are token
matrices [B, H W, C], which convolutions see as channels-last images. What a convolution's bias and
a skip connection add is left pending until the next norm, which reads the parts and writes their
sum in the pass that takes its statistics. The last convolution and the 1x1 one of the posterior's
moments are one, multiplied in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dsd_fast.diffusion.networks import Network, vae_ops
from dsd_fast.graphs import tuned_convolutions

# Half-precision convolutions on tensor cores read 8 channels at once.
_PIXEL_CHANNELS = 8


def unsupported(config: Mapping[str, Any]) -> str | None:
    """Why `FusedEncoder` cannot run a VAE of this configuration, or None where it can."""
    if config.get("_class_name") != "AutoencoderKL":
        return f"a {config.get('_class_name')} is not an AutoencoderKL"
    blocks = set(config.get("down_block_types", ()))
    if blocks != {"DownEncoderBlock2D"}:
        return f"encoder blocks {', '.join(sorted(blocks))} are not all DownEncoderBlock2D"
    if config.get("act_fn", "silu") != "silu":
        return f"activation {config['act_fn']!r} is not silu"
    return None


@dataclass
class _Pending:
    """A sum not yet taken: x + residual + add, [B, H W, C]; add [C] is a constant of the model."""

    x: Tensor
    residual: Tensor | None
    add: Tensor
    height: int
    width: int


class _Conv:
    """A 3x3 convolution without its bias, and its gradient to the input.

    Args:
        stride: 1, with a border of one zero around, or 2, without.
        flipped: take the gradient of stride 1 as a convolution with the flipped transpose (one
            more copy of the weight) instead of the library's gradient.
    """

    def __init__(self, weight: Tensor, stride: int = 1, flipped: bool = True):
        self.weight = weight.contiguous(memory_format=torch.channels_last)
        self.stride = stride
        self.padding = 1 if stride == 1 else 0
        self.flipped: Tensor | None = None
        if flipped and stride == 1:
            back = weight.transpose(0, 1).flip(2, 3)
            self.flipped = back.contiguous(memory_format=torch.channels_last)

    def __call__(self, x: Tensor, height: int, width: int) -> Tensor:
        y = F.conv2d(_image(x, height, width), self.weight, None, self.stride, self.padding)
        return _tokens(y)

    def gradient(self, dy: Tensor, height: int, width: int) -> Tensor:
        """To the input [B, height width, C_in], from dy [B, H' W', C_out]."""
        if self.flipped is not None:
            return _tokens(F.conv2d(_image(dy, height, width), self.flipped, None, 1, 1))
        out = [(side + 2 * self.padding - 3) // self.stride + 1 for side in (height, width)]
        # of the input only the shape is read
        like = dy.new_empty(()).expand(dy.shape[0], self.weight.shape[1], height, width)
        like = torch.empty_like(like, memory_format=torch.channels_last)
        dx = torch.ops.aten.convolution_backward(
            _image(dy, *out), like, self.weight, None, [self.stride] * 2, [self.padding] * 2,
            [1, 1], False, [0, 0], 1, [True, False, False],
        )[0]  # fmt: skip
        return _tokens(dx)


def _image(x: Tensor, height: int, width: int) -> Tensor:
    """[B, H W, C] as a channels-last [B, C, H, W]."""
    return x.unflatten(1, (height, width)).permute(0, 3, 1, 2)


def _tokens(image: Tensor) -> Tensor:
    """[B, C, H, W] as contiguous [B, H W, C]; a view where the image is channels-last."""
    return image.permute(0, 2, 3, 1).flatten(1, 2).contiguous()


class _Norm:
    """GroupNorm of a pending sum; `silu` after it."""

    def __init__(self, norm: nn.GroupNorm, silu: bool):
        self.weight = _wide(norm.weight)
        self.bias = _wide(norm.bias)
        self.groups, self.eps, self.silu = norm.num_groups, norm.eps, silu

    def __call__(self, p: _Pending) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """y, and for the gradient s, what s is without, and the statistics."""
        total = None if p.residual is None else torch.empty_like(p.x)
        y, stats = vae_ops.group_norm_fwd(
            p.x, self.weight, self.bias, self.groups, self.eps, self.silu,
            add=p.add, residual=p.residual, out_sum=total,
        )  # fmt: skip
        return (y, p.x, p.add, stats) if total is None else (y, total, None, stats)

    def gradient(
        self, dy: Tensor, s: Tensor, add: Tensor | None, stats: Tensor, other: Tensor | None = None
    ) -> Tensor:
        return vae_ops.group_norm_bwd(
            dy, s, self.weight, self.bias, stats, self.groups, self.silu, add=add, dresidual=other
        )


class _Residual:
    """norm, convolution, norm, convolution and a skip connection, 1x1 where channels change."""

    def __init__(self, block: Network, flipped: bool):
        self.norms = _Norm(block.norm1, True), _Norm(block.norm2, True)
        self.convs = tuple(_Conv(c.weight.detach(), 1, flipped) for c in (block.conv1, block.conv2))
        self.between = _wide(block.conv1.bias)
        self.bias = _wide(block.conv2.bias)
        self.shortcut: Tensor | None = None
        if block.conv_shortcut is not None:
            shortcut = block.conv_shortcut.weight.detach().flatten(1)
            self.bias = self.bias + _wide(block.conv_shortcut.bias)
            self.shortcut, self.wide_shortcut = shortcut, _wide(shortcut)

    def __call__(self, p: _Pending, tape: list) -> _Pending:
        size = p.height, p.width
        y, s, missing, stats = self.norms[0](p)
        h = self.convs[0](y, *size)
        y, _, _, stats_2 = self.norms[1](_Pending(h, None, self.between, *size))
        tape.append((s, missing, stats, h, stats_2, size))
        y = self.convs[1](y, *size)
        bias = self.bias
        if missing is not None:
            bias = bias + (missing if self.shortcut is None else self.wide_shortcut @ missing)
        if self.shortcut is not None:
            s = F.linear(s, self.shortcut)
        return _Pending(y, s, bias, *size)

    def gradient(self, d: Tensor, tape: list) -> Tensor:
        s, missing, stats, h, stats_2, size = tape.pop()
        dh = self.norms[1].gradient(self.convs[1].gradient(d, *size), h, self.between, stats_2)
        dy = self.convs[0].gradient(dh, *size)
        skip = d if self.shortcut is None else d @ self.shortcut
        return self.norms[0].gradient(dy, s, missing, stats, skip)


class _Downsample:
    """A convolution of stride 2 over the image with one more row and column of zeros."""

    def __init__(self, block: Network):
        self.conv = _Conv(block.conv.weight.detach(), 2)
        self.bias = _wide(block.conv.bias)

    def __call__(self, p: _Pending, tape: list) -> _Pending:
        assert p.residual is not None  # it follows a _Residual
        bordered = vae_ops.skip_sum(p.x, p.residual, p.add, p.height, p.width)
        tape.append((p.height, p.width))
        y = self.conv(bordered, p.height + 1, p.width + 1)
        return _Pending(y, None, self.bias, p.height // 2, p.width // 2)

    def gradient(self, d: Tensor, tape: list) -> Tensor:
        height, width = tape.pop()
        dx = self.conv.gradient(d, height + 1, width + 1).unflatten(1, (height + 1, width + 1))
        return dx[:, :height, :width].flatten(1, 2)


class _Attention:
    """One head of all channels over all pixels: plain products, the shares kept for the gradient.

    No flash kernel takes heads this wide.
    """

    def __init__(self, block: Network):
        self.norm = _Norm(block.group_norm, False)
        scale = block.scale
        dtype = block.to_q.weight.dtype
        linears = (block.to_q, block.to_k, block.to_v)
        factors = (scale, 1.0, 1.0)
        self.weight = torch.cat([_wide(m.weight) * f for m, f in zip(linears, factors)]).to(dtype)
        self.qkv_bias = torch.cat([_wide(m.bias) * f for m, f in zip(linears, factors)]).to(dtype)
        self.out = block.to_out[0].weight.detach()
        self.bias = _wide(block.to_out[0].bias)

    def __call__(self, p: _Pending, tape: list) -> _Pending:
        y, s, missing, stats = self.norm(p)
        qkv = F.linear(y, self.weight, self.qkv_bias)
        q, k, v = qkv.chunk(3, 2)
        shares = vae_ops.softmax_fwd(_logits(q, k), qkv.dtype)
        y = _product(shares, v, 1 / vae_ops.SHARE_SCALE)
        tape.append((s, missing, stats, qkv, shares))
        bias = self.bias if missing is None else self.bias + missing
        return _Pending(F.linear(y, self.out), s, bias, p.height, p.width)

    def gradient(self, d: Tensor, tape: list) -> Tensor:
        s, missing, stats, qkv, shares = tape.pop()
        q, k, v = qkv.chunk(3, 2)
        dy = d @ self.out
        dv = _product(shares.mT, dy, 1 / vae_ops.SHARE_SCALE)
        dlogits = vae_ops.softmax_bwd(shares, torch.bmm(dy, v.mT))
        dq = _product(dlogits, k, 1 / vae_ops.GRADIENT_SCALE)
        dk = _product(dlogits.mT, q, 1 / vae_ops.GRADIENT_SCALE)
        return self.norm.gradient(torch.cat([dq, dk, dv], 2) @ self.weight, s, missing, stats, d)


def _logits(q: Tensor, k: Tensor) -> Tensor:
    """Q K^T, in float32 where the library can: logits of a wide head pass the steps of a half."""
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
        try:
            return torch.bmm(q, k.mT, out_dtype=torch.float32)
        except TypeError:  # torch before 2.8
            pass
    return torch.bmm(q, k.mT)


def _product(a: Tensor, b: Tensor, factor: float) -> Tensor:
    """factor A B, scaled before it is rounded."""
    ignored = b.new_empty(()).expand(a.shape[0], a.shape[1], b.shape[2])
    return torch.baddbmm(ignored, a, b, beta=0, alpha=factor)


def _wide(x: Tensor) -> Tensor:
    return x.detach() if x.dtype == torch.float64 else x.detach().float()


class FusedEncoder:
    """Moments of the posterior of images, differentiable in the images alone.

    The result and the gradient are those of the module up to rounding. On CUDA nothing waits for
    the device or depends on values, so that a CUDA graph can hold both passes; cuDNN chooses its
    convolutions in the first call of a shape, which must come before a capture. Weights are shared
    with the module, apart from what is folded and, with `flipped`, one more copy of the 3x3 ones.

    Args:
        vae: AutoencoderKL for which `unsupported` has nothing to say, on its device, in its dtype.
        flipped: see `_Conv`.
    Raises:
        ValueError: another architecture.
    """

    def __init__(self, vae: Network, flipped: bool = True):
        reason = unsupported({**vae.config, "_class_name": type(vae).__name__})
        encoder = vae.encoder
        if reason is None and any(a and a.heads != 1 for a in encoder.mid_block.attentions):
            reason = "the attention has several heads"
        if reason is not None:
            raise ValueError(f"FusedEncoder: {reason}")
        self.dtype = encoder.conv_in.weight.dtype
        first = encoder.conv_in.weight.detach()
        self.factor = 2 ** (len(encoder.down_blocks) - 1)
        self.conv_in = _Conv(
            F.pad(first, (0, 0, 0, 0, 0, _PIXEL_CHANNELS - first.shape[1])), 1, flipped
        )
        self.bias_in = _wide(encoder.conv_in.bias)
        self.blocks: list[_Residual | _Downsample | _Attention] = []
        for block in encoder.down_blocks:
            self.blocks += [_Residual(resnet, flipped) for resnet in block.resnets]
            self.blocks += [_Downsample(d) for d in block.downsamplers or ()]
        middle = encoder.mid_block
        self.blocks.append(_Residual(middle.resnets[0], flipped))
        for attention, resnet in zip(middle.attentions, middle.resnets[1:]):
            if attention is not None:
                self.blocks.append(_Attention(attention))
            self.blocks.append(_Residual(resnet, flipped))
        self.norm_out = _Norm(encoder.conv_norm_out, True)
        weight, bias = _wide(encoder.conv_out.weight), _wide(encoder.conv_out.bias)
        if vae.quant_conv is not None:
            mix = _wide(vae.quant_conv.weight).flatten(1)
            weight = torch.einsum("oi,ichw->ochw", mix, weight)
            bias = mix @ bias + _wide(vae.quant_conv.bias)
        self.conv_out = _Conv(weight.to(self.dtype), 1, flipped)
        self.bias_out = bias

    def moments(self, rgb: Tensor) -> Tensor:
        """Mean and log variance of the posterior, before any clamp.

        Args:
            rgb: [B,3,H,W] float32 in [0,1], in any memory format; H and W multiples of `factor`.
        Returns:
            [B,2C,h,w] float32 (float64 from a float64 module).
        """
        if rgb.ndim != 4 or rgb.shape[1] != 3:
            raise ValueError(f"FusedEncoder: expected rgb [B,3,H,W], got {tuple(rgb.shape)}")
        if rgb.shape[2] % self.factor or rgb.shape[3] % self.factor:
            raise ValueError(
                f"FusedEncoder: expected sides that {self.factor} divides, got {tuple(rgb.shape)}"
            )
        return _Encode.apply(rgb, self)

    def forward(self, rgb: Tensor, tape: list) -> Tensor:
        """`moments`, leaving on the tape what `gradient` takes from it."""
        batch, channels, height, width = rgb.shape
        pixels = rgb.new_zeros((batch, height, width, _PIXEL_CHANNELS), dtype=self.dtype)
        pixels[..., :channels] = (rgb * 2 - 1).permute(0, 2, 3, 1)
        x = self.conv_in(pixels.flatten(1, 2), height, width)
        p = _Pending(x, None, self.bias_in, height, width)
        for block in self.blocks:
            p = block(p, tape)
        y, *kept = self.norm_out(p)
        size = p.height, p.width
        tape.append((*kept, size, (height, width)))
        moments = _wide(self.conv_out(y, *size)) + self.bias_out
        return _image(moments, *size).contiguous()

    def gradient(self, d: Tensor, tape: list) -> Tensor:
        """To rgb, [B,3,H,W], of `forward`'s result; empties the tape."""
        *kept, size, (height, width) = tape.pop()
        dx = self.conv_out.gradient(_tokens(d.to(self.dtype)), *size)
        dx = self.norm_out.gradient(dx, *kept)
        for block in reversed(self.blocks):
            dx = block.gradient(dx, tape)
        dx = self.conv_in.gradient(dx, height, width)
        # pixels are 2 rgb - 1
        return _image(_wide(dx[..., :3]) * 2, height, width)


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rgb: Tensor, encoder: FusedEncoder) -> Tensor:
        ctx.encoder, ctx.tape, ctx.dtype = encoder, [], rgb.dtype
        with tuned_convolutions(), torch.autocast(rgb.device.type, enabled=False):
            return encoder.forward(rgb, ctx.tape)

    @staticmethod
    @once_differentiable
    def backward(ctx, d: Tensor) -> tuple[Tensor, None]:
        if not ctx.tape:
            raise RuntimeError("FusedEncoder: the gradient was taken already; encode once more")
        with tuned_convolutions(), torch.autocast(d.device.type, enabled=False):
            return ctx.encoder.gradient(d, ctx.tape).to(ctx.dtype), None
