"""The density at which the surface of a field lies: where pictures of it have their outlines.

A field's edge is fog. A pixel shows the object where its ray gathers an opacity of more than a
half; of the surface at a density c it shows the object where the largest density along its ray is
more than c. A level is chosen such that the two agree over views from all around, which needs no
mesh. What is thin gathers less than what is thick, so that no single density is right everywhere:
the level may differ a little from place to place.

Where fog fills a hollow, outlines say nothing, and a level has holes that no picture shows. There
the surface is where rays have gathered a half: what is hidden that much from every view is inside.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dsd_fast import ops
from dsd_fast.scene.cameras import camera_rays, look_at, orbit_positions

# Views from all around, their pixels, field of view in degrees, and between which elevations.
N_VIEWS = 32
SIZE = 128
FOVY_DEG = 40.0
ELEVATIONS_DEG = (-10.0, 60.0)
# The opacity from which on a pixel shows the object.
OPAQUE = 0.5
# Levels are adjusted on a grid of so many points along the longest side,
POINTS = 24
# by at most this much of the logarithm, and between neighbours the less, the larger the weight.
REACH = 1.0
SMOOTHNESS = 0.003
# How sharply a ray's largest density tells on which side of the level it is, a unit of logarithm.
SHARPNESS = 6.0
ROUNDS, STEPS, RATE = 3, 60, 0.1
# Points along the longest side of the grid on which it is kept what is hidden,
HIDDEN_POINTS = 96
# which counts where the density is at least this share of the level: what nobody sees because it is
# under the object stays empty.
FOG = 0.05
# Densities that differ by more than this factor from a ray's largest decide nothing.
_BELOW = math.log(8.0)


class Dense(Protocol):
    """What has a density."""

    def density(self, points: Tensor) -> Tensor:
        """[N] at points [N,3]."""
        ...


@dataclass(frozen=True)
class Level:
    """Logarithms of the density of the surface, on a grid [X,Y,Z] over a box, linear in between."""

    logs: Tensor
    low: Tensor  # [3]
    high: Tensor  # [3]
    # How well outlines agree: intersection over union of all views; None for a level that was
    # given.
    agreement: float | None = None
    # The least optical depth in front of a place, of all views, on a grid over the same box.
    hidden: Tensor | None = None

    @staticmethod
    def constant(density: float, device: torch.device) -> Level:
        corner = torch.ones(3, device=device)
        logs = torch.full((2, 2, 2), math.log(density), device=device)
        return Level(logs, -corner, corner)

    def at(self, points: Tensor) -> Tensor:
        """Logarithms [N] at points [N,3]; outside of the box those of its border."""
        return _interpolated(self.logs, points, self.low, self.high)

    def relative(self, points: Tensor, density: Tensor) -> Tensor:
        """What is more than one inside of the surface, [N], at points [N,3] of densities [N]."""
        relative = density * (-self.at(points)).exp()
        if self.hidden is None:
            return relative
        hidden = _interpolated(self.hidden, points, self.low, self.high) / -math.log(1 - OPAQUE)
        return torch.maximum(relative, torch.minimum(hidden, relative / FOG))

    def __str__(self) -> str:
        low, high = self.logs.min().exp().item(), self.logs.max().exp().item()
        if self.agreement is None:
            return f"{low:.4g}"
        return (
            f"{low:.4g} to {high:.4g} by place, where outlines of {N_VIEWS} views agree to "
            f"{100 * self.agreement:.1f} %"
        )


class _Rays(NamedTuple):
    """Samples of the R rays of all views that may be a ray's largest density, and what rays
    gather."""

    rays: Tensor  # int64 [S]
    points: Tensor  # [S,3]
    logs: Tensor  # [S] of their density
    opaque: Tensor  # bool [R]
    hidden: Tensor  # [X,Y,Z] as of `Level`

    def largest(self, logs: Tensor) -> Tensor:
        """Of values [S] of samples, each ray's [R]; -inf where it has none."""
        none = logs.new_full((len(self.opaque),), -math.inf)
        return none.scatter_reduce(0, self.rays, logs, "amax")

    def agreement(self, above: Tensor) -> float:
        """Intersection over union of where rays [R] meet the surface and where they are opaque."""
        union = (above | self.opaque).sum()
        return float((above & self.opaque).sum() / union) if union else 0.0


def find_level(
    field: Dense, occupied: Tensor, radius: float, low: Tensor, high: Tensor, step: float
) -> Level | None:
    """The level that reproduces outlines; None where no ray is opaque.

    Args:
        occupied: bool [G,G,G], the cells of the box [-radius, radius]³ that may hold density.
        low, high: [3] corners of the box that holds the object, on the CPU.
        step: length of a step along rays.
    """
    rays = _look(field, occupied, radius, low, high, step)
    if not rays.opaque.any():
        return None
    largest = rays.largest(rays.logs)
    candidates = torch.linspace(-3.0, 8.0, 221).tolist()
    found = [rays.agreement(largest > log) for log in candidates]
    best = max(range(len(found)), key=found.__getitem__)
    logs, agreement = _adjust(rays, candidates[best], low, high)
    if agreement < found[best]:
        logs = torch.full_like(logs, candidates[best])
        agreement = found[best]
    logs, low, high, hidden = (x.to(occupied.device) for x in (logs, low, high, rays.hidden))
    return Level(logs, low, high, agreement, hidden)


@torch.no_grad()
def _look(
    field: Dense, occupied: Tensor, radius: float, low: Tensor, high: Tensor, step: float
) -> _Rays:
    """The rays of all views, on the CPU, whose sums are the same each time: on CUDA the field is
    asked, and what is hidden is looked up."""
    device = occupied.device
    centre, reach = (low + high) / 2, float((high - low).norm()) / 2
    fovy = torch.tensor([math.radians(FOVY_DEG)])
    distance = torch.tensor([1.02 * reach / math.sin(0.5 * float(fovy))])
    aabb = (-radius,) * 3 + (radius,) * 3
    bottom, top = (math.sin(math.radians(angle)) for angle in ELEVATIONS_DEG)
    axes = [
        torch.linspace(float(a), float(b), n, device=device)
        for a, b, n in zip(low, high, _sides(low, high, HIDDEN_POINTS))
    ]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
    hidden = torch.full(places.shape[:3], math.inf, device=device).flatten()
    places = places.reshape(-1, 3)
    parts: list[tuple[Tensor, ...]] = []
    for view in range(N_VIEWS):
        # Evenly over the sphere's belt, by the golden angle.
        sine = bottom + (top - bottom) * (view + 0.5) / N_VIEWS
        elevation = torch.tensor([math.asin(sine)])
        azimuth = torch.tensor([view * math.pi * (3 - math.sqrt(5))])
        eye = centre + orbit_positions(elevation, azimuth, distance)
        pose = look_at(eye, centre[None], torch.tensor([[0.0, 0.0, 1.0]])).to(device)
        origins, dirs = camera_rays(pose, fovy.to(device), SIZE, SIZE)
        origins = origins.reshape(-1, 3).contiguous()
        dirs = dirs.reshape(-1, 3).contiguous()
        rays, starts, ends = ops.march(origins, dirs, occupied, aabb, step)
        rays = rays.long()
        points = torch.addcmul(origins[rays], dirs[rays], (0.5 * (starts + ends))[:, None])
        samples = (rays, starts, ends, points, field.density(points))
        rays, starts, ends, points, density = (values.cpu() for values in samples)
        depth = density * (ends - starts)
        # Steps of all rays begin at the same distances from the eye.
        first = math.floor((float(distance) - reach) / step) - 1
        n_steps = math.ceil(2 * reach / step) + 3
        at = (starts / step).round().long() - first
        inside = (at >= 0) & (at < n_steps)
        volume = torch.zeros((n_steps + 1) * SIZE * SIZE)
        volume.index_add_(0, (at[inside] + 1) * SIZE * SIZE + rays[inside], depth[inside])
        volume = volume.view(n_steps + 1, SIZE, SIZE).cumsum(0)
        in_front = _in_front(volume.to(device), pose[0], first * step, step, places)
        hidden = torch.minimum(hidden, in_front)
        opaque = 1 - (-volume[-1].flatten()).exp() > OPAQUE
        logs = density.clamp_min(1e-9).log()
        none = logs.new_full((SIZE * SIZE,), -math.inf)
        near = logs > none.scatter_reduce(0, rays, logs, "amax")[rays] - _BELOW
        parts.append((rays[near] + view * SIZE * SIZE, points[near], logs[near], opaque))
    columns = [torch.cat(column) for column in zip(*parts)]
    return _Rays(*columns, hidden=hidden.view([len(axis) for axis in axes]).cpu())


def _in_front(volume: Tensor, pose: Tensor, first: float, step: float, places: Tensor) -> Tensor:
    """Optical depth [N] between the eye of a view and places [N,3]; infinite out of the picture.

    Args:
        volume: [K,H,W] that of the view's rays up to the distances first, first + step, ...
    """
    seen = (places - pose[:3, 3]) @ pose[:3, :3]  # the camera looks along -z
    zoom = 1 / math.tan(math.radians(FOVY_DEG) / 2)
    x, y = (zoom * seen[:, k] / -seen[:, 2] for k in (0, 1))
    # Between the middles of the first and the last, as grid_sample counts.
    index = (seen.norm(dim=-1) - first) / step
    z = (2 * index + 1) / len(volume) - 1
    at = torch.stack([x, -y, z], -1)[None, None, None]
    found = F.grid_sample(volume[None, None], at, align_corners=False, padding_mode="border")
    outside = (x.abs() > 1) | (y.abs() > 1)
    return found[0, 0, 0, 0].masked_fill(outside, math.inf)


def _sides(low: Tensor, high: Tensor, longest: int) -> list[int]:
    """Points of a grid of nearly cubic cells over a box, so many along its longest side."""
    side = (high - low) / (high - low).max() * (longest - 1)
    return [max(int(n), 1) + 1 for n in side.ceil().tolist()]


def _adjust(rays: _Rays, log: float, low: Tensor, high: Tensor) -> tuple[Tensor, float]:
    """The level by place, [X,Y,Z], and how well outlines agree with it.

    Each ray says of the place where it comes nearest to the surface that the level is lower or
    higher there: a logistic regression, whose weights differ little between neighbours.
    """
    logs = torch.full(_sides(low, high, POINTS), log, requires_grad=True)
    optimizer = torch.optim.Adam([logs], lr=RATE)
    best, best_agreement = logs.detach().clone(), -1.0
    for turn in range(ROUNDS + 1):
        with torch.no_grad():
            above = rays.logs - _interpolated(logs, rays.points, low, high)
            largest = rays.largest(above)
            agreement = rays.agreement(largest > 0)
            if agreement > best_agreement:
                best, best_agreement = logs.detach().clone(), agreement
            if turn == ROUNDS:
                return best, best_agreement
            decisive = (above >= largest[rays.rays]) & (above.abs() < 2 * REACH)
            points, own = rays.points[decisive], rays.logs[decisive]
            opaque = rays.opaque[rays.rays[decisive]].float()
        for _ in range(STEPS):
            score = SHARPNESS * (own - _interpolated(logs, points, low, high))
            loss = F.binary_cross_entropy_with_logits(score, opaque, reduction="sum") / 1000
            rough = sum((logs.diff(dim=k).square().sum() for k in range(3)), torch.zeros(()))
            optimizer.zero_grad()
            (loss + SMOOTHNESS * rough).backward()
            optimizer.step()
            with torch.no_grad():
                logs.clamp_(log - REACH, log + REACH)
    raise AssertionError("the last round returns")


def _interpolated(grid: Tensor, points: Tensor, low: Tensor, high: Tensor) -> Tensor:
    at = ((points - low) / (high - low) * 2 - 1).flip(-1)  # grid_sample's x is the last axis
    found = F.grid_sample(
        grid[None, None], at[None, None, None], align_corners=True, padding_mode="border"
    )
    return found[0, 0, 0, 0]
