"""Properties of every public operator, for arguments of every odd kind (hypothesis).

Whatever the arguments are, an operator gives a result or an error that names an argument, never a
crash or an error from deep inside. It writes what it is said to write and nothing else, and the
compiled backend and the reference agree wherever both accept. tests/sanitize.sh runs this file
where each access out of bounds ends the process.

DSD_PROPERTY_FACTOR=100 runs so many times as many examples.
"""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dsd_fast import ops

FACTOR = float(os.environ.get("DSD_PROPERTY_FACTOR", "1"))


def examples(number: int) -> settings:
    """Always the same examples; those of a longer run begin with those of a shorter one."""
    return settings(
        max_examples=math.ceil(number * FACTOR),
        deadline=None,
        derandomize=True,
        database=None,
        # Most of an example comes from a seed, which nothing makes simpler.
        phases=[Phase.generate],
        # Fixtures of conftest.py hold for all examples of a test alike.
        suppress_health_check=list(HealthCheck),
    )


# ---- arguments ----------------------------------------------------------------------------------

# What random numbers are spoilt with. Beside huge numbers sums overflow, and where depends on their
# order: such results are not compared, but nothing may crash.
SPECIAL = {
    "odd": torch.tensor(
        [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, -1e-40, 1.2e-38, 1e-30, 0.5, -1.0, 1.0]
    ),
    "huge": torch.tensor([3.4e38, -3.4e38, 1e30, -1e20, math.inf, math.nan, 2.0**24, 2.0**31]),
}
KINDS = ["tame", *SPECIAL]
SIZES = [0, 1, 2, 7, 31, 32, 33, 65, 129, 257]

# Levels and features of every kind: one, the most, dense ones, hashed ones, few entries.
SPECS = [
    ops.GridSpec(1, 2, 3, 2, 1.0),
    ops.GridSpec(5, 2, 9, 4, 1.7),
    ops.GridSpec(3, 4, 11, 3, 2.0),
    ops.GridSpec(32, 4, 3, 16, 1.5),
    ops.GridSpec(32, 2, 4, 2, 1.3),
]
BOXES = [
    (-1.0, -1.0, -1.0, 1.0, 1.0, 1.0),
    (-2.0, -1.5, 0.0, 1.0, 1.7, 0.25),
    (-1e38, -1e38, -1e38, 1e38, 1e38, 1e38),
    (0.0, 0.0, 0.0, 1e-30, 1.0, 1e30),
    (1e6, 1e6, 1e6, 1e6 + 1, 1e6 + 1, 1e6 + 1),
]


class Drawn:
    """Random numbers of one example. What hypothesis cannot make simpler comes from a seed."""

    def __init__(self, draw: Callable, kind: str) -> None:
        self.draw, self.kind, self.wild = draw, kind, kind != "tame"
        self.generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def one_of(self, *values: Any) -> Any:
        return self.draw(st.sampled_from(values))

    def size(self) -> int:
        return self.one_of(*SIZES)

    def floats(self, *shape: int, low: float = -1.0, high: float = 1.0) -> Tensor:
        values = low + (high - low) * torch.rand(*shape, generator=self.generator)
        if not self.wild:
            return values
        special = SPECIAL[self.kind]
        share = torch.rand((), generator=self.generator) ** 2
        chosen = torch.randint(len(special), shape, generator=self.generator)
        spoilt = torch.rand(*shape, generator=self.generator) < share
        return torch.where(spoilt, special[chosen], values)

    def integers(self, n: int, *shape: int) -> Tensor:
        return torch.randint(n, shape, generator=self.generator)


@dataclass(frozen=True)
class Op:
    """What the properties need to know of an operator."""

    arguments: Callable[[Drawn], dict[str, Any]]
    written: tuple[str, ...] = ()  # arguments that change
    differentiable: tuple[str, ...] = ()
    exact: bool = False  # the backends agree bit for bit
    rtol: float = 1e-5
    # Whether the reference multiplies by zero what the kernels skip, a NaN where that is infinite.
    loose: bool = False


def grid_arguments(d: Drawn) -> dict[str, Any]:
    spec = d.one_of(*SPECS)
    table = d.floats(spec.n_params)
    return {
        "x": d.floats(d.size(), 3, low=-0.2, high=1.2),
        "table": table.half() if d.one_of(False, False, True) else table,
        "spec": spec,
        "n_active_levels": d.one_of(None, 0, 1, spec.n_levels),
    }


def field_arguments(d: Drawn) -> dict[str, Any]:
    spec = d.one_of(*SPECS[:3])
    n, width = d.size(), spec.n_outputs
    table = d.floats(spec.n_params)
    return {
        "points": d.floats(n, 3, low=-2.5, high=2.5),
        "table": table,
        "w1d": d.floats(64, width),
        "w2d": d.floats(1, 64),
        "w1f": d.floats(64, width),
        "w2f": d.floats(3, 64),
        "shape": ops.FieldShape(
            spec,
            radius=d.one_of(0.5, 2.0),
            bias=d.one_of("blob_magic3d", "blob_dreamfusion", -1.0),
            activation=d.one_of("softplus", "exp", "trunc_exp"),
        ),
        "n_active_levels": d.one_of(None, 0, 1),
        "features": d.one_of(True, False),
        "normals": d.one_of(True, False),
        "half_table": table.half() if d.one_of(False, True) else None,
        "n_valid": d.one_of(None, torch.tensor(n // 2), torch.tensor(-3), torch.tensor(2**62)),
    }


def ray_arguments(d: Drawn) -> dict[str, Any]:
    n, cells = d.size(), d.one_of(1, 2, 7)
    jitter = d.floats(n, low=0.0)
    return {
        "origins": d.floats(n, 3, low=-3.0, high=3.0),
        "dirs": d.floats(n, 3) * d.one_of(1.0, 100.0, 1e-30, 1e-45, 1e30),
        "occupancy": torch.rand(cells, cells, cells, generator=d.generator) < d.one_of(0, 0.4, 1),
        "aabb": d.one_of(*BOXES) if d.wild else d.one_of(*BOXES[:2]),
        "step": d.one_of(0.11, 0.013, 2.0, *((1e-37, 1e-6, 1e30) if d.wild else ())),
        "jitter": d.one_of(None, jitter),
        "near": d.one_of(0.0, 0.3, *((-5.0, 1e6, 3e38) if d.wild else ())),
        "far": d.one_of(1e39, 3.4e38, *(() if d.wild else (2.0, 1e10))),
    }


def packed_ray_arguments(d: Drawn) -> dict[str, Any]:
    return {**ray_arguments(d), "capacity": d.one_of(0, 1, 100, 5000)}


def sample_arguments(d: Drawn) -> dict[str, Any]:
    lengths = torch.tensor([d.one_of(0, 1, 5, 33, 200) for _ in range(d.one_of(0, 1, 3, 9))]).long()
    n = int(lengths.sum())
    starts, widths = d.floats(n, low=0.0, high=3.0), d.floats(n, low=0.0, high=0.1).clamp(min=0.0)
    return {
        "sigmas": d.floats(n, low=0.0, high=d.one_of(3.0, 1e3)),
        "t_starts": starts,
        # Negative widths let transmittances grow: no number of such a ray is worth comparing.
        "t_ends": starts + (d.floats(n, high=0.1) if d.kind == "huge" else widths),
        "ray_indices": torch.repeat_interleave(torch.arange(len(lengths)), lengths),
        "n_rays": len(lengths),
    }


def with_offsets(d: Drawn, arguments: dict[str, Any]) -> dict[str, Any]:
    """The same rays by offsets, with room behind them in all arrays of samples."""
    n, room = len(arguments["sigmas"]), d.one_of(0, 1, 40)
    lengths = torch.bincount(arguments["ray_indices"], minlength=arguments["n_rays"])
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    kept = {k: v for k, v in arguments.items() if k not in ("ray_indices", "n_rays")}
    for name, value in kept.items():
        if isinstance(value, Tensor) and value.dim() and len(value) == n and name != "dirs":
            kept[name] = torch.cat([value, value.new_full((room, *value.shape[1:]), math.nan)])
    return {**kept, "offsets": offsets}


def either_way(d: Drawn, arguments: dict[str, Any], no_rays: Any = None) -> dict[str, Any]:
    if d.one_of(False, True):
        return arguments
    arguments = with_offsets(d, arguments)
    return {**arguments, "ray_indices": None, "n_rays": None} if no_rays else arguments


def visibility_arguments(d: Drawn) -> dict[str, Any]:
    threshold = d.one_of(0.01, torch.tensor(0.05), -1.0, math.nan)
    samples = either_way(d, sample_arguments(d), no_rays=True)
    return {**samples, "alpha_threshold": threshold, "transmittance_threshold": d.one_of(1e-4, 0.5)}


def prune_arguments(d: Drawn) -> dict[str, Any]:
    samples = with_offsets(d, sample_arguments(d))
    threshold = d.one_of(0.01, torch.tensor(0.05), -1.0)
    return {**samples, "alpha_threshold": threshold, "capacity": d.one_of(0, 1, 50, 3000)}


def composite_arguments(d: Drawn) -> dict[str, Any]:
    samples = sample_arguments(d)
    return either_way(d, {**samples, "rgbs": d.floats(len(samples["sigmas"]), 3)})


def composite_full_arguments(d: Drawn) -> dict[str, Any]:
    samples = sample_arguments(d)
    n, n_rays = len(samples["sigmas"]), samples["n_rays"]
    samples |= {"rgbs": d.floats(n, 3), "normals": d.floats(n, 3)}
    dirs = d.floats(n_rays, 3) if d.one_of(True, False) else None
    return {**either_way(d, samples), "dirs": dirs}


def update_arguments(d: Drawn) -> dict[str, Any]:
    n_cells, n = d.size(), d.size()
    n = n if n_cells else 0
    return {
        "occs": d.floats(n_cells),
        "indices": d.integers(max(n_cells, 1), n),
        "values": d.floats(n),
        "decay": d.one_of(0.0, 0.95, 1.0, 1e-45),
    }


def threshold_arguments(d: Drawn) -> dict[str, Any]:
    threshold = d.one_of(0.01, 1.0, 0.0, -1.0, math.inf)
    return {"occs": d.floats(1 + d.size()), "max_threshold": threshold}


def adam_arguments(d: Drawn) -> dict[str, Any]:
    n = d.size()
    scale = torch.tensor(d.one_of(1.0, 1024.0, *((math.nan, math.inf, 0.0) if d.wild else ())))
    steps = d.one_of(0.0, 5.0, 1e6, *((-1.0, math.nan, -math.inf, math.inf) if d.wild else ()))
    return {
        "param": d.floats(n),
        "grad": d.floats(n),
        "exp_avg": d.floats(n),
        "exp_avg_sq": d.floats(n, low=0.0),
        "step": torch.tensor(steps),
        "lr": d.one_of(0.01, 0.0, 1e-45, *((1e30,) if d.wild else ())),
        "betas": d.one_of((0.9, 0.99), (0.0, 0.0), [0.5, 0.9999999]),
        "eps": d.one_of(1e-8, 0.0, 1e-15) if d.wild else 1e-8,
        "grad_scale": d.one_of(None, scale),
        "found_inf": d.one_of(None, torch.tensor(0.0), torch.tensor(1.0), torch.tensor(math.nan)),
        "half_copy": d.one_of(None, torch.zeros(n, dtype=torch.float16)),
        "zero_grad": d.one_of(False, True),
    }


def mesh_arguments(d: Drawn) -> dict[str, Any]:
    n_views, n_vertices, n_faces = d.one_of(0, 1, 3), d.size(), d.size()
    positions = d.floats(n_views, n_vertices, 4, low=-2.0, high=2.0)
    faces = d.integers(max(n_vertices, 1), n_faces if n_vertices else 0, 3).int()
    return {
        "positions": positions * d.one_of(1.0, 0.1, 1e-30, 1e30),
        "faces": faces,
        "height": d.one_of(1, 5, 33),
        "width": d.one_of(1, 17, 40),
        "n_samples": d.one_of(1, 4, 8),
    }


SAMPLE_VALUES = ("sigmas", "rgbs", "normals")
WEIGHTS = ("table", "w1d", "w2d", "w1f", "w2f")
OPS = {
    "hashgrid": Op(grid_arguments, differentiable=("x", "table")),
    "hashgrid_jacobian": Op(grid_arguments, differentiable=("x", "table")),
    "spherical_harmonics": Op(lambda d: {"dirs": d.floats(d.size(), 3)}, differentiable=("dirs",)),
    "fused_field": Op(field_arguments, differentiable=WEIGHTS, rtol=1e-4, loose=True),
    "march": Op(ray_arguments, exact=True),
    "march_packed": Op(packed_ray_arguments, exact=True),
    "visibility": Op(visibility_arguments),
    "prune": Op(prune_arguments),
    "composite": Op(composite_arguments, differentiable=SAMPLE_VALUES),
    "composite_full": Op(composite_full_arguments, differentiable=SAMPLE_VALUES),
    "occupancy_update": Op(update_arguments, written=("occs",), exact=True),
    "occupancy_threshold": Op(threshold_arguments),
    "rasterize": Op(mesh_arguments, exact=True),
    "adam_step": Op(
        adam_arguments,
        written=("param", "grad", "exp_avg", "exp_avg_sq", "step", "half_copy"),
    ),
}


# ---- runs ---------------------------------------------------------------------------------------


@contextmanager
def running(backend: str) -> Iterator[None]:
    before = os.environ.get("DSD_BACKEND")
    os.environ["DSD_BACKEND"] = backend
    try:
        yield
    finally:
        os.environ.pop("DSD_BACKEND")
        if before is not None:
            os.environ["DSD_BACKEND"] = before


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors of a result."""
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in tensors_of(v)] if isinstance(value, (tuple, list)) else []


GUARD = 64  # elements; every address stays as round as it was


def guard_value(tensor: Tensor) -> float:
    if tensor.is_floating_point():
        return math.nan
    return 1 if tensor.dtype == torch.bool else 2**30


class Guarded:
    """Copies of tensors on a device, each between two guards in one storage."""

    def __init__(self, arguments: dict[str, Any], device: torch.device) -> None:
        self.storages: dict[str, Tensor] = {}
        self.arguments = dict(arguments)
        for name, value in arguments.items():
            if isinstance(value, Tensor):
                storage = torch.full(
                    (2 * GUARD + value.numel(),), guard_value(value), dtype=value.dtype
                ).to(device)
                inside = storage[GUARD : GUARD + value.numel()].view(value.shape)
                inside.copy_(value)
                self.storages[name], self.arguments[name] = storage, inside

    def check(self, before: dict[str, Any], written: tuple[str, ...]) -> None:
        """Nothing but what may be written has changed."""
        for name, storage in self.storages.items():
            expected = torch.full_like(storage, guard_value(storage))
            inside = self.arguments[name] if name in written else before[name]
            expected[GUARD:-GUARD] = inside.detach().to(storage.device).flatten()
            assert bitwise(storage, expected), f"{name} was written"


def bitwise(a: Tensor, b: Tensor) -> bool:
    return bool(torch.equal(a.view(torch.uint8), b.view(torch.uint8)))


def call(name: str, arguments: dict[str, Any]) -> list[Tensor]:
    """Results of an operator, with what it wrote; an output that is None counts as none."""
    results = tensors_of(getattr(ops, name)(**arguments))
    return results + [arguments[n] for n in OPS[name].written if arguments.get(n) is not None]


def gradients(results: list[Tensor], inputs: list[Tensor], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pairs = [(r, torch.randn(r.shape, generator=generator)) for r in results]
    pairs = [(r, g.to(r.device)) for r, g in pairs if r.requires_grad]
    if not pairs:
        return [torch.zeros_like(i) for i in inputs]
    outputs, grads = zip(*pairs)
    found = torch.autograd.grad(outputs, inputs, grads, allow_unused=True)
    return [torch.zeros_like(i) if g is None else g for i, g in zip(inputs, found)]


def comparable(kind: str, arguments: dict[str, Any], device: torch.device) -> str:
    """On CUDA a half table brings operands of float16, which the reference does not have."""
    return "huge" if device.type == "cuda" and arguments.get("half_table") is not None else kind


def assert_agree(
    op: Op, got: list[Tensor], want: list[Tensor], kind: str, loose: bool = False
) -> None:
    """With `loose`, numbers may be finite that are not in the reference."""
    assert [(r.dtype, r.shape) for r in got] == [(r.dtype, r.shape) for r in want]
    for number, (a, b) in enumerate(zip(got, want)):
        a, b = a.detach().cpu(), b.detach().cpu()
        if op.exact or (kind != "huge" and not a.is_floating_point()):
            assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)), number
        elif kind != "huge":
            finite, expected = torch.isfinite(a), torch.isfinite(b)
            assert torch.equal(finite & expected if loose else finite, expected), (number, a, b)
            a, b = a[expected].double(), b[expected].double()
            assert (a - b).norm() <= op.rtol * b.norm() + 1e-7, (number, a, b)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OPS)
@examples(15)
@given(data=st.data())
def test_backends_agree(device, name, kind, data):
    """The same results and gradients; nothing is written that should not be."""
    op, d = OPS[name], Drawn(data.draw, kind)
    arguments = op.arguments(d)
    wanting = [
        n
        for n in op.differentiable
        if isinstance(arguments.get(n), Tensor)
        and arguments[n].dtype == torch.float32
        and d.one_of(True, True, False)
    ]
    found = []
    for backend in ("compiled", "torch"):
        guarded = Guarded(arguments, device)
        inputs = [guarded.arguments[n].requires_grad_() for n in wanting]
        with running(backend):
            results = call(name, guarded.arguments)
            grads = gradients(results, inputs, seed=1) if inputs else []
        guarded.check(arguments, op.written)
        found.append((results, grads))
    (got, got_grads), (want, want_grads) = found
    kind = comparable(kind, arguments, device)
    assert_agree(op, got, want, kind, loose=op.loose)
    # The reference's gradients also multiply an infinity by a zero where the kernels skip. With a
    # NaN in the middle of a network the two differ about which weights have to do with it.
    assert_agree(op, got_grads, want_grads, "huge" if d.wild and op.loose else kind, loose=True)


# Gradients come in any layout that autograd knows; the operators are given them contiguous.
GRADIENT_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "expanded": lambda g: g.flatten()[:1].sum().expand(g.shape),
    "transposed in memory": lambda g: g.transpose(0, -1).contiguous().transpose(0, -1),
    "every second": lambda g: torch.stack([g, g], dim=-1)[..., 0],
    "overlapping": lambda g: g.flatten().repeat(2).as_strided(g.shape, [1] * g.dim()),
    "negated view": lambda g: torch.complex(torch.zeros_like(g), -g).conj().imag,
    "odd address": lambda g: inside_another(g),
    "without a number": lambda g: torch.full_like(g, math.nan),
}


@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.differentiable])
@examples(12)
@given(data=st.data())
def test_gradients_of_any_layout(device, name, data):
    """Some outputs get none, the others one of any layout: the same as contiguous ones."""
    op, d = OPS[name], Drawn(data.draw, "tame")
    arguments = Guarded(op.arguments(d), device).arguments
    inputs = [arguments[n].float() for n in op.differentiable if arguments.get(n) is not None]
    names = [n for n in op.differentiable if arguments.get(n) is not None]
    arguments |= {n: i.requires_grad_() for n, i in zip(names, inputs)}
    with running("compiled"):
        outputs = [r for r in call(name, arguments) if r.requires_grad and d.one_of(True, False)]
        if not outputs:
            return
        layouts = [GRADIENT_LAYOUTS[d.one_of(*GRADIENT_LAYOUTS)] for _ in outputs]
        grads = [layout(d.floats(*o.shape).to(device)) for layout, o in zip(layouts, outputs)]
        options = {"retain_graph": True, "allow_unused": True}
        got = torch.autograd.grad(outputs, inputs, grads, **options)
        dense = [g.clone(memory_format=torch.contiguous_format) for g in grads]
        want = torch.autograd.grad(outputs, inputs, dense, **options)
    pairs = [(a, b) for a, b in zip(got, want) if a is not None or b is not None]
    assert_agree(op, [a for a, _ in pairs], [b for _, b in pairs], "odd")


@examples(100)
@given(data=st.data())
def test_the_shape_of_a_grid(data):
    """Any numbers give levels that fit their table, or an error that names one of them."""
    numbers = {
        "n_levels": st.integers(-1, 40),
        "n_features": st.sampled_from([0, 1, 2, 3, 4, 8]),
        "log2_table_size": st.integers(0, 40),
        "base_resolution": st.integers(0, 2**26) | st.integers(1, 64),
        "per_level_scale": st.floats() | st.floats(1.0, 2.0),
    }
    odd = st.sampled_from([None, "2", 2.0, True, 10**400, -(2**70), 1e308, math.nan, [2], 2])
    arguments = {
        n: data.draw(odd if data.draw(st.integers(0, 9)) == 0 else valid, label=n)
        for n, valid in numbers.items()
    }
    try:
        spec = ops.GridSpec(**arguments)
    except (TypeError, ValueError) as error:
        assert any(n in str(error) for n in arguments) or "the finest level" in str(error)
        return
    assert len(spec.levels) == spec.n_levels <= 32
    end = 0
    for level in spec.levels:
        assert level.offset == end and 1 <= level.size <= 2**spec.log2_table_size
        assert level.hashed == (level.size < level.resolution**3)
        assert math.isfinite(level.scale) and level.resolution <= 2**24 + 1
        end += level.size
    assert spec.n_params == end * spec.n_features
    assert len(spec.packed_levels) == 24 * spec.n_levels


# ---- faults -------------------------------------------------------------------------------------


def negative(t: Tensor) -> Tensor:
    """The same values as a view that negates when it is read."""
    if t.dtype not in (torch.float32, torch.float64):
        return t
    return torch.complex(torch.zeros_like(t), -t).conj().imag


def is_index(t: Tensor) -> bool:
    return t.dtype in (torch.int32, torch.int64) and t.dim() > 0


def inside_another(t: Tensor) -> Tensor:
    """The same values, contiguous, from an address that is no rounder than an element."""
    storage = torch.zeros(t.numel() + 1, dtype=t.dtype, device=t.device)
    return storage[1:].view(t.shape).copy_(t)


TENSOR_FAULTS: dict[str, Callable[[Tensor], Any]] = {
    "float64": lambda t: t.double(),
    "float16": lambda t: t.half(),
    "bfloat16": lambda t: t.bfloat16(),
    "int32": lambda t: t.nan_to_num(0).int(),
    "int64": lambda t: t.nan_to_num(0).long(),
    "uint8": lambda t: t.nan_to_num(0).to(torch.uint8),
    "bool": lambda t: t != 0,
    "complex": lambda t: t.to(torch.complex64),
    "one dimension more": lambda t: t[None],
    "one dimension less": lambda t: t.flatten()[0] if t.numel() else t.flatten(),
    "flat": lambda t: t.flatten(),
    "one row more": lambda t: torch.cat([t, t[:1]]) if t.dim() and len(t) else t.new_zeros(1),
    "one row less": lambda t: t[1:] if t.dim() else t,
    "no rows": lambda t: t[:0] if t.dim() else t,
    "transposed": lambda t: t.transpose(0, -1) if t.dim() else t,
    "transposed in memory": lambda t: (
        t.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() else t
    ),
    "every second": lambda t: torch.stack([t, t], dim=-1)[..., 0],
    "flipped": lambda t: t.flip(0) if t.dim() else t,
    "expanded": lambda t: t[:1].expand(t.shape) if t.dim() and len(t) else t,
    "overlapping": lambda t: t.as_strided(t.shape, [1] * t.dim()),
    "negative view": negative,
    "odd address": inside_another,
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "list": lambda t: t.tolist(),
    "array": lambda t: t.cpu().numpy(),
    "none": lambda t: None,
    "text": lambda t: "tensor",
    "requires grad": lambda t: t.clone().requires_grad_() if t.is_floating_point() else t,
    "not a leaf": lambda t: t.clone().requires_grad_() * 1 if t.is_floating_point() else t,
    "parameter": lambda t: torch.nn.Parameter(t, requires_grad=t.is_floating_point()),
}
# For integers that say where something is.
INDEX_FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "reversed": lambda t: t.flip(0),
    "negative": lambda t: t - 5,
    "the smallest": lambda t: torch.full_like(t, torch.iinfo(t.dtype).min),
    "the largest": lambda t: torch.full_like(t, torch.iinfo(t.dtype).max),
    "too large at last": lambda t: torch.cat([t[:-1], t[-1:] + 1000]),
    "negative at first": lambda t: torch.cat([t[:1] - 1000, t[1:]]),
    "a leap and back": lambda t: (
        torch.cat([t[:1], t[1:-1] + torch.iinfo(t.dtype).max // 2, t[-1:]]) if len(t) > 2 else t
    ),
    "alternating": lambda t: torch.where(torch.arange(t.numel()).view(t.shape) % 2 == 0, t, -t),
}
NUMBER_FAULTS = [
    math.nan,
    math.inf,
    -math.inf,
    -1,
    0,
    1,
    0.5,
    1.0,
    1e-50,
    1e39,
    2**50,
    2**70,
    -(2**70),
]
NUMBER_FAULTS += [10**400, True, None, "1", [1], 1j, np.float32(0.5), np.float64(0.25), np.int64(2)]
NUMBER_FAULTS += [torch.tensor(1.0), torch.tensor(1)]
SEQUENCES = [
    (),
    (0.5,),
    (0.5, 0.5),
    (0.5, math.nan),
    (1.0, 0.5),
    [0.0] * 6,
    "ab",
    5,
    None,
    (0, 1) * 3,
]
SEQUENCES += [(0, 0, 0, 1, 1, math.inf), (0, 0, 0, 1, 1, 10**400), (0, 0, 0, 1, "1", 1), {1, 2}]
SEQUENCES += [
    (-3e38,) * 3 + (3e38,) * 3,
    (0, 0, 0, 1e-45, 1, 1),
    (1, 1, 1, 0, 0, 0),
    torch.arange(6),
]
SEQUENCES += [(0, 0, 0, 1 + 1e-9, 1, 1), torch.tensor(0.5), np.zeros(2), (True, False)]


def spoil(d: Drawn, op: Op, arguments: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The arguments on a device, one or two of them replaced."""
    arguments = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in arguments.items()}
    first = d.one_of(*arguments)
    for name in dict.fromkeys((first, d.one_of(first, *arguments))):
        value = arguments[name]
        if isinstance(value, Tensor):
            faults = TENSOR_FAULTS
            if (
                value.dtype in (torch.int32, torch.int64)
                and value.dim()
                and d.one_of(True, True, False)
            ):
                faults = INDEX_FAULTS
            with suppress(RuntimeError):  # a fault that such a tensor cannot have
                arguments[name] = faults[d.one_of(*faults)](value)
        elif isinstance(value, (ops.GridSpec, ops.FieldShape)):
            arguments[name] = d.one_of(None, 3, "spec", SPECS[3], ops.FieldShape(SPECS[3]))
        elif isinstance(value, (tuple, list)):
            arguments[name] = d.one_of(*SEQUENCES)
        elif value is not None:
            arguments[name] = d.one_of(*NUMBER_FAULTS)
        else:
            arguments[name] = d.one_of(3, "none", torch.zeros(2, device=device), [])
    return arguments


def is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta


def is_dense(tensor: Tensor) -> bool:
    """Whether a clone has the layout of the original."""
    return tensor.is_contiguous() and not tensor.is_neg()


@pytest.mark.parametrize("name", OPS)
@examples(40)
@given(data=st.data())
def test_faults_give_an_error_that_names_them(device, name, data):
    """Or a result, which is the reference's. What is refused has written nothing."""
    op, d = OPS[name], Drawn(data.draw, "tame")
    arguments = spoil(d, op, op.arguments(d), device)
    outcomes = []
    for backend in ("compiled", "torch"):
        tensors = {n: v for n, v in arguments.items() if is_plain(v)}
        copies = {n: v.detach().clone() for n, v in tensors.items()}
        written = {
            n: copies[n].clone() for n in op.written if n in tensors and is_dense(tensors[n])
        }
        outcomes.append(None)
        with running(backend):
            try:
                outcomes[-1] = call(name, arguments | written)
            except (ValueError, TypeError, IndexError) as error:
                assert any(argument in str(error) for argument in arguments), error
        for n, before in copies.items():
            if n not in op.written or outcomes[-1] is None:
                after = written.get(n, tensors[n]).detach()
                assert torch.equal(after.nan_to_num(7.0), before.nan_to_num(7.0)), n
    got, want = outcomes
    if got is not None and want is not None and not any(r.is_meta for r in (*got, *want)):
        assert_agree(op, got, want, comparable("odd", arguments, device), loose=True)


class Recorder(TorchDispatchMode):
    """Keeps the calls of the operators beneath, as torch.ops can make them too."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "dsd_fast":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", OPS)
@examples(20)
@given(data=st.data())
def test_operators_beneath_check_too(device, name, data):
    """torch.ops reaches them directly, the backward ones too: no access out of bounds."""
    op, d = OPS[name], Drawn(data.draw, "tame")
    arguments = Guarded(op.arguments(d), device).arguments
    inputs = [
        arguments[n].requires_grad_()
        for n in op.differentiable
        if isinstance(arguments.get(n), Tensor) and arguments[n].dtype == torch.float32
    ]
    with running("compiled"), Recorder() as recorder:
        results = call(name, arguments)
        gradients(results, inputs, seed=1) if inputs else None
    for func, args in recorder.calls:
        for _ in range(2):
            place = d.draw(st.integers(0, len(args) - 1))
            value = args[place].detach() if isinstance(args[place], Tensor) else args[place]
            schema = func._schema.arguments[place]
            if isinstance(value, Tensor):
                faults = TENSOR_FAULTS
                if (
                    value.dtype in (torch.int32, torch.int64)
                    and value.dim()
                    and d.one_of(True, False)
                ):
                    faults = INDEX_FAULTS
                with suppress(RuntimeError):
                    value = faults[d.one_of(*faults)](value)
            elif "Tensor" in str(schema.type):
                value = torch.zeros(d.one_of(0, 3), 1, device=device)
            elif isinstance(value, (list, tuple)):
                value = d.one_of(*SEQUENCES)
            else:
                value = d.one_of(*NUMBER_FAULTS)
            given_args = [a.detach() if isinstance(a, Tensor) else a for a in args]
            given_args[place] = value
            # Words of torch's own schema are welcome here.
            with running("compiled"), suppress(ValueError, TypeError, IndexError, RuntimeError):
                func(*given_args)
