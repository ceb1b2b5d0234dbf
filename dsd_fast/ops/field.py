"""The field in one operator: encoding, both heads, density with its blob, and normals.

Formulas: csrc/field.h. Nothing per sample is kept between forward and backward; the backward pass
computes everything again. On the CPU results are the same, bit for bit, for any number of threads.
On CUDA the gradients are summed with float atomics, so their last bits change from run to run.
Under torch.use_deterministic_algorithms(True) they are summed in integers (see `ops.hashgrid`) and
in one order: the same samples give the same bits, however many rows there are behind `n_valid`.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dsd_fast._backend import address, aligned, backend, deterministic, extension, target
from dsd_fast.ops._check import check_flag, check_number, check_tensor
from dsd_fast.ops.hashgrid import (
    _SPEC,
    GridSpec,
    _active_levels,
    _spec,
    hashgrid_jacobian_reference,
    hashgrid_reference,
)

# As compiled (csrc/field.h): neurons of a head, and the widest encoding.
_HIDDEN = 64
_MAX_WIDTH = 32
# Numbers of FieldBias and FieldActivation in csrc/field.h.
_BIAS_KINDS = ("constant", "blob_magic3d", "blob_dreamfusion")
_ACTIVATIONS = ("softplus", "exp", "trunc_exp")
# Softplus is linear above this input, as in torch.
_SOFTPLUS_THRESHOLD = 20.0
# The smallest radius of the box and of a blob: their squares are numbers of float32.
_SMALLEST = 1e-15
# trunc_exp: the derivative stops growing at this input.
_TRUNC_EXP_LIMIT = 15.0

_Outputs = tuple[Tensor, Tensor | None, Tensor | None]


class FieldShape(NamedTuple):
    """What the operator needs beside tensors.

    Args:
        spec: shape of the grid; at most 32 columns.
        radius: half the edge of the box that the grid covers.
        bias: blob_magic3d, blob_dreamfusion, or the constant that is added to the raw density.
        blob_scale, blob_std: height and size of a blob.
        activation: softplus, exp or trunc_exp.
    """

    spec: GridSpec
    radius: float = 2.0
    bias: Literal["blob_magic3d", "blob_dreamfusion"] | float = "blob_magic3d"
    blob_scale: float = 10.0
    blob_std: float = 0.5
    activation: Literal["softplus", "exp", "trunc_exp"] = "softplus"


def can_fuse(spec: GridSpec, n_neurons: int) -> bool:
    """Whether `fused_field` is compiled for heads of one hidden layer of this shape."""
    return n_neurons == _HIDDEN and spec.n_outputs <= _MAX_WIDTH and spec.n_features in (2, 4)


# ---- reference ----------------------------------------------------------------------------------


def density_bias(points: Tensor, shape: FieldShape) -> tuple[Tensor | float, Tensor | float]:
    """What is added to the raw density at points [N, 3], a blob [N] or a constant; its gradient."""
    scale, std = shape.blob_scale, shape.blob_std
    if shape.bias == "blob_magic3d":
        distance = torch.linalg.vector_norm(points, dim=-1)
        # The gradient is zero, not NaN, at the tip of the cone.
        return scale * (1 - distance / std), -scale / std * F.normalize(points, dim=-1, eps=1e-12)
    if shape.bias == "blob_dreamfusion":
        value = scale * torch.exp(-0.5 * points.square().sum(-1) / std**2)
        return value, value[:, None] * points / -(std**2)
    return float(shape.bias), 0.0


def activate(raw: Tensor, shape: FieldShape) -> tuple[Tensor, Tensor]:
    """Density and its slope, from raw density."""
    if shape.activation == "softplus":
        return F.softplus(raw, threshold=_SOFTPLUS_THRESHOLD), torch.sigmoid(raw)
    if shape.activation == "exp":
        return torch.exp(raw), torch.exp(raw)
    slope = torch.exp(raw.clamp(max=_TRUNC_EXP_LIMIT))
    # Above the limit: the value of exp, with the constant slope exp(limit) as derivative.
    tangent = (raw - raw.detach()) * slope.detach()
    return torch.exp(raw).detach() + tangent, slope


def density_and_normal(
    points: Tensor,
    encoded: Tensor,
    jacobian: Tensor | None,
    w1: Tensor,
    w2: Tensor,
    shape: FieldShape,
) -> tuple[Tensor, Tensor | None]:
    """Density [N] and its normal −∇σ/‖∇σ‖ [N, 3] from the encoding [N, L F] and its Jacobian.

    A bias-free ReLU layer is linear wherever its mask m does not change. With the network
    W2·relu(W1·e) the gradient to the encoding is g = m·(W2ᵀ∘W1), the raw density is e·g, and
    ∇raw = Jᵀg. The mask has no derivative, so that one ordinary backward pass through these
    expressions gives the exact gradients to W1, W2 and the table, of density and normal both.
    """
    bias, bias_slope = density_bias(points, shape)
    mask = F.linear(encoded, w1).detach().gt(0).to(encoded.dtype)
    to_encoding = mask @ (w2.t() * w1)
    raw = (encoded * to_encoding).sum(-1) + bias
    density, slope = activate(raw, shape)
    if jacobian is None:
        return density, None
    # The grid reads (p + radius) / (2·radius).
    gradient = torch.bmm(to_encoding[:, None], jacobian)[:, 0] / (2 * shape.radius)
    return density, -F.normalize((gradient + bias_slope) * slope[:, None], dim=-1, eps=1e-12)


def fused_field_reference(
    points: Tensor,
    table: Tensor,
    w1d: Tensor,
    w2d: Tensor,
    w1f: Tensor,
    w2f: Tensor,
    shape: FieldShape,
    n_active_levels: int | None = None,
    *,
    features: bool = True,
    normals: bool = True,
    half_table: Tensor | None = None,
    n_valid: Tensor | None = None,
) -> _Outputs:
    """`fused_field` in pure torch: any floating dtype and device, differentiable by autograd."""
    points = points.detach()
    is_valid = None
    if n_valid is not None:
        is_valid = torch.arange(len(points), device=points.device) < n_valid
        points = torch.where(is_valid[:, None], points, 0.0)
    if half_table is not None:
        # Values of the copy, gradients to the table.
        table = half_table.to(table.dtype) + (table - table.detach())
    unit = torch.add(0.5, points, alpha=0.5 / shape.radius)
    jacobian = None
    if normals:
        encoded, jacobian = hashgrid_jacobian_reference(unit, table, shape.spec, n_active_levels)
    else:
        encoded = hashgrid_reference(unit, table, shape.spec, n_active_levels)
    density, normal = density_and_normal(points, encoded, jacobian, w1d, w2d, shape)
    output = F.linear(F.relu(F.linear(encoded, w1f)), w2f) if features else None
    if is_valid is not None:
        density = torch.where(is_valid, density, 0.0)
        output = None if output is None else torch.where(is_valid[:, None], output, 0.0)
        normal = None if normal is None else torch.where(is_valid[:, None], normal, 0.0)
    return density, output, normal


# ---- operators ----------------------------------------------------------------------------------

# points, table, the half copy of the table, the weights, the count of points; then numbers.
_TENSORS = (
    "Tensor points, Tensor table, Tensor? half_table, Tensor w1d, Tensor w2d, Tensor w1f, "
    "Tensor w2f, Tensor? n_valid"
)
_NUMBERS = f"{_SPEC}, float radius, int bias_kind, float bias_scale, float bias_std, int activation"
_N_SPEC = 6


def _check_shape(shape: object) -> FieldShape:
    """Raises TypeError or ValueError for numbers that give no field."""
    op = "fused_field"
    if not isinstance(shape, FieldShape):
        raise TypeError(f"{op}: shape must be a FieldShape, got {type(shape).__name__}")
    if shape.activation not in _ACTIVATIONS:
        choices = ", ".join(_ACTIVATIONS)
        raise ValueError(f"{op}: activation must be one of {choices}, got {shape.activation!r}")
    if isinstance(shape.bias, str) and shape.bias not in _BIAS_KINDS[1:]:
        choices = ", ".join((*_BIAS_KINDS[1:], "a number"))
        raise ValueError(f"{op}: bias must be one of {choices}, got {shape.bias!r}")
    names = ["radius", "blob_scale", "blob_std"]
    for name in names if isinstance(shape.bias, str) else ["radius", "bias"]:
        value = check_number(op, name, getattr(shape, name))
        if not math.isfinite(value):
            raise ValueError(f"{op}: {name} must be finite in float32, got {value}")
        if name in ("radius", "blob_std") and value < _SMALLEST:
            raise ValueError(f"{op}: {name} must be at least {_SMALLEST}, got {value}")
    return shape


@cache
def _numbers(shape: FieldShape, n_active: int) -> tuple[Any, ...]:
    spec = shape.spec
    blob = isinstance(shape.bias, str)
    return (
        spec.n_levels,
        spec.n_features,
        spec.log2_table_size,
        spec.base_resolution,
        spec.per_level_scale,
        n_active,
        float(shape.radius),
        _BIAS_KINDS.index(shape.bias) if blob else 0,
        float(shape.blob_scale if blob else shape.bias),
        float(shape.blob_std),
        _ACTIVATIONS.index(shape.activation),
    )


def _check_inputs(
    tensors: tuple, spec: GridSpec, dtype: torch.dtype | None = torch.float32
) -> None:
    """A `dtype` of None: any floating point one, the same for all."""
    op = "fused_field"
    points, table, half_table, *weights, n_valid = tensors
    width = spec.n_outputs
    if width > _MAX_WIDTH:
        raise ValueError(
            f"{op}: expected at most {_MAX_WIDTH} columns of the encoding (levels times features),"
            f" got {width}"
        )
    check_tensor(op, "points", points, dtype, ["N", 3])
    dtype = points.dtype
    check_tensor(op, "table", table, dtype, [spec.n_params], points.device)
    if half_table is not None:
        check_tensor(op, "half_table", half_table, torch.float16, [spec.n_params], points.device)
    shapes = ([_HIDDEN, width], [1, _HIDDEN], [_HIDDEN, width], [3, _HIDDEN])
    if n_valid is not None:
        check_tensor(op, "n_valid", n_valid, torch.int64, [], points.device)
    for name, weight, shape in zip(("w1d", "w2d", "w1f", "w2f"), weights, shapes):
        check_tensor(op, name, weight, dtype, shape, points.device)


def _launch(
    kernel: str,
    tensors: tuple,
    others: list[Tensor | None],
    numbers: tuple,
    workspace: Sequence[Tensor | None] = (),
) -> None:
    points, table, half_table, *weights, n_valid = tensors
    spec, n_active = _spec(*numbers[: _N_SPEC - 1]), numbers[_N_SPEC - 1]
    _active_levels(kernel, spec, n_active)
    radius, bias_kind, bias_scale, bias_std, activation = numbers[_N_SPEC:]
    read = table
    if half_table is not None:
        # The CPU computes in float32, with the values of the copy.
        read = half_table if points.is_cuda else half_table.float()
    # Entries, and pairs of neighbours in the gradient, move whole.
    if points.is_cuda and any(address(t) % 16 for t in (read, *others)):
        raise ValueError(
            f"{kernel}: on CUDA the table must start at a multiple of 16 bytes, got a view that "
            "does not; call .clone() on it"
        )
    getattr(extension(), kernel)(
        address(points),
        address(n_valid),
        address(read),
        [address(weight) for weight in weights],
        [address(tensor) for tensor in others],
        *(address(tensor) for tensor in workspace),
        points.shape[0],
        n_active,
        spec.n_features,
        spec.packed_levels,
        read.dtype == torch.float16,
        bias_kind,
        activation,
        [radius, bias_scale, bias_std],
        *target(points),
    )


@torch.library.custom_op(
    "dsd_fast::fused_field",
    mutates_args=(),
    schema=f"({_TENSORS}, bool features, bool normals, {_NUMBERS}) -> (Tensor, Tensor, Tensor)",
)
def _field_op(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    tensors, (features, normals), numbers = args[:8], args[8:10], args[10:]
    _check_inputs(tensors, _spec(*numbers[: _N_SPEC - 1]))
    outputs = _empty_outputs(tensors[0], features, normals)
    if tensors[0].shape[0] > 0:
        present = [outputs[0], outputs[1] if features else None, outputs[2] if normals else None]
        _launch("field_fwd", tensors, present, numbers)
    return outputs


@torch.library.custom_op(
    "dsd_fast::fused_field_bwd",
    mutates_args=(),
    schema=(
        f"({_TENSORS}, Tensor? grad_density, Tensor? grad_features, Tensor? grad_normal, "
        f"{_NUMBERS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
)
def _field_bwd_op(*args: Any) -> tuple[Tensor, ...]:
    tensors, grads, numbers = args[:8], args[8:11], args[11:]
    _check_inputs(tensors, _spec(*numbers[: _N_SPEC - 1]))
    n = tensors[0].shape[0]
    for name, grad, shape in zip(("density", "features", "normal"), grads, ([n], [n, 3], [n, 3])):
        if grad is not None:
            op = "fused_field_bwd"
            check_tensor(op, f"grad_{name}", grad, torch.float32, shape, tensors[0].device)
    out = tuple(torch.zeros_like(tensor) for tensor in (tensors[1], *tensors[3:7]))
    if n > 0 and any(grad is not None for grad in grads):
        workspace = _workspace(tensors, grads, numbers)
        grads = [aligned(grad) for grad in grads]
        _launch("field_bwd", tensors, [*grads, *out], numbers, workspace)
    return out


def _workspace(tensors: tuple, grads: tuple, numbers: tuple) -> tuple[Tensor | None, Tensor | None]:
    """Memory of the backward pass on CUDA: between its kernels, and for sums where they are to be
    deterministic."""
    points, _, half_table, *_ = tensors
    if not points.is_cuda:
        return None, None
    spec, n_active = _spec(*numbers[: _N_SPEC - 1]), numbers[_N_SPEC - 1]
    between = extension().field_workspace(
        points.shape[0], n_active, spec.n_features, half_table is not None, grads[2] is not None
    )
    between = points.new_empty(between, dtype=torch.uint8)
    if not deterministic():
        return between, None
    return between, points.new_empty(extension().field_sums(spec.n_params), dtype=torch.uint8)


def _empty_outputs(points: Tensor, features: bool, normals: bool) -> tuple[Tensor, Tensor, Tensor]:
    # An operator cannot return None: an output that is not wanted has no rows.
    n = points.shape[0]
    return (
        points.new_empty(n),
        points.new_empty(n if features else 0, 3),
        points.new_empty(n if normals else 0, 3),
    )


@_field_op.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_outputs(args[0], args[8], args[9])


@_field_bwd_op.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(tensor) for tensor in (args[1], *args[3:7]))


def _save(ctx: Any, inputs: tuple, output: Any) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.asked, ctx.numbers = inputs[8:10], inputs[10:]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_density: Any, grad_features: Any, grad_normal: Any) -> tuple:
    features, normals = ctx.asked
    grads = [grad_density, grad_features if features else None, grad_normal if normals else None]
    grads = [None if grad is None else grad.contiguous() for grad in grads]
    table, *weights = _field_bwd_op(*ctx.saved_tensors, *grads, *ctx.numbers)
    return None, table, None, *weights, None, None, None, *(None for _ in ctx.numbers)


_field_op.register_autograd(_backward, setup_context=_save)


# ---- public -------------------------------------------------------------------------------------


def fused_field(
    points: Tensor,
    table: Tensor,
    w1d: Tensor,
    w2d: Tensor,
    w1f: Tensor,
    w2f: Tensor,
    shape: FieldShape,
    n_active_levels: int | None = None,
    *,
    features: bool = True,
    normals: bool = True,
    half_table: Tensor | None = None,
    n_valid: Tensor | None = None,
) -> _Outputs:
    """Density, features and normals of a field with one hidden layer of 64 neurons in each head.

    Args:
        points: [N, 3] float32, contiguous, CPU or CUDA, world units. N may be 0.
        table: [spec.n_params] float32, takes the gradient.
        w1d, w2d: density head, [64, L F] and [1, 64] float32.
        w1f, w2f: feature head, [64, L F] and [3, 64] float32.
        shape: grid, box, bias and activation; L F is at most 32.
        n_active_levels: finer levels are skipped (None: all active).
        features, normals: whether these outputs are wanted; density alone is the cheapest.
        half_table: float16 copy of the table to read instead of it. On CUDA it halves the traffic
            and runs the heads on tensor cores: float16 operands, float32 sums. Without it all is
            float32.
        n_valid: 0-dim int64 on the points' device: rows of `points` from this one on are skipped
            without asking the host. They get zeros, and take no part in gradients. None: all rows.

    Returns:
        (density [N], features [N, 3] or None, normal [N, 3] or None), float32. Differentiable once
        in table and weights, not in points.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or layout.
    """
    n_active = _active_levels("fused_field", _check_shape(shape).spec, n_active_levels)
    check_flag("fused_field", "features", features)
    check_flag("fused_field", "normals", normals)
    tensors = (points, table, half_table, w1d, w2d, w1f, w2f, n_valid)
    if backend(points) == "torch":
        _check_inputs(tensors, shape.spec, dtype=None)
        return fused_field_reference(
            points,
            table,
            w1d,
            w2d,
            w1f,
            w2f,
            shape,
            n_active_levels,
            features=features,
            normals=normals,
            half_table=half_table,
            n_valid=n_valid,
        )
    _check_inputs(tensors, shape.spec)
    outputs = _field_op(*tensors, features, normals, *_numbers(shape, n_active))
    return outputs[0], outputs[1] if features else None, outputs[2] if normals else None
