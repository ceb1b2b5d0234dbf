"""Wavefront OBJ and MTL text to arrays: the parts of the formats that the models' renders need."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

GREY = (0.7, 0.7, 0.7)  # for materials that the MTL does not define


@dataclass
class Material:
    """What is used of an MTL material."""

    colour: tuple[float, float, float] = GREY
    opacity: float = 1.0
    texture: str | None = None  # file name as written


@dataclass
class Obj:
    """A parsed OBJ: fan-triangulated faces, one material index a face; -1 is "no uv"."""

    positions: np.ndarray  # [N, 3] float64
    uvs: np.ndarray  # [M, 2] float64
    corner_position: np.ndarray  # [F, 3] int64
    corner_uv: np.ndarray  # [F, 3] int64
    face_material: np.ndarray  # [F] int64
    materials: list[str] = field(default_factory=list)
    libraries: list[str] = field(default_factory=list)


def parse_obj(text: str) -> Obj:
    """Read the geometry and material names of a Wavefront OBJ; normals and groups are ignored."""
    positions: list[str] = []
    uvs: list[str] = []
    corners: list[str] = []
    sizes: list[int] = []
    face_material: list[int] = []
    materials: dict[str, int] = {"": 0}
    libraries: list[str] = []
    material = 0
    for line in text.replace("\\\n", " ").splitlines():
        kind, _, rest = line.strip().partition(" ")
        if kind == "v":
            positions += rest.split()[:3]
        elif kind == "f":
            tokens = rest.split()
            if "-" in rest:
                counts = (len(positions) // 3, len(uvs) // 2)
                tokens = [_absolute(token, counts) for token in tokens]
            if len(tokens) >= 3:
                corners += tokens
                sizes.append(len(tokens))
                face_material.append(material)
        elif kind == "vt":
            uvs += rest.split()[:2]
        elif kind == "usemtl":
            material = materials.setdefault(rest.strip(), len(materials))
        elif kind == "mtllib":
            libraries.append(rest.strip())

    index_of = {token: _corner(token) for token in set(corners)}
    index = np.array([index_of[token] for token in corners], dtype=np.int64).reshape(-1, 2)
    size = np.array(sizes, dtype=np.int64)
    start = np.cumsum(size) - size
    per_face = size - 2
    face = np.repeat(np.arange(len(size)), per_face)
    step = np.arange(per_face.sum()) - np.repeat(np.cumsum(per_face) - per_face, per_face)
    fan = np.stack([start[face], start[face] + step + 1, start[face] + step + 2], axis=1)
    return Obj(
        positions=np.array(positions, dtype=np.float64).reshape(-1, 3),
        uvs=np.array(uvs, dtype=np.float64).reshape(-1, 2),
        corner_position=index[fan, 0],
        corner_uv=index[fan, 1],
        face_material=np.array(face_material, dtype=np.int64)[face],
        materials=list(materials),
        libraries=libraries,
    )


def _absolute(token: str, counts: tuple[int, int]) -> str:
    """Rewrite the negative (relative) indices of an OBJ face corner; drop its normal."""
    fields = token.split("/")[:2]
    return "/".join(
        str(int(value) + count + 1) if value.startswith("-") else value
        for value, count in zip(fields, counts, strict=False)
    )


def _corner(token: str) -> tuple[int, int]:
    """Zero-based (position, uv) of a face corner "v", "v/vt", "v//vn" or "v/vt/vn"."""
    fields = token.split("/")
    return int(fields[0]) - 1, int(fields[1]) - 1 if len(fields) > 1 and fields[1] else -1


def parse_mtl(text: str) -> dict[str, Material]:
    """Read diffuse colour, opacity (`d`) and diffuse texture of each material."""
    materials: dict[str, Material] = {}
    current = Material()
    for line in text.splitlines():
        key, _, rest = line.strip().replace("\t", " ").partition(" ")
        rest = rest.strip()
        if key == "newmtl":
            current = materials.setdefault(rest, Material())
        elif not rest:
            continue
        elif key == "Kd":
            red, green, blue = (min(max(float(v), 0.0), 1.0) for v in rest.split()[:3])
            current.colour = (red, green, blue)
        elif key == "d":
            current.opacity = min(max(float(rest.split()[-1]), 0.0), 1.0)
        elif key == "map_Kd":
            current.texture = rest
    return materials
