"""One step of Adam over a flat parameter, in one pass over its memory."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from dsd_fast._backend import address, backend, extension, target
from dsd_fast.ops._check import check_flag, check_number, check_tensor


def adam_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    lr: float,
    betas: Sequence[float] = (0.9, 0.999),
    eps: float = 1e-8,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    half_copy: Tensor | None = None,
    zero_grad: bool = False,
) -> None:
    """Move a parameter by Adam, in place, as torch.optim.Adam(fused=True) does.

    With g = grad / grad_scale and t the count after this step: m <- β₁m + (1 - β₁)g,
    v <- β₂v + (1 - β₂)g², param <- param - lr / (1 - β₁ᵗ) · m / (√v / √(1 - β₂ᵗ) + eps).

    Where found_inf is 1, nothing changes and the count does not advance; that is decided on the
    device, which nobody waits for, so a CUDA graph can hold the call. Arithmetic is float32;
    deterministic on every backend.

    Args:
        param: float32 [P], contiguous, as all tensors here; changed in place.
        grad: float32 [P], changed with `zero_grad` alone.
        exp_avg, exp_avg_sq: float32 [P], m and v; changed in place.
        step: float32 [], steps taken so far; changed in place.
        lr: learning rate, at least 0.
        betas: (β₁, β₂), each in [0, 1).
        eps: added to the denominator, at least 0.
        grad_scale: float32 [], what the gradient is divided by; None for 1.
        found_inf: float32 [], 1 where the step is to be left out; None for 0.
        half_copy: float16 [P] that gets the new parameter, rounded to nearest. It stays as it is
            where the step is left out.
        zero_grad: set the gradient to zero behind, also where the step is left out.

    Raises:
        TypeError: an argument is no tensor or has another dtype.
        ValueError: another shape or device, not contiguous, a number out of range, or (compiled)
            tensors that share memory.
    """
    state = param, grad, exp_avg, exp_avg_sq, step
    _check_tensors(*state, grad_scale, found_inf, half_copy)
    if not isinstance(betas, Sequence) or len(betas) != 2:
        raise TypeError(f"adam_step: betas must be two numbers, got {betas!r}")
    beta1, beta2 = betas
    check_flag("adam_step", "zero_grad", zero_grad)
    lr, eps = check_number("adam_step", "lr", lr), check_number("adam_step", "eps", eps)
    for beta in betas:
        check_number("adam_step", "betas", beta)
    if not (0.0 <= beta1 < 1.0 and 0.0 <= beta2 < 1.0):
        raise ValueError(f"adam_step: betas must be in [0, 1), got {beta1} and {beta2}")
    if not (lr >= 0.0 and eps >= 0.0):
        raise ValueError(f"adam_step: lr and eps must be at least 0, got {lr} and {eps}")
    if not (math.isfinite(lr) and math.isfinite(eps)):
        raise ValueError(f"adam_step: lr and eps must be finite in float32, got {lr} and {eps}")
    numbers = (lr, beta1, beta2, eps)
    if backend(param) == "torch":
        adam_step_reference(*state, lr, betas, eps, grad_scale, found_inf, half_copy, zero_grad)
    else:
        plain = (tensor.detach() for tensor in state)
        torch.ops.dsd_fast.adam_step(*plain, *numbers, grad_scale, found_inf, half_copy, zero_grad)


# Defined by its schema: the wrapper of torch.library.custom_op costs 0.1 ms a call, which a step
# with its handful of small parameters would spend many times over.
torch.library.define(
    "dsd_fast::adam_step",
    "(Tensor(a!) param, Tensor(b!) grad, Tensor(c!) exp_avg, Tensor(d!) exp_avg_sq, "
    "Tensor(e!) step, float lr, float beta1, float beta2, float eps, Tensor? grad_scale, "
    "Tensor? found_inf, Tensor(f!)? half_copy, bool zero_grad) -> ()",
)


@torch.library.impl("dsd_fast::adam_step", "default")
def _adam_step_op(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    half_copy: Tensor | None,
    zero_grad: bool,
) -> None:
    _check_tensors(param, grad, exp_avg, exp_avg_sq, step, grad_scale, found_inf, half_copy)
    _check_apart(param, grad, exp_avg, exp_avg_sq, half_copy)
    extension().adam_step(
        address(param),
        address(grad),
        address(exp_avg),
        address(exp_avg_sq),
        address(half_copy),
        address(step),
        address(grad_scale),
        address(found_inf),
        param.shape[0],
        lr,
        beta1,
        beta2,
        eps,
        zero_grad,
        *target(param),
    )
    # Detached tensors count their changes with the originals, for autograd to see.
    for tensor in (param, exp_avg, exp_avg_sq, step, half_copy, grad if zero_grad else None):
        if tensor is not None:
            torch.autograd.graph.increment_version(tensor)


def _check_tensors(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    half_copy: Tensor | None,
) -> None:
    check_tensor("adam_step", "param", param, torch.float32, ("P",))
    for name, tensor in (("grad", grad), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        check_tensor("adam_step", name, tensor, torch.float32, param.shape, param.device)
    check_tensor("adam_step", "step", step, torch.float32, (), param.device)
    for name, tensor in (("grad_scale", grad_scale), ("found_inf", found_inf)):
        if tensor is not None:
            check_tensor("adam_step", name, tensor, torch.float32, (), param.device)
    if half_copy is not None:
        check_tensor("adam_step", "half_copy", half_copy, torch.float16, param.shape, param.device)


def _check_apart(*tensors: Tensor | None) -> None:
    """Raises ValueError where two tensors share memory: what one gets, the other would lose."""
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors if t is not None)
    if any(end > begin for (_, end), (begin, _) in pairwise(spans)):
        raise ValueError(
            "adam_step: param, grad, exp_avg, exp_avg_sq and half_copy must not share memory, got "
            "two that do; .clone() one"
        )


@torch.library.register_fake("dsd_fast::adam_step")
def _(
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    step,
    lr,
    beta1,
    beta2,
    eps,
    grad_scale,
    found_inf,
    half_copy,
    zero_grad,
):
    return None


@torch.no_grad()
def adam_step_reference(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    lr: float,
    betas: Sequence[float] = (0.9, 0.999),
    eps: float = 1e-8,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    half_copy: Tensor | None = None,
    zero_grad: bool = False,
) -> None:
    """`adam_step` in pure torch, any floating dtype and device."""
    beta1, beta2 = betas
    go = torch.ones_like(step, dtype=torch.bool) if found_inf is None else found_inf != 1
    count = (step + 1).double()
    g = grad if grad_scale is None else grad / grad_scale
    m = beta1 * exp_avg + (1 - beta1) * g
    v = beta2 * exp_avg_sq + (1 - beta2) * g * g
    rate = (lr / (1 - beta1**count)).to(param.dtype)
    root = (1 - beta2**count).sqrt().to(param.dtype)
    new = param - rate * m / (v.sqrt() / root + eps)
    for tensor, value in ((param, new), (exp_avg, m), (exp_avg_sq, v), (step, step + 1)):
        tensor.copy_(torch.where(go, value, tensor))
    if half_copy is not None:
        half_copy.copy_(torch.where(go, new.to(half_copy.dtype), half_copy))
    if zero_grad:
        grad.zero_()
