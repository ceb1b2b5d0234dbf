"""Volume rendering of a field: march through occupied cells, shade, composite."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsd_fast import ops
from dsd_fast.background import Background
from dsd_fast.cameras import CameraBatch
from dsd_fast.field import Field
from dsd_fast.material import MaterialConfig, Shading, choose_shading, shade
from dsd_fast.occupancy import OccupancyConfig, OccupancyGrid

# Pixels more opaque than this have a depth worth speaking of; only they have a z-variance.
OPAQUE = 0.5


@dataclass
class RendererConfig:
    # Half the edge of the box that rays are marched through; the field's radius.
    radius: float = 2.0
    # Steps across the box's diagonal; sets the length of a step.
    num_samples_per_ray: int = 512
    # Samples evaluated at a time where no gradient is needed; bounds memory.
    eval_chunk_size: int = 160000
    # Shift the samples of each ray by a random part of a step in training.
    randomized: bool = True
    # Distance from the camera at which rays begin.
    near_plane: float = 0.0
    # Distance from the camera at which rays end.
    far_plane: float = 1e10
    # Skip empty cells of the occupancy grid.
    grid_prune: bool = True
    # Drop samples that are transparent or hidden before they are shaded.
    prune_alpha_threshold: bool = True
    # The occupancy grid.
    occupancy: OccupancyConfig = field(default_factory=OccupancyConfig)


@dataclass(frozen=True)
class RenderOutput:
    """Images [B,H,W,·] and the S packed samples they were made of."""

    rgb: Tensor  # [B,H,W,3] foreground over background
    opacity: Tensor  # [B,H,W,1]
    depth: Tensor  # [B,H,W,1] Σ w t, not normalised
    normal: Tensor  # [B,H,W,3] (N+1)/2 · opacity with N the unit world normal
    z_variance: Tensor  # [B,H,W,1] variance of t along the ray, zero where opacity <= OPAQUE
    rgb_fg: Tensor  # [B,H,W,3] Σ w c
    weights: Tensor  # [S]
    normals: Tensor  # [S,3]
    dirs: Tensor  # [S,3] unit ray directions
    ray_indices: Tensor  # [S] int64, into the B·H·W rays
    n_samples: int  # S; zero is legal: only the background is seen


@dataclass(frozen=True)
class _Samples:
    """Packed ray intervals, sorted by ray and depth, with the rays they lie on."""

    rays_o: Tensor  # [R,3]
    rays_d: Tensor  # [R,3]
    ray_indices: Tensor  # [S]
    t_starts: Tensor  # [S]
    t_ends: Tensor  # [S]

    def __len__(self) -> int:
        return len(self.ray_indices)

    def select(self, indices: Tensor) -> _Samples:
        return _Samples(
            self.rays_o,
            self.rays_d,
            self.ray_indices.index_select(0, indices),
            self.t_starts.index_select(0, indices),
            self.t_ends.index_select(0, indices),
        )

    def chunks(self, size: int) -> Iterator[_Samples]:
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            yield _Samples(
                self.rays_o,
                self.rays_d,
                self.ray_indices[part],
                self.t_starts[part],
                self.t_ends[part],
            )

    def dirs(self) -> Tensor:
        return self.rays_d.index_select(0, self.ray_indices)

    def points(self) -> Tensor:
        """Midpoints of the intervals, [S,3]."""
        middle = 0.5 * (self.t_starts + self.t_ends)
        origins = self.rays_o.index_select(0, self.ray_indices)
        return torch.addcmul(origins, self.dirs(), middle[:, None])


class Renderer(nn.Module):
    """Renders a field in front of a background.

    Holds the occupancy grid (buffers `occupancy.occs`, `occupancy.binary`) and no parameters.
    """

    def __init__(self, cfg: RendererConfig, material: MaterialConfig | None = None) -> None:
        super().__init__()
        for name in ("num_samples_per_ray", "eval_chunk_size", "radius"):
            if not getattr(cfg, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(cfg, name)}")
        self.cfg = cfg
        self.material = material or MaterialConfig()
        # √3 as the official code rounds it.
        self.step_size = 1.732 * 2.0 * cfg.radius / cfg.num_samples_per_ray
        self.occupancy = OccupancyGrid(cfg.occupancy, cfg.radius, self.step_size)
        if not cfg.grid_prune:
            self.occupancy.fill()

    def forward(
        self,
        field: Field,
        background: Background,
        cameras: CameraBatch,
        step: int,
        training: bool,
        generator: torch.Generator | None = None,
        update_occupancy: bool = True,
    ) -> RenderOutput:
        """Render the cameras as they look at training step `step`.

        Sets the field's step first. In training, gradients are recorded and the CPU `generator`
        gives, in this order: the occupancy update, the ray jitter, the shading, the background.
        `update_occupancy=False` leaves the grid alone, for further renderings of the same step.
        Otherwise no gradients are recorded and nothing is random.
        """
        if training and generator is None:
            raise ValueError("renderer: training needs a generator, got None")
        field.set_step(step)
        if training and update_occupancy:
            self.update_occupancy(field, step, generator)
        with torch.set_grad_enabled(training and torch.is_grad_enabled()):
            samples = self._sample(field, cameras, training, generator)
            shading = choose_shading(self.material, step, training, generator)
            sigmas, rgbs, normals = self._evaluate(field, cameras, samples, shading)
            rays = ops.composite_full(
                sigmas,
                rgbs,
                normals,
                samples.t_starts,
                samples.t_ends,
                samples.ray_indices,
                len(samples.rays_o),
            )
            behind = background(cameras.rays_d, training, generator)

            def to_image(values: Tensor) -> Tensor:
                return values.reshape(len(cameras), cameras.height, cameras.width, -1)

            opacity, rgb_fg = to_image(rays.opacity), to_image(rays.color)
            normal = F.normalize(to_image(rays.normal), dim=-1)
            return RenderOutput(
                rgb=rgb_fg + behind * (1.0 - opacity),
                opacity=opacity,
                depth=to_image(rays.depth),
                normal=(normal + 1.0) * 0.5 * opacity,
                z_variance=to_image(rays.z_variance) * (opacity > OPAQUE),
                rgb_fg=rgb_fg,
                weights=rays.weights,
                normals=normals,
                dirs=samples.dirs(),
                ray_indices=samples.ray_indices,
                n_samples=len(samples),
            )

    def update_occupancy(self, field: Field, step: int, generator: torch.Generator) -> None:
        """Refresh the occupancy grid from the field if `step` asks for it."""
        if self.cfg.grid_prune:
            self.occupancy.update(step, field.density, generator)

    @torch.no_grad()
    def _sample(
        self,
        field: Field,
        cameras: CameraBatch,
        training: bool,
        generator: torch.Generator | None,
    ) -> _Samples:
        """The samples that are worth shading."""
        cfg = self.cfg
        rays_o = cameras.rays_o.reshape(-1, 3).contiguous()
        rays_d = cameras.rays_d.reshape(-1, 3).contiguous()
        jitter = None
        if training and cfg.randomized:
            jitter = torch.rand(len(rays_o), generator=generator).to(rays_o)
        intervals = ops.march(
            rays_o,
            rays_d,
            self.occupancy.binary,
            self.occupancy.aabb,
            self.step_size,
            jitter,
            cfg.near_plane,
            cfg.far_plane,
        )
        candidates = _Samples(rays_o, rays_d, *intervals)
        if not (cfg.grid_prune and cfg.prune_alpha_threshold and len(candidates)):
            return candidates
        sigmas = _concatenate(
            lambda part: (field.density(part.points()),), candidates, cfg.eval_chunk_size
        )[0]
        visible = ops.visibility(
            sigmas,
            candidates.t_starts,
            candidates.t_ends,
            candidates.ray_indices,
            len(rays_o),
            self.occupancy.alpha_threshold(),
        )
        return candidates.select(visible.nonzero()[:, 0])

    def _evaluate(
        self, field: Field, cameras: CameraBatch, samples: _Samples, shading: Shading
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Density [S], colour [S,3] and normal [S,3] of samples."""
        n_pixels = cameras.height * cameras.width

        def evaluate(part: _Samples) -> tuple[Tensor, Tensor, Tensor]:
            points = part.points()
            density, features, normal = field(points)
            lights = cameras.light_positions
            if len(cameras) > 1:
                lights = lights.index_select(0, part.ray_indices // n_pixels)
            return density, shade(features, points, normal, lights, shading), normal

        if torch.is_grad_enabled():
            # In one piece, also if it is empty: the parameters shall get zero gradients, not none.
            return evaluate(samples)
        return _concatenate(evaluate, samples, self.cfg.eval_chunk_size)


def _concatenate(
    function: Callable[[_Samples], tuple[Tensor, ...]], samples: _Samples, chunk_size: int
) -> tuple[Tensor, ...]:
    """function(samples), evaluated in chunks."""
    parts = [function(part) for part in samples.chunks(chunk_size)] or [function(samples)]
    return tuple(torch.cat(columns) for columns in zip(*parts))
