"""Every operator turns away every tensor that its kernels cannot take, and names it."""

import pytest
import torch
from torch import Tensor

from dsd_fast import ops

SPEC = ops.GridSpec(3, 2, 8, 4, 1.5)
GRID = {"x": torch.zeros(5, 3), "table": torch.zeros(SPEC.n_params), "spec": SPEC}
SAMPLES = {
    "sigmas": torch.zeros(5),
    "t_starts": torch.zeros(5),
    "t_ends": torch.ones(5),
    "ray_indices": torch.tensor([0, 0, 0, 1, 1]),
    "n_rays": 2,
}
COLORS = {"rgbs": torch.zeros(5, 3)}

# Arguments that each operator accepts; the first tensor decides the device.
ACCEPTED = {
    "fused_field": {
        "points": torch.zeros(5, 3),
        "table": torch.zeros(SPEC.n_params),
        "w1d": torch.zeros(64, SPEC.n_outputs),
        "w2d": torch.zeros(1, 64),
        "w1f": torch.zeros(64, SPEC.n_outputs),
        "w2f": torch.zeros(3, 64),
        "shape": ops.FieldShape(SPEC),
        "half_table": torch.zeros(SPEC.n_params, dtype=torch.float16),
    },
    "hashgrid": GRID,
    "hashgrid_jacobian": GRID,
    "spherical_harmonics": {"dirs": torch.zeros(5, 3)},
    "march": {
        "origins": torch.zeros(5, 3),
        "dirs": torch.ones(5, 3),
        "occupancy": torch.ones(4, 4, 4, dtype=torch.bool),
        "aabb": (-1, -1, -1, 1, 1, 1),
        "step": 0.1,
        "jitter": torch.zeros(5),
    },
    "march_packed": {
        "origins": torch.zeros(5, 3),
        "dirs": torch.ones(5, 3),
        "occupancy": torch.ones(4, 4, 4, dtype=torch.bool),
        "aabb": (-1, -1, -1, 1, 1, 1),
        "step": 0.1,
        "jitter": torch.zeros(5),
        "capacity": 9,
    },
    "prune": {
        "sigmas": torch.zeros(5),
        "t_starts": torch.zeros(5),
        "t_ends": torch.ones(5),
        "offsets": torch.tensor([0, 3, 5]),
        "alpha_threshold": torch.zeros(()),
        "capacity": 9,
    },
    "rasterize": {
        "positions": torch.zeros(2, 3, 4),
        "faces": torch.zeros(1, 3, dtype=torch.int32),
        "height": 2,
        "width": 2,
    },
    "visibility": SAMPLES | {"alpha_threshold": torch.zeros(())},
    "composite": SAMPLES | COLORS,
    "composite_full": SAMPLES | COLORS | {"normals": torch.zeros(5, 3), "dirs": torch.zeros(2, 3)},
    "occupancy_update": {
        "occs": torch.zeros(9),
        "indices": torch.arange(3),
        "values": torch.ones(3),
    },
    "occupancy_threshold": {"occs": torch.zeros(9)},
    "adam_step": {
        "param": torch.zeros(9),
        "grad": torch.ones(9),
        "exp_avg": torch.zeros(9),
        "exp_avg_sq": torch.zeros(9),
        "step": torch.zeros(()),
        "lr": 0.1,
        "grad_scale": torch.ones(()),
        "found_inf": torch.zeros(()),
        "half_copy": torch.zeros(9, dtype=torch.float16),
    },
}

FAULTS = {
    "dtype": (TypeError, lambda t: t.double() if t.is_floating_point() else t.float()),
    "shape": (ValueError, lambda t: t[None]),
    "layout": (ValueError, lambda t: torch.stack([t, t], dim=-1)[..., 0]),
    "device": (ValueError, lambda t: t.to("meta")),
    "kind": (TypeError, lambda t: t.tolist()),
}


def cases() -> list:
    found = []
    for op, arguments in ACCEPTED.items():
        tensors = [name for name, value in arguments.items() if isinstance(value, Tensor)]
        for name in tensors:
            faults = set(FAULTS)
            if name == tensors[0]:
                faults.remove("device")
            if arguments[name].dim() == 0:  # One number has no layout, and may be a Python one.
                faults -= {"layout", "kind"}
            found += [pytest.param(op, name, f, id=f"{op}-{name}-{f}") for f in sorted(faults)]
    return found


def test_the_table_has_every_operator():
    assert set(ACCEPTED) == {name for name in ops.__all__ if not name[0].isupper()}
    for op, arguments in ACCEPTED.items():
        copies = {k: v.clone() if isinstance(v, Tensor) else v for k, v in arguments.items()}
        getattr(ops, op)(**copies)


@pytest.mark.parametrize(("op", "name", "fault"), cases())
def test_faults_are_named(op, name, fault):
    error, spoil = FAULTS[fault]
    arguments = {**ACCEPTED[op], name: spoil(ACCEPTED[op][name])}
    with pytest.raises(error, match=f"^{op}: {name} "):
        getattr(ops, op)(**arguments)
