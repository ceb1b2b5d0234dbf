"""Meshes of the embedded prior: OBJ reading, our axes, crease normals, and one compact pack file.

Axes: the source has y up and its front on +z; ours are those of the cameras, z up and the front
on +x, so (X, Y, Z) = (z, x, y). Every model is centred on its bounding box and scaled to a
bounding sphere of radius `RADIUS`.

Colours follow what the libraries' own icons show: a material's texture replaces its `Kd`, and
`Kd` is used as an sRGB colour as it stands.
"""

from __future__ import annotations

import io
import json
import lzma
import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from zipfile import ZipFile

import numpy as np
from PIL import Image

from dsd_fast.picture_file import open_picture
from dsd_fast.prior.catalogue import Entry
from dsd_fast.prior.obj import Material, parse_mtl, parse_obj

RADIUS = 0.6  # bounding sphere of every model, in scene units
TEXTURE_SIZE = 256  # longest side of a stored texture
TEXTURE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TGA", "TIFF")  # none starts a program
INVISIBLE = 0.02  # parts with a smaller opacity are dropped

MAGIC = b"DSDPACK1"
POSITION_LEVELS = 65535  # positions are stored as uint16 over [-RADIUS, RADIUS]
UV_STEP = 1.0 / 4096  # step of stored texture coordinates: 1/16 texel of 256
WILD_TILES = 128  # a triangle that spans more tiles than this has broken texture coordinates


@dataclass(frozen=True)
class Part:
    """A run of triangles that share one material."""

    first: int  # first triangle
    count: int
    colour: tuple[float, float, float]  # sRGB in [0, 1], used when there is no texture
    opacity: float
    texture: int  # index into Model.textures, -1 without


@dataclass(frozen=True)
class MainPart:
    """The part that recolouring paints, and how much of the model it is."""

    part: int
    share: float  # of the visible pixels, over views from all around
    luma: float  # median Rec. 601 luma of those pixels, in [0, 1]


@dataclass(frozen=True)
class Model:
    """A model in our axes.

    positions: [V, 3] float32. uvs: [V, 2] float32, zero where the part has no texture, v up.
    triangles: [T, 3] int32. textures: uint8 [H, W, 4] images, first row on top.
    """

    id: str
    positions: np.ndarray
    uvs: np.ndarray
    triangles: np.ndarray
    parts: tuple[Part, ...]
    textures: tuple[np.ndarray, ...]
    main: MainPart


def _find_file(names: dict[str, str], folder: PurePosixPath, wanted: str) -> str | None:
    """The zip member for a file named in an OBJ or MTL: same folder, any case, any path before."""
    base = wanted.replace("\\", "/").rsplit("/", 1)[-1]
    for candidate in (base, base.split()[-1] if base.split() else base):
        found = names.get(str(folder / candidate).lower())
        if found:
            return found
    return None


def _read_materials(
    archive: ZipFile, names: dict[str, str], folder: PurePosixPath, libraries: Sequence[str]
) -> dict[str, Material]:
    """The materials of an OBJ's libraries; the folder's only .mtl stands in for a missing one."""
    found = [_find_file(names, folder, library) for library in libraries]
    members = [member for member in found if member]
    if not members:
        members = [
            name
            for lower, name in names.items()
            if lower.endswith(".mtl")
            and PurePosixPath(lower).parent == PurePosixPath(str(folder).lower())
        ]
        if len(members) > 1:
            members = []
    materials: dict[str, Material] = {}
    for member in members:
        materials |= parse_mtl(archive.read(member).decode("latin-1"))
    return materials


def _read_texture(archive: ZipFile, member: str) -> np.ndarray:
    """A texture as uint8 [H, W, 4], longest side at most TEXTURE_SIZE."""
    data = io.BytesIO(archive.read(member))
    image = Image.open(data, formats=TEXTURE_FORMATS).convert("RGBA")
    scale = TEXTURE_SIZE / max(image.size)
    if scale < 1.0:
        width, height = (max(1, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    return np.array(image)


def load_model(entry: Entry) -> Model:
    """Read a catalogue entry into our axes, with the libraries' quirks mended.

    Raises ValueError when the OBJ has no visible triangle.
    """
    with ZipFile(entry.archive) as archive:
        names = {name.lower(): name for name in archive.namelist()}
        folder = PurePosixPath(entry.member).parent
        obj = parse_obj(archive.read(entry.member).decode("latin-1"))
        defined = _read_materials(archive, names, folder, obj.libraries)
        materials = [defined.get(name, Material()) for name in obj.materials]
        textures: list[np.ndarray] = []
        texture_of: dict[str, int] = {}
        texture_index = []
        for material in materials:
            member = material.texture and _find_file(names, folder, material.texture)
            if member and member not in texture_of:
                texture_of[member] = len(textures)
                textures.append(_read_texture(archive, member))
            texture_index.append(texture_of[member] if member else -1)

    texture = np.array(texture_index)
    # A face without texture coordinates cannot show its texture: its material falls back to Kd.
    has_uv = (obj.corner_uv >= 0).all(axis=1)
    variant = obj.face_material * 2 + (has_uv & (texture[obj.face_material] >= 0))
    opacity = np.array([material.opacity for material in materials])
    keep = opacity[obj.face_material] > INVISIBLE
    if not keep.any():
        raise ValueError(f"{entry.id}: {entry.member} has no visible triangle")
    order = np.flatnonzero(keep)[np.argsort(variant[keep], kind="stable")]
    variant = variant[order]

    axes = np.asarray(entry.rotation).reshape(3, 3)[[2, 0, 1]]  # then (X, Y, Z) = (z, x, y)
    angle = -np.radians(entry.noun.front_az)
    turn = np.array(
        [[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]]
    )
    points = normalise((obj.positions @ (turn @ axes).T), obj.corner_position[order])

    levels = np.rint((points / RADIUS + 1) / 2 * POSITION_LEVELS).astype(np.int64)
    corner_level = levels[obj.corner_position[order]]  # [T, 3, 3]
    textured = (variant % 2).astype(bool)
    corner_uv = np.zeros((*variant.shape, 3, 2), np.int64)
    uv = np.rint(obj.uvs / UV_STEP).astype(np.int64)
    corner_uv[textured] = uv[obj.corner_uv[order][textured]]
    tile = round(1 / UV_STEP)
    wild = (np.ptp(corner_uv, axis=1) > WILD_TILES * tile).any(axis=1)
    corner_uv[wild] %= tile
    parts, corner_uv, triangles_of = _parts(variant, materials, texture, corner_level, corner_uv)

    rows = np.concatenate(
        [corner_level[triangles_of].reshape(-1, 3), corner_uv[triangles_of].reshape(-1, 2)], axis=1
    )
    vertices, triangles = _index_by_first_use(rows)
    model = Model(
        id=entry.id,
        positions=_dequantise(vertices[:, :3]),
        uvs=(vertices[:, 3:] * UV_STEP).astype(np.float32),
        triangles=triangles,
        parts=parts,
        textures=tuple(textures),
        main=MainPart(0, 0.0, 0.5),
    )
    return replace(model, main=find_main_part(model))


def normalise(points: np.ndarray, used: np.ndarray) -> np.ndarray:
    """Centre the used points' bounding box on the origin; bounding sphere of radius RADIUS."""
    visible = points[np.unique(used)]
    points = points - (visible.min(axis=0) + visible.max(axis=0)) / 2
    reach = np.linalg.norm(points[np.unique(used)], axis=1).max()
    if not reach > 0:
        raise ValueError("the mesh is a single point")
    return np.clip(points * (RADIUS / reach), -RADIUS, RADIUS)


def _parts(
    variant: np.ndarray,
    materials: list[Material],
    texture: np.ndarray,
    corner_level: np.ndarray,
    corner_uv: np.ndarray,
) -> tuple[tuple[Part, ...], np.ndarray, np.ndarray]:
    """Part table of triangles sorted by variant; drops triangles without area.

    Returns the parts, the uvs moved by whole tiles into the smallest range, the triangles kept.
    """
    a, b, c = corner_level[:, 0], corner_level[:, 1], corner_level[:, 2]
    solid = np.cross(b - a, c - a).any(axis=1)
    parts = []
    kept = []
    first = 0
    corner_uv = corner_uv.copy()
    tile = round(1 / UV_STEP)
    for value in np.unique(variant[solid]):
        chosen = np.flatnonzero(solid & (variant == value))
        material = materials[value // 2]
        is_textured = bool(value % 2)
        if is_textured:
            corner_uv[chosen] -= corner_uv[chosen].min(axis=(0, 1)) // tile * tile
        parts.append(
            Part(
                first,
                len(chosen),
                material.colour,
                material.opacity,
                int(texture[value // 2]) if is_textured else -1,
            )
        )
        kept.append(chosen)
        first += len(chosen)
    return tuple(parts), corner_uv, np.concatenate(kept)


def _index_by_first_use(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct rows in the order of first use, and the [T, 3] int32 triangles over them."""
    _, first, inverse = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return rows[first[order]], rank[inverse.ravel()].reshape(-1, 3).astype(np.int32)


def _dequantise(levels: np.ndarray) -> np.ndarray:
    return ((levels / POSITION_LEVELS * 2 - 1) * RADIUS).astype(np.float32)


def find_main_part(model: Model, n_samples: int = 60_000, size: int = 64) -> MainPart:
    """The part with the most visible pixels, by splatting surface samples into depth buffers.

    Six orthographic views (four sides, raised by 20 degrees, front from above and the top) of
    `size` squared pixels; deterministic.
    """
    rng = np.random.default_rng(0)
    corners = model.positions[model.triangles].astype(np.float64)
    area = np.linalg.norm(
        np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1
    )
    triangle = np.searchsorted(np.cumsum(area) / area.sum(), rng.random(n_samples))
    triangle = np.minimum(triangle, len(area) - 1)
    root, v = np.sqrt(rng.random(n_samples)), rng.random(n_samples)
    weights = np.stack([1 - root, root * (1 - v), root * v], axis=1)
    points = np.einsum("nk,nkd->nd", weights, corners[triangle])
    part_of = np.repeat(np.arange(len(model.parts)), [part.count for part in model.parts])[triangle]

    seen: list[np.ndarray] = []
    for azimuth, elevation in ((0, 20), (90, 20), (180, 20), (270, 20), (0, 50), (0, 89)):
        a, e = np.radians(azimuth), np.radians(elevation)
        back = np.array([np.cos(e) * np.cos(a), np.cos(e) * np.sin(a), np.sin(e)])
        right = np.array([-np.sin(a), np.cos(a), 0.0])
        plane = points @ np.stack([right, np.cross(back, right)]).T
        pixel = np.clip((plane / RADIUS + 1) / 2 * size, 0, size - 1).astype(np.int64) @ [1, size]
        order = np.lexsort((-(points @ back), pixel))  # nearest first within a pixel
        seen.append(order[np.unique(pixel[order], return_index=True)[1]])
    visible = np.concatenate(seen)

    counts = np.bincount(part_of[visible], minlength=len(model.parts))
    main = int(counts.argmax())
    part = model.parts[main]
    colours = np.asarray(part.colour)[None]
    if part.texture >= 0:
        image = model.textures[part.texture]
        mine = visible[part_of[visible] == main]
        uv = np.einsum("nk,nkd->nd", weights[mine], model.uvs[model.triangles[triangle[mine]]])
        height, width = image.shape[:2]
        column = (uv[:, 0] % 1.0 * width).astype(np.int64) % width
        row = ((1.0 - uv[:, 1] % 1.0) * height).astype(np.int64) % height
        texels = image[row, column]
        colours = texels[texels[:, 3] > 127][:, :3] / 255.0
        if not len(colours):
            colours = texels[:, :3] / 255.0
    luma = float(np.median(colours @ [0.299, 0.587, 0.114]))
    return MainPart(main, float(counts[main] / len(visible)), luma)


def _planes(values: np.ndarray) -> bytes:
    """Byte planes of an integer array, column by column: they compress better than rows."""
    columns = np.ascontiguousarray(values.reshape(len(values), -1).T)
    return (
        columns.view(np.uint8).reshape(*columns.shape, values.itemsize).transpose(0, 2, 1).tobytes()
    )


def _from_planes(data: memoryview, dtype: str, rows: int, columns: int) -> tuple[np.ndarray, int]:
    """Inverse of _planes: the [rows, columns] array and the number of bytes read."""
    itemsize = np.dtype(dtype).itemsize
    size = rows * columns * itemsize
    planes = np.frombuffer(data[:size], np.uint8).reshape(columns, itemsize, rows)
    values = np.ascontiguousarray(planes.transpose(2, 0, 1)).view(dtype).reshape(rows, columns)
    return values, size


def _delta(values: np.ndarray, dtype: str) -> np.ndarray:
    """Zigzag-coded differences of successive rows, wrapping in `dtype` (unsigned)."""
    bits = np.dtype(dtype).itemsize * 8
    signed = np.dtype(dtype).newbyteorder("=").str.replace("u", "i")
    step = np.diff(values.astype(dtype), axis=0, prepend=np.zeros((1, values.shape[1]), dtype))
    step = step.astype(dtype).view(signed)
    return ((step << 1) ^ (step >> (bits - 1))).view(dtype)


def _undelta(code: np.ndarray) -> np.ndarray:
    """Inverse of _delta."""
    step = (code >> 1) ^ (0 - (code & 1)).astype(code.dtype)
    return np.cumsum(step, axis=0, dtype=code.dtype)


def encode_geometry(model: Model) -> bytes:
    """Positions, uvs (textured models only) and triangles as one xz stream.

    Vertices are numbered in the order of first use, so a triangle corner is coded as its distance
    from the highest vertex used so far: zero for a new one, small numbers for recent ones.
    """
    levels = np.rint((model.positions / RADIUS + 1) / 2 * POSITION_LEVELS).astype(np.uint16)
    corners = model.triangles.ravel().astype(np.int64)
    highest = np.maximum.accumulate(corners)
    before = np.concatenate([[-1], highest[:-1]])
    data = _planes((before + 1 - corners).astype("<u4")) + _planes(_delta(levels, "<u2"))
    if model.textures:
        uv = np.rint(model.uvs / UV_STEP).astype(np.int64)
        data += _planes(_delta(uv % 2**32, "<u4"))
    return lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)


def decode_geometry(
    data: bytes, n_vertices: int, n_triangles: int, has_uv: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inverse of encode_geometry: positions, uvs, triangles as in Model."""
    view = memoryview(lzma.decompress(data))
    code, size = _from_planes(view, "<u4", n_triangles * 3, 1)
    code = code[:, 0].astype(np.int64)
    is_new = code == 0
    triangles = (np.cumsum(is_new) - is_new - code).astype(np.int32).reshape(-1, 3)
    levels, used = _from_planes(view[size:], "<u2", n_vertices, 3)
    positions = _dequantise(_undelta(levels))
    uvs = np.zeros((n_vertices, 2), np.float32)
    if has_uv:
        steps, _ = _from_planes(view[size + used :], "<u4", n_vertices, 2)
        uvs = (_undelta(steps).view("<i4") * UV_STEP).astype(np.float32)
    return positions, uvs, triangles


def _encode_texture(image: np.ndarray) -> bytes:
    """PNG where the alpha channel says something, JPEG otherwise."""
    buffer = io.BytesIO()
    if image[..., 3].min() < 250:
        Image.fromarray(image).save(buffer, "PNG", optimize=True)
    else:
        Image.fromarray(image[..., :3]).save(buffer, "JPEG", quality=85, optimize=True)
    return buffer.getvalue()


def _pack_one(entry: Entry) -> tuple[dict, list[bytes]]:
    """Index record and streams of one catalogue entry: geometry, then each texture."""
    model = load_model(entry)
    streams = [encode_geometry(model), *(_encode_texture(image) for image in model.textures)]
    record = {
        "id": model.id,
        "vertices": len(model.positions),
        "triangles": len(model.triangles),
        "bytes": [len(stream) for stream in streams],
        "parts": [
            [p.first, p.count, *(round(c, 4) for c in p.colour), round(p.opacity, 4), p.texture]
            for p in model.parts
        ],
        "main": [model.main.part, round(model.main.share, 4), round(model.main.luma, 4)],
    }
    return record, streams


def write_pack(
    entries: Sequence[Entry],
    path: Path,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Load, quantise and write all entries into one file.

    The file is MAGIC, the length of the index (uint64, little-endian), the index (JSON records)
    and the streams of each model in turn, whose lengths its record holds. `progress` is called
    with (done, total) after each model.
    """
    records = []
    blobs = []
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for record, streams in pool.imap(_pack_one, entries):
            records.append(record)
            blobs += streams
            if progress:
                progress(len(records), len(entries))
    index = json.dumps(records, separators=(",", ":")).encode()
    with path.open("wb") as file:
        file.write(MAGIC + len(index).to_bytes(8, "little") + index)
        file.writelines(blobs)


class Pack:
    """Read access to a pack file; `len(pack)` models, `pack.load(i)` gives one.

    The file is opened at each load, so a Pack may be sent to child processes. Raises ValueError
    when the file is no pack.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        with self.path.open("rb") as file:
            magic = file.read(len(MAGIC))
            if magic != MAGIC:
                raise ValueError(f"{self.path}: expected a model pack ({MAGIC!r}), got {magic!r}")
            size = int.from_bytes(file.read(8), "little")
            self.records: list[dict] = json.loads(file.read(size))
            start = file.tell()
        ends = start + np.cumsum([sum(record["bytes"]) for record in self.records])
        self._starts = [start, *ends.tolist()]

    def __len__(self) -> int:
        return len(self.records)

    @property
    def ids(self) -> list[str]:
        return [record["id"] for record in self.records]

    def n_triangles(self, number: int) -> int:
        return self.records[number]["triangles"]

    def main(self, number: int) -> MainPart:
        return MainPart(*self.records[number]["main"])

    def parts(self, number: int) -> tuple[Part, ...]:
        return tuple(
            Part(first, count, (red, green, blue), opacity, texture)
            for first, count, red, green, blue, opacity, texture in self.records[number]["parts"]
        )

    def load(self, number: int) -> Model:
        """Decode one model."""
        record = self.records[number]
        with self.path.open("rb") as file:
            file.seek(self._starts[number])
            geometry, *encoded = [file.read(size) for size in record["bytes"]]
        positions, uvs, triangles = decode_geometry(
            geometry, record["vertices"], record["triangles"], bool(encoded)
        )
        textures = tuple(
            np.array(open_picture(io.BytesIO(data)).convert("RGBA")) for data in encoded
        )
        return Model(
            record["id"], positions, uvs, triangles, self.parts(number), textures, self.main(number)
        )
