"""Normals of meshes that have none."""

from __future__ import annotations

import numpy as np

# Neighbouring faces that meet at less than this are shaded smoothly.
CREASE_DEG = 50.0


def crease_normals(
    positions: np.ndarray, triangles: np.ndarray, crease_deg: float = CREASE_DEG
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Split vertices so that faces are smooth across shallow edges and hard across creases.

    Corners of faces that share an edge and meet at less than `crease_deg` are joined; each
    group's normal is the area-weighted mean of its faces'. Vertices at one place (texture seams)
    count as one.

    positions: [V, 3]. triangles: [T, 3] int32. Returns (source [W] int64, the vertex that
    each new one copies; normals [W, 3] float32, unit; triangles [T, 3] int32 over the new ones).
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    place = np.unique(positions, axis=0, return_inverse=True)[1].ravel()
    corner = place[triangles]  # [T, 3]
    p = positions.astype(np.float64)[triangles]
    face_normal = np.cross(p[:, 1] - p[:, 0], p[:, 2] - p[:, 0])
    length = np.linalg.norm(face_normal, axis=1, keepdims=True)
    unit = face_normal / np.maximum(length, 1e-30)

    start, end = corner, np.roll(corner, -1, axis=1)
    low = np.minimum(start, end)
    key = (low * np.int64(len(positions)) + np.maximum(start, end)).ravel()
    n_corners = len(key)
    here = np.arange(n_corners)
    following = here.reshape(-1, 3)[:, [1, 2, 0]].ravel()
    starts_low = (start == low).ravel()
    low_corner = np.where(starts_low, here, following)
    high_corner = np.where(starts_low, following, here)

    order = np.argsort(key, kind="stable")
    key = key[order]
    links = []
    for shift in (1, 2, 3):  # up to four faces an edge: both sides of doubled surfaces
        same = np.flatnonzero(key[:-shift] == key[shift:])
        i, j = order[same], order[same + shift]
        cosine = np.einsum("nd,nd->n", unit[i // 3], unit[j // 3])
        smooth = cosine > np.cos(np.radians(crease_deg))
        i, j = i[smooth], j[smooth]
        links += [(low_corner[i], low_corner[j]), (high_corner[i], high_corner[j])]
    rows = np.concatenate([a for a, _ in links])
    columns = np.concatenate([b for _, b in links])
    graph = coo_matrix((np.ones(len(rows), np.int8), (rows, columns)), (n_corners, n_corners))
    n_groups, group = connected_components(graph, directed=False)

    sums = np.stack(
        [np.bincount(group, np.repeat(face_normal[:, k], 3), n_groups) for k in range(3)], axis=1
    )
    norm = np.linalg.norm(sums, axis=1, keepdims=True)
    normals = np.where(norm > 0, sums / np.maximum(norm, 1e-30), [0.0, 0.0, 1.0])

    vertex = triangles.ravel().astype(np.int64)
    _, first, inverse = np.unique(vertex * n_groups + group, return_index=True, return_inverse=True)
    return (
        vertex[first],
        normals[group[first]].astype(np.float32),
        inverse.reshape(-1, 3).astype(np.int32),
    )
