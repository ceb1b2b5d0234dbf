"""Layers of a frozen network over images with their channels innermost, on a CPU with AVX-512.

Products (convolutions and linear layers are one), norms and attention. What goes into a product,
and its weights, are float32 or, at twice the speed, bfloat16, of which a processor with AVX512-BF16
multiplies pairs; sums, norms and residuals are float32 always (csrc/dense.h).

Nothing here has a gradient. `DSD_BACKEND=torch` selects twins in torch, which compute the same up
to the order of sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from dsd_fast._backend import address, backend, extension, target
from dsd_fast.ops._check import check_tensor

# Widest head of an attention.
WIDEST_HEAD = 160
_CPU = torch.device("cpu")
_LANES = 16
_TAPS = 9  # at most, of a convolution


def precision() -> torch.dtype | None:
    """The fastest dtype of products here: bfloat16, float32, or None without AVX-512."""
    if backend(_CPU) == "torch":
        return None
    return {0: None, 1: torch.float32, 2: torch.bfloat16}[extension().build_info()["cpu_dense"]]


@contextmanager
def crew() -> Iterator[None]:
    """Calls within, of this thread, share threads that are started once."""
    mine = not _on_torch() and extension().keep_crew(torch.get_num_threads())
    try:
        yield
    finally:
        if mine:
            extension().release_crew()


class Weight:
    """The weights of a product as the kernel reads them, [ceil(O/16), taps, I/P, 16, P].

    Args:
        weight: [O,I] or [O,I,a,b], a·b at most 9, in any floating dtype.
        dtype: bfloat16 (P = 2) or float32 (P = 1).
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype):
        if weight.ndim not in (2, 4) or dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(
                "dense.Weight: expected [O,I] or [O,I,a,b] for float32 or bfloat16, got "
                f"{list(weight.shape)} for {dtype}"
            )
        self.columns, self.inputs = weight.shape[:2]
        self.dtype = dtype
        pair = 2 if dtype == torch.bfloat16 else 1
        if self.inputs % pair:
            raise ValueError(f"dense.Weight: bfloat16 takes inputs in pairs, got {self.inputs}")
        self.shape = tuple(weight.shape[2:]) or (1, 1)
        self.taps = self.shape[0] * self.shape[1]
        w = weight.detach().float().reshape(self.columns, self.inputs, self.taps)
        w = F.pad(w, (0, 0, 0, 0, 0, -self.columns % _LANES))
        w = w.view(-1, _LANES, self.inputs // pair, pair, self.taps).permute(0, 4, 2, 1, 3)
        self.data = w.to(dtype).contiguous()

    def dense(self) -> Tensor:
        """[O,inputs,a,b] float32."""
        w = self.data.float().permute(0, 3, 2, 4, 1).reshape(-1, self.inputs, *self.shape)
        return w[: self.columns]


def linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    gated: bool = False,
) -> Tensor:
    """x [..,I] times the weights, + bias [O] + residual [..,O]: [..,O] in `dtype`.

    Args:
        x: in the weights' dtype.
        residual: float32.
        gated: the first half of the outputs times gelu of the second, [..,O/2]; with bias, without
            residual.
    """
    _check("dense.linear", "x", x, weight.dtype, [*x.shape[:-1], weight.inputs])
    if bias is not None:
        _check("dense.linear", "bias", bias, torch.float32, [weight.columns])
    columns = weight.columns // 2 if gated else weight.columns
    y = x.new_empty(*x.shape[:-1], columns, dtype=dtype)
    if residual is not None:
        _check("dense.linear", "residual", residual, torch.float32, y.shape)
    if gated and (bias is None or residual is not None or columns % _LANES):
        raise ValueError("dense.linear: gated takes a bias, no residual, and vectors of 16 outputs")
    if _on_torch():
        z = F.linear(x.float(), weight.dense().flatten(1), bias)
        if gated:
            value, gate = z.chunk(2, -1)
            z = value * F.gelu(gate)
        return y.copy_(z if residual is None else z + residual)
    n = y.numel() // columns
    _dense(
        x, weight, bias, None, residual, y,
        x_strides=(0, 0, weight.inputs), y_strides=(0, 0, columns), size=(1, 1, n),
        taps=[0], gated=gated,
    )  # fmt: skip
    return y


def convolve(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    *,
    add: Tensor | None = None,
    residual: Tensor | None = None,
    stride: int = 1,
    border: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Convolution of a framed image [B,h+2,w+2,I]: [B,h/stride,w/stride,O] in `dtype`.

    Args:
        x: in the weights' dtype, with one row of zeros around (`framed`, `group_norm`).
        bias: [O] float32.
        add: [B,O] float32, to every pixel.
        residual: [B,h/stride,w/stride,O] float32.
        border: zeros that the convolution sees before the first pixel: 1, or 0.
    """
    batch, height, width = x.shape[0], x.shape[1] - 2, x.shape[2] - 2
    _check("dense.convolve", "x", x, weight.dtype, [batch, "h", "w", weight.inputs])
    if bias is not None:
        _check("dense.convolve", "bias", bias, torch.float32, [weight.columns])
    shape = (batch, height // stride, width // stride, weight.columns)
    y = x.new_empty(shape, dtype=dtype)
    if residual is not None:
        _check("dense.convolve", "residual", residual, torch.float32, shape)
    if add is not None and (add.shape != (batch, weight.columns) or add.stride(1) != 1):
        raise ValueError(
            f"dense.convolve: expected add [{batch}, {weight.columns}] with dense rows, got "
            f"{list(add.shape)}"
        )
    if _on_torch():
        image = x.float().permute(0, 3, 1, 2)[:, :, 1 - border :, 1 - border :]
        z = F.conv2d(image, weight.dense(), bias, stride)[:, :, : shape[1], : shape[2]]
        z = z.permute(0, 2, 3, 1)
        z = z if add is None else z + add[:, None, None]
        return y.copy_(z if residual is None else z + residual)
    _dense(
        x, weight, bias, add, residual, y,
        x_strides=_image_strides(x, stride), y_strides=_image_strides(y),
        size=shape[:3], taps=_taps(x, weight.shape, 1 - border, 1 - border),
    )  # fmt: skip
    return y


def upsampling_phases(weight: Tensor, dtype: torch.dtype) -> list[Weight]:
    """A 3x3 convolution after nearest 2x upsampling, [O,I,3,3], for `convolve_phases`.

    Of the three rows that an output row reads two are copies of one: rows 2i see (w0, w1 + w2) of
    the small image's i - 1 and i, rows 2i + 1 (w0 + w1, w2) of i and i + 1; columns likewise. So
    the large image takes 4/9 of the arithmetic.
    """

    def pairs(w: Tensor, axis: int) -> list[Tensor]:
        a, b, c = w.unbind(axis)
        return [torch.stack([a, b + c], axis), torch.stack([a + b, c], axis)]

    w = weight.detach().float()
    return [Weight(both, dtype) for rows in pairs(w, 2) for both in pairs(rows, 3)]


def halving_gradient(weight: Tensor, dtype: torch.dtype) -> list[Weight]:
    """The gradient of a 3x3 convolution of stride 2, [O,I,3,3], with zeros after the last pixel and
    none before the first, to its input; for `convolve_phases`.

    Rows 2i of the input were seen by w2 of the output's i - 1 and w0 of i, rows 2i + 1 by w1 of i.
    """

    def parts(w: Tensor, axis: int) -> list[Tensor]:
        a, b, c = w.unbind(axis)
        return [torch.stack([c, a], axis), b.unsqueeze(axis)]

    w = weight.detach().float().transpose(0, 1)
    return [Weight(both, dtype) for rows in parts(w, 2) for both in parts(rows, 3)]


def convolve_phases(x: Tensor, weights: Sequence[Weight], bias: Tensor | None = None) -> Tensor:
    """An image twice as large as a framed one [B,h+2,w+2,I], by a convolution for each phase.

    Args:
        x: in the weights' dtype.
        weights: four; pixels (2i + a, 2j + b) are those of the convolution 2a + b, of which the
            first number reads the framed (i + a, j + b).
    Returns:
        [B,2h,2w,O] float32.
    """
    batch, height, width = x.shape[0], x.shape[1] - 2, x.shape[2] - 2
    first = weights[0]
    _check("dense.convolve_phases", "x", x, first.dtype, [batch, "h", "w", first.inputs])
    if bias is not None:
        _check("dense.convolve_phases", "bias", bias, torch.float32, [first.columns])
    y = x.new_empty(batch, height, 2, width, 2, first.columns, dtype=torch.float32)
    for i, weight in enumerate(weights):
        part = y[:, :, i // 2, :, i % 2]
        if _on_torch():
            image = x.float().permute(0, 3, 1, 2)[:, :, i // 2 :, i % 2 :]
            z = F.conv2d(image, weight.dense(), bias)[:, :, :height, :width]
            part.copy_(z.permute(0, 2, 3, 1))
            continue
        _dense(
            x, weight, bias, None, None, part,
            x_strides=_image_strides(x), y_strides=_image_strides(part),
            size=(batch, height, width), taps=_taps(x, weight.shape, i // 2, i % 2),
        )  # fmt: skip
    return y.view(batch, 2 * height, 2 * width, first.columns)


def group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    dtype: torch.dtype,
    *,
    x2: Tensor | None = None,
    scale_shift: Tensor | None = None,
    frame: bool = True,
    stats: Tensor | None = None,
) -> Tensor:
    """act(GroupNorm(x | x2) (1 + scale) + shift) of images [B,h,w,C], in `dtype`.

    Args:
        x, x2: [B,h,w,C1], [B,h,w,C2] float32, multiples of 16 channels.
        weight, bias: [C1 + C2] float32.
        silu: act is SiLU, else nothing.
        scale_shift: [B,2C] float32 = (scale | shift), with any stride between rows.
        frame: with one row of zeros around, [B,h+2,w+2,C], as `convolve` reads it.
        stats: [B,groups,2] float32 that gets each group's mean and 1 / deviation.
    """
    channels = x.shape[3] + (0 if x2 is None else x2.shape[3])
    _check("dense.group_norm", "x", x, torch.float32, ["B", "h", "w", "C"])
    if x2 is not None:
        _check("dense.group_norm", "x2", x2, torch.float32, [*x.shape[:3], "C"])
    for name, tensor in (("weight", weight), ("bias", bias)):
        _check("dense.group_norm", name, tensor, torch.float32, [channels])
    if scale_shift is not None and (
        scale_shift.shape != (len(x), 2 * channels) or scale_shift.stride(1) != 1
    ):
        raise ValueError(
            f"dense.group_norm: expected scale_shift [{len(x)}, {2 * channels}] with dense rows, "
            f"got {list(scale_shift.shape)}"
        )
    if stats is not None:
        _check("dense.group_norm", "stats", stats, torch.float32, [len(x), groups, 2])
    if channels % groups or x.shape[3] % _LANES or channels % _LANES:
        raise ValueError(
            f"dense.group_norm: expected channels in {groups} groups and in vectors of {_LANES}, "
            f"got {x.shape[3]} of {channels}"
        )
    if _on_torch():
        s = (x if x2 is None else torch.cat([x, x2], 3)).permute(0, 3, 1, 2)
        if stats is not None:
            variance, mean = torch.var_mean(s.reshape(len(x), groups, -1), 2, correction=0)
            stats.copy_(torch.stack([mean, torch.rsqrt(variance + eps)], 2))
        s = F.group_norm(s, groups, weight, bias, eps)
        if scale_shift is not None:
            scale, shift = scale_shift[:, :, None, None].chunk(2, 1)
            s = s * (1 + scale) + shift
        return _framed_reference((F.silu(s) if silu else s).permute(0, 2, 3, 1), dtype, frame)
    return _norm(x, x2, weight, bias, scale_shift, groups, eps, silu, dtype, frame, stats)


def framed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """An image [B,h,w,C] float32 in `dtype` with one row of zeros around: [B,h+2,w+2,C]."""
    _check("dense.framed", "x", x, torch.float32, ["B", "h", "w", "C"])
    if _on_torch():
        return _framed_reference(x, dtype, True)
    return _norm(x, None, None, None, None, 0, 0.0, False, dtype, True, None)


def group_norm_grad(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stats: Tensor,
    silu: bool,
    dtype: torch.dtype,
    *,
    residual: Tensor | None = None,
    plain: Tensor | None = None,
) -> Tensor:
    """The gradient to x of act(GroupNorm(x)), + residual, all [B,h,w,C] float32.

    Args:
        grad: to the result; its numbers are lost.
        stats: [B,groups,2] that `group_norm` left.
        plain: gets it as it is.
    Returns:
        it in `dtype` with one row of zeros around, [B,h+2,w+2,C], as `convolve` reads it.
    """
    groups = stats.shape[1]
    images = (("grad", grad), ("x", x), ("residual", residual), ("plain", plain))
    for name, tensor in images:
        if tensor is not None:
            _check("dense.group_norm_grad", name, tensor, torch.float32, x.shape)
    for name, tensor in (("weight", weight), ("bias", bias)):
        _check("dense.group_norm_grad", name, tensor, torch.float32, x.shape[3:])
    _check("dense.group_norm_grad", "stats", stats, torch.float32, [len(x), groups, 2])
    if _on_torch():
        mean, rstd = stats[:, None, None, :, :, None].unbind(4)
        h = (x.unflatten(3, (groups, -1)) - mean) * rstd
        g = grad
        if silu:
            u = h.flatten(3) * weight + bias
            share = torch.sigmoid(u)
            g = grad * share * (1 + u * (1 - share))
        g = (g * weight).unflatten(3, (groups, -1))
        of_group = (1, 2, 4)
        g = g - g.mean(of_group, True) - h * (g * h).mean(of_group, True)
        dx = (g * rstd).flatten(3)
        dx = dx if residual is None else dx + residual
        if plain is not None:
            plain.copy_(dx)
        return _framed_reference(dx, dtype, True)
    batch, height, width, channels = x.shape
    framed = x.new_empty(batch, height + 2, width + 2, channels, dtype=dtype)
    sums = _sums(x, channels)
    extension().dense_norm_grad(
        address(grad), address(x), address(weight), address(bias), address(stats),
        address(residual), address(sums), address(plain), address(framed),
        (batch, height, width), channels, groups, silu, dtype == torch.bfloat16, *target(x),
    )  # fmt: skip
    return framed


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """LayerNorm over the last dimension of x [..,C] float32, in `dtype`."""
    channels = x.shape[-1]
    _check("dense.layer_norm", "x", x, torch.float32, list(x.shape))
    for name, tensor in (("weight", weight), ("bias", bias)):
        _check("dense.layer_norm", name, tensor, torch.float32, [channels])
    if _on_torch():
        return F.layer_norm(x, [channels], weight, bias, eps).to(dtype)
    y = torch.empty_like(x, dtype=dtype)
    extension().dense_layer_norm(
        address(x), address(weight), address(bias), address(y), x.numel() // channels, channels,
        eps, dtype == torch.bfloat16, *target(x),
    )  # fmt: skip
    return y


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """softmax(q kᵀ / √d) v for every head, d = C / heads: [B,Q,C] in the dtype of q.

    Args:
        q: [B,Q,C], k, v: [B,K,C], float32 or bfloat16, the last dimension dense.
        heads: of an even width up to WIDEST_HEAD.
    """
    batch, queries, channels = q.shape
    width = channels // heads
    if channels % heads or width % 2 or width > WIDEST_HEAD:
        raise ValueError(
            f"dense.attention: expected heads of an even width up to {WIDEST_HEAD}, got {channels} "
            f"channels in {heads}"
        )
    for name, x in (("q", q), ("k", k), ("v", v)):
        wanted = (batch, queries if name == "q" else k.shape[1], channels)
        if x.shape != wanted or x.dtype != q.dtype or x.stride(2) != 1 or x.is_cuda:
            raise ValueError(
                f"dense.attention: expected {name} {list(wanted)} in {q.dtype} with a dense last "
                f"dimension on the CPU, got {list(x.shape)} in {x.dtype}"
            )
    if _on_torch():
        a, b, c = (x.float().unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(a, b, c).transpose(1, 2).flatten(2).to(q.dtype)
    y = q.new_empty(batch, queries, channels)
    room = extension().dense_attention_room(k.shape[1], width)
    workspace = q.new_empty(batch * heads * room)
    strides = [stride for x in (q, k, v) for stride in x.stride()[:2]]
    extension().dense_attention(
        address(q), address(k), address(v), address(y), address(workspace), strides, batch,
        queries, k.shape[1], heads, width, width**-0.5, q.dtype == torch.bfloat16, *target(q),
    )  # fmt: skip
    return y


def _check(
    op: str, name: str, tensor: object, dtype: torch.dtype, shape: Sequence[int | str]
) -> None:
    check_tensor(op, name, tensor, dtype, shape, _CPU)


def _on_torch() -> bool:
    return backend(_CPU) == "torch"


def _framed_reference(x: Tensor, dtype: torch.dtype, frame: bool) -> Tensor:
    return (F.pad(x, (0, 0, 1, 1, 1, 1)) if frame else x).to(dtype).contiguous()


def _norm(
    x: Tensor,
    x2: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale_shift: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
    dtype: torch.dtype,
    frame: bool,
    stats: Tensor | None,
) -> Tensor:
    batch, height, width, first = x.shape
    channels = first + (0 if x2 is None else x2.shape[3])
    edge = 2 if frame else 0
    y = x.new_empty(batch, height + edge, width + edge, channels, dtype=dtype)
    sums = _sums(x, channels) if groups else None
    extension().dense_norm(
        address(x), address(x2), address(weight), address(bias), address(scale_shift),
        address(sums), address(stats), address(y), (batch, height, width), channels, first,
        0 if scale_shift is None else scale_shift.stride(0), groups, eps, silu, frame,
        dtype == torch.bfloat16, *target(x),
    )  # fmt: skip
    return y


def _sums(x: Tensor, channels: int) -> Tensor:
    """Where a norm sums parts of images [B,h,w,C]."""
    return x.new_empty(len(x) * extension().dense_norm_parts(*x.shape[1:3]) * 2 * channels)


def _dense(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    add: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    x_strides: Sequence[int],
    y_strides: Sequence[int],
    size: Sequence[int],
    taps: list[int],
    gated: bool = False,
) -> None:
    extension().dense(
        address(x), address(weight.data), address(bias), address(add), address(residual),
        address(y), x_strides, y_strides, 0 if add is None else add.stride(0), size, weight.inputs,
        weight.columns, taps + [0] * (_TAPS - len(taps)), len(taps),
        weight.dtype == torch.bfloat16, y.dtype == torch.bfloat16, gated,
        *target(x),
    )  # fmt: skip


def _image_strides(x: Tensor, stride: int = 1) -> tuple[int, int, int]:
    batch, row, pixel, _ = x.stride()
    return batch, row * stride, pixel * stride


def _taps(x: Tensor, size: Sequence[int], row: int, column: int) -> list[int]:
    """Where a kernel of a size reads a framed image for pixel 0, from its place (row, column)."""
    return [
        (row + i) * x.stride(1) + (column + j) * x.stride(2)
        for i in range(size[0])
        for j in range(size[1])
    ]
