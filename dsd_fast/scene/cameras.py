"""Random training cameras, fixed evaluation cameras and their rays.

World: right-handed, +z up; azimuth is measured from +x towards +y, so that azimuth 0, the "front",
has the camera on +x. Camera: OpenGL, it looks along its -z, +y is up, +x is right.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from annotated_types import Interval
from torch import Tensor

from dsd_fast import ranges
from dsd_fast.ranges import ConfigError, check


@dataclass
class CameraConfig:
    # Width of the training images in pixels; one number, or one per resolution stage.
    width: ranges.Stages[ranges.Pixels] = (128, 512)
    # Height of the training images in pixels; one number, or one per resolution stage.
    height: ranges.Stages[ranges.Pixels] = (128, 512)
    # Views per training step; one number, or one per resolution stage.
    batch_size: ranges.Stages[Annotated[int, Interval(ge=1, le=2**15)]] = 1
    # Views that belong together: 1, or the 4 of a multi-view model, which share all but their
    # azimuths, a quarter turn apart. The batch size is a multiple of it.
    n_view: Literal[1, 4] = 1
    # Steps at which the next resolution stage begins.
    resolution_milestones: tuple[ranges.CountOrNone, ...] = (5000,)
    # Elevation of training cameras in degrees (lowest, highest).
    elevation_range: ranges.Span[ranges.Elevation] = (-10.0, 45.0)
    # Azimuth of training cameras in degrees (lowest, highest).
    azimuth_range: ranges.Span[Annotated[float, Interval(ge=-720, le=720)]] = (-180.0, 180.0)
    # Distance of training cameras from the origin (nearest, farthest).
    camera_distance_range: ranges.Span[ranges.Length] = (1.5, 2.0)
    # Take that range for the half height of the picture at the object, so that it looks equally
    # large at every field of view: the distance is the drawn number / tan(fovy / 2).
    relative_distance: bool = False
    # Vertical field of view of training cameras in degrees (narrowest, widest).
    fovy_range: ranges.Span[ranges.FieldOfView] = (40.0, 70.0)
    # Largest shift of the camera position, per axis, uniform.
    camera_perturb: ranges.Spread = 0.1
    # Standard deviation of the point looked at, per axis.
    center_perturb: ranges.Spread = 0.2
    # Standard deviation of the up vector, per axis.
    up_perturb: ranges.Spread = 0.02
    # Distance of the light from the origin (nearest, farthest).
    light_distance_range: ranges.Span[ranges.Length] = (0.8, 1.5)
    # Standard deviation of the light direction around the camera's (dreamfusion lights only).
    light_position_perturb: ranges.Spread = 1.0
    # Lights around the camera direction (dreamfusion) or on a ring around it (magic3d).
    light_sample_strategy: Literal["dreamfusion", "magic3d"] = "dreamfusion"
    # Spread the azimuths of a batch evenly over the range.
    batch_uniform_azimuth: bool = True
    # Widen the view ranges from the evaluation view to the full ranges until this step.
    progressive_until: ranges.CountOrNone = 0
    # The step at which they begin to widen.
    progressive_from: ranges.CountOrNone = 0
    # Height of evaluation images in pixels.
    eval_height: ranges.Pixels = 512
    # Width of evaluation images in pixels.
    eval_width: ranges.Pixels = 512
    # Elevation of evaluation cameras in degrees.
    eval_elevation_deg: ranges.ViewElevation = 15.0
    # Distance of evaluation cameras from the origin.
    eval_camera_distance: ranges.Length = 2.0
    # Vertical field of view of evaluation cameras in degrees.
    eval_fovy_deg: ranges.FieldOfView = 70.0
    # Number of views of the turntable.
    n_test_views: ranges.Bins = 120

    def validate(self) -> None:
        """Raise ConfigError for settings that do not go together."""
        milestones = self.resolution_milestones
        if list(milestones) != sorted(set(milestones)):
            raise ConfigError(f"resolution_milestones: the steps must grow, got {milestones}")
        if self.progressive_from > self.progressive_until:
            raise ConfigError(
                f"progressive_from: expected a step before progressive_until "
                f"({self.progressive_until}), got {self.progressive_from}"
            )
        for name in ("height", "width", "batch_size"):
            stages = self.per_stage(name)
            if len(stages) != len(milestones) + 1:
                raise ConfigError(
                    f"{name}: expected one number or {len(milestones) + 1} numbers (one more than "
                    f"resolution_milestones), got {stages}"
                )
        if self.n_view > 1:
            self._validate_views_together()

    def _validate_views_together(self) -> None:
        """ConfigError for what views of one object cannot have."""
        sizes = self.per_stage("batch_size")
        if any(size % self.n_view for size in sizes):
            raise ConfigError(
                f"batch_size: expected multiples of n_view ({self.n_view}), whole objects, got "
                f"{sizes}"
            )
        if not math.isclose(self.azimuth_range[1] - self.azimuth_range[0], 360.0):
            raise ConfigError(
                f"azimuth_range: {self.n_view} views of an object stand all around it: expected a "
                f"range of 360 degrees, got {self.azimuth_range}"
            )
        for name in ("camera_perturb", "center_perturb", "up_perturb"):
            if getattr(self, name) != 0:
                raise ConfigError(
                    f"{name}: a multi-view model is told cameras that look at the centre, got "
                    f"{getattr(self, name)}; pass --cameras.{name.replace('_', '-')} 0"
                )

    def per_stage(self, name: str) -> list[int]:
        """`width`, `height` or `batch_size` of each resolution stage."""
        value = getattr(self, name)
        n_stages = len(self.resolution_milestones) + 1
        return [value] * n_stages if isinstance(value, int) else list(value)


@dataclass(frozen=True)
class CameraBatch:
    """B cameras and their lights, float32 tensors on one device; rays are made when asked for.

    `elevation_deg`, `azimuth_deg` and `distance` are nominal: those drawn before the pose was
    perturbed. They are what the guidance sees, and they stay on the CPU, where it decides by them:
    fetching them from the device would make every step wait for it.
    """

    c2w: Tensor  # [B,4,4] camera-to-world, columns right, up, backward, position
    fovy: Tensor  # [B] vertical field of view, radians
    light_positions: Tensor  # [B,3]
    elevation_deg: Tensor  # [B] on the CPU
    azimuth_deg: Tensor  # [B] on the CPU
    distance: Tensor  # [B] on the CPU
    height: int
    width: int
    # Whether they stand where a trajectory's own cameras do, before its background.
    anchored: bool = False

    def __len__(self) -> int:
        return self.c2w.shape[0]

    @property
    def n_rays(self) -> int:
        return len(self) * self.height * self.width

    @property
    def camera_positions(self) -> Tensor:
        """[B,3]"""
        return self.c2w[:, :3, 3]

    @property
    def rays_o(self) -> Tensor:
        """[B,H,W,3] ray origins (an expanded view: do not write to it)."""
        return self._rays[0]

    @property
    def rays_d(self) -> Tensor:
        """[B,H,W,3] unit ray directions."""
        return self._rays[1]

    @cached_property
    def _rays(self) -> tuple[Tensor, Tensor]:
        return camera_rays(self.c2w, self.fovy, self.height, self.width)

    def tensors(self) -> dict[str, Tensor]:
        """Pose and light by name: what is needed where rays are made."""
        return {name: getattr(self, name) for name in ("c2w", "fovy", "light_positions")}

    def to(self, device: torch.device | str) -> CameraBatch:
        """The same cameras with pose and light on another device, where their rays are made."""
        return replace(self, **{name: part.to(device) for name, part in self.tensors().items()})


class Lattice(Protocol):
    """Places of the views of an object for which guidance keeps trajectories."""

    def snap(self, elevation_deg: Tensor, azimuth_deg: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest places of first views at these angles, float32 [G] each on the CPU."""
        ...


def look_at(positions: Tensor, centers: Tensor, up: Tensor) -> Tensor:
    """Camera-to-world matrices [B,4,4] of cameras at `positions` [B,3] that look at `centers`."""
    forward = F.normalize(centers - positions, dim=-1)
    right = F.normalize(torch.linalg.cross(forward, up), dim=-1)
    true_up = F.normalize(torch.linalg.cross(right, forward), dim=-1)
    c2w = torch.zeros(len(positions), 4, 4, dtype=positions.dtype, device=positions.device)
    c2w[:, :3] = torch.stack([right, true_up, -forward, positions], dim=-1)
    c2w[:, 3, 3] = 1.0
    return c2w


def camera_rays(c2w: Tensor, fovy: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Origins and unit directions [B,H,W,3] of the rays through the pixel centres.

    c2w [B,4,4], fovy [B] in radians; focal length 0.5·H/tan(fovy/2) on both axes, principal point
    in the middle. The origins are an expanded view of the camera positions.
    """
    focal = 0.5 * height / torch.tan(0.5 * fovy)
    columns = torch.arange(width, dtype=c2w.dtype, device=c2w.device) + 0.5 - width / 2
    rows = torch.arange(height, dtype=c2w.dtype, device=c2w.device) + 0.5 - height / 2
    right, up, backward = c2w[:, None, None, :3, :3].unbind(-1)
    x = (columns / focal[:, None])[:, None, :, None]
    y = (-rows / focal[:, None])[:, :, None, None]
    directions = F.normalize(x * right + y * up - backward, dim=-1)
    return c2w[:, None, None, :3, 3].expand(-1, height, width, -1), directions


def clip_matrices(cameras: CameraBatch, near: Tensor | float, far: Tensor | float) -> Tensor:
    """From world to clip space, for `ops.rasterize`: [B,4,4], of homogeneous columns.

    The pixel centres of a rasterised picture are those that `camera_rays` goes through.

    Args:
        near, far: distances along the view [B], or one number, between which things are seen;
            0 < near < far.
    """
    rotation, position = cameras.c2w[:, :3, :3], cameras.c2w[:, :3, 3]
    turn = rotation.transpose(1, 2)
    view = torch.zeros_like(cameras.c2w)
    view[:, :3, :3] = turn
    view[:, :3, 3] = -(turn @ position[:, :, None])[:, :, 0]
    view[:, 3, 3] = 1.0
    zoom = 1.0 / torch.tan(0.5 * cameras.fovy)
    project = torch.zeros_like(view)
    project[:, 0, 0] = zoom * cameras.height / cameras.width
    project[:, 1, 1] = zoom
    project[:, 2, 2] = (far + near) / (near - far)
    project[:, 2, 3] = 2.0 * far * near / (near - far)
    project[:, 3, 2] = -1.0
    return project @ view


def orbit_positions(elevation: Tensor, azimuth: Tensor, distance: Tensor) -> Tensor:
    """Positions [B,3] on a sphere around the origin; angles [B] in radians."""
    horizontal = torch.cos(elevation)
    directions = torch.stack(
        [horizontal * torch.cos(azimuth), horizontal * torch.sin(azimuth), torch.sin(elevation)],
        dim=-1,
    )
    return distance[:, None] * directions


def camera_condition(elevation_deg: Tensor, azimuth_deg: Tensor) -> Tensor:
    """Cameras as a multi-view model is told them (MVDream, Shi et al. 2023): float32 [N,16].

    The camera-to-world matrix, row by row, of a camera at unit distance that looks at the origin:
    neither distance nor field of view is told. MVDream's axes are those of this module.

    Args:
        elevation_deg, azimuth_deg: [N] degrees.
    """
    elevation, azimuth = (torch.deg2rad(a.double()) for a in (elevation_deg, azimuth_deg))
    positions = orbit_positions(elevation, azimuth, torch.ones_like(elevation))
    up = positions.new_tensor([0.0, 0.0, 1.0]).expand_as(positions)
    return look_at(positions, torch.zeros_like(positions), up).flatten(1).float()


class RandomCameras:
    """Draws training cameras, as DreamFusion's random views.

    A batch belongs to the step it is asked for. (The reference builds batches ahead of time, so its
    resolution change and its first progressive view come up to two steps later.)

    Args:
        cfg: settings.
        anchored: with a `Lattice`, the steps whose views are on it, at the middle of the ranges of
            distance and field of view, a trajectory's own frame; None for all, in any frame.
        lattice: with a number n, nominal azimuths are moved to the nearest of the n values +-a that
            stand in the middle of equal parts of [0, 180] degrees, the sign kept: those for which
            guidance keeps trajectories (`GuidanceConfig.lattice`). Positions are perturbed after
            that, so views still come from everywhere. For views that belong together it is a
            `Lattice` of their first ones. None leaves angles as they are drawn.

    With `n_view` of 4, views 4g to 4g + 3 are of object g. They share what is drawn (elevation,
    distance, field of view, the light's place beside the camera); their azimuths are a, a + 90,
    a + 180 and a + 270 with a in [0, 90). (The reference begins with a - 180: the same four.)
    """

    def __init__(
        self,
        cfg: CameraConfig,
        lattice: int | Lattice | None = None,
        anchored: Callable[[int], bool] | None = None,
    ) -> None:
        check(cfg)
        self.cfg = cfg
        self.lattice = lattice
        self.anchored = anchored
        self._heights, self._widths, self._batch_sizes = (
            cfg.per_stage(name) for name in ("height", "width", "batch_size")
        )

    def stage(self, step: int) -> int:
        """Index of the resolution stage of a step."""
        return bisect_right(self.cfg.resolution_milestones, step)

    def sample(self, step: int, generator: torch.Generator) -> CameraBatch:
        """Draw the cameras of a training step from the CPU `generator`."""
        cfg, stage = self.cfg, self.stage(step)
        draw = _PerObject(self._batch_sizes[stage] // cfg.n_view, cfg.n_view, generator)
        anchored = self.anchored is not None and self.anchored(step)
        elevation, azimuth_deg = self._angles(step, draw)
        distance = draw.uniform(*_middle(cfg.camera_distance_range, anchored))
        shift = draw.uniform(-cfg.camera_perturb, cfg.camera_perturb, 3)
        centers = draw.normal(cfg.center_perturb)
        up = torch.tensor([0.0, 0.0, 1.0]) + draw.normal(cfg.up_perturb)
        fovy = torch.deg2rad(draw.uniform(*_middle(cfg.fovy_range, anchored)))
        if cfg.relative_distance:
            distance = distance / torch.tan(0.5 * fovy)
        positions = orbit_positions(elevation, torch.deg2rad(azimuth_deg), distance) + shift
        return CameraBatch(
            look_at(positions, centers, up),
            fovy,
            self._lights(positions, draw),
            torch.rad2deg(elevation),
            azimuth_deg,
            distance,
            self._heights[stage],
            self._widths[stage],
            anchored,
        )

    def _angles(self, step: int, draw: _PerObject) -> tuple[Tensor, Tensor]:
        """Nominal elevation in radians and azimuth in degrees of the views of a step, [B] each."""
        cfg = self.cfg
        begun, until = cfg.progressive_from, cfg.progressive_until
        opening = min(1.0, max(0, step - begun) / (until - begun + 1))
        low, high = (_lerp(cfg.eval_elevation_deg, bound, opening) for bound in cfg.elevation_range)
        # Half of the batches are uniform in elevation, half uniform in area on the sphere.
        if torch.rand((), generator=draw.generator) < 0.5:
            elevation = torch.deg2rad(draw.uniform(low, high))
        else:
            low, high = (math.sin(math.radians(bound)) for bound in (low, high))
            elevation = torch.asin(draw.uniform(low, high))
        low, high = (_lerp(0.0, bound, opening) for bound in cfg.azimuth_range)
        if cfg.n_view > 1:
            # Spread from the middle of the quarter, which shows more than front and side.
            part = 360.0 / cfg.n_view
            opening = opening if until else 1.0
            low, high = (_lerp(part / 2, bound, opening) for bound in (0.0, part))
            azimuth_deg = draw.uniform(low, high)
        elif cfg.batch_uniform_azimuth:
            n = draw.n_objects
            parts = (torch.rand(n, generator=draw.generator) + torch.arange(n)) / n
            azimuth_deg = low + (high - low) * parts
        else:
            azimuth_deg = draw.uniform(low, high)
        if self.anchored is None or self.anchored(step):
            elevation, azimuth_deg = self._placed(elevation, azimuth_deg)
        if cfg.n_view > 1:
            around = 360.0 / cfg.n_view * torch.arange(cfg.n_view)
            azimuth_deg = azimuth_deg + around.repeat(draw.n_objects)
        return elevation, azimuth_deg

    def _lights(self, positions: Tensor, draw: _PerObject) -> Tensor:
        """Positions [B,3] of the lights of cameras at `positions` [B,3]."""
        cfg = self.cfg
        distance = draw.uniform(*cfg.light_distance_range)
        if cfg.light_sample_strategy == "dreamfusion":
            direction = F.normalize(positions + draw.normal(cfg.light_position_perturb), dim=-1)
        else:
            azimuth = draw.uniform(-math.pi, math.pi)
            elevation = draw.uniform(math.pi / 6, math.pi / 2)
            local = orbit_positions(elevation, azimuth, torch.ones(len(positions)))
            direction = (_camera_frame(positions) @ local[:, :, None])[:, :, 0]
        return distance[:, None] * direction

    def _placed(self, elevation: Tensor, azimuth_deg: Tensor) -> tuple[Tensor, Tensor]:
        """Nominal angles as drawn, elevation in radians and azimuth in degrees, moved to where
        guidance wants them."""
        if self.lattice is None:
            return elevation, azimuth_deg
        if isinstance(self.lattice, int):
            return elevation, _on_lattice(azimuth_deg, self.lattice)
        elevation_deg, azimuth_deg = self.lattice.snap(torch.rad2deg(elevation), azimuth_deg)
        return torch.deg2rad(elevation_deg), azimuth_deg


def eval_camera(
    cfg: CameraConfig,
    azimuth_deg: float = 0.0,
    elevation_deg: float | None = None,
    size: tuple[int, int] | None = None,
    device: torch.device | str = "cpu",
) -> CameraBatch:
    """One unperturbed evaluation camera (B=1) with its light at the camera.

    `elevation_deg` defaults to the configuration's, `size` is (height, width) instead of the
    configuration's.
    """
    elevation = torch.tensor([cfg.eval_elevation_deg if elevation_deg is None else elevation_deg])
    azimuth = torch.tensor([float(azimuth_deg)])
    distance = torch.tensor([float(cfg.eval_camera_distance)])
    height, width = size or (cfg.eval_height, cfg.eval_width)
    positions = orbit_positions(torch.deg2rad(elevation), torch.deg2rad(azimuth), distance)
    c2w = look_at(positions, torch.zeros(1, 3), torch.tensor([[0.0, 0.0, 1.0]]))
    fovy = torch.deg2rad(torch.tensor([float(cfg.eval_fovy_deg)]))
    cameras = CameraBatch(c2w, fovy, positions, elevation, azimuth, distance, height, width)
    return cameras.to(device)


def turntable(
    cfg: CameraConfig,
    n_views: int | None = None,
    size: tuple[int, int] | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[CameraBatch]:
    """Evaluation cameras once around the object, one at a time.

    Azimuths run from 0 to 360 degrees inclusive, so that the last view repeats the first.
    """
    n_views = cfg.n_test_views if n_views is None else n_views
    for azimuth_deg in torch.linspace(0.0, 360.0, n_views).tolist():
        yield eval_camera(cfg, azimuth_deg, size=size, device=device)


def _on_lattice(azimuth_deg: Tensor, n_parts: int) -> Tensor:
    """Azimuths [B] moved to the middle of their part of |azimuth|, in [-180, 180)."""
    azimuth = (azimuth_deg.double() + 180) % 360 - 180
    part = (azimuth.abs() * n_parts / 180).floor().clamp(max=n_parts - 1)
    return torch.copysign((part + 0.5) * 180 / n_parts, azimuth).float()


class _PerObject(NamedTuple):
    """Draws numbers once an object, which then hold for each of its views: [B,...]."""

    n_objects: int
    n_view: int
    generator: torch.Generator

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        drawn = torch.rand(self.n_objects, *shape, generator=self.generator)
        return self._per_view(low + (high - low) * drawn)

    def normal(self, scale: float) -> Tensor:
        return self._per_view(scale * torch.randn(self.n_objects, 3, generator=self.generator))

    def _per_view(self, drawn: Tensor) -> Tensor:
        return drawn if self.n_view == 1 else drawn.repeat_interleave(self.n_view, dim=0)


def _camera_frame(positions: Tensor) -> Tensor:
    """Rotations [B,3,3] whose third column points from the origin to the camera."""
    z = F.normalize(positions, dim=-1)
    x = F.normalize(torch.stack([z[:, 1], -z[:, 0], torch.zeros_like(z[:, 0])], dim=-1), dim=-1)
    y = F.normalize(torch.linalg.cross(z, x), dim=-1)
    return torch.stack([x, y, z], dim=-1)


def _middle(span: tuple[float, float], only: bool) -> tuple[float, float]:
    """The span, or its middle alone."""
    middle = sum(span) / 2
    return (middle, middle) if only else span


def _lerp(start: float, end: float, weight: float) -> float:
    return (1.0 - weight) * start + weight * end
