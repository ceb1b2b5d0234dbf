"""All cases, by name."""

from __future__ import annotations

from functools import partial

from benchmarks import (
    adam,
    composite,
    field,
    guidance,
    hashgrid,
    march,
    occupancy,
    rasterize,
    render,
    sh,
)
from benchmarks.case import Case

_POINTS = {"cpu": (1 << 16,), "cuda": (1 << 20,)}
_VIEWS = {"cpu": (128, 512), "cuda": (128, 512)}
_SAMPLED_VIEWS = {"cpu": (128,), "cuda": (128, 512)}
# On a GPU the table of the official grid.
_NUMBERS = {"cpu": (1 << 22,), "cuda": (1 << 20, hashgrid.SPEC.n_params)}
_CELLS = {"cpu": (32, 128), "cuda": (32, 128)}

# Check sizes stay off the kernels' block sizes.
_points = partial(Case, unit="points", sizes=_POINTS, check_size=10007)
_samples = partial(Case, unit="px", sizes=_SAMPLED_VIEWS, check_size=19)
_cells = partial(Case, unit="cells", sizes=_CELLS, check_size=13)
_numbers = partial(Case, unit="numbers", sizes=_NUMBERS, check_size=10007)
_PICTURES = {"cpu": (512,), "cuda": (512, 1024)}
_pictures = partial(Case, unit="px", sizes=_PICTURES, check_size=67)
# Latents of one view, and of 64 larger ones. The last digit of a half may differ.
_view = partial(Case, unit="px", sizes={"cpu": (64,), "cuda": (64,)}, check_size=19, tolerance=1e-4)
_views = partial(_view, sizes={"cpu": (32,), "cuda": (128,)})
_many = {"n_items": 64}
_on_rays = {"points": hashgrid.along_rays}
# On CUDA operands are float16, and a rounding may move a neuron over the edge of its ReLU.
_fields = partial(_points, tolerance=5e-2)

CASES: dict[str, Case] = {
    "encode/forward": _points(hashgrid.forward),
    "encode/forward-rays": _points(partial(hashgrid.forward, **_on_rays)),
    "encode/forward-half": _points(partial(hashgrid.forward, half=True)),
    "encode/forward-half-rays": _points(partial(hashgrid.forward, half=True, **_on_rays)),
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
    "field/density": _fields(partial(field.forward, features=False)),
    "field/forward": _fields(field.forward),
    "field/forward-backward": _fields(field.forward_backward),
    "field/normals": _fields(partial(field.forward_backward, normals=True)),
    "field/density-rays": _fields(partial(field.forward, features=False, **_on_rays)),
    "field/forward-rays": _fields(partial(field.forward, **_on_rays)),
    "field/forward-backward-rays": _fields(partial(field.forward_backward, **_on_rays)),
    "field/normals-rays": _fields(partial(field.forward_backward, normals=True, **_on_rays)),
    "march": Case(march.march, "px", _VIEWS, check_size=19),
    "visibility": _samples(composite.visibility),
    "prune": _samples(composite.prune),
    "composite/forward": _samples(composite.forward),
    "composite/forward-backward": _samples(composite.forward_backward),
    "composite-full/forward": _samples(composite.full_forward),
    "composite-full/backward": _samples(composite.full_backward),
    "rasterize/20k": _pictures(rasterize.rasterize),
    "rasterize/500k": _pictures(partial(rasterize.rasterize, n_faces=500_000)),
    "rasterize/20k-1": _pictures(partial(rasterize.rasterize, n_samples=1)),
    "rasterize/500k-1": _pictures(partial(rasterize.rasterize, n_faces=500_000, n_samples=1)),
    "occupancy/update": _cells(occupancy.update),
    "occupancy/threshold": _cells(occupancy.threshold),
    "adam/step": _numbers(adam.step),
    "adam/step-half": _numbers(partial(adam.step, half=True), tolerance=1e-3),
    "guidance/combine": _view(guidance.combine),
    "guidance/combine-many": _views(partial(guidance.combine, **_many)),
    "guidance/step": _view(guidance.step),
    "guidance/step-many": _views(partial(guidance.step, **_many)),
    "guidance/link": _view(guidance.link),
    "guidance/link-many": _views(partial(guidance.link, **_many)),
    "guidance/link-table": _view(guidance.link_table),
    "guidance/link-table-many": _views(partial(guidance.link_table, **_many)),
    "guidance/gradient": _view(guidance.gradient),
    "guidance/gradient-many": _views(partial(guidance.gradient, **_many)),
    "guidance/text": _view(guidance.text),
    "guidance/passes": _view(guidance.passes),
    # Long chains of arithmetic, on CUDA with float16 operands; the losses' gradients are small
    # differences.
    "render": _samples(render.render, tolerance=2e-2),
}
