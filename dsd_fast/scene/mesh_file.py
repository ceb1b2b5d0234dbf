"""Meshes from files that anybody may have made, read by trimesh.

Of what a file names, regular files beside it are read, and of pictures those formats that are safe.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsd_fast.picture_file import MAX_BYTES, only_safe_pictures
from dsd_fast.scene.mesh_scene import Surface
from dsd_fast.scene.normals import crease_normals

log = logging.getLogger(__name__)

SUFFIXES = frozenset((".glb", ".gltf", ".obj", ".ply", ".stl"))
# Of these the third axis points up; the others have y up and their front on +z, as glTF says.
Z_UP = (".ply", ".stl")
MAX_FACES = 500_000
# The bounding sphere of the models that the embedded priors were trained on: a mesh of this size
# fills pictures as they did.
RADIUS = 0.6


class MeshFileError(ValueError):
    """A file that is no mesh, or none of which something can be made; the text says why."""


@dataclass(frozen=True)
class MeshFile:
    """Triangles as a file has them, all parts in one, in its units and axes."""

    points: np.ndarray  # [V,3] float64
    normals: np.ndarray  # [V,3] float64, unit
    faces: np.ndarray  # [F,3] int64
    uvs: np.ndarray | None  # [V,2] float64, v up; None where a part has none
    z_up: bool

    def in_gltf(self, values: np.ndarray) -> np.ndarray:
        """Points or normals [V,3] with y up and the front on +z, in the file's units."""
        return values[:, [1, 2, 0]] if self.z_up else values

    def surface(self, turn_deg: float = 0.0) -> Surface:
        """As it is looked at: z up, its front on +x, the bounding box's centre in the origin, in a
        sphere of RADIUS.

        Args:
            turn_deg: by which it is turned first, around its vertical axis, counter-clockwise from
                above.
        """
        used = self.points[np.unique(self.faces)]
        centre = (used.min(0) + used.max(0)) / 2
        reach = np.linalg.norm(used - centre, axis=1).max()
        order = [0, 1, 2] if self.z_up else [2, 0, 1]
        angle = np.deg2rad(turn_deg)
        cos, sin = np.cos(angle), np.sin(angle)
        turn = np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])
        points = (self.points - centre)[:, order] @ turn.T * (RADIUS / reach)
        # What no triangle has may lie anywhere, or nowhere.
        unused = np.ones(len(points), bool)
        unused[self.faces] = False
        points[unused] = 0.0
        normals = self.normals[:, order] @ turn.T
        return Surface(
            points.astype(np.float32), normals.astype(np.float32), self.faces.astype(np.int32)
        )


def read_mesh_file(path: Path, up: str = "auto") -> MeshFile:
    """All parts of a mesh as one.

    Args:
        up: the axis that points up in the file, "y" or "z"; "auto" is z for PLY and STL, y for
            others.
    Raises:
        ImportError: trimesh is missing.
        MeshFileError: no mesh, no triangle with an area, or more triangles than MAX_FACES.
    """
    if not path.is_file():
        raise MeshFileError(f"there is no such file: {path}")
    if path.suffix.lower() not in SUFFIXES:
        known = ", ".join(sorted(SUFFIXES))
        raise MeshFileError(f"{path}: expected a mesh in {known}, got {path.suffix or 'no suffix'}")
    if path.stat().st_size > MAX_BYTES:
        raise MeshFileError(f"{path} has more than {MAX_BYTES >> 20} MiB")
    points, normals, faces, uvs, n_points = [], [], [], [], 0
    for part in mesh_parts(path):
        mesh = part.mesh
        own_points, own_faces = np.asarray(mesh.vertices, np.float64), np.asarray(mesh.faces)
        _check_part(own_points, own_faces, path)
        uv = getattr(part.visual, "uv", None)
        own_uvs = None if uv is None or len(uv) != len(own_points) else np.asarray(uv, np.float64)
        if part.has_normals:
            own_normals = _unit(np.asarray(mesh.vertex_normals, np.float64))
        else:
            scale = np.abs(own_points[own_faces]).max() or 1.0
            source, own_normals, own_faces = crease_normals(own_points / scale, own_faces)
            own_points = own_points[source]
            own_uvs = None if own_uvs is None else own_uvs[source]
        points.append(own_points)
        normals.append(own_normals)
        faces.append(own_faces.astype(np.int64) + n_points)
        uvs.append(None if own_uvs is None else own_uvs[:, :2])
        n_points += len(own_points)
    if not faces:
        raise MeshFileError(f"{path}: there are no triangles in it")
    z_up = path.suffix.lower() in Z_UP if up == "auto" else up == "z"
    mesh = MeshFile(
        np.concatenate(points),
        np.concatenate(normals),
        np.concatenate(faces),
        None if any(uv is None for uv in uvs) else np.concatenate(uvs),
        z_up,
    )
    _check(mesh, path)
    return mesh


def _check_part(points: np.ndarray, faces: np.ndarray, path: Path) -> None:
    if faces.min() < 0 or faces.max() >= len(points):
        raise MeshFileError(f"{path} is damaged: it has triangles of vertices that are not in it")
    if not np.isfinite(points[faces]).all():
        raise MeshFileError(f"{path} is damaged: it has vertices that are not finite")


def _check(mesh: MeshFile, path: Path) -> None:
    if len(mesh.faces) > MAX_FACES:
        raise MeshFileError(
            f"{path}: expected at most {MAX_FACES:,} triangles, got {len(mesh.faces):,}: decimate "
            "it first"
        )
    used = mesh.points[np.unique(mesh.faces)]
    size = float(np.ptp(used, axis=0).max())
    # What float32, of which glTF is, has digits for.
    if not 1e-30 < size < 1e30:
        raise MeshFileError(f"{path}: its vertices are one point, or beyond all numbers")
    a, b, c = ((mesh.points[mesh.faces[:, k]] - used[0]) / size for k in range(3))
    if not (np.cross(b - a, c - a) != 0).any():
        raise MeshFileError(f"{path}: none of its triangles has an area")


def _unit(normals: np.ndarray) -> np.ndarray:
    """Unit normals; up where a file has none, or nonsense."""
    length = np.linalg.norm(normals, axis=1, keepdims=True)
    good = np.isfinite(length) & (length > 0)
    return np.where(good, normals / np.where(good, length, 1.0), [0.0, 0.0, 1.0])


class Part(NamedTuple):
    """A part of a file, as trimesh has it."""

    mesh: Any  # a trimesh.Trimesh in its place
    visual: Any  # what it knows of colours and materials
    has_normals: bool  # whether the file has them, else they are trimesh's


def mesh_parts(path: Path) -> list[Part]:
    """The parts of a file that have triangles.

    Raises:
        ImportError: trimesh is missing.
        MeshFileError: not a mesh, or it names files that it must not.
    """
    try:
        import trimesh
    except ImportError as error:
        raise ImportError("meshes are read by trimesh: pip install trimesh") from error
    parts = []
    try:
        with only_safe_pictures() as refused:
            # Vertices stay apart as they are: merged ones would mix colours across creases.
            scene = trimesh.load_scene(path, process=False, resolver=_resolver(path, refused))
            for node in scene.graph.nodes_geometry:
                transform, name = scene.graph[node]
                part = scene.geometry[name]
                if isinstance(part, trimesh.Trimesh) and len(part.faces):
                    # Of a file that has none they are computed when they are asked for.
                    has_normals = "vertex_normals" in part._cache
                    moved = part.copy().apply_transform(transform)
                    # The copy has lost what it knows of colours beside a material.
                    parts.append(Part(moved, part.visual, has_normals))
    except Exception as error:  # its readers raise all kinds
        raise MeshFileError(f"{path} is not a mesh: {type(error).__name__}: {error}") from error
    if refused:
        raise MeshFileError(f"{path}: {'; '.join(dict.fromkeys(refused))}")
    return parts


def _resolver(path: Path, refused: list[str]) -> Any:
    """What trimesh asks for files that a mesh names: regular ones in its folder, and no others.

    Others are added to `refused`, in words; one that is missing is a warning, as most viewers have
    it.
    """
    from trimesh.resolvers import FilePathResolver

    class Beside(FilePathResolver):
        def get(self, name: str) -> bytes:
            file, folder = path.parent / name.strip(), path.parent.resolve()
            if not file.exists():
                log.warning("%s: names a file that is not there: %s", path, name)
            elif folder not in file.resolve().parents or not file.is_file():
                refused.append(f"{name}: expected a regular file in the mesh's folder")
            elif file.stat().st_size > MAX_BYTES:
                refused.append(f"{name}: has more than {MAX_BYTES >> 20} MiB")
            else:
                return file.read_bytes()
            raise ValueError(name)

    return Beside(str(path))
