"""Volume rendering of a field: march through occupied cells, shade, composite."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from annotated_types import Gt, Interval
from pydantic import AllowInfNan
from torch import Tensor, nn

from dsd_fast import ops
from dsd_fast._backend import backend
from dsd_fast.ranges import ConfigError, Count, NonNegative, Positive, check
from dsd_fast.scene.background import Background
from dsd_fast.scene.cameras import CameraBatch
from dsd_fast.scene.field import Field
from dsd_fast.scene.material import MaterialConfig, Shading, choose_shading, shade
from dsd_fast.scene.occupancy import OccupancyConfig, OccupancyGrid
from dsd_fast.scene.sample_room import SampleRoom
from dsd_fast.upload import upload

# Pixels more opaque than this have a depth worth speaking of; only they have a z-variance.
OPAQUE = 0.5


@dataclass
class RendererConfig:
    # Steps across the box's diagonal; sets the length of a step.
    num_samples_per_ray: Annotated[int, Interval(ge=1, le=2**16)] = 512
    # Samples evaluated at a time where no gradient is needed; bounds memory.
    eval_chunk_size: Count = 160000
    # Shift the samples of each ray by a random part of a step in training.
    randomized: bool = True
    # Distance from the camera at which rays begin.
    near_plane: NonNegative = 0.0
    # Distance from the camera at which rays end.
    far_plane: Annotated[float, AllowInfNan(), Gt(0)] = 1e10
    # Skip empty cells of the occupancy grid.
    grid_prune: bool = True
    # Drop samples that are transparent or hidden before they are shaded.
    prune_alpha_threshold: bool = True
    # On CUDA, room for so many samples a ray on average, those marched and those kept; samples that
    # find no room are dropped and reported. None learns it from the renderings before. A CUDA graph
    # needs numbers.
    sample_room: tuple[Positive, Positive] | None = None
    # The occupancy grid.
    occupancy: OccupancyConfig = field(default_factory=OccupancyConfig)

    def validate(self) -> None:
        """Raise ConfigError for settings that do not go together."""
        if self.near_plane >= self.far_plane:
            raise ConfigError(
                f"near_plane: expected less than far_plane, {self.far_plane}, got {self.near_plane}"
            )


@dataclass(frozen=True)
class RenderOutput:
    """Images [B,H,W,·], and how many samples they were made of."""

    rgb: Tensor  # [B,H,W,3] foreground over background
    opacity: Tensor  # [B,H,W,1]
    depth: Tensor  # [B,H,W,1] Σ w t, not normalised
    normal: Tensor  # [B,H,W,3] (N+1)/2 · opacity with N the unit world normal
    z_variance: Tensor  # [B,H,W,1] variance of t along the ray, zero where opacity <= OPAQUE
    rgb_fg: Tensor  # [B,H,W,3] Σ w c
    orientation: Tensor  # [B,H,W,1] Σ w max(0, n·d)², w without gradient: normals that face away
    n_samples: Tensor  # 0-dim int64; zero is legal: only the background is seen

    def surface(self, views: CameraBatch, radius: float) -> Tensor:
        """Where the pixels see the object, for `guidance.Plan.seeing`: [B,H,W,4], their mean
        depth's point in half edges of the box of this radius, and opacity; without gradient."""
        opacity = self.opacity.detach()
        depth = self.depth.detach() / opacity.clamp_min(1e-5)
        points = views.rays_o + depth * views.rays_d
        return torch.cat([points / radius, opacity], -1)


@dataclass(frozen=True)
class _Samples:
    """Intervals on rays. Of the C there is room for, the first `n_valid` are samples."""

    rays_o: Tensor  # [R,3]
    rays_d: Tensor  # [R,3]
    ray_indices: Tensor  # int32 [C]
    t_starts: Tensor  # [C]
    t_ends: Tensor  # [C]
    offsets: Tensor  # int64 [R+1] where each ray's samples begin

    @property
    def n_valid(self) -> Tensor:
        """0-dim int64."""
        return self.offsets[-1]

    def __len__(self) -> int:
        return len(self.ray_indices)

    def first(self, n: int) -> _Samples:
        """Without the room behind."""
        return self._part(slice(0, n))

    def chunks(self, size: int) -> Iterator[_Samples]:
        for start in range(0, len(self), size):
            yield self._part(slice(start, start + size))

    def _part(self, part: slice) -> _Samples:
        columns = (self.ray_indices[part], self.t_starts[part], self.t_ends[part])
        return _Samples(self.rays_o, self.rays_d, *columns, self.offsets)

    def points(self, skips: bool = False) -> Tensor:
        """Midpoints of the intervals, [C,3]; with `skips` any numbers from `n_valid` on."""
        if skips and backend(self.rays_o) == "triton":
            from dsd_fast.kernels import ray_samples

            where = (self.ray_indices, self.t_starts, self.t_ends)
            return ray_samples.points(self.rays_o, self.rays_d, *where, self.n_valid)
        middle = 0.5 * (self.t_starts + self.t_ends)
        origins = self.rays_o.index_select(0, self.ray_indices)
        dirs = self.rays_d.index_select(0, self.ray_indices)
        return torch.addcmul(origins, dirs, middle[:, None])


class Renderer(nn.Module):
    """Renders a field in front of a background.

    Rays are marched through the box [-radius, radius]³, the field's.

    Holds the occupancy grid (buffers `occupancy.occs`, `occupancy.binary`) and no parameters.

    On CUDA, with a field of the usual shape, nothing waits for the device but the first renderings,
    which learn how much room samples need: later ones have half as much again as was needed lately.
    With `cfg.sample_room` there are no such first ones, and a CUDA graph can hold a rendering and
    its backward pass.

    Peak memory of a training rendering on an H100, the official field and its optimizer included:
    1.24 GiB at 512² with 7.6 million samples kept and room for 10.5 (0.37 GiB at 128²), about 95
    bytes for each sample there is room for, and 315 MiB.
    """

    def __init__(
        self, cfg: RendererConfig, radius: float, material: MaterialConfig | None = None
    ) -> None:
        super().__init__()
        self.cfg = cfg
        self.material = material or MaterialConfig()
        check(self.cfg)
        check(self.material)
        # √3 as the official code rounds it.
        self.step_size = 1.732 * 2.0 * radius / cfg.num_samples_per_ray
        self.occupancy = OccupancyGrid(cfg.occupancy, radius, self.step_size)
        if not cfg.grid_prune:
            self.occupancy.fill()
        marched, kept = cfg.sample_room or (None, None)
        self._marched, self._kept = SampleRoom("marched", marched), SampleRoom("kept", kept)

    def view(
        self, field: Field, background: Background, cameras: CameraBatch, step: int
    ) -> RenderOutput:
        """What cameras see at a step of the run, without chance or gradients."""
        field.set_step(step)
        shading = choose_shading(self.material, step, training=False)
        # On CUDA one kernel takes numbers, where an image's samples fill much of the memory.
        draws = {"shading": upload(shading.numbers(), cameras.c2w.device)}
        return self.render(field, background, cameras, draws, training=False)

    def draw(
        self,
        field: Field,
        background: Background,
        cameras: CameraBatch,
        step: int,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """Bring the field's levels and the occupancy grid to a step, and draw for its rendering.

        In the official order: occupancy, jitter, shading, background, from the CPU `generator`. (A
        generator of the device draws there; a CUDA graph of this needs one.)

        Returns:
            By name: jitter [B·H·W], the shift of each ray's samples in steps, and paint, of the
            background, see there, where they are asked for; shading, on the CPU, the numbers of a
            `Shading`.
        """
        field.set_step(step)
        self.update_occupancy(field, step, generator)
        draws = {}
        if self.cfg.randomized:
            n_rays, device = cameras.n_rays, generator.device
            draws["jitter"] = torch.rand(n_rays, generator=generator, device=device)
        draws["shading"] = choose_shading(self.material, step, True, generator).numbers()
        paint = background.draw(len(cameras), generator, cameras.anchored)
        return draws if paint is None else {**draws, "paint": paint}

    def render(
        self,
        field: Field,
        background: Background,
        cameras: CameraBatch,
        draws: Mapping[str, Tensor],
        training: bool = True,
    ) -> RenderOutput:
        """Render the field as it is, with what `draw` drew, here or on the cameras' device.

        Gradients are recorded in training alone.
        """
        with torch.set_grad_enabled(training and torch.is_grad_enabled()):
            samples = self._sample(field, cameras, draws.get("jitter"), training)
            shading = draws["shading"]
            # On the CPU by its mode: an albedo needs no light computed.
            shading = shading if shading.is_cuda else Shading.of(shading)
            sigmas, rgbs, normals = self._evaluate(field, cameras, samples, shading)
            rays = ops.composite_full(
                sigmas,
                rgbs,
                normals,
                samples.t_starts,
                samples.t_ends,
                offsets=samples.offsets,
                dirs=samples.rays_d,
            )
            paint = draws.get("paint")
            if paint is not None:
                paint = upload(paint, cameras.rays_d.device)
            behind = background(cameras.rays_d, training, paint)

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
                orientation=to_image(rays.orientation),
                n_samples=samples.n_valid,
            )

    @property
    def n_dropped(self) -> int:
        """Samples that found no room so far, as far as the host has heard."""
        return self._marched.n_dropped + self._kept.n_dropped

    def rooms(self, n_rays: int) -> tuple[int | None, int | None]:
        """Room for the samples of so many rays, marched and kept; None where it is not learnt yet.

        A CUDA graph of a rendering holds for the rooms at its capture alone.
        """
        return self._marched.room(n_rays), self._kept.room(n_rays)

    def room_state(self) -> dict[str, Any]:
        """What was learnt of the room that samples need, in values of JSON, for a checkpoint."""
        return {"marched": self._marched.state(), "kept": self._kept.state()}

    def load_room_state(self, state: Mapping[str, Any]) -> None:
        """Take over a `room_state`: later renderings get the room that they would have had."""
        self._marched.load_state(state["marched"])
        self._kept.load_state(state["kept"])

    def watch_replay(self, n_rays: int) -> None:
        """Learn from a rendering that a CUDA graph replayed."""
        self._marched.watch_replay(n_rays)
        if self.cfg.grid_prune and self.cfg.prune_alpha_threshold:
            self._kept.watch_replay(n_rays)

    def update_occupancy(self, field: Field, step: int, generator: torch.Generator) -> None:
        """Refresh the occupancy grid from the field if `step` asks for it."""
        if self.cfg.grid_prune:
            self.occupancy.update(step, field.density, generator)

    @torch.no_grad()
    def _sample(
        self, field: Field, cameras: CameraBatch, jitter: Tensor | None, training: bool
    ) -> _Samples:
        """The samples that are worth shading."""
        cfg = self.cfg
        rays_o = cameras.rays_o.reshape(-1, 3).contiguous()
        rays_d = cameras.rays_d.reshape(-1, 3).contiguous()
        if jitter is not None:
            jitter = upload(jitter, rays_o.device)
        cells = self.occupancy.binary, self.occupancy.aabb
        if not training and rays_o.device.type == "cpu":
            # Half of a picture's time would go into crossing what is empty.
            cells = self.occupancy.tight()
        march = (
            rays_o,
            rays_d,
            *cells,
            self.step_size,
            jitter,
            cfg.near_plane,
            cfg.far_plane,
        )
        n_rays = len(rays_o)
        room = self._marched.room(n_rays) if field.skips_rows(rays_o.device) else None
        if room is None:
            candidates = _Samples(rays_o, rays_d, *_march_all(*march))
            self._marched.learn(len(candidates), n_rays)
        else:
            packed = ops.march_packed(*march, capacity=room)
            self._marched.watch(packed, n_rays)
            candidates = _Samples(rays_o, rays_d, *packed[1:4], packed.offsets)
        if not (cfg.grid_prune and cfg.prune_alpha_threshold):
            return candidates

        n_kept = None if room is None else self._kept.room(n_rays)
        packed = ops.prune(
            self._density(field, candidates, room is not None),
            candidates.t_starts,
            candidates.t_ends,
            candidates.offsets,
            self.occupancy.alpha_threshold(),
            capacity=len(candidates) if n_kept is None else n_kept,
        )
        samples = _Samples(rays_o, rays_d, *packed[1:4], packed.offsets)
        if n_kept is None:
            samples = samples.first(int(samples.n_valid))
            self._kept.learn(len(samples), n_rays)
        else:
            self._kept.watch(packed, n_rays)
        return samples

    def _density(self, field: Field, samples: _Samples, skips: bool) -> Tensor:
        """Density [C]; without `skips` there must be no room behind the samples."""
        if skips:
            return field.density(samples.points(skips), samples.n_valid)
        size = self.cfg.eval_chunk_size
        return _concatenate(lambda part: (field.density(part.points()),), samples, size)[0]

    def _evaluate(
        self, field: Field, cameras: CameraBatch, samples: _Samples, shading: Shading | Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Density [C], colour [C,3] and normal [C,3] of samples."""
        n_pixels = cameras.height * cameras.width
        skips = field.skips_rows(samples.rays_o.device)

        def evaluate(part: _Samples) -> tuple[Tensor, Tensor, Tensor]:
            points = part.points(skips)
            density, features, normal = (
                field(points, n_valid=part.n_valid) if skips else field(points)
            )
            lights = cameras.light_positions
            if len(cameras) > 1:
                lights = lights.index_select(0, part.ray_indices // n_pixels)
            colors = shade(features, points, normal, lights, shading, part.n_valid)
            return density, colors, normal

        if skips or torch.is_grad_enabled():
            # In one piece, also if it is empty: the parameters shall get zero gradients, not none.
            return evaluate(samples)
        density, colors, normal = _concatenate(evaluate, samples, self.cfg.eval_chunk_size)
        return density, colors, normal


def _march_all(origins: Tensor, dirs: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """(ray_indices, t_starts, t_ends, offsets) of all samples; waits for the device."""
    ray_indices, t_starts, t_ends = ops.march(origins, dirs, *args)
    rays = torch.arange(len(origins) + 1, device=origins.device)
    offsets = torch.searchsorted(ray_indices, rays)
    return ray_indices.int(), t_starts, t_ends, offsets


def _concatenate(
    function: Callable[[_Samples], tuple[Tensor, ...]], samples: _Samples, chunk_size: int
) -> tuple[Tensor, ...]:
    """function(samples), evaluated in chunks."""
    parts = [function(part) for part in samples.chunks(chunk_size)] or [function(samples)]
    return tuple(torch.cat(columns) for columns in zip(*parts))
