"""Where the triangles of a mesh lie in its texture: coordinates of its own, or new ones.

New ones are made by xatlas in a process of its own, which ends at a time limit: for some meshes it
takes for ever, for some it crashes.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

log = logging.getLogger(__name__)

# Texels between charts, of a texture of 1024: as many as a mip level of 1/4 mixes.
PADDING = 4
RESOLUTION = 1024
# Larger meshes are cut before they are unwrapped, along the longest side of what is left: xatlas
# takes more than twice as long for twice as many triangles, and has crashed at 80,000.
MOST_FACES_OF_A_CUT = 8192
# Own coordinates that share more of their area with each other, or leave more of the surface
# without any, are no place for a texture.
MOST_SHARED = 0.02
MOST_FLAT = 0.02
# Rows and columns of the picture in which own coordinates are looked at.
_LOOK_SIZE = 1024


class Atlas(NamedTuple):
    """Places of the corners of triangles in a texture."""

    vertices: np.ndarray  # int64 [N] of each of its vertices, the mesh's
    faces: np.ndarray  # int64 [F,3] in the mesh's order
    uvs: np.ndarray  # float32 [N,2] in [0,1], v up


class AtlasError(RuntimeError):
    """No atlas can be made of this mesh; the text says why."""


def own_atlas(points: np.ndarray, faces: np.ndarray, uvs: np.ndarray | None) -> Atlas:
    """The mesh's own coordinates.

    Args:
        points: [V,3]; faces: [F,3]; uvs: [V,2], or None where it has none.
    Raises:
        AtlasError: none, or not such that each place of the texture is of one place of the surface.
    """
    import torch

    from dsd_fast import ops

    if uvs is None:
        raise AtlasError("it has no texture coordinates")
    corners = uvs[faces]
    if not np.isfinite(corners).all() or corners.min() < -1e-4 or corners.max() > 1 + 1e-4:
        raise AtlasError("its texture coordinates leave the square from 0 to 1, as tiles do")
    areas = _areas(np.concatenate([corners, np.zeros_like(corners[..., :1])], -1))
    surface = _areas(points[faces])
    if surface[areas < 1e-12].sum() > MOST_FLAT * surface.sum():
        raise AtlasError("a part of its surface has no room in its texture coordinates")
    clip = np.concatenate([2 * uvs - 1, np.zeros((len(uvs), 1)), np.ones((len(uvs), 1))], 1)
    found = ops.rasterize(
        torch.from_numpy(clip[None].astype(np.float32)),
        torch.from_numpy(faces.astype(np.int32)),
        _LOOK_SIZE,
        _LOOK_SIZE,
    )
    covered = (found.ids >= 0).double().mean().item()
    if areas.sum() * (1 - MOST_SHARED) > covered:
        raise AtlasError("parts of its surface share places in its texture coordinates")
    return Atlas(np.arange(len(uvs)), faces, uvs.clip(0, 1).astype(np.float32))


def make_atlas(
    points: np.ndarray,
    faces: np.ndarray,
    seconds: float,
    tell: Callable[[int], object] | None = None,
) -> Atlas:
    """New coordinates by xatlas (Young; after thekla_atlas of Castaño), the same for the same mesh.

    Args:
        points: [V,3], any scale; faces: [F,3] int.
        seconds: after which it ends.
        tell: is told from time to time how many seconds it has taken.
    Raises:
        AtlasError: it took longer, failed, or xatlas is not installed.
    """
    # Its thresholds are of meshes of about this size.
    used = points[np.unique(faces)]
    size = np.ptp(used, axis=0).max() or 1.0
    with tempfile.TemporaryDirectory(prefix="dsd-atlas-") as folder:
        given, made = Path(folder, "mesh.npz"), Path(folder, "atlas.npz")
        scaled = ((points - used.mean(0)) / size).astype(np.float32)
        np.savez(given, points=np.nan_to_num(scaled), faces=faces.astype(np.uint32))
        code = "import sys; from dsd_fast.scene.atlas import _unwrap; _unwrap(*sys.argv[1:])"
        command = [sys.executable, "-c", code, str(given), str(made)]
        said = Path(folder, "said")
        with open(said, "w") as errors:
            process = subprocess.Popen(command, stdout=errors, stderr=errors)
            try:
                _wait(process, seconds, tell)
            except subprocess.TimeoutExpired:
                raise AtlasError(
                    f"unwrapping its {len(faces):,} triangles took more than {seconds:g} seconds"
                ) from None
            finally:
                # Also where this process is interrupted: nobody waits for it any more.
                process.kill()
                process.wait()
        if process.returncode or not made.exists():
            lines = said.read_text(errors="replace").strip().splitlines()
            lines = lines or [f"it ended with code {process.returncode}"]
            raise AtlasError(f"xatlas failed: {lines[-1]}")
        with np.load(made) as found:
            atlas = Atlas(found["vertices"], found["faces"], found["uvs"])
    if not np.isfinite(atlas.uvs).all():
        raise AtlasError("xatlas failed: it gave coordinates that are not finite")
    return atlas


def _wait(
    process: subprocess.Popen[bytes], seconds: float, tell: Callable[[int], object] | None
) -> None:
    """Until it ends, TimeoutExpired after so many seconds."""
    begun = time.monotonic()
    while True:
        left = begun + seconds - time.monotonic()
        try:
            process.wait(max(min(left, 1.0), 0.0))
            return
        except subprocess.TimeoutExpired:
            if left <= 1.0:
                raise
        if tell is not None:
            tell(round(time.monotonic() - begun))


def _areas(corners: np.ndarray) -> np.ndarray:
    """Of triangles [F,3,3]: [F]."""
    a, b, c = corners.swapaxes(0, 1)
    return 0.5 * np.linalg.norm(np.cross(b - a, c - a), axis=1)


def _unwrap(given: str, made: str) -> None:
    """What the process does: from one file to another."""
    import xatlas

    with np.load(given) as mesh:
        points, faces = mesh["points"], mesh["faces"]
    cuts = _cut(points[faces].mean(1), np.arange(len(faces)))
    atlas = xatlas.Atlas()
    own = []
    for cut in cuts:
        used, local = np.unique(faces[cut], return_inverse=True)
        atlas.add_mesh(points[used], local.reshape(-1, 3).astype(np.uint32))
        own.append(used)
    options = xatlas.PackOptions()
    options.padding, options.resolution = PADDING, RESOLUTION
    atlas.generate(pack_options=options)
    if atlas.atlas_count != 1:
        raise SystemExit(f"expected one atlas, got {atlas.atlas_count}")
    vertices, uvs, new_faces, n = [], [], np.zeros(faces.shape, np.int64), 0
    for number, (cut, used) in enumerate(zip(cuts, own)):
        of_cut, local, uv = atlas[number]
        vertices.append(used[of_cut].astype(np.int64))
        uvs.append(uv.astype(np.float32))
        new_faces[cut] = local.reshape(-1, 3).astype(np.int64) + n
        n += len(of_cut)
    # xatlas has v down, as pictures have their rows.
    uv = np.concatenate(uvs)
    uv[:, 1] = 1 - uv[:, 1]
    np.savez(made, vertices=np.concatenate(vertices), faces=new_faces, uvs=uv)


def _cut(centres: np.ndarray, faces: np.ndarray) -> list[np.ndarray]:
    """Faces by their numbers [F], in parts of at most MOST_FACES_OF_A_CUT that lie together."""
    if len(faces) <= MOST_FACES_OF_A_CUT:
        return [faces]
    axis = np.ptp(centres[faces], axis=0).argmax()
    order = faces[np.argsort(centres[faces, axis], kind="stable")]
    half = len(order) // 2
    return _cut(centres, np.sort(order[:half])) + _cut(centres, np.sort(order[half:]))
