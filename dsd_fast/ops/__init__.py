"""Operators over csrc. Each has five faces of one name: a pure-torch reference
(``<name>_reference`` in its module), a CPU and a CUDA kernel (csrc), a torch.library operator
(``torch.ops.dsd_fast.<name>``, with fake and, where it makes sense, autograd) and a test."""

from dsd_fast.ops._pack import PackedSamples
from dsd_fast.ops.adam import adam_step
from dsd_fast.ops.composite import Composited, composite, composite_full, visibility
from dsd_fast.ops.field import FieldShape, fused_field
from dsd_fast.ops.hashgrid import GridSpec, hashgrid, hashgrid_jacobian
from dsd_fast.ops.march import march, march_packed
from dsd_fast.ops.occupancy import occupancy_threshold, occupancy_update
from dsd_fast.ops.prune import prune
from dsd_fast.ops.rasterize import Fragments, rasterize
from dsd_fast.ops.sh import spherical_harmonics

__all__ = [
    "Composited",
    "FieldShape",
    "Fragments",
    "GridSpec",
    "PackedSamples",
    "adam_step",
    "composite",
    "composite_full",
    "fused_field",
    "hashgrid",
    "hashgrid_jacobian",
    "march",
    "march_packed",
    "occupancy_threshold",
    "occupancy_update",
    "prune",
    "rasterize",
    "spherical_harmonics",
    "visibility",
]
