"""Rasterising a closed mesh of 20,000 and of 500,000 triangles, as textures are trained on."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks.case import Workload
from dsd_fast import ops
from dsd_fast.ops.rasterize import rasterize_reference
from dsd_fast.scene.cameras import CameraConfig, clip_matrices, eval_camera


def rasterize(
    size: int,
    device: torch.device,
    generator: torch.Generator,
    n_faces: int = 20_000,
    n_samples: int = 4,
) -> Workload:
    """One view of size² pixels of a bumpy sphere, which fills most of it."""
    points, faces = bumpy_sphere(n_faces, generator)
    cameras = CameraConfig(eval_camera_distance=2.6, eval_fovy_deg=48.0)
    view = eval_camera(cameras, 30.0, size=(size, size))
    ones = points.new_ones(len(points), 1)
    clip = torch.cat([points, ones], 1) @ clip_matrices(view, 1.0, 5.0).transpose(1, 2)
    arguments = clip.contiguous().to(device), faces.to(device), size, size, n_samples
    return Workload(
        compiled=lambda: ops.rasterize(*arguments),
        reference=lambda: rasterize_reference(*arguments),
        outputs=ops.Fragments._fields,
        n_items=size * size * n_samples,
        # A vertex, a face; the number and the weights of a sample.
        n_bytes=16 * len(points) + 12 * len(faces) + 16 * size * size * n_samples,
    )


def bumpy_sphere(n_faces: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A closed surface of about so many triangles: points [V,3] and faces int32 [F,3]."""
    n = max(round(math.sqrt(n_faces / 2)), 3)
    rings, sides = torch.meshgrid(torch.arange(n + 1), torch.arange(n), indexing="ij")
    up, around = rings * math.pi / n, sides * 2 * math.pi / n
    points = torch.stack([up.sin() * around.cos(), up.sin() * around.sin(), up.cos()], -1)
    points = points * (1 + 0.05 * (9 * up).sin() * (7 * around).cos())[..., None]
    here, right = rings * n + sides, rings * n + (sides + 1) % n
    a, b, c, d = here[:-1], right[:-1], here[1:], right[1:]
    faces = torch.cat([torch.stack([a, c, d], -1), torch.stack([a, d, b], -1)]).reshape(-1, 3)
    order = torch.randperm(len(faces), generator=generator)  # a file's triangles come in any order
    return points.reshape(-1, 3), faces[order].int()
