"""`FusedUNet`: our own forward of diffusers' UNet2DConditionModel, for inference.

The arithmetic is diffusers' (models/unets/unet_2d_condition.py, models/resnet.py,
models/transformers/transformer_2d.py, models/attention.py), arranged so that little but matrix
products and convolutions is left:

* Images are token matrices [B, h·w, C] throughout, which are channels-last images as they lie; a
  permutation or a copy is never needed, nor is a concatenation (GroupNorm reads both sources, the
  shortcut is two products).
* No product has a bias. The biases of a chain of residual additions are constants, so they are
  summed once, here, and added by the next normalisation, where they cost nothing. A `_Tokens` is a
  matrix with what is still to be added to it.
* Residual additions happen inside the products that make the other term (`addmm_`).
* Q, K and V of a self-attention are one product; so are K and V of all cross-attentions, and the
  time projections of all ResNet blocks.

Weights are not copied: what is fused moves into one tensor, and the module's own parameters become
views of its rows. The module keeps working, and reads the same memory. Moving it afterwards
(`.to`, `load_state_dict(assign=True)`) cuts that tie; make a new FusedUNet then.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from inspect import signature

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dsd_fast.diffusion.networks import Network, token_ops

# cuDNN's attention is 1.6 times as fast as FlashAttention 2 at 4096 tokens on an H100. The rest are
# for what it does not take; the last one takes everything, the CPU included.
_ATTENTION = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
_ORDERED = "set_priority" in signature(sdpa_kernel).parameters  # not in the oldest torch we take
_DOWN = {"DownBlock2D", "CrossAttnDownBlock2D"}
_UP = {"UpBlock2D", "CrossAttnUpBlock2D"}
# Options of UNet2DConditionModel that change its arithmetic, with the only values known here.
_KNOWN = {
    "act_fn": ("silu", "swish"),
    "addition_embed_type": (None, "text"),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "num_class_embeds": (None,),
    "resnet_out_scale_factor": (1.0,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}


def unsupported(unet: nn.Module) -> str | None:
    """What of a module FusedUNet does not know; None where it can take its place."""
    config = getattr(unet, "config", None)
    if type(unet).__name__ != "UNet2DConditionModel" or config is None:
        return f"a {type(unet).__name__}, not a UNet2DConditionModel"
    for name, known in _KNOWN.items():
        value = config.get(name, known[0])
        if value not in known:
            return f"{name} = {value!r}"
    if config.get("norm_num_groups") is None:
        return "norm_num_groups = None"
    only_cross = config.get("only_cross_attention", False)
    if any(only_cross) if isinstance(only_cross, (list, tuple)) else only_cross:
        return f"only_cross_attention = {only_cross!r}"
    for name, known in (("down_block_types", _DOWN), ("up_block_types", _UP)):
        if others := sorted(set(config[name]) - known):
            return f"{name} with {', '.join(others)}"
    if unet.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"weights in {unet.dtype}"
    for name, module in unet.named_modules():
        # adapters (LoRA, IP-Adapter) replace layers or processors
        processor = getattr(module, "processor", None)
        if processor is not None and type(processor).__name__ not in (
            "AttnProcessor",
            "AttnProcessor2_0",
        ):
            return f"{type(processor).__name__} in {name}"
        if hasattr(module, "lora_A"):
            return f"a LoRA adapter in {name}"
    return None


@dataclass
class _Tokens:
    """An image as it stands: data + bias + residual is its value.

    A skip connection and the next layer hold the same object, so that whoever settles it first does
    so for both.
    """

    data: Tensor  # [B, h·w, C]
    height: int
    width: int
    bias: Tensor | None = None  # [C] in data's dtype
    residual: Tensor | None = None  # [B, h·w, C]

    def settle(self) -> _Tokens:
        """Nothing is left to add, in place: where a convolution reads it."""
        if self.residual is not None:
            self.data.add_(self.residual)
        if self.bias is not None:
            self.data.add_(self.bias)
        self.bias = self.residual = None
        return self

    def settle_into(self) -> Tensor | None:
        """Where a normalisation shall write the sum it makes anyway; None: nothing is pending."""
        return None if self.residual is None else torch.empty_like(self.data)

    def settled(self, total: Tensor | None) -> Tensor:
        """The data; from now on the sum, if a normalisation wrote one."""
        if total is not None:
            self.data, self.bias, self.residual = total, None, None
        return self.data


@dataclass
class _Flow:
    """What is known of a _Tokens when the network is built; settled where that is."""

    channels: int
    bias: Tensor | None = None  # [C] float32: constants are summed with all digits
    pending: bool = False  # a residual

    def settle(self) -> None:
        self.bias, self.pending = None, False

    def settle_pending(self) -> None:
        if self.pending:
            self.settle()


def _attention_kernels() -> AbstractContextManager[object]:
    return sdpa_kernel(_ATTENTION, set_priority=True) if _ORDERED else sdpa_kernel(_ATTENTION)


def _plus(first: Tensor, *others: Tensor | None) -> Tensor:
    """Sum of those that are there, in float32."""
    return sum((v.float() for v in others if v is not None), first.float())


def _times(weight: Tensor, vector: Tensor | None) -> Tensor | None:
    """weight [O, I] · vector [I], for a constant that goes through a product."""
    return None if vector is None else weight.float() @ vector.float()


def _pack(parameters: list[nn.Parameter]) -> Tensor:
    """The rows of all parameters in one tensor, of which they become views."""
    packed = torch.cat([p.data for p in parameters])
    for parameter, rows in zip(parameters, packed.split([len(p) for p in parameters])):
        parameter.data = rows
    return packed


def _conv_weight(conv: nn.Conv2d) -> Tensor:
    """[O, I, k, k] with the channels innermost, as the module keeps it from now on."""
    conv.weight.data = conv.weight.data.contiguous(memory_format=torch.channels_last)
    return conv.weight.data


def _matrix(layer: nn.Linear | nn.Conv2d) -> Tensor:
    """[O, I] of a linear layer or a 1x1 convolution."""
    return layer.weight.data.reshape(layer.weight.shape[:2])


def _convolve(x: Tensor, weight: Tensor, height: int, width: int, stride: int = 1) -> Tensor:
    """Convolution of tokens [B, h·w, I] with one row of zeros around, no bias: [B, h'·w', O]."""
    image = x.view(x.shape[0], height, width, -1).permute(0, 3, 1, 2)
    return _rows(F.conv2d(image, weight, stride=stride, padding=1))


def _phases(weight: Tensor) -> Tensor:
    """[4O, I, 2, 2] of a 3x3 convolution that follows nearest 2x upsampling: [O, I, 3, 3].

    Of the three rows that an output row reads, two are copies of one. Even output rows (phase 0)
    see (w0, w1 + w2) of the small image's rows i - 1 and i, odd ones (w0 + w1, w2) of i and i + 1;
    columns likewise. So the large image is four 2x2 convolutions of the small one: 4/9 of the
    arithmetic. Both phases read two neighbours, the odd one a row further, which
    `tokens.interleave` sees to.
    """
    w = weight.float()
    rows = [
        torch.stack([w[:, :, 0], w[:, :, 1] + w[:, :, 2]], 2),
        torch.stack([w[:, :, 0] + w[:, :, 1], w[:, :, 2]], 2),
    ]
    both = [
        torch.stack(pair, 3)
        for r in rows
        for pair in (
            (r[..., 0], r[..., 1] + r[..., 2]),
            (r[..., 0] + r[..., 1], r[..., 2]),
        )
    ]
    return torch.cat(both).to(weight.dtype).contiguous(memory_format=torch.channels_last)


def _rows(image: Tensor) -> Tensor:
    """[B, C, h, w] to tokens [B, h·w, C]; nothing moves when the channels are innermost."""
    return image.permute(0, 2, 3, 1).contiguous().flatten(1, 2)


def _accumulate(total: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """total [B, N, O] += x [B, N, I] · weightᵀ, inside the product."""
    total.view(-1, total.shape[-1]).addmm_(x.view(-1, x.shape[-1]), weight.t())
    return total


class _Norm:
    """Affine parameters of a normalisation, and what is added to its input."""

    def __init__(self, norm: nn.GroupNorm | nn.LayerNorm, add: Tensor | None):
        self.weight, self.bias, self.eps = norm.weight.data, norm.bias.data, norm.eps
        self.groups = getattr(norm, "num_groups", 0)
        self.add = add

    def group(self, x: _Tokens, silu: bool, **more: Tensor | None) -> Tensor:
        return token_ops.group_norm(
            x.data, self.weight, self.bias, self.groups, self.eps, silu,
            **{"add": self.add, "residual": x.residual} | more,
        )  # fmt: skip

    def layer(self, x: Tensor) -> Tensor:
        return token_ops.layer_norm(x, self.weight, self.bias, self.eps, add=self.add)


class _ResNet:
    """ResnetBlock2D. Its result keeps the biases, and with equal channels its input as residual.

    Args:
        x: the incoming tokens; becomes what comes out.
        skip: the skip connection that is concatenated, or None.
        time: first column of this block in the time projections.
    """

    def __init__(self, block: Network, x: _Flow, skip: _Flow | None, time: int):
        self.conv_1, self.conv_2 = _conv_weight(block.conv1), _conv_weight(block.conv2)
        self.scale_shift = block.time_embedding_norm == "scale_shift"
        out = len(self.conv_1)
        self.time = slice(time, time + (2 if self.scale_shift else 1) * out)
        # a sum of two sources has no place to be written to
        self.settle_first = skip is not None and x.pending
        if self.settle_first:
            x.settle()
        bias = x.bias
        if skip is not None and (x.bias is not None or skip.bias is not None):
            bias = torch.cat([_bias_of(x, block), _bias_of(skip, block)])
        self.norm_1 = _Norm(block.norm1, bias)
        # with "default" the projections' biases hold this one
        self.norm_2 = _Norm(block.norm2, block.conv1.bias.data if self.scale_shift else None)
        if x.pending:
            # norm_1 settles its input
            x.settle()
            bias = None
        self.shortcut: list[Tensor] = []
        if block.conv_shortcut is None:
            bias = _plus(block.conv2.bias.data, bias)
        else:
            whole = _matrix(block.conv_shortcut)
            own = _plus(block.conv2.bias.data, block.conv_shortcut.bias.data)
            bias = _plus(own, _times(whole, bias))
            self.shortcut = list(whole.split([x.channels, whole.shape[1] - x.channels], 1))
        self.bias = bias.to(self.conv_2.dtype)
        self.out = _Flow(out, bias, pending=not self.shortcut)

    def __call__(self, x: _Tokens, skip: _Tokens | None, time: Tensor) -> _Tokens:
        if self.settle_first:
            x.settle()
        total = x.settle_into()
        y = self.norm_1.group(x, True, x2=None if skip is None else skip.data, out_sum=total)
        source = x.settled(total)
        y = _Tokens(_convolve(y, self.conv_1, x.height, x.width), x.height, x.width)
        own = time[:, self.time]
        if self.scale_shift:
            y.data = self.norm_2.group(y, True, scale_shift=own)
        else:
            y.data = self.norm_2.group(y, True, add=own)
        y = _Tokens(_convolve(y.data, self.conv_2, x.height, x.width), x.height, x.width, self.bias)
        if not self.shortcut:
            y.residual = source if skip is None else torch.cat([source, skip.data], -1)
            return y
        _accumulate(y.data, source, self.shortcut[0])
        if skip is not None:
            _accumulate(y.data, skip.data, self.shortcut[1])
        return y


def _bias_of(flow: _Flow, block: Network) -> Tensor:
    if flow.bias is not None:
        return flow.bias
    return block.norm1.weight.new_zeros(flow.channels, dtype=torch.float32)


class _Transformer:
    """Transformer2DModel, in place: the residual it ends with is added to its input's matrix.

    Args:
        x: the incoming tokens; becomes what comes out.
        keys: first column of each block's keys and values among all, by block.
    """

    def __init__(self, module: Network, x: _Flow, keys: dict[nn.Module, int]):
        self.norm = _Norm(module.norm, x.bias)
        x.settle_pending()
        self.proj_in, self.proj_out = _matrix(module.proj_in), _matrix(module.proj_out)
        bias = _plus(module.proj_in.bias.data)
        self.blocks = []
        for block in module.transformer_blocks:
            self.blocks.append(_Block(block, bias, keys[block.attn2]))
            bias = self.blocks[-1].bias
        x.bias = _plus(module.proj_out.bias.data, x.bias, _times(self.proj_out, bias))
        self.bias = x.bias.to(self.proj_out.dtype)

    def __call__(self, x: _Tokens, text: Tensor) -> _Tokens:
        total = x.settle_into()
        h = F.linear(self.norm.group(x, False, out_sum=total), self.proj_in)
        x.settled(total)
        for block in self.blocks:
            h = block(h, text)
        _accumulate(x.data, h, self.proj_out)
        x.bias = self.bias
        return x


class _Block:
    """BasicTransformerBlock: self-attention, cross-attention, GEGLU; h without its bias."""

    def __init__(self, block: Network, bias: Tensor, keys: int):
        own, cross = block.attn1, block.attn2
        self.heads, self.keys = own.heads, keys
        self.norm_1 = _Norm(block.norm1, bias)
        self.qkv = _pack([own.to_q.weight, own.to_k.weight, own.to_v.weight])
        self.own_out = own.to_out[0].weight.data
        bias = _plus(bias, own.to_out[0].bias)
        self.norm_2 = _Norm(block.norm2, bias)
        self.query, self.cross_out = cross.to_q.weight.data, cross.to_out[0].weight.data
        bias = _plus(bias, cross.to_out[0].bias)
        self.norm_3 = _Norm(block.norm3, bias)
        first, last = block.ff.net[0].proj, block.ff.net[2]
        self.ff_in, self.ff_bias, self.ff_out = first.weight.data, first.bias.data, last.weight.data
        self.bias = _plus(bias, last.bias)

    def __call__(self, h: Tensor, text: Tensor) -> Tensor:
        q, k, v = F.linear(self.norm_1.layer(h), self.qkv).chunk(3, -1)
        _accumulate(h, self._attend(q, k, v), self.own_out)
        q = F.linear(self.norm_2.layer(h), self.query)
        k, v = text[..., self.keys : self.keys + 2 * q.shape[-1]].chunk(2, -1)
        _accumulate(h, self._attend(q, k, v), self.cross_out)
        wide = token_ops.linear_geglu(self.norm_3.layer(h), self.ff_in, self.ff_bias)
        return _accumulate(h, wide, self.ff_out)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class FusedUNet:
    """Takes the place of a UNet2DConditionModel's forward, with its weights.

    Args:
        unet: in eval mode; it keeps working, see the module's text for whose its weights are.
        split_upsampling: do the convolutions after an upsampling on the small image (`_phases`).
            Their weights are then kept a second time, 16/9 as large: 118 MB of Stable Diffusion 2
            in half precision.
    Raises:
        ValueError: `unsupported(unet)`.
    """

    @torch.no_grad()
    def __init__(self, unet: Network, split_upsampling: bool = True):
        self.split_upsampling = split_upsampling
        if reason := unsupported(unet):
            raise ValueError(f"the fused UNet does not support {reason}")
        self.time_proj, self.time_embedding = unet.time_proj, unet.time_embedding
        self.text_embedding = getattr(unet, "add_embedding", None)
        resnets = [m for m in unet.modules() if type(m).__name__ == "ResnetBlock2D"]
        self.time_weight = _pack([r.time_emb_proj.weight for r in resnets])
        # diffusers adds the first convolution's bias right before the projection
        self.time_bias = torch.cat(
            [
                r.time_emb_proj.bias.data
                if r.time_embedding_norm == "scale_shift"
                else r.time_emb_proj.bias.data + r.conv1.bias.data
                for r in resnets
            ]
        )
        times, column = {}, 0
        for resnet in resnets:
            times[resnet] = column
            column += len(resnet.time_emb_proj.weight)
        crosses = [m.attn2 for m in unet.modules() if type(m).__name__ == "BasicTransformerBlock"]
        self.text_weight = _pack([w for a in crosses for w in (a.to_k.weight, a.to_v.weight)])
        keys, column = {}, 0
        for cross in crosses:
            keys[cross] = column
            column += 2 * len(cross.to_k.weight)

        self.conv_in = _conv_weight(unet.conv_in)
        x = _Flow(len(self.conv_in), _plus(unet.conv_in.bias.data))
        self.conv_in_bias = unet.conv_in.bias.data
        skips = [x]

        def layer(resnet: Network, attention: Network | None, skip: _Flow | None):
            nonlocal x
            first = _ResNet(resnet, x, skip, times[resnet])
            x = first.out
            return first, None if attention is None else _Transformer(attention, x, keys)

        def sampler(modules: Network | None) -> tuple[Tensor, Tensor] | None:
            nonlocal x
            if not modules:
                return None
            conv = modules[0].conv
            x.settle()
            x = _Flow(len(conv.weight), _plus(conv.bias.data))
            return _conv_weight(conv), conv.bias.data

        self.down, self.up = [], []
        for block in unet.down_blocks:
            layers = []
            for resnet, attention in zip(block.resnets, _attentions(block)):
                layers.append(layer(resnet, attention, None))
                skips.append(x)
            down = sampler(block.downsamplers)
            if down is not None:
                skips.append(x)
            self.down.append((layers, down))
        mid = unet.mid_block
        self.mid = [layer(mid.resnets[0], None, None)]
        for attention, resnet in zip(mid.attentions, mid.resnets[1:]):
            transformer = _Transformer(attention, x, keys)
            self.mid[-1] = (self.mid[-1][0], transformer)
            self.mid.append(layer(resnet, None, None))
        for block in unet.up_blocks:
            layers = [
                layer(resnet, attention, skips.pop())
                for resnet, attention in zip(block.resnets, _attentions(block))
            ]
            up = sampler(block.upsamplers)
            if up is not None and split_upsampling:
                up = _phases(up[0]), up[1]
            self.up.append((layers, up))
        self.norm_out = _Norm(unet.conv_norm_out, x.bias)
        self.conv_out, self.conv_out_bias = _conv_weight(unet.conv_out), unet.conv_out.bias.data
        self.multiple = 2 ** sum(up is not None for _, up in self.up)

    @torch.no_grad()
    def __call__(self, latents: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """The module's prediction. Nothing waits for the device; a CUDA graph can hold it.

        Args:
            latents: [R, C, h, w] in the weights' dtype.
            t: [R] int64.
            text: [R, L, D] in the weights' dtype.
        Returns:
            [R, C', h, w] contiguous, in the weights' dtype.
        Raises:
            ValueError: h or w that halving does not divide.
        """
        height, width = latents.shape[2:]
        if height % self.multiple or width % self.multiple:
            raise ValueError(
                f"the fused UNet needs sides in multiples of {self.multiple}, got {height}×{width}"
            )
        # an outer autocast must not change the precision that the weights have
        with (
            torch.autocast(latents.device.type, enabled=False),
            _attention_kernels(),
        ):
            return self._forward(latents, t, text)

    def _forward(self, latents: Tensor, t: Tensor, text: Tensor) -> Tensor:
        time = self.time_embedding(self.time_proj(t).to(latents.dtype))
        if self.text_embedding is not None:
            time = time + self.text_embedding(text)
        time = F.linear(F.silu(time), self.time_weight, self.time_bias)
        text = F.linear(text, self.text_weight)

        image = F.conv2d(
            latents.contiguous(memory_format=torch.channels_last), self.conv_in, padding=1
        )
        x = _Tokens(_rows(image), latents.shape[2], latents.shape[3], self.conv_in_bias)
        skips = [x]
        for layers, down in self.down:
            for resnet, transformer in layers:
                x = resnet(x, None, time)
                if transformer is not None:
                    x = transformer(x, text)
                skips.append(x)
            if down is not None:
                weight, bias = down
                x.settle()
                y = _convolve(x.data, weight, x.height, x.width, stride=2)
                x = _Tokens(y, x.height // 2, x.width // 2, bias)
                skips.append(x)
        for resnet, transformer in self.mid:
            x = resnet(x, None, time)
            if transformer is not None:
                x = transformer(x, text)
        for layers, up in self.up:
            for resnet, transformer in layers:
                x = resnet(x, skips.pop(), time)
                if transformer is not None:
                    x = transformer(x, text)
            if up is not None:
                weight, bias = up
                x = _Tokens(self._upsample(x, weight), 2 * x.height, 2 * x.width, bias)
        y = self.norm_out.group(x, True)
        image = y.view(y.shape[0], x.height, x.width, -1).permute(0, 3, 1, 2)
        return F.conv2d(image, self.conv_out, self.conv_out_bias, padding=1).contiguous()

    def _upsample(self, x: _Tokens, weight: Tensor) -> Tensor:
        if self.split_upsampling:
            frame = _convolve(x.settle().data, weight, x.height, x.width)
            return token_ops.interleave(frame, x.height, x.width)
        if x.residual is not None:
            x.settle()
        y = token_ops.upsample(x.data, x.height, x.width, x.bias)
        return _convolve(y, weight, 2 * x.height, 2 * x.width)


def _attentions(block: Network) -> list[Network | None]:
    found = getattr(block, "attentions", None)
    return [None] * len(block.resnets) if found is None else list(found)
