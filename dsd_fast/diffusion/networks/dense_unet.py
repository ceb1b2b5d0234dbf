"""`DenseUNet`: the forward of a UNet on a CPU with AVX-512, over `dsd_fast.ops.dense`.

For diffusers' UNet2DConditionModel and for `MultiViewUNet`, whose layers are the same under other
names. Images lie with their channels innermost, [R,h,w,C] float32; a normalisation writes what the
next product reads, in the products' dtype and with a row of zeros around where that is a
convolution; biases, the levels' embedding and residuals are added in a product's last pass.

In bfloat16 a product's factors are rounded and nothing else is. What decides how much that changes
a gradient of Diverse Score Distillation, the small difference of two predictions, is where the
rounded numbers lie: on the way of the residuals itself (first and last convolution, shortcuts, the
projections out of a transformer, the steps down) and in the embedding of the level, which are few
of the multiplications. Those stay in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsd_fast.diffusion.networks import Network, fused_unet
from dsd_fast.diffusion.networks.multiview_unet import MultiViewUNet, sinusoids
from dsd_fast.ops import dense

_LANES = 16
# From so many inputs on, a convolution's weights do not stay in a core's cache while it reads them
# again and again, and the library's own is faster.
_WIDEST = 640


def unsupported(unet: Network) -> str | None:
    """What of a module DenseUNet does not know; None where it can take its place."""
    if not isinstance(unet, MultiViewUNet):
        if reason := fused_unet.unsupported(unet):
            return reason
        if getattr(unet, "add_embedding", None) is None and unet.config.get("addition_embed_type"):
            return "an added embedding"
    if next(unet.parameters()).dtype != torch.float32:
        return "weights that are not float32"
    for name, module in unet.named_modules():
        if isinstance(module, nn.GroupNorm) and module.num_channels % _LANES:
            return f"{name} with {module.num_channels} channels, no multiple of {_LANES}"
        if isinstance(module, nn.Conv2d) and module.in_channels > _WIDEST:
            return f"{name} with {module.in_channels} channels, more than {_WIDEST}"
        attention: Network = module
        if hasattr(module, "to_q"):
            width = attention.to_q.out_features // attention.heads
            if width % 2 or width > dense.WIDEST_HEAD:
                return f"{name} with heads of {width} channels"
    return None


@dataclass
class _Given:
    """What layers read beside the image."""

    time: Tensor  # [R, all blocks' columns] float32
    keys: Tensor  # [R, L, all cross-attentions' keys and values] in the products' dtype


class _Norm:
    def __init__(self, norm: nn.GroupNorm, silu: bool, dtype: torch.dtype):
        self.weight, self.bias = norm.weight.detach(), norm.bias.detach()
        self.groups, self.eps, self.silu, self.dtype = norm.num_groups, norm.eps, silu, dtype

    def __call__(
        self,
        x: Tensor,
        *,
        x2: Tensor | None = None,
        scale_shift: Tensor | None = None,
        frame: bool = True,
    ) -> Tensor:
        return dense.group_norm(
            x, self.weight, self.bias, self.groups, self.eps, self.silu, self.dtype,
            x2=x2, scale_shift=scale_shift, frame=frame,
        )  # fmt: skip


class _Product:
    """A convolution or linear layer, or a list of them side by side: packed weights and bias."""

    def __init__(self, layers: Network, dtype: torch.dtype):
        several: Sequence[Network] = layers if isinstance(layers, list) else [layers]
        self.weight = dense.Weight(torch.cat([layer.weight for layer in several]), dtype)
        biases = [layer.bias for layer in several]
        self.bias = None if biases[0] is None else torch.cat([b.detach() for b in biases])


class _Residual:
    """Two convolutions, and a way past them that is one of 1x1 where channels change.

    Args:
        shortcut: the 1x1 convolution, or None.
        skip: channels of a skip connection, which follow those of the image.
        columns: those of the block in the time projections.
    """

    def __init__(
        self,
        norms: tuple[nn.GroupNorm, nn.GroupNorm],
        convolutions: tuple[nn.Conv2d, nn.Conv2d],
        shortcut: nn.Conv2d | None,
        skip: int,
        columns: slice,
        dtype: torch.dtype,
    ):
        self.norms = tuple(_Norm(norm, True, dtype) for norm in norms)
        self.convolutions = tuple(_Product(conv, dtype) for conv in convolutions)
        self.columns = columns
        self.scale_shift = columns.stop - columns.start > convolutions[0].out_channels
        self.shortcuts: list[dense.Weight] = []
        if shortcut is not None:
            matrix = shortcut.weight.detach().flatten(1)
            parts = matrix.split([matrix.shape[1] - skip, skip] if skip else matrix.shape[1], 1)
            self.shortcuts = [dense.Weight(part, torch.float32) for part in parts]
            assert shortcut.bias is not None
            self.shortcut_bias = shortcut.bias.detach()

    def __call__(self, x: Tensor, skip: Tensor | None, given: _Given) -> Tensor:
        time = given.time[:, self.columns]
        first, second = self.convolutions
        y = self.norms[0](x, x2=skip)
        y = dense.convolve(y, first.weight, first.bias, add=None if self.scale_shift else time)
        y = self.norms[1](y, scale_shift=time if self.scale_shift else None)
        if self.shortcuts:
            past = dense.linear(x, self.shortcuts[0], self.shortcut_bias)
            if skip is not None:
                past = dense.linear(skip, self.shortcuts[1], residual=past)
        else:
            past = x if skip is None else torch.cat([x, skip], 3)
        return dense.convolve(y, second.weight, second.bias, residual=past)


class _Resample:
    """A convolution that halves the image, or one after nearest 2x upsampling."""

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype):
        assert conv.bias is not None  # those of both classes have one
        self.bias, self.dtype = conv.bias.detach(), dtype
        self.down = conv.stride[0] == 2
        self.weights = (
            [dense.Weight(conv.weight, dtype)]
            if self.down
            else dense.upsampling_phases(conv.weight, dtype)
        )

    def __call__(self, x: Tensor, skip: Tensor | None, given: _Given) -> Tensor:
        y = dense.framed(x, self.dtype)
        if self.down:
            return dense.convolve(y, self.weights[0], self.bias, stride=2)
        return dense.convolve_phases(y, self.weights, self.bias)


class _Transformer:
    """Transformer blocks over the pixels of images, self-attention over `n_views` of them together.

    Args:
        keys: first column of each block's keys and values among all, by block.
    """

    def __init__(
        self, module: Network, keys: dict[nn.Module, int], n_views: int, dtype: torch.dtype
    ):
        self.norm = _Norm(module.norm, False, dtype)
        self.proj_in = _Product(_as_linear(module.proj_in), dtype)
        self.proj_out = _Product(_as_linear(module.proj_out), torch.float32)
        self.blocks = [
            _Block(block, keys[block.attn2], n_views, dtype) for block in module.transformer_blocks
        ]

    def __call__(self, x: Tensor, skip: Tensor | None, given: _Given) -> Tensor:
        h = dense.linear(self.norm(x, frame=False), self.proj_in.weight, self.proj_in.bias)
        tokens = h.flatten(1, 2)
        for block in self.blocks:
            tokens = block(tokens, given.keys)
        h = tokens.view(x.shape)
        return dense.linear(h, self.proj_out.weight, self.proj_out.bias, residual=x)


class _Block:
    """Self-attention, cross-attention and GEGLU, each added to the tokens [R,N,C] float32."""

    def __init__(self, block: Network, column: int, n_views: int, dtype: torch.dtype):
        own, cross = block.attn1, block.attn2
        self.norms = [(n.weight.detach(), n.bias.detach(), n.eps) for n in _norms(block)]
        self.heads, self.n_views, self.dtype = own.heads, n_views, dtype
        channels = own.to_q.out_features
        self.keys = slice(column, column + channels)
        self.values = slice(column + channels, column + 2 * channels)
        self.qkv = _Product([own.to_q, own.to_k, own.to_v], dtype)
        self.own_out = _Product(own.to_out[0], dtype)
        self.query = _Product(cross.to_q, dtype)
        self.cross_out = _Product(cross.to_out[0], dtype)
        self.wide, self.narrow = (
            _Product(n, dtype) for n in (block.ff.net[0].proj, block.ff.net[2])
        )

    def __call__(self, h: Tensor, text: Tensor) -> Tensor:
        qkv = dense.linear(self._normed(h, 0), self.qkv.weight, self.qkv.bias, dtype=self.dtype)
        together = qkv.view(-1, self.n_views * qkv.shape[1], qkv.shape[2])
        q, k, v = together.chunk(3, 2)
        y = dense.attention(q, k, v, self.heads).view_as(h)
        h = dense.linear(y, self.own_out.weight, self.own_out.bias, residual=h)
        q = dense.linear(self._normed(h, 1), self.query.weight, self.query.bias, dtype=self.dtype)
        y = dense.attention(q, text[..., self.keys], text[..., self.values], self.heads)
        h = dense.linear(y, self.cross_out.weight, self.cross_out.bias, residual=h)
        y = dense.linear(
            self._normed(h, 2), self.wide.weight, self.wide.bias, dtype=self.dtype, gated=True
        )
        return dense.linear(y, self.narrow.weight, self.narrow.bias, residual=h)

    def _normed(self, h: Tensor, i: int) -> Tensor:
        weight, bias, eps = self.norms[i]
        return dense.layer_norm(h, weight, bias, eps, self.dtype)


def _norms(block: Network) -> tuple[nn.LayerNorm, nn.LayerNorm, nn.LayerNorm]:
    return block.norm1, block.norm2, block.norm3


def _as_linear(layer: Network) -> nn.Linear:
    """A 1x1 convolution as the linear layer that it is."""
    if isinstance(layer, nn.Linear):
        return layer
    linear = nn.Linear(layer.in_channels, layer.out_channels)
    linear.weight.data, linear.bias.data = layer.weight.data.flatten(1), layer.bias.data
    return linear


_Layer = _Residual | _Resample | _Transformer


class DenseUNet:
    """Takes the place of a UNet's forward on the CPU; its weights are copied.

    Args:
        unet: UNet2DConditionModel or MultiViewUNet in float32 on the CPU, in eval mode.
        dtype: of the products: bfloat16, where `dense.precision()` says so, or float32.
    Raises:
        ValueError: `unsupported(unet)`.
    """

    @torch.no_grad()
    def __init__(self, unet: Network, dtype: torch.dtype):
        if reason := unsupported(unet):
            raise ValueError(f"DenseUNet does not support {reason}")
        self.dtype = dtype
        self.unet = unet
        self.n_views = getattr(unet, "n_views", 1)
        crosses = [m for name, m in unet.named_modules() if name.endswith("attn2")]
        self._keys = _columns([block for block in unet.modules() if hasattr(block, "attn2")])
        self.text = _Product([layer for a in crosses for layer in (a.to_k, a.to_v)], dtype)
        self._projections: list[nn.Linear] = []
        build = self._of_views if isinstance(unet, MultiViewUNet) else self._of_diffusers
        conv_in, self.down, self.mid, self.up, norm_out, conv_out = build(unet)
        self.conv_in = _Product(conv_in, torch.float32)
        self.norm_out = _Norm(norm_out, True, torch.float32)
        self.conv_out = _Product(conv_out, torch.float32)
        self.time_weight = torch.cat([p.weight for p in self._projections])
        self.time_bias = torch.cat([p.bias for p in self._projections])

    @torch.no_grad()
    def __call__(
        self, latents: Tensor, t: Tensor, tokens: Tensor, camera: Tensor | None = None
    ) -> Tensor:
        """The module's prediction.

        Args:
            latents: [R,C,h,w] float32, sides as the module takes them.
            t: [R] int64.
            tokens: [R,L,D] float32.
            camera: [R,16] float32, for a MultiViewUNet.
        Returns:
            [R,C',h,w] float32 contiguous.
        Raises:
            ValueError: rows that are no whole number of objects, or sides that do not halve.
        """
        if latents.shape[0] % self.n_views:
            raise ValueError(
                f"expected {self.n_views} rows an object, one a view, got {latents.shape[0]} rows"
            )
        halvings = sum(isinstance(layer, _Resample) for layers in self.down for layer in layers)
        if latents.shape[2] % 2**halvings or latents.shape[3] % 2**halvings:
            raise ValueError(
                f"expected sides in multiples of {2**halvings}, got {list(latents.shape[2:])}"
            )
        time = F.silu(self._embedding(t, tokens, camera))
        keys = dense.linear(tokens.to(self.dtype), self.text.weight, dtype=self.dtype)
        given = _Given(F.linear(time, self.time_weight, self.time_bias), keys)
        with dense.crew():
            return self._forward(latents, given)

    def _forward(self, latents: Tensor, given: _Given) -> Tensor:
        image = dense.framed(latents.permute(0, 2, 3, 1).contiguous(), torch.float32)
        x = dense.convolve(image, self.conv_in.weight, self.conv_in.bias)
        kept = [x]
        for layers in self.down:
            x = _through(layers, x, None, given)
            kept.append(x)
        x = _through(self.mid, x, None, given)
        for layers in self.up:
            x = _through(layers, x, kept.pop(), given)
        y = dense.convolve(self.norm_out(x), self.conv_out.weight, self.conv_out.bias)
        return y.permute(0, 3, 1, 2).contiguous()

    def _embedding(self, t: Tensor, tokens: Tensor, camera: Tensor | None) -> Tensor:
        """Of level, camera and text, [R,E] float32: by the module's own layers."""
        unet = self.unet
        if isinstance(unet, MultiViewUNet):
            first: Network = unet.time_embed[0]
            level = sinusoids(t, first.in_features)
            embedding = unet.time_embed(level) + unet.camera_embed(camera)
            pooled = getattr(unet, "text_embed", None)
        else:
            embedding = unet.time_embedding(unet.time_proj(t).float())
            pooled = getattr(unet, "add_embedding", None)
        return embedding if pooled is None else embedding + pooled(tokens)

    def _project(self, projection: nn.Linear) -> slice:
        first = sum(p.out_features for p in self._projections)
        self._projections.append(projection)
        return slice(first, first + projection.out_features)

    # ---- the layers of either class, in the order of the forward ---------------------------------

    def _of_diffusers(self, unet: Network) -> tuple:
        def residual(block: Network, skip: int) -> _Residual:
            return _Residual(
                (block.norm1, block.norm2), (block.conv1, block.conv2), block.conv_shortcut, skip,
                self._project(block.time_emb_proj), self.dtype,
            )  # fmt: skip

        def layers(block: Network, i: int, skip: int) -> list[_Layer]:
            found: list[_Layer] = [residual(block.resnets[i], skip)]
            if getattr(block, "attentions", None) is not None:
                found.append(_Transformer(block.attentions[i], self._keys, 1, self.dtype))
            return found

        kept, down, up = [unet.conv_in.out_channels], [], []
        for block in unet.down_blocks:
            for i, resnet in enumerate(block.resnets):
                down.append(layers(block, i, 0))
                kept.append(resnet.conv2.out_channels)
            for sampler in block.downsamplers or ():
                down.append([_Resample(sampler.conv, torch.float32)])
                kept.append(kept[-1])
        mid: list[_Layer] = [residual(unet.mid_block.resnets[0], 0)]
        for attention, resnet in zip(unet.mid_block.attentions, unet.mid_block.resnets[1:]):
            mid += [_Transformer(attention, self._keys, 1, self.dtype), residual(resnet, 0)]
        for block in unet.up_blocks:
            for i in range(len(block.resnets)):
                up.append(layers(block, i, kept.pop()))
            for sampler in block.upsamplers or ():
                up[-1].append(_Resample(sampler.conv, self.dtype))
        return unet.conv_in, down, mid, up, unet.conv_norm_out, unet.conv_out

    def _of_views(self, unet: MultiViewUNet) -> tuple:
        def layers(block: nn.Module, skip: int = 0) -> list[_Layer]:
            found: list[_Layer] = []
            for layer in block.children():
                parts: Network = layer
                if hasattr(layer, "in_layers"):
                    past = parts.skip_connection
                    found.append(
                        _Residual(
                            (parts.in_layers[0], parts.out_layers[0]),
                            (parts.in_layers[2], parts.out_layers[3]),
                            past if isinstance(past, nn.Conv2d) else None,
                            skip,
                            self._project(parts.emb_layers[1]),
                            self.dtype,
                        )
                    )
                elif hasattr(layer, "transformer_blocks"):
                    found.append(_Transformer(parts, self._keys, self.n_views, self.dtype))
                elif hasattr(layer, "op"):
                    found.append(_Resample(parts.op, torch.float32))
                else:
                    found.append(_Resample(parts.conv, self.dtype))
            return found

        blocks: Network = unet.input_blocks
        conv_in = blocks[0][0]
        kept, down = [conv_in.out_channels], []
        for block in blocks[1:]:
            down.append(layers(block))
            last = [
                m for m in block.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)
            ]
            kept.append(last[-1].out_channels)
        mid = layers(unet.middle_block)
        up = [layers(block, kept.pop()) for block in unet.output_blocks]
        ending: Network = unet.out
        return conv_in, down, mid, up, ending[0], ending[2]


def _columns(blocks: Sequence[Network]) -> dict[nn.Module, int]:
    """First column of each block's keys and values among all of them, by its cross-attention."""
    found, column = {}, 0
    for block in blocks:
        found[block.attn2] = column
        column += 2 * block.attn2.to_k.out_features
    return found


def _through(layers: Sequence[_Layer], x: Tensor, skip: Tensor | None, given: _Given) -> Tensor:
    for layer in layers:
        x = layer(x, skip, given)
        skip = None
    return x
