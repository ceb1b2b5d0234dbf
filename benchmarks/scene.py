"""The scene of the volume cases: the official field's initial blob, seen from around it."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dsd_fast import ops
from dsd_fast.ops.field import FieldShape, density_bias
from dsd_fast.ops.hashgrid import GridSpec
from dsd_fast.scene.cameras import CameraBatch, CameraConfig, RandomCameras
from dsd_fast.scene.field import FieldConfig
from dsd_fast.scene.occupancy import OccupancyGrid
from dsd_fast.scene.renderer import Renderer, RendererConfig

# Of the official ranges: the middle distance, and fields of view with as many samples as the
# recorded peers had (peers.py): 47 candidates a ray to march, 29 kept ones to render.
DISTANCE = 1.75
MARCH_FOVY_DEG = 47.9
RENDER_FOVY_DEG = 56.5

RADIUS = FieldConfig.radius
RENDERER = RendererConfig()
STEP_SIZE = Renderer(RENDERER, RADIUS).step_size


class Samples(NamedTuple):
    """Packed samples of the R rays of one view, and a density at each."""

    sigmas: Tensor  # [S]
    t_starts: Tensor  # [S]
    t_ends: Tensor  # [S]
    ray_indices: Tensor  # int64 [S]
    offsets: Tensor  # int64 [R+1]

    @property
    def n_rays(self) -> int:
        return len(self.offsets) - 1


def view(
    width: int, fovy_deg: float, device: torch.device, generator: torch.Generator
) -> CameraBatch:
    """A camera at a random place around the blob; each sees about the same of it."""
    cfg = CameraConfig(
        width=width,
        height=width,
        resolution_milestones=(),
        camera_distance_range=(DISTANCE, DISTANCE),
        fovy_range=(fovy_deg, fovy_deg),
        camera_perturb=0.0,
        center_perturb=0.0,
        up_perturb=0.0,
    )
    return RandomCameras(cfg).sample(0, generator).to(device)


def rays(
    width: int, device: torch.device, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """(origins [R,3], directions [R,3], jitter [R]) of the width² rays of a view to march."""
    cameras = view(width, MARCH_FOVY_DEG, device, generator)
    origins, dirs = (x.reshape(-1, 3).contiguous() for x in (cameras.rays_o, cameras.rays_d))
    return origins, dirs, torch.rand(width * width, generator=generator).to(device)


def blob_density(points: Tensor) -> Tensor:
    """Density [N] of the initial field at points [N,3]: that of the blob alone."""
    blob, _ = density_bias(points, FieldShape(GridSpec(1, 2, 3, 2, 1.0)))  # of any grid
    return F.softplus(torch.as_tensor(blob))


@cache
def occupancy(device: torch.device) -> OccupancyGrid:
    """The occupancy grid after the first update of a run."""
    grid = OccupancyGrid(RENDERER.occupancy, RADIUS, STEP_SIZE)
    grid.update(0, blob_density, torch.Generator().manual_seed(0))
    return grid.to(device)


def samples(width: int, device: torch.device, generator: torch.Generator) -> Samples:
    """What marching a view takes, each with the blob's density times a random factor."""
    origins, dirs, jitter = rays(width, device, generator)
    grid = occupancy(device)
    ray_indices, t_starts, t_ends = ops.march(
        origins, dirs, grid.binary, grid.aabb, STEP_SIZE, jitter
    )
    middle = 0.5 * (t_starts + t_ends)[:, None]
    density = blob_density(origins[ray_indices] + middle * dirs[ray_indices])
    factor = 0.5 + torch.rand(len(middle), generator=generator).to(device)
    offsets = torch.searchsorted(ray_indices, torch.arange(len(origins) + 1, device=device))
    return Samples(density * factor, t_starts, t_ends, ray_indices, offsets)
