"""Fewer triangles for the same shape, by fast-simplification (quadric errors, Garland and Heckbert
1997)."""

from __future__ import annotations

import numpy as np

from dsd_fast.scene.mesh_scene import Surface
from dsd_fast.scene.surface import MeshError, vertex_normals

# Vertices of the fine surface among which a normal is looked for.
NEIGHBOURS = 4


class FineNormals:
    """Normals of a fine surface, near points of a coarser one."""

    def __init__(self, surface: Surface) -> None:
        from scipy.spatial import KDTree

        self._normals = surface.normals.astype(np.float64)
        self._tree = KDTree(surface.points)

    def at(self, points: np.ndarray, like: np.ndarray) -> np.ndarray:
        """Unit normals [N,3] at points [N,3], those of the nearest of its vertices that face as
        `like` [N,3] do, which of a thin part tells one side from the other; `like` where none."""
        n = min(NEIGHBOURS, len(self._normals))
        distance, near = self._tree.query(points, k=n, workers=-1)
        distance, near = distance.reshape(-1, n), near.reshape(-1, n)
        own = self._normals[near]  # [N,n,3]
        facing = np.einsum("pkd,pd->pk", own, like).clip(0.0)
        weight = facing / (distance + 1e-3 * distance.max(initial=1e-12) + 1e-12)
        total = np.einsum("pk,pkd->pd", weight, own)
        length = np.linalg.norm(total, axis=1, keepdims=True)
        return np.where(length > 1e-12, total / np.maximum(length, 1e-12), like)


def simplified(fine: Surface, max_faces: int, normals: FineNormals) -> Surface:
    """The surface with at most ``max_faces`` triangles, 0 for all; its normals are the fine one's.

    Raises:
        MeshError: nothing is left of it.
    """
    if not max_faces or len(fine.faces) <= max_faces:
        return fine
    import fast_simplification

    points, faces, *_ = fast_simplification.simplify(
        fine.points, fine.faces, target_count=max_faces
    )
    corners = points[faces].astype(np.float64)
    normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    faces = faces[np.linalg.norm(normal, axis=1) > 0]
    if not len(faces):
        raise MeshError(f"max_faces: {max_faces} leave nothing of the mesh, pass more")
    used, faces = np.unique(faces, return_inverse=True)
    points, faces = points[used].astype(np.float32), faces.reshape(-1, 3)
    own = vertex_normals(points, faces)
    smooth = normals.at(points, own)
    return Surface(points, smooth.astype(np.float32), faces.astype(np.int32))
