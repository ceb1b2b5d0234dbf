"""Volume rendering of packed samples: visibility, weights, and their sums along rays.

Sample i of a ray has alpha_i = 1 - exp(-sigma_i (t_end - t_start)), stands behind the transmittance
T_i = exp(-sum_{j<i} sigma_j (t_end - t_start)_j) and weighs w_i = T_i alpha_i at the middle t_i of
its interval (Max 1995, "Optical models for direct volume rendering").

Packed samples: all rays' samples one ray after the other, each from near to far; `ray_indices`
[S] int64 names the ray of each sample and must be sorted and in [0, n_rays). The CPU backend
refuses other ray indices with a ValueError. On CUDA, where looking would cost a synchronisation,
they give wrong numbers, but never an access out of bounds, nor more work than R times S samples.

In their place `offsets` [R + 1] int64 may say where each ray begins (`march_packed` and `prune`
give them). The last entry is the number of samples, and arrays may be longer: what is behind is not
read, and its weights and gradients are zero. Offsets must rise from 0 to at most S, with the same
consequences where they do not.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsd_fast._backend import address, backend, extension, target
from dsd_fast.ops._check import check_integer, check_number, check_tensor
from dsd_fast.ops._pack import MAX_RAYS, check_offsets, check_offsets_tensor, unpack

# Floor of the opacity that normalises the weights of the z-variance.
MIN_OPACITY = 1e-5


class Composited(NamedTuple):
    """What `composite_full` returns; R rays, S samples."""

    color: Tensor  # [R, 3]  sum of w c
    opacity: Tensor  # [R, 1]  sum of w
    depth: Tensor  # [R, 1]  sum of w t, not normalised
    z_variance: Tensor  # [R, 1]  variance of t under the weights w / max(opacity, MIN_OPACITY)
    normal: Tensor  # [R, 3]  sum of w n, not normalised
    weights: Tensor  # [S]
    orientation: Tensor  # [R, 1]  sum of w max(0, n d)^2, w as given; [0, 1] without directions d


def visibility(
    sigmas: Tensor,
    t_starts: Tensor,
    t_ends: Tensor,
    ray_indices: Tensor | None,
    n_rays: int | None,
    alpha_threshold: float | Tensor,
    transmittance_threshold: float = 1e-4,
    *,
    offsets: Tensor | None = None,
) -> Tensor:
    """Which samples can be seen: T_i >= transmittance_threshold and alpha_i >= alpha_threshold.

    Transmittances are those of all samples given, the invisible ones included.

    Args:
        sigmas: float32 [S], contiguous, as all tensors here.
        t_starts, t_ends: float32 [S].
        ray_indices: int64 [S], sorted; None with `offsets`.
        n_rays: number of rays R; None with `offsets`.
        alpha_threshold: a number, or a float32 tensor [] on the device of the samples
            (`occupancy_threshold` gives one; it is not copied to the host).
        transmittance_threshold: a number.
        offsets: int64 [R + 1] in place of `ray_indices` and `n_rays`.

    Returns:
        bool [S], False behind the last ray. Not differentiable.

    Raises:
        TypeError, ValueError: see `composite`.
    """
    n_rays = _check_samples("visibility", sigmas, t_starts, t_ends, ray_indices, n_rays, offsets)
    if not isinstance(alpha_threshold, Tensor):
        alpha_threshold = check_number("visibility", "alpha_threshold", alpha_threshold)
        alpha_threshold = sigmas.new_full((), alpha_threshold)
    check_tensor("visibility", "alpha_threshold", alpha_threshold, torch.float32, (), sigmas.device)
    least = check_number("visibility", "transmittance_threshold", transmittance_threshold)
    function = visibility_reference if backend(sigmas) == "torch" else _visibility_op
    return function(
        sigmas.detach(),
        t_starts.detach(),
        t_ends.detach(),
        ray_indices,
        n_rays,
        alpha_threshold.detach(),
        least,
        offsets,
    )


def composite(
    sigmas: Tensor,
    rgbs: Tensor,
    t_starts: Tensor,
    t_ends: Tensor,
    ray_indices: Tensor | None = None,
    n_rays: int | None = None,
    *,
    offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Render colours of packed samples.

    color = sum w c, opacity = sum w and depth = sum w t over a ray, zeros if it has no samples.

    Arithmetic is float32 with sums along a ray in double, or in two floats on CUDA. Deterministic
    on CPU (for any number of threads) and CUDA. With `offsets` no step waits for the device.

    Args:
        sigmas: float32 [S] densities, contiguous, as all tensors here.
        rgbs: float32 [S, 3].
        t_starts, t_ends: float32 [S], the samples' intervals.
        ray_indices: int64 [S], sorted.
        n_rays: number of rays R.
        offsets: int64 [R + 1] in place of `ray_indices` and `n_rays`.

    Returns:
        (color [R, 3], opacity [R, 1], depth [R, 1], weights [S]), float32. All four pass gradients
        to `sigmas` and `rgbs`; intervals get none, and there is no second derivative.

    Raises:
        TypeError: an argument is no tensor or has another dtype.
        ValueError: another shape or device, not contiguous, neither or both of `ray_indices` and
            `offsets`, or (CPU) ray_indices or offsets not sorted or out of range.

    Example:
        >>> t = torch.tensor([0.0, 1.0, 2.0])
        >>> rays = torch.tensor([0, 0])
        >>> composite(torch.ones(2), torch.ones(2, 3), t[:-1], t[1:], rays, n_rays=1)[1]
        tensor([[0.8647]])
    """
    n_rays = _check_samples("composite", sigmas, t_starts, t_ends, ray_indices, n_rays, offsets)
    _check_values("composite", sigmas, n_rays, rgbs=rgbs)
    function = composite_reference if backend(sigmas) == "torch" else _composite_op
    return function(sigmas, rgbs, t_starts, t_ends, ray_indices, n_rays, offsets)


def composite_full(
    sigmas: Tensor,
    rgbs: Tensor,
    normals: Tensor,
    t_starts: Tensor,
    t_ends: Tensor,
    ray_indices: Tensor | None = None,
    n_rays: int | None = None,
    *,
    offsets: Tensor | None = None,
    dirs: Tensor | None = None,
) -> Composited:
    """`composite`, and the normals and the spread of depth along each ray.

    normal = sum w n. With v_i = w_i / max(opacity, 1e-5) and m = sum v t, z_variance =
    sum v (t - m)^2, gradients flowing through v. With the rays' directions d, orientation =
    sum w max(0, n d)^2 tells of normals that face away; it passes gradients to the normals alone.

    Args:
        normals: float32 [S, 3].
        dirs: float32 [R, 3], or None for no orientation. The other arguments are those of
            `composite`.

    Returns:
        A `Composited`. All outputs but the orientation pass gradients to `sigmas`, `rgbs` and
        `normals`; intervals and directions get none, and there is no second derivative.

    Raises:
        TypeError, ValueError: see `composite`.
    """
    op = "composite_full"
    n_rays = _check_samples(op, sigmas, t_starts, t_ends, ray_indices, n_rays, offsets)
    check_tensor(op, "normals", normals, torch.float32, (len(sigmas), 3), sigmas.device)
    _check_values(op, sigmas, n_rays, rgbs=rgbs, dirs=dirs)
    dirs = None if dirs is None else dirs.detach()
    function = composite_full_reference if backend(sigmas) == "torch" else _composite_full_op
    samples = sigmas, rgbs, normals, t_starts, t_ends
    return Composited(*function(*samples, ray_indices, n_rays, offsets, dirs))


def _check_samples(
    op: str,
    sigmas: Tensor,
    t_starts: Tensor,
    t_ends: Tensor,
    ray_indices: Tensor | None,
    n_rays: int | None,
    offsets: Tensor | None,
) -> int:
    """Gives the number of rays."""
    check_tensor(op, "sigmas", sigmas, torch.float32, ("S",))
    shape, device = sigmas.shape, sigmas.device
    check_tensor(op, "t_starts", t_starts, torch.float32, shape, device)
    check_tensor(op, "t_ends", t_ends, torch.float32, shape, device)
    if offsets is not None:
        if ray_indices is not None or n_rays is not None:
            raise ValueError(f"{op}: offsets replace ray_indices and n_rays, got both")
        return check_offsets_tensor(op, offsets, device)
    if n_rays is None:
        raise ValueError(f"{op}: either ray_indices and n_rays or offsets are needed, got neither")
    check_tensor(op, "ray_indices", ray_indices, torch.int64, shape, device)
    check_integer(op, "n_rays", n_rays, 0, MAX_RAYS)
    return n_rays


def _check_values(
    op: str,
    sigmas: Tensor,
    n_rays: int,
    rgbs: Tensor,
    normals: Tensor | None = None,
    dirs: Tensor | None = None,
) -> None:
    """Checks the triples of samples and rays."""
    device = sigmas.device
    check_tensor(op, "rgbs", rgbs, torch.float32, (len(sigmas), 3), device)
    if normals is not None:
        check_tensor(op, "normals", normals, torch.float32, (len(sigmas), 3), device)
    if dirs is not None:
        check_tensor(op, "dirs", dirs, torch.float32, (n_rays, 3), device)


def _check_places(
    op: str,
    sigmas: Tensor,
    t_starts: Tensor,
    t_ends: Tensor,
    ray_indices: Tensor | None,
    n_rays: int,
    offsets: Tensor | None,
) -> None:
    """Checks what an operator was given, and where that costs no wait the values of offsets."""
    given = n_rays if offsets is None else None
    found = _check_samples(op, sigmas, t_starts, t_ends, ray_indices, given, offsets)
    if n_rays != found:
        raise ValueError(f"{op}: n_rays must be {found}, as offsets say, got {n_rays}")
    n_samples = len(sigmas)
    if offsets is not None and not offsets.is_cuda:
        check_offsets(offsets, n_samples)
    elif ray_indices is not None and not ray_indices.is_cuda:
        _check_ray_indices(ray_indices, n_rays)


def _check_ray_indices(ray_indices: Tensor, n_rays: int) -> None:
    if ray_indices.numel() == 0:
        return
    if not bool((ray_indices[1:] >= ray_indices[:-1]).all()):
        raise ValueError("ray_indices must be sorted: the samples of a ray stand together")
    first, last = int(ray_indices[0]), int(ray_indices[-1])
    if first < 0 or last >= n_rays:
        raise ValueError(f"ray_indices must be in [0, {n_rays}), got {first} to {last}")


def _ray_offsets(ray_indices: Tensor | None, n_rays: int, offsets: Tensor | None = None) -> Tensor:
    """Where each ray's samples begin in the packed arrays, int64 [R + 1]; the last entry is S."""
    if offsets is not None:
        return offsets
    assert ray_indices is not None
    return torch.searchsorted(ray_indices, torch.arange(n_rays + 1, device=ray_indices.device))


@torch.library.custom_op("dsd_fast::visibility", mutates_args=())
def _visibility_op(
    sigmas: Tensor,
    t_starts: Tensor,
    t_ends: Tensor,
    ray_indices: Tensor | None,
    n_rays: int,
    alpha_threshold: Tensor,
    transmittance_threshold: float,
    offsets: Tensor | None = None,
) -> Tensor:
    op, samples = "visibility", (sigmas, t_starts, t_ends)
    _check_places(op, *samples, ray_indices, n_rays, offsets)
    check_tensor(op, "alpha_threshold", alpha_threshold, torch.float32, (), sigmas.device)
    offsets = _ray_offsets(ray_indices, n_rays, offsets)
    visible = torch.empty_like(sigmas, dtype=torch.bool)
    extension().visibility(
        address(sigmas),
        address(t_starts),
        address(t_ends),
        address(offsets),
        address(alpha_threshold),
        transmittance_threshold,
        n_rays,
        len(sigmas),
        address(visible),
        *target(sigmas),
    )
    return visible


@_visibility_op.register_fake
def _(
    sigmas,
    t_starts,
    t_ends,
    ray_indices,
    n_rays,
    alpha_threshold,
    transmittance_threshold,
    offsets=None,
):
    return torch.empty_like(sigmas, dtype=torch.bool)


def _empty_outputs(sigmas: Tensor, n_rays: int, dirs: Tensor | None = None) -> Composited:
    return Composited(
        color=sigmas.new_empty(n_rays, 3),
        opacity=sigmas.new_empty(n_rays, 1),
        depth=sigmas.new_empty(n_rays, 1),
        z_variance=sigmas.new_empty(n_rays, 1),
        normal=sigmas.new_empty(n_rays, 3),
        weights=torch.empty_like(sigmas),
        orientation=sigmas.new_empty(0 if dirs is None else n_rays, 1),
    )


def _composite_fwd(
    sigmas: Tensor,
    rgbs: Tensor,
    normals: Tensor | None,
    t_starts: Tensor,
    t_ends: Tensor,
    ray_indices: Tensor | None,
    n_rays: int,
    offsets: Tensor | None,
    dirs: Tensor | None = None,
) -> Composited:
    """Without normals, z_variance and normal stay unwritten."""
    op = "composite" if normals is None else "composite_full"
    _check_places(op, sigmas, t_starts, t_ends, ray_indices, n_rays, offsets)
    _check_values(op, sigmas, n_rays, rgbs=rgbs, normals=normals, dirs=dirs)
    offsets = _ray_offsets(ray_indices, n_rays, offsets)
    out = _empty_outputs(sigmas, n_rays, dirs)
    asked = out if normals is not None else out._replace(z_variance=None, normal=None)
    extension().composite_fwd(
        address(sigmas),
        address(rgbs),
        address(normals),
        address(t_starts),
        address(t_ends),
        address(offsets),
        address(dirs),
        n_rays,
        len(sigmas),
        *(address(tensor) for tensor in asked),
        *target(sigmas),
    )
    return out


@torch.library.custom_op("dsd_fast::composite", mutates_args=())
def _composite_op(
    sigmas: Tensor,
    rgbs: Tensor,
    t_starts: Tensor,
    t_ends: Tensor,
    ray_indices: Tensor | None,
    n_rays: int,
    offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out = _composite_fwd(sigmas, rgbs, None, t_starts, t_ends, ray_indices, n_rays, offsets)
    return out.color, out.opacity, out.depth, out.weights


@_composite_op.register_fake
def _(sigmas, rgbs, t_starts, t_ends, ray_indices, n_rays, offsets=None):
    out = _empty_outputs(sigmas, n_rays)
    return out.color, out.opacity, out.depth, out.weights


@torch.library.custom_op("dsd_fast::composite_full", mutates_args=())
def _composite_full_op(
    sigmas: Tensor,
    rgbs: Tensor,
    normals: Tensor,
    t_starts: Tensor,
    t_ends: Tensor,
    ray_indices: Tensor | None,
    n_rays: int,
    offsets: Tensor | None = None,
    dirs: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    samples = sigmas, rgbs, normals, t_starts, t_ends
    return _composite_fwd(*samples, ray_indices, n_rays, offsets, dirs)[:]


@_composite_full_op.register_fake
def _(sigmas, rgbs, normals, t_starts, t_ends, ray_indices, n_rays, offsets=None, dirs=None):
    return tuple(_empty_outputs(sigmas, n_rays, dirs))


@torch.library.custom_op("dsd_fast::composite_bwd", mutates_args=())
def _composite_bwd_op(
    grad_color: Tensor | None,
    grad_opacity: Tensor | None,
    grad_depth: Tensor | None,
    grad_z_variance: Tensor | None,
    grad_normal: Tensor | None,
    grad_weights: Tensor | None,
    sigmas: Tensor,
    rgbs: Tensor,
    normals: Tensor | None,
    t_starts: Tensor,
    t_ends: Tensor,
    ray_indices: Tensor | None,
    n_rays: int,
    opacity: Tensor,
    depth: Tensor,
    z_variance: Tensor | None,
    offsets: Tensor | None = None,
    dirs: Tensor | None = None,
    grad_orientation: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (sigmas, rgbs, normals) for both operators; normals [0, 3] without normals.

    Weights and transmittances are computed again rather than kept. An absent gradient is zero.
    """
    op = "composite_bwd"
    _check_places(op, sigmas, t_starts, t_ends, ray_indices, n_rays, offsets)
    if (normals is None) != (z_variance is None):
        raise ValueError(f"{op}: normals and z_variance must be given both or neither, got one")
    _check_values(op, sigmas, n_rays, rgbs=rgbs, normals=normals, dirs=dirs)
    offsets = _ray_offsets(ray_indices, n_rays, offsets)
    grads = [grad_color, grad_opacity, grad_depth, grad_z_variance, grad_normal, grad_weights]
    grads.append(None if dirs is None else grad_orientation)
    grads = [None if grad is None else grad.contiguous() for grad in grads]
    widths = (3, 1, 1, 1, 3, None, 1)  # of the outputs; the weights have one number a sample
    for name, width, grad in zip(Composited._fields, widths, grads):
        if grad is not None:
            shape = sigmas.shape if width is None else (n_rays, width)
            check_tensor(op, f"grad_{name}", grad, torch.float32, shape, sigmas.device)
    for name, values in (("opacity", opacity), ("depth", depth), ("z_variance", z_variance)):
        if values is not None:
            check_tensor(op, name, values, torch.float32, (n_rays, 1), sigmas.device)
    grad_sigmas, grad_rgbs = torch.empty_like(sigmas), torch.empty_like(rgbs)
    grad_normals = rgbs.new_empty(0, 3) if normals is None else torch.empty_like(normals)
    extension().composite_bwd(
        address(sigmas),
        address(rgbs),
        address(normals),
        address(t_starts),
        address(t_ends),
        address(offsets),
        address(dirs),
        n_rays,
        len(sigmas),
        address(opacity),
        address(depth),
        address(z_variance),
        *(address(grad) for grad in grads),
        address(grad_sigmas),
        address(grad_rgbs),
        address(grad_normals),
        *target(sigmas),
    )
    return grad_sigmas, grad_rgbs, grad_normals


@_composite_bwd_op.register_fake
def _(
    grad_color,
    grad_opacity,
    grad_depth,
    grad_z_variance,
    grad_normal,
    grad_weights,
    sigmas,
    rgbs,
    normals,
    t_starts,
    t_ends,
    ray_indices,
    n_rays,
    opacity,
    depth,
    z_variance,
    offsets=None,
    dirs=None,
    grad_orientation=None,
):
    grad_normals = rgbs.new_empty(0, 3) if normals is None else torch.empty_like(normals)
    return torch.empty_like(sigmas), torch.empty_like(rgbs), grad_normals


def _save_composite(ctx: Any, inputs: tuple, output: tuple) -> None:
    sigmas, rgbs, t_starts, t_ends, ray_indices, n_rays, offsets = inputs
    _, opacity, depth, _ = output
    ctx.save_for_backward(sigmas, rgbs, t_starts, t_ends, ray_indices, offsets, opacity, depth)
    ctx.n_rays = n_rays
    ctx.set_materialize_grads(False)


def _composite_backward(ctx, grad_color, grad_opacity, grad_depth, grad_weights):
    sigmas, rgbs, t_starts, t_ends, ray_indices, offsets, opacity, depth = ctx.saved_tensors
    grad_sigmas, grad_rgbs, _ = _composite_bwd_op(
        grad_color,
        grad_opacity,
        grad_depth,
        None,
        None,
        grad_weights,
        sigmas,
        rgbs,
        None,
        t_starts,
        t_ends,
        ray_indices,
        ctx.n_rays,
        opacity,
        depth,
        None,
        offsets,
    )
    return grad_sigmas, grad_rgbs, None, None, None, None, None


def _save_composite_full(ctx: Any, inputs: tuple, output: tuple) -> None:
    *samples, n_rays, offsets, dirs = inputs
    out = Composited(*output)
    kept = out.opacity, out.depth, out.z_variance
    ctx.save_for_backward(*samples, *kept, offsets, dirs)
    ctx.n_rays = n_rays
    ctx.set_materialize_grads(False)


def _composite_full_backward(ctx, *grads):
    *samples, opacity, depth, z_variance, offsets, dirs = ctx.saved_tensors
    *grads, grad_orientation = grads
    kept = opacity, depth, z_variance
    grad_values = _composite_bwd_op(
        *grads, *samples, ctx.n_rays, *kept, offsets, dirs, grad_orientation
    )
    return *grad_values, None, None, None, None, None, None


_composite_op.register_autograd(_composite_backward, setup_context=_save_composite)
_composite_full_op.register_autograd(_composite_full_backward, setup_context=_save_composite_full)


def _ray_sums(values: Tensor, ray_indices: Tensor, n_rays: int) -> Tensor:
    """Sum of values [S, C] over each ray -> [R, C]."""
    return values.new_zeros(n_rays, values.shape[1]).index_add(0, ray_indices, values)


def _optical_depth_before(thickness: Tensor, ray_indices: Tensor, n_rays: int) -> Tensor:
    """For each sample the sum of `thickness` over the samples before it on its ray -> [S].

    Sums within a ray only (a padded [R, K] table): one cumulative sum over all rays, minus its
    value at the ray's start, would lose digits and carry an infinity into every later ray.
    """
    _check_ray_indices(ray_indices, n_rays)
    offsets = _ray_offsets(ray_indices, n_rays)
    place = torch.arange(thickness.shape[0], device=thickness.device) - offsets[ray_indices]
    longest = int((offsets[1:] - offsets[:-1]).max()) if thickness.numel() else 0
    table = thickness.new_zeros(n_rays, longest + 1)
    table = table.index_put((ray_indices, place + 1), thickness)
    return table.cumsum(1)[ray_indices, place]


def _transmittance_alpha(
    sigmas: Tensor, t_starts: Tensor, t_ends: Tensor, ray_indices: Tensor, n_rays: int
) -> tuple[Tensor, Tensor]:
    """(transmittance in front of each sample, its alpha), [S] each."""
    thickness = sigmas * (t_ends - t_starts)
    before = _optical_depth_before(thickness, ray_indices, n_rays)
    return torch.exp(-before), -torch.expm1(-thickness)


def _padded(values: Tensor, size: int) -> Tensor:
    """Values [n] with zeros behind them -> [size]."""
    return torch.cat([values, values.new_zeros(size - len(values))])


@torch.no_grad()
def visibility_reference(
    sigmas: Tensor,
    t_starts: Tensor,
    t_ends: Tensor,
    ray_indices: Tensor | None,
    n_rays: int | None,
    alpha_threshold: float | Tensor,
    transmittance_threshold: float = 1e-4,
    offsets: Tensor | None = None,
) -> Tensor:
    """`visibility` in pure torch, any floating dtype and device."""
    if offsets is not None:
        check_offsets(offsets, len(sigmas))
        rays, size = unpack(offsets), len(sigmas)
        sigmas, t_starts, t_ends = (x[: len(rays)] for x in (sigmas, t_starts, t_ends))
        thresholds = alpha_threshold, transmittance_threshold
        seen = visibility_reference(sigmas, t_starts, t_ends, rays, len(offsets) - 1, *thresholds)
        return _padded(seen, size)
    assert ray_indices is not None and n_rays is not None
    transmittance, alpha = _transmittance_alpha(sigmas, t_starts, t_ends, ray_indices, n_rays)
    return (transmittance >= transmittance_threshold) & (alpha >= alpha_threshold)


def composite_reference(
    sigmas: Tensor,
    rgbs: Tensor,
    t_starts: Tensor,
    t_ends: Tensor,
    ray_indices: Tensor | None = None,
    n_rays: int | None = None,
    offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`composite` in pure torch, any floating dtype and device, differentiable by autograd."""
    if offsets is not None:
        check_offsets(offsets, len(sigmas))
        rays, n_rays, size = unpack(offsets), len(offsets) - 1, len(sigmas)
        sigmas, rgbs, t_starts, t_ends = (x[: len(rays)] for x in (sigmas, rgbs, t_starts, t_ends))
        *sums, weights = composite_reference(sigmas, rgbs, t_starts, t_ends, rays, n_rays)
        return sums[0], sums[1], sums[2], _padded(weights, size)
    assert ray_indices is not None and n_rays is not None
    transmittance, alpha = _transmittance_alpha(sigmas, t_starts, t_ends, ray_indices, n_rays)
    weights = (transmittance * alpha)[:, None]
    middle = 0.5 * (t_starts + t_ends)[:, None]
    return (
        _ray_sums(weights * rgbs, ray_indices, n_rays),
        _ray_sums(weights, ray_indices, n_rays),
        _ray_sums(weights * middle, ray_indices, n_rays),
        weights[:, 0],
    )


def composite_full_reference(
    sigmas: Tensor,
    rgbs: Tensor,
    normals: Tensor,
    t_starts: Tensor,
    t_ends: Tensor,
    ray_indices: Tensor | None = None,
    n_rays: int | None = None,
    offsets: Tensor | None = None,
    dirs: Tensor | None = None,
) -> Composited:
    """`composite_full` in pure torch, any floating dtype and device, differentiable by autograd."""
    if offsets is not None:
        check_offsets(offsets, len(sigmas))
        rays, size = unpack(offsets), len(sigmas)
        samples = sigmas, rgbs, normals, t_starts, t_ends
        sigmas, rgbs, normals, t_starts, t_ends = (x[: len(rays)] for x in samples)
        samples = sigmas, rgbs, normals, t_starts, t_ends
        out = composite_full_reference(*samples, rays, len(offsets) - 1, dirs=dirs)
        return out._replace(weights=_padded(out.weights, size))
    assert ray_indices is not None and n_rays is not None
    color, opacity, depth, weights = composite_reference(
        sigmas, rgbs, t_starts, t_ends, ray_indices, n_rays
    )
    middle = 0.5 * (t_starts + t_ends)[:, None]
    share = weights[:, None] / opacity.clamp(min=MIN_OPACITY)[ray_indices]
    mean = _ray_sums(share * middle, ray_indices, n_rays)
    orientation = opacity.new_zeros(0, 1)
    if dirs is not None:
        product = (normals * dirs[ray_indices]).sum(-1, keepdim=True)
        away = torch.where(product < 0.0, 0.0, product)  # a NaN stays one, in the gradient too
        orientation = _ray_sums(weights.detach()[:, None] * away**2, ray_indices, n_rays)
    return Composited(
        color=color,
        opacity=opacity,
        depth=depth,
        z_variance=_ray_sums(share * (middle - mean[ray_indices]) ** 2, ray_indices, n_rays),
        normal=_ray_sums(weights[:, None] * normals, ray_indices, n_rays),
        weights=weights,
        orientation=orientation,
    )
