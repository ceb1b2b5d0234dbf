"""Multiresolution hash-grid encoding: value, Jacobian, and the gradients of both.

Müller et al. 2022, "Instant Neural Graphics Primitives". Table layout, level sizes and hash are
tiny-cuda-nn's, element for element (grid type "Hash", "coherent prime", linear interpolation, 3
dimensions), so weights can be exchanged. Formulas: csrc/hashgrid.h.

The compiled kernels compute in float32. On the CPU every result is the same, bit for bit, for any
number of threads. On CUDA the table gradient is summed with float atomics, so its last bits change
from run to run. Under torch.use_deterministic_algorithms(True) it is summed in integers, and the
same call gives the same bits: that takes longer, and memory of 8 bytes a number of the table. A
level to which something is added that is not finite then gets NaN everywhere.
"""

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dsd_fast._backend import address, aligned, backend, deterministic, extension, target
from dsd_fast.ops._check import check_integer, check_number, check_tensor

# Coherent prime hash: one factor a dimension, the first is 1 so that neighbours along x are close.
_PRIMES = (1, 2654435761, 805459861)
_UINT32 = 2**32 - 1
# Cells further out are read as this one (kGridFarCell in csrc/hashgrid.h).
_FAR_CELL = 2.0**30
# Compiled feature counts and level limit (csrc/hashgrid.h).
_FEATURES = (2, 4)
_MAX_LEVELS = 32
# The logarithm of the most corners along an edge.
_FINEST = 24


class GridLevel(NamedTuple):
    """One level of the grid."""

    scale: float  # cells along an edge of the unit cube (a float32 value)
    resolution: int  # corners along an edge
    size: int  # table entries
    hashed: bool  # False: entry x + y R + z R^2
    offset: int  # first entry in the table


@dataclass(frozen=True)
class GridSpec:
    """Shape of a hash grid.

    Args:
        n_levels: levels, 1 to 32.
        n_features: features an entry, 2 or 4.
        log2_table_size: a level has at most 2 ** log2_table_size entries; 3 to 28.
        base_resolution: corners along an edge on the coarsest level.
        per_level_scale: growth of the resolution from level to level, at least 1.

    Raises:
        TypeError: a value that is no number, or no integer where it counts something.
        ValueError: a value out of these ranges.
    """

    n_levels: int
    n_features: int
    log2_table_size: int
    base_resolution: int
    per_level_scale: float

    def __post_init__(self) -> None:
        for name in ("n_levels", "n_features", "log2_table_size", "base_resolution"):
            check_integer("GridSpec", name, getattr(self, name), -_UINT32, _UINT32)
        growth = check_number("GridSpec", "per_level_scale", self.per_level_scale)
        if not 1 <= self.n_levels <= _MAX_LEVELS:
            raise ValueError(f"n_levels must be 1 to {_MAX_LEVELS}, got {self.n_levels}")
        if self.n_features not in _FEATURES:
            raise ValueError(f"n_features must be one of {_FEATURES}, got {self.n_features}")
        if not 3 <= self.log2_table_size <= 28:
            raise ValueError(f"log2_table_size must be 3 to 28, got {self.log2_table_size}")
        if self.base_resolution < 2:
            raise ValueError(f"base_resolution must be at least 2, got {self.base_resolution}")
        if not 1.0 <= growth < math.inf:
            raise ValueError(f"per_level_scale must be at least 1 and finite, got {growth}")
        # In logarithms, for the power may be more than a float holds.
        finest = math.log2(self.base_resolution)
        finest += math.log2(growth) * (self.n_levels - 1)
        if finest > _FINEST + 1e-9:
            raise ValueError(
                f"the finest level would have 2^{finest:.1f} corners an edge; beyond 2^{_FINEST} "
                "float32 coordinates cannot tell cells apart"
            )

    @cached_property
    def levels(self) -> tuple[GridLevel, ...]:
        """All levels, coarse to fine."""
        # The float32 steps of tiny-cuda-nn: exp2(l * log2(b)) * base - 1. Each step is computed in
        # double and rounded once, so every platform's table is the same.
        log2_scale = np.float32(math.log2(np.float32(self.per_level_scale)))
        levels, offset = [], 0
        for level in range(self.n_levels):
            growth = np.float32(2.0 ** float(np.float32(level) * log2_scale))
            scale = growth * np.float32(self.base_resolution) - np.float32(1.0)
            resolution = math.ceil(scale) + 1
            dense = resolution**3
            size = min(-(-dense // 8) * 8, 2**self.log2_table_size)
            levels.append(GridLevel(float(scale), resolution, size, size < dense, offset))
            offset += size
        return tuple(levels)

    @cached_property
    def packed_levels(self) -> bytes:
        """The levels as the compiled kernels read them."""
        return b"".join(
            struct.pack("<fIIIq", lv.scale, lv.resolution, lv.size, lv.hashed, lv.offset)
            for lv in self.levels
        )

    @property
    def n_entries(self) -> int:
        """Table entries of all levels."""
        return self.levels[-1].offset + self.levels[-1].size

    @property
    def n_params(self) -> int:
        """Numbers in the table."""
        return self.n_entries * self.n_features

    @property
    def n_outputs(self) -> int:
        """Columns of the encoding."""
        return self.n_levels * self.n_features


# Operators take numbers, not objects: the end of each schema, and the way back.
_SPEC = (
    "int n_levels, int n_features, int log2_table_size, int base_resolution, "
    "float per_level_scale, int n_active"
)
_SpecArgs = tuple[int, int, int, int, float, int]


@cache
def _spec(*args: Any) -> GridSpec:
    return GridSpec(*args)


def _spec_args(spec: GridSpec, n_active: int) -> _SpecArgs:
    return (
        spec.n_levels,
        spec.n_features,
        spec.log2_table_size,
        spec.base_resolution,
        spec.per_level_scale,
        n_active,
    )


# ---- reference ----------------------------------------------------------------------------------


def _corners(x: Tensor, table: Tensor, spec: GridSpec, level: GridLevel) -> tuple[Tensor, Tensor]:
    """(fractions [N, 3], corner values [N, 2, 2, 2, F] indexed by the corner's z, y, x offset)."""
    # float64 holds the product of two float32 exactly, so the rounding back is that of the kernels'
    # fused multiply-add.
    position = (x.double() * level.scale + 0.5).to(x.dtype)
    floor = position.detach().floor()
    cell = torch.nan_to_num(floor.double(), nan=-_FAR_CELL).clamp(-_FAR_CELL, _FAR_CELL).long()
    offsets = torch.arange(2, device=x.device)
    cx, cy, cz = ((cell[:, d, None] + offsets) & _UINT32 for d in range(3))  # [N, 2]
    if level.hashed:
        fx, fy, fz = _PRIMES
        entry = _combine(torch.bitwise_xor, cx * fx, cy * fy, cz * fz)
    else:
        r = level.resolution
        entry = _combine(torch.add, cx, cy * r, cz * (r * r & _UINT32))
    # Products and sums may pass 2^63, but their low 32 bits, all that counts, stay right.
    entry = (entry & _UINT32) % level.size + level.offset
    return position - floor, table.view(-1, spec.n_features)[entry]


def _combine(f: Callable, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """f over all corners: three [N, 2] -> [N, 2, 2, 2] indexed by z, y, x."""
    return f(f(z[:, :, None, None], y[:, None, :, None]), x[:, None, None, :])


def _mix(a: Tensor, b: Tensor, f: Tensor) -> Tensor:
    return a + f * (b - a)


def _level_reference(
    x: Tensor, table: Tensor, spec: GridSpec, level: GridLevel
) -> tuple[Tensor, Tensor]:
    """(value [N, F], Jacobian [N, F, 3]) of one level."""
    fraction, v = _corners(x, table, spec, level)
    fx, fy, fz = (fraction[:, d, None] for d in range(3))  # [N, 1]
    v0, v1 = v[..., 0, :], v[..., 1, :]  # [N, 2, 2, F]: z, y
    along_x = _mix(v0, v1, fx[:, None, None])
    a0, a1 = along_x[:, :, 0], along_x[:, :, 1]  # [N, 2, F]: z
    b0, b1 = _mix(a0, a1, fy[:, None]).unbind(1)  # [N, F]
    slope_x = _mix((v1 - v0)[:, :, 0], (v1 - v0)[:, :, 1], fy[:, None])
    jacobian = (
        _mix(slope_x[:, 0], slope_x[:, 1], fz),
        _mix((a1 - a0)[:, 0], (a1 - a0)[:, 1], fz),
        b1 - b0,
    )
    return _mix(b0, b1, fz), level.scale * torch.stack(jacobian, dim=-1)


def hashgrid_reference(
    x: Tensor, table: Tensor, spec: GridSpec, n_active_levels: int | None = None
) -> Tensor:
    """`hashgrid` in pure torch: any floating dtype and device, differentiable by autograd alone."""
    return hashgrid_jacobian_reference(x, table, spec, n_active_levels)[0]


def hashgrid_jacobian_reference(
    x: Tensor, table: Tensor, spec: GridSpec, n_active_levels: int | None = None
) -> tuple[Tensor, Tensor]:
    """`hashgrid_jacobian` in pure torch: any floating dtype and device, by autograd alone."""
    n_active = _active_levels("hashgrid", spec, n_active_levels)
    _check_inputs("hashgrid", x, table, spec, dtype=None)
    table = table.to(x.dtype)
    levels = [_level_reference(x, table, spec, level) for level in spec.levels[:n_active]]
    rest = (spec.n_levels - n_active) * spec.n_features
    values = [value for value, _ in levels] + [x.new_zeros(x.shape[0], rest)]
    jacobians = [jacobian for _, jacobian in levels] + [x.new_zeros(x.shape[0], rest, 3)]
    return torch.cat(values, dim=1), torch.cat(jacobians, dim=1)


# ---- operators ----------------------------------------------------------------------------------


def _active_levels(op: str, spec: GridSpec, n_active_levels: int | None) -> int:
    if not isinstance(spec, GridSpec):
        raise TypeError(f"{op}: spec must be a GridSpec, got {type(spec).__name__}")
    n_active = spec.n_levels if n_active_levels is None else n_active_levels
    check_integer(op, "n_active_levels", n_active, 0, spec.n_levels)
    return n_active


def _check_inputs(
    op: str, x: Tensor, table: Tensor, spec: GridSpec, dtype: torch.dtype | None = torch.float32
) -> None:
    # Made twice: by the public functions, where torch would turn a list or a mix of devices away in
    # words of its own, and by the operators, which torch.ops can reach directly.
    check_tensor(op, "x", x, dtype, ["N", 3])
    is_half = isinstance(table, Tensor) and table.dtype == torch.float16 != x.dtype
    table_dtype = torch.float16 if is_half else x.dtype
    check_tensor(op, "table", table, table_dtype, [spec.n_params], x.device)
    if is_half and table.requires_grad:
        raise ValueError(
            f"{op}: a float16 table is read alone; expected requires_grad False, got True: train a "
            "float32 table, and encode with its copy"
        )


def _launch(
    kernel: str, x: Tensor, *tensors: Tensor | None, args: _SpecArgs, more: tuple[bool, ...] = ()
) -> None:
    """Runs a compiled kernel on `x` and `tensors`, in the order of csrc/bindings.cpp."""
    spec, n_active = _spec(*args[:-1]), args[-1]
    _active_levels(kernel, spec, n_active)
    # CUDA moves 16 bytes at a time. torch's own allocations start at far rounder addresses.
    if x.is_cuda and any(address(tensor) % 16 for tensor in tensors):
        raise ValueError(
            f"{kernel}: on CUDA the table must start at a multiple of 16 bytes, got a view that "
            "does not; call .clone() on it"
        )
    getattr(extension(), kernel)(
        *(address(tensor) for tensor in (x, *tensors)),
        x.shape[0],
        n_active,
        spec.n_features,
        spec.packed_levels,
        *more,
        *target(x),
    )


def _fwd(op: str, x: Tensor, table: Tensor, args: _SpecArgs, jacobian: bool) -> list[Tensor]:
    spec = _spec(*args[:-1])
    _check_inputs(op, x, table, spec)
    y = x.new_empty(x.shape[0], spec.n_outputs)
    jac = x.new_empty(x.shape[0], spec.n_outputs, 3) if jacobian else None
    if x.shape[0] > 0:
        # The CPU computes in float32, with the values of a float16 table.
        read = table if x.is_cuda else table.float()
        is_half = read.dtype == torch.float16
        _launch("hashgrid_fwd", x, read, y, jac, args=args, more=(is_half,))
    return [y] if jac is None else [y, jac]


def _check_grads(
    op: str, x: Tensor, grad_y: Tensor | None, grad_jac: Tensor | None, spec: GridSpec
) -> None:
    shape = [x.shape[0], spec.n_outputs]
    if grad_y is not None:
        check_tensor(op, "grad_y", grad_y, torch.float32, shape, x.device)
    if grad_jac is not None:
        check_tensor(op, "grad_jac", grad_jac, torch.float32, [*shape, 3], x.device)


@torch.library.custom_op(
    "dsd_fast::hashgrid", mutates_args=(), schema=f"(Tensor x, Tensor table, {_SPEC}) -> Tensor"
)
def _hashgrid_op(x: Tensor, table: Tensor, *args: Any) -> Tensor:
    return _fwd("hashgrid", x, table, args, jacobian=False)[0]


@torch.library.custom_op(
    "dsd_fast::hashgrid_jacobian",
    mutates_args=(),
    schema=f"(Tensor x, Tensor table, {_SPEC}) -> (Tensor, Tensor)",
)
def _hashgrid_jacobian_op(x: Tensor, table: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    y, jac = _fwd("hashgrid_jacobian", x, table, args, jacobian=True)
    return y, jac


@torch.library.custom_op(
    "dsd_fast::hashgrid_bwd_table",
    mutates_args=(),
    schema=f"(Tensor x, Tensor? grad_y, Tensor? grad_jac, {_SPEC}) -> Tensor",
)
def _bwd_table_op(x: Tensor, grad_y: Tensor | None, grad_jac: Tensor | None, *args: Any) -> Tensor:
    """Table gradient [P] of sum(y grad_y) + sum(jac grad_jac)."""
    spec = _spec(*args[:-1])
    check_tensor("hashgrid_bwd_table", "x", x, torch.float32, ["N", 3])
    _check_grads("hashgrid_bwd_table", x, grad_y, grad_jac, spec)
    grad_table = x.new_zeros(spec.n_params)
    if x.shape[0] > 0 and not (grad_y is None and grad_jac is None):
        sums = None
        if x.is_cuda and deterministic():
            sums = x.new_empty(extension().hashgrid_sums(spec.n_params), dtype=torch.uint8)
        grads = aligned(grad_y), aligned(grad_jac)
        _launch("hashgrid_bwd_table", x, *grads, grad_table, sums, args=args)
    return grad_table


@torch.library.custom_op(
    "dsd_fast::hashgrid_bwd_input",
    mutates_args=(),
    schema=f"(Tensor x, Tensor table, Tensor? grad_y, Tensor? grad_jac, {_SPEC}) -> Tensor",
)
def _bwd_input_op(
    x: Tensor, table: Tensor, grad_y: Tensor | None, grad_jac: Tensor | None, *args: Any
) -> Tensor:
    """Input gradient [N, 3] of sum(y grad_y) + sum(jac grad_jac)."""
    spec = _spec(*args[:-1])
    _check_inputs("hashgrid_bwd_input", x, table, spec)
    _check_grads("hashgrid_bwd_input", x, grad_y, grad_jac, spec)
    grad_x = torch.empty_like(x)
    if x.shape[0] > 0:
        grads = aligned(grad_y), aligned(grad_jac)
        _launch("hashgrid_bwd_input", x, table.float(), *grads, grad_x, args=args)
    return grad_x


@_hashgrid_op.register_fake
def _(x: Tensor, table: Tensor, *args: Any) -> Tensor:
    return x.new_empty(x.shape[0], _spec(*args[:-1]).n_outputs)


@_hashgrid_jacobian_op.register_fake
def _(x: Tensor, table: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    width = _spec(*args[:-1]).n_outputs
    return x.new_empty(x.shape[0], width), x.new_empty(x.shape[0], width, 3)


@_bwd_table_op.register_fake
def _(x: Tensor, grad_y: Tensor | None, grad_jac: Tensor | None, *args: Any) -> Tensor:
    return x.new_empty(_spec(*args[:-1]).n_params)


@_bwd_input_op.register_fake
def _(
    x: Tensor, table: Tensor, grad_y: Tensor | None, grad_jac: Tensor | None, *args: Any
) -> Tensor:
    return torch.empty_like(x)


# ---- autograd -----------------------------------------------------------------------------------
# The two backward operators are differentiable themselves, out of the same four operators, so that
# create_graph=True gives right second derivatives.

_NO_GRADS = (None,) * 6  # of the numbers that make up the spec


def _save_fwd(ctx: Any, inputs: tuple, output: Any) -> None:
    x, table, *ctx.args = inputs
    ctx.save_for_backward(x, table)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_y: Tensor | None, grad_jac: Tensor | None = None) -> tuple:
    x, table = ctx.saved_tensors
    grad_y = None if grad_y is None else grad_y.contiguous()
    grad_jac = None if grad_jac is None else grad_jac.contiguous()
    grad_x = grad_table = None
    if ctx.needs_input_grad[0]:
        grad_x = _bwd_input_op(x, table, grad_y, grad_jac, *ctx.args)
    if ctx.needs_input_grad[1]:
        grad_table = _bwd_table_op(x, grad_y, grad_jac, *ctx.args)
    return grad_x, grad_table, *_NO_GRADS


def _save_bwd_table(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, grad_y, grad_jac, *ctx.args = inputs
    ctx.save_for_backward(x, grad_y, grad_jac)


def _backward_of_bwd_table(ctx: Any, v: Tensor) -> tuple:
    """grad_table is linear in grad_y and grad_jac: its adjoint is the encoding with table v."""
    x, grad_y, grad_jac = ctx.saved_tensors
    v = v.contiguous()
    grad_x = to_y = to_jac = None
    if ctx.needs_input_grad[0]:
        grad_x = _bwd_input_op(x, v, grad_y, grad_jac, *ctx.args)
    if ctx.needs_input_grad[2]:
        to_y, to_jac = _hashgrid_jacobian_op(x, v, *ctx.args)
    elif ctx.needs_input_grad[1]:
        to_y = _hashgrid_op(x, v, *ctx.args)
    return grad_x, to_y if ctx.needs_input_grad[1] else None, to_jac, *_NO_GRADS


def _save_bwd_input(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, table, grad_y, grad_jac, *ctx.args = inputs
    ctx.has_grad_jac = grad_jac is not None
    ctx.save_for_backward(x, table, grad_y)


def _backward_of_bwd_input(ctx: Any, v: Tensor) -> tuple:
    """sum(grad_x v) = sum(jac c) with c = grad_y v^T, an encoding Jacobian's loss again."""
    if ctx.has_grad_jac:
        raise NotImplementedError(
            "hashgrid_jacobian: the gradient with respect to x cannot be differentiated again (it "
            "would need third derivatives); detach x, or use DSD_BACKEND=torch"
        )
    x, table, grad_y = ctx.saved_tensors
    v = v.contiguous()
    c = grad_y[:, :, None] * v[:, None, :]
    grad_x = grad_table = to_y = None
    if ctx.needs_input_grad[0]:
        grad_x = _bwd_input_op(x, table, None, c, *ctx.args)
    if ctx.needs_input_grad[1]:
        grad_table = _bwd_table_op(x, None, c, *ctx.args)
    if ctx.needs_input_grad[2]:
        jac = _hashgrid_jacobian_op(x, table, *ctx.args)[1]
        to_y = (jac * v[:, None, :]).sum(-1)
    return grad_x, grad_table, to_y, None, *_NO_GRADS


_hashgrid_op.register_autograd(_backward, setup_context=_save_fwd)
_hashgrid_jacobian_op.register_autograd(_backward, setup_context=_save_fwd)
_bwd_table_op.register_autograd(_backward_of_bwd_table, setup_context=_save_bwd_table)
_bwd_input_op.register_autograd(_backward_of_bwd_input, setup_context=_save_bwd_input)


# ---- public -------------------------------------------------------------------------------------


def hashgrid(
    x: Tensor, table: Tensor, spec: GridSpec, n_active_levels: int | None = None
) -> Tensor:
    """Encodes points by a multiresolution hash grid.

    Args:
        x: [N, 3] float32, contiguous, CPU or CUDA; the unit cube is where the grid is meant to be
            used, points outside it read wrapped-around entries. N may be 0.
        table: [spec.n_params] float32, contiguous, on x's device. Or float16, which is read alone:
            it takes no gradient, and halves the traffic on CUDA.
        spec: shape of the grid.
        n_active_levels: finer levels than the first so many are skipped: zeros, and no gradient
            (None: all active).

    Returns:
        [N, L F] float32, the features of level 0 first. Differentiable in x and table, twice.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or layout, or n_active_levels out of
            range; the text has expected and got.
        RuntimeError, ImportError: no compiled code for the device, with the way out.

    Example:
        >>> spec = GridSpec(4, 2, 10, 4, 1.5)
        >>> hashgrid(torch.rand(5, 3), torch.zeros(spec.n_params), spec).shape
        torch.Size([5, 8])
    """
    if backend(x) == "torch":
        return hashgrid_reference(x, table, spec, n_active_levels)
    n_active = _active_levels("hashgrid", spec, n_active_levels)
    _check_inputs("hashgrid", x, table, spec)
    return _hashgrid_op(x, table, *_spec_args(spec, n_active))


def hashgrid_jacobian(
    x: Tensor, table: Tensor, spec: GridSpec, n_active_levels: int | None = None
) -> tuple[Tensor, Tensor]:
    """Encodes points and gives the encoding's Jacobian, from one gather of the table.

    One ordinary backward pass then trains through both: the table gradient of a loss on value and
    Jacobian is a single scatter. Arguments and errors are those of `hashgrid`.

    Returns:
        (y [N, L F], jac [N, L F, 3] = dy/dx), float32. Differentiable in x and table; on cell faces
        the Jacobian is that of the cell whose lower face it is.

    Example:
        >>> spec = GridSpec(4, 2, 10, 4, 1.5)
        >>> y, jac = hashgrid_jacobian(torch.rand(5, 3), torch.zeros(spec.n_params), spec)
        >>> jac.shape
        torch.Size([5, 8, 3])
    """
    if backend(x) == "torch":
        return hashgrid_jacobian_reference(x, table, spec, n_active_levels)
    n_active = _active_levels("hashgrid_jacobian", spec, n_active_levels)
    _check_inputs("hashgrid_jacobian", x, table, spec)
    return _hashgrid_jacobian_op(x, table, *_spec_args(spec, n_active))
