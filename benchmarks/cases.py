"""All cases, by name."""

from __future__ import annotations

from functools import partial

from benchmarks import composite, hashgrid, march, occupancy, render, sh
from benchmarks.case import Case

_POINTS = {"cpu": (1 << 16,), "cuda": (1 << 20,)}
_VIEWS = {"cpu": (128, 512), "cuda": (128, 512)}
_SAMPLED_VIEWS = {"cpu": (128,), "cuda": (128, 512)}
_CELLS = {"cpu": (32, 128), "cuda": (32, 128)}

# Check sizes stay off the kernels' block sizes.
_points = partial(Case, unit="points", sizes=_POINTS, check_size=10007)
_samples = partial(Case, unit="px", sizes=_SAMPLED_VIEWS, check_size=19)
_cells = partial(Case, unit="cells", sizes=_CELLS, check_size=13)
_on_rays = {"points": hashgrid.along_rays}

CASES: dict[str, Case] = {
    "encode/forward": _points(hashgrid.forward),
    "encode/forward-rays": _points(partial(hashgrid.forward, **_on_rays)),
    "encode/backward": _points(hashgrid.backward),
    "encode/backward-rays": _points(partial(hashgrid.backward, **_on_rays)),
    "jacobian/forward": _points(hashgrid.jacobian_forward),
    "jacobian/forward-rays": _points(partial(hashgrid.jacobian_forward, **_on_rays)),
    "jacobian/backward": _points(hashgrid.jacobian_backward),
    "jacobian/backward-rays": _points(partial(hashgrid.jacobian_backward, **_on_rays)),
    "jacobian/forward-backward": _points(hashgrid.jacobian_forward_backward),
    "jacobian/forward-backward-rays": _points(
        partial(hashgrid.jacobian_forward_backward, **_on_rays)
    ),
    "sh/forward": _points(sh.forward),
    "sh/backward": _points(sh.backward),
    # The number of samples comes to the host.
    "march": Case(march.march, "px", _VIEWS, check_size=19, captures=False),
    "march-packed": Case(march.packed, "px", _VIEWS, check_size=19),
    "visibility": _samples(composite.visibility),
    "prune": _samples(composite.prune),
    "composite/forward": _samples(composite.forward),
    "composite/forward-backward": _samples(composite.forward_backward),
    "composite/forward-backward-packed": _samples(composite.forward_backward_packed),
    "composite-full/forward": _samples(composite.full_forward),
    "composite-full/backward": _samples(composite.full_backward),
    "occupancy/update": _cells(occupancy.update),
    "occupancy/threshold": _cells(occupancy.threshold),
    # Long chains of float32 arithmetic; the losses' gradients are small differences.
    "render": _samples(render.render, tolerance=1e-3, captures=False),
}
