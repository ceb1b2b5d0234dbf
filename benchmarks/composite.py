"""Visibility and compositing of the samples that marching a view takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import scene
from benchmarks.case import Call, Workload, backward_of, by_reference
from benchmarks.peers import nerfacc
from benchmarks.scene import Samples
from dsd_fast import ops
from dsd_fast.ops.composite import (
    composite_full_reference,
    composite_reference,
    visibility_reference,
)
from dsd_fast.ops.prune import prune_reference

# Bytes of a sample's density, interval and ray index.
_SAMPLE = 4 + 8 + 8


def visibility(width: int, device: torch.device, generator: torch.Generator) -> Workload:
    """Which samples can be seen, with the threshold of a run's first steps."""
    samples = scene.samples(width, device, generator)
    arguments = (*samples, scene.occupancy(device).alpha_threshold())
    n_samples = len(samples.sigmas)
    return Workload(
        compiled=lambda: ops.visibility(*arguments),
        reference=lambda: visibility_reference(*arguments),
        outputs=("visible",),
        n_items=n_samples,
        n_bytes=(_SAMPLE + 1) * n_samples,
        peers=_visibility_peers(*arguments),
    )


def prune(width: int, device: torch.device, generator: torch.Generator) -> Workload:
    """The samples that can be seen, packed anew in arrays with a tenth more room."""
    samples = scene.samples(width, device, generator)
    threshold = scene.occupancy(device).alpha_threshold()
    n_seen = int(ops.visibility(*samples, threshold).sum())
    capacity = n_seen + n_seen // 10
    arguments = (*samples[:3], _offsets(samples), threshold)
    n_samples = len(samples.sigmas)
    return Workload(
        compiled=lambda: ops.prune(*arguments, capacity=capacity),
        reference=lambda: prune_reference(*arguments, capacity=capacity),
        outputs=ops.PackedSamples._fields,
        n_items=n_samples,
        # Density and interval in, index and interval out; two offsets a ray.
        n_bytes=12 * n_samples + 12 * capacity + 16 * samples.n_rays,
    )


def forward(width: int, device: torch.device, generator: torch.Generator) -> Workload:
    """Colour, opacity, depth and weights, no gradient wanted."""
    samples = scene.samples(width, device, generator)
    rgbs = _colors(samples, generator)
    return Workload(
        compiled=lambda: _composite(ops.composite, samples, rgbs),
        reference=lambda: _composite(composite_reference, samples, rgbs),
        outputs=("color", "opacity", "depth", "weights"),
        n_items=len(rgbs),
        # Colours in, weights out; five numbers a ray.
        n_bytes=(_SAMPLE + 12 + 4) * len(rgbs) + 20 * samples.n_rays,
        peers=_composite_peers(samples, rgbs),
    )


def forward_backward(width: int, device: torch.device, generator: torch.Generator) -> Workload:
    """`forward`, and from the gradients of colour, opacity and depth to densities and colours."""
    samples = scene.samples(width, device, generator)
    inputs = samples.sigmas.requires_grad_(), _colors(samples, generator).requires_grad_()
    grads = _ray_grads(samples.n_rays, (3, 1, 1), device, generator)

    def call() -> Sequence[Tensor]:
        images = _composite(ops.composite, samples, inputs[1])[:3]
        return torch.autograd.grad(images, inputs, grads)

    n_samples, n_rays = len(samples.sigmas), samples.n_rays
    return Workload(
        compiled=call,
        reference=by_reference(call),
        outputs=("grad_sigmas", "grad_rgbs"),
        n_items=n_samples,
        # The samples are read twice; the gradients of density and colour are written.
        n_bytes=(2 * (_SAMPLE + 12) + 4 + 16) * n_samples + 40 * n_rays,
        peers=_composite_peers(samples, inputs[1], grads),
    )


def forward_backward_packed(
    width: int, device: torch.device, generator: torch.Generator
) -> Workload:
    """`forward_backward` of samples that come with offsets, as `march_packed` gives them."""
    samples = scene.samples(width, device, generator)
    inputs = samples.sigmas.requires_grad_(), _colors(samples, generator).requires_grad_()
    grads = _ray_grads(samples.n_rays, (3, 1, 1), device, generator)
    offsets = _offsets(samples)

    def call() -> Sequence[Tensor]:
        images = ops.composite(*inputs, samples.t_starts, samples.t_ends, offsets=offsets)[:3]
        return torch.autograd.grad(images, inputs, grads)

    n_samples, n_rays = len(samples.sigmas), samples.n_rays
    return Workload(
        compiled=call,
        reference=by_reference(call),
        outputs=("grad_sigmas", "grad_rgbs"),
        n_items=n_samples,
        # As `forward_backward`, with two offsets a ray for an index a sample.
        n_bytes=(2 * (12 + 12) + 4 + 16) * n_samples + 56 * n_rays,
    )


def full_forward(width: int, device: torch.device, generator: torch.Generator) -> Workload:
    """`forward` with normals and the variance of depth: what the renderer calls."""
    samples = scene.samples(width, device, generator)
    rgbs, normals = _colors(samples, generator), _normals(samples, generator)
    return Workload(
        compiled=lambda: _composite(ops.composite_full, samples, rgbs, normals)[:6],
        reference=lambda: _composite(composite_full_reference, samples, rgbs, normals)[:6],
        outputs=ops.Composited._fields[:6],
        n_items=len(rgbs),
        n_bytes=(_SAMPLE + 24 + 4) * len(rgbs) + 36 * samples.n_rays,
    )


def full_backward(width: int, device: torch.device, generator: torch.Generator) -> Workload:
    """The backward pass of `full_forward` alone, from the gradients of all images."""
    samples = scene.samples(width, device, generator)
    rgbs, normals = _colors(samples, generator), _normals(samples, generator)
    grads = _ray_grads(samples.n_rays, (3, 1, 1, 1, 3), device, generator)
    intervals = samples[1:]
    images = ops.composite_full(samples.sigmas, rgbs, normals, *intervals)
    kept = images.opacity, images.depth, images.z_variance
    inputs = tuple(x.clone().requires_grad_() for x in (samples.sigmas, rgbs, normals))
    return Workload(
        compiled=lambda: torch.ops.dsd_fast.composite_bwd(
            *grads, None, samples.sigmas, rgbs, normals, *intervals, *kept
        ),
        reference=backward_of(
            lambda: composite_full_reference(*inputs, *intervals)[:5], inputs, grads
        ),
        outputs=("grad_sigmas", "grad_rgbs", "grad_normals"),
        n_items=len(rgbs),
        n_bytes=(_SAMPLE + 24 + 28) * len(rgbs) + (36 + 12) * samples.n_rays,
    )


def _composite(function, samples: Samples, *values: Tensor) -> tuple[Tensor, ...]:
    return function(samples.sigmas, *values, *samples[1:])


def _offsets(samples: Samples) -> Tensor:
    """Where each ray begins, [R + 1]."""
    rays = torch.arange(samples.n_rays + 1, device=samples.sigmas.device)
    return torch.searchsorted(samples.ray_indices, rays)


def _colors(samples: Samples, generator: torch.Generator) -> Tensor:
    return torch.rand(len(samples.sigmas), 3, generator=generator).to(samples.sigmas)


def _normals(samples: Samples, generator: torch.Generator) -> Tensor:
    normals = torch.randn(len(samples.sigmas), 3, generator=generator)
    return F.normalize(normals, dim=-1).to(samples.sigmas)


def _ray_grads(
    n_rays: int, widths: Sequence[int], device: torch.device, generator: torch.Generator
) -> tuple[Tensor, ...]:
    return tuple(torch.randn(n_rays, w, generator=generator).to(device) for w in widths)


def _visibility_peers(
    sigmas: Tensor,
    t_starts: Tensor,
    t_ends: Tensor,
    ray_indices: Tensor,
    n_rays: int,
    threshold: Tensor,
) -> dict[str, Call]:
    peer = nerfacc()
    if peer is None or not sigmas.is_cuda:
        return {}
    packed_info = peer.pack_info(ray_indices, n_rays)
    alpha_thre = threshold.item()
    return {
        f"nerfacc {peer.__version__}": lambda: peer.render_visibility_from_density(
            t_starts, t_ends, sigmas, packed_info=packed_info, alpha_thre=alpha_thre
        )
    }


def _composite_peers(
    samples: Samples, rgbs: Tensor, grads: Sequence[Tensor] | None = None
) -> dict[str, Call]:
    peer = nerfacc()
    if peer is None or not rgbs.is_cuda:
        return {}
    sigmas, t_starts, t_ends, ray_indices, n_rays = samples
    middle = 0.5 * (t_starts + t_ends)[:, None]

    def call() -> Sequence[Tensor]:
        weights, _, _ = peer.render_weight_from_density(
            t_starts, t_ends, sigmas, ray_indices=ray_indices, n_rays=n_rays
        )
        images = [
            peer.accumulate_along_rays(weights, values, ray_indices=ray_indices, n_rays=n_rays)
            for values in (rgbs, None, middle)
        ]
        return images if grads is None else torch.autograd.grad(images, (sigmas, rgbs), grads)

    return {f"nerfacc {peer.__version__}": call}
