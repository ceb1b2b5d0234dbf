"""Real spherical harmonics of directions, bands 0 to 2."""

from typing import Any

import torch
from torch import Tensor

from dsd_fast._backend import address, backend, extension, target
from dsd_fast.ops._check import check_tensor

N_VALUES = 9


def spherical_harmonics_reference(dirs: Tensor) -> Tensor:
    """`spherical_harmonics` in pure torch: any floating dtype and device, by autograd alone."""
    check_tensor("spherical_harmonics", "dirs", dirs, None, ["N", 3])
    x, y, z = dirs.unbind(1)
    values = (
        torch.full_like(x, 0.28209479177387814),
        -0.48860251190291987 * y,
        0.48860251190291987 * z,
        -0.48860251190291987 * x,
        1.0925484305920792 * x * y,
        -1.0925484305920792 * y * z,
        0.94617469575755997 * z * z - 0.31539156525251999,
        -1.0925484305920792 * x * z,
        0.54627421529603959 * (x * x - y * y),
    )
    return torch.stack(values, dim=1)


@torch.library.custom_op("dsd_fast::spherical_harmonics", mutates_args=())
def _sh_op(dirs: Tensor) -> Tensor:
    check_tensor("spherical_harmonics", "dirs", dirs, torch.float32, ["N", 3])
    y = dirs.new_empty(dirs.shape[0], N_VALUES)
    if dirs.shape[0] > 0:
        extension().sh_fwd(address(dirs), address(y), dirs.shape[0], *target(dirs))
    return y


@torch.library.custom_op("dsd_fast::spherical_harmonics_bwd", mutates_args=())
def _sh_bwd_op(dirs: Tensor, grad_y: Tensor) -> Tensor:
    check_tensor("spherical_harmonics", "dirs", dirs, torch.float32, ["N", 3])
    n = dirs.shape[0]
    check_tensor("spherical_harmonics", "grad_y", grad_y, torch.float32, [n, N_VALUES], dirs.device)
    grad_dirs = torch.empty_like(dirs)
    if n > 0:
        addresses = (address(dirs), address(grad_y), address(grad_dirs))
        extension().sh_bwd(*addresses, n, *target(dirs))
    return grad_dirs


@_sh_op.register_fake
def _(dirs: Tensor) -> Tensor:
    return dirs.new_empty(dirs.shape[0], N_VALUES)


@_sh_bwd_op.register_fake
def _(dirs: Tensor, grad_y: Tensor) -> Tensor:
    return torch.empty_like(dirs)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_y: Tensor) -> Tensor:
    return _sh_bwd_op(ctx.saved_tensors[0], grad_y.contiguous())


def _backward_again(ctx: Any, *_: Any) -> None:
    raise NotImplementedError(
        "spherical_harmonics: only first derivatives are compiled; DSD_BACKEND=torch has all"
    )


_sh_op.register_autograd(_backward, setup_context=_save)
_sh_bwd_op.register_autograd(_backward_again, setup_context=_save)


def spherical_harmonics(dirs: Tensor) -> Tensor:
    """Evaluates the 9 real spherical harmonics of bands 0, 1, 2.

    Order and signs of tiny-cuda-nn's encoding of degree 3, polynomials of the direction (x, y, z)
    (csrc/sh.h): 0.28209; (-0.48860 y, 0.48860 z, -0.48860 x); (1.09255 xy, -1.09255 yz,
    0.94617 z^2 - 0.31539, -1.09255 xz, 0.54627 (x^2 - y^2)).

    Args:
        dirs: [N, 3] float32, contiguous, CPU or CUDA, of unit length (not checked). N may be 0.

    Returns:
        [N, 9] float32, differentiable in dirs, once.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or layout.
        RuntimeError, ImportError: no compiled code for the device, with the way out.

    Example:
        >>> spherical_harmonics(torch.tensor([[0.0, 0.0, 1.0]]))[0, 2]
        tensor(0.4886)
    """
    if backend(dirs) == "torch":
        return spherical_harmonics_reference(dirs)
    check_tensor("spherical_harmonics", "dirs", dirs, torch.float32, ["N", 3])
    return _sh_op(dirs)
