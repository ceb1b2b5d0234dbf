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

# Bytes of a sample's density and interval.
_SAMPLE = 4 + 8


def visibility(width: int, device: torch.device, generator: torch.Generator) -> Workload:
    """Which samples can be seen, with the threshold of a run's first steps."""
    samples = scene.samples(width, device, generator)
    arguments = (*samples[:3], None, samples.n_rays)
    threshold, n_samples = scene.occupancy(device).alpha_threshold(), len(samples.sigmas)
    more = {"offsets": samples.offsets}
    return Workload(
        compiled=lambda: ops.visibility(*arguments[:4], None, threshold, **more),
        reference=lambda: visibility_reference(*arguments, threshold, 1e-4, **more),
        outputs=("visible",),
        n_items=n_samples,
        n_bytes=(_SAMPLE + 1) * n_samples,
        peers=_visibility_peers(samples, threshold),
    )


def prune(width: int, device: torch.device, generator: torch.Generator) -> Workload:
    """The samples that can be seen, packed anew in arrays with a tenth more room."""
    samples = scene.samples(width, device, generator)
    threshold = scene.occupancy(device).alpha_threshold()
    arguments = (*samples[:3], samples.offsets, threshold, 1e-4)
    visible = ops.visibility(*samples[:3], None, None, threshold, offsets=samples.offsets)
    n_samples, n_seen = len(samples.sigmas), int(visible.sum())
    capacity = n_seen + n_seen // 10
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
        n_bytes=(_SAMPLE + 12 + 4) * len(rgbs) + 28 * samples.n_rays,
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
        n_bytes=(2 * (_SAMPLE + 12) + 4 + 16) * n_samples + 56 * n_rays,
        peers=_composite_peers(samples, inputs[1], grads),
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
        n_bytes=(_SAMPLE + 24 + 4) * len(rgbs) + 44 * samples.n_rays,
    )


def full_backward(width: int, device: torch.device, generator: torch.Generator) -> Workload:
    """The backward pass of `full_forward` alone, from the gradients of all images."""
    samples = scene.samples(width, device, generator)
    rgbs, normals = _colors(samples, generator), _normals(samples, generator)
    grads = _ray_grads(samples.n_rays, (3, 1, 1, 1, 3), device, generator)
    intervals, offsets = samples[1:3], samples.offsets
    places = (None, samples.n_rays)
    images = ops.composite_full(samples.sigmas, rgbs, normals, *intervals, offsets=offsets)
    kept = images.opacity, images.depth, images.z_variance
    inputs = tuple(x.clone().requires_grad_() for x in (samples.sigmas, rgbs, normals))
    return Workload(
        compiled=lambda: torch.ops.dsd_fast.composite_bwd(
            *grads, None, samples.sigmas, rgbs, normals, *intervals, *places, *kept, offsets
        ),
        reference=backward_of(
            lambda: composite_full_reference(*inputs, *intervals, *places, offsets)[:5],
            inputs,
            grads,
        ),
        outputs=("grad_sigmas", "grad_rgbs", "grad_normals"),
        n_items=len(rgbs),
        n_bytes=(_SAMPLE + 24 + 28) * len(rgbs) + (44 + 12) * samples.n_rays,
    )


def _composite(function, samples: Samples, *values: Tensor) -> tuple[Tensor, ...]:
    if function in (composite_reference, composite_full_reference):
        places = (None, samples.n_rays, samples.offsets)
        return function(samples.sigmas, *values, samples.t_starts, samples.t_ends, *places)
    return function(
        samples.sigmas, *values, samples.t_starts, samples.t_ends, offsets=samples.offsets
    )


def _colors(samples: Samples, generator: torch.Generator) -> Tensor:
    return torch.rand(len(samples.sigmas), 3, generator=generator).to(samples.sigmas)


def _normals(samples: Samples, generator: torch.Generator) -> Tensor:
    normals = torch.randn(len(samples.sigmas), 3, generator=generator)
    return F.normalize(normals, dim=-1).to(samples.sigmas)


def _ray_grads(
    n_rays: int, widths: Sequence[int], device: torch.device, generator: torch.Generator
) -> tuple[Tensor, ...]:
    return tuple(torch.randn(n_rays, w, generator=generator).to(device) for w in widths)


def _visibility_peers(samples: Samples, threshold: Tensor) -> dict[str, Call]:
    peer = nerfacc()
    sigmas, t_starts, t_ends, ray_indices, _ = samples
    if peer is None or not sigmas.is_cuda:
        return {}
    packed_info = peer.pack_info(ray_indices, samples.n_rays)
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
    sigmas, t_starts, t_ends, ray_indices, _ = samples
    n_rays = samples.n_rays
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
