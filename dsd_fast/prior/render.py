"""Headless renders of packed models (OpenGL through EGL): the training images of the prior.

Each view is a straight-alpha RGBA image, so that the background can be chosen while training. The
cameras are those of the training loop (`dsd_fast.scene.cameras`), with most objects wholly in view.
Works with a GPU's EGL and with Mesa's software rasteriser. Where a GPU driver's EGL is not found,
`__EGL_VENDOR_LIBRARY_FILENAMES` may have to name its `10_nvidia.json`.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np

from dsd_fast.judge import captions
from dsd_fast.judge.nouns import noun_by_id
from dsd_fast.prior.mesh import Model, Pack
from dsd_fast.prior.views import (
    Views,
    is_recolourable,
    sample_orbits,
    sample_quarters,
    sample_views,
)
from dsd_fast.ranges import (
    AnyPath,
    ConfigError,
    Count,
    CountOrNone,
    DeviceIndex,
    UnsignedSeed,
    Workers,
    check,
)
from dsd_fast.scene.normals import crease_normals

if TYPE_CHECKING:
    import moderngl

IMAGES = "rgba.npy"
SIZE = 256
SUPERSAMPLING = 2
TILES = 16  # views that are read back together
CAPTION_VARIANTS = 8
ALPHA_TEST = 0.5


@dataclass
class RenderConfig:
    """From packed models to views."""

    # Packed models.
    pack: AnyPath
    # Folder to write: 256 KiB a view.
    out: AnyPath
    # Views of each model.
    views_per_model: Count = 144
    # Views that share light and paint, for pairs of one object (train-views); 0: each its own.
    views_per_orbit: CountOrNone = 0
    # Orbits of four views, a quarter turn apart at one elevation (train-multiview).
    quarter_turns: bool = False
    # Processes, each with an EGL context.
    workers: Workers = field(default_factory=lambda: os.cpu_count() or 1)
    # EGL device.
    device_index: DeviceIndex = 0
    # Seed of cameras, lights and paints.
    seed: UnsignedSeed = 0

    def validate(self) -> None:
        if self.quarter_turns and self.views_per_orbit not in (0, 4):
            raise ConfigError(
                f"views_per_orbit: quarter turns make orbits of 4, got {self.views_per_orbit}"
            )
        if self.orbit and self.views_per_model % self.orbit:
            raise ConfigError(
                f"views_per_orbit: expected 0 or a divisor of the {self.views_per_model} views "
                f"per model, got {self.orbit}"
            )

    @property
    def orbit(self) -> int:
        """Views of one object, 0 where each is of its own."""
        return 4 if self.quarter_turns else self.views_per_orbit


class ContextError(RuntimeError):
    """A graphics device that cannot be drawn with."""


def _shader(*names: str) -> str:
    """The files of a shader, one after the other."""
    folder = resources.files("dsd_fast.prior")
    files = (folder.joinpath(f"{name}.glsl") for name in names)
    return "".join(file.read_text(encoding="utf-8") for file in files)


def create_context(device_index: int = 0) -> moderngl.Context:
    """A headless OpenGL 3.3 context on one EGL device.

    Raises ContextError with what EGL said when there is none.
    """
    import moderngl

    os.environ.setdefault("LP_NUM_THREADS", "1")  # software: one process a core is faster
    causes = []
    # The second form names the run-time libraries, for machines without a linker's cache.
    for libraries in ({}, {"libgl": "libGL.so.1", "libegl": "libEGL.so.1"}):
        settings: dict[str, Any] = {"backend": "egl", "device_index": device_index, **libraries}
        try:
            return moderngl.create_context(require=330, standalone=True, **settings)
        except Exception as error:  # moderngl and glcontext raise bare Exceptions
            causes.append(str(error))
    raise ContextError(
        f"no EGL context on device {device_index}: {'; '.join(causes)}. On Debian install libegl1, "
        "libgl1 and libgl1-mesa-dri; with an NVIDIA driver set __EGL_VENDOR_LIBRARY_FILENAMES to "
        "its 10_nvidia.json"
    )


class Renderer:
    """Draws models into SIZE² straight-alpha images; one a process, on one EGL device."""

    def __init__(
        self, device_index: int = 0, size: int = SIZE, supersampling: int = SUPERSAMPLING
    ) -> None:
        self.size = size
        self.context = create_context(device_index)
        self.name: str = self.context.info["GL_RENDERER"]
        large = (size * supersampling, size * supersampling)
        self.image = self.context.texture(large, 4)
        self.target = self.context.framebuffer([self.image], self.context.depth_renderbuffer(large))
        self.tiles = self.context.framebuffer([self.context.texture((size, size * TILES), 4)])
        self.program = self.context.program(
            _shader("view", "model.vert"), _shader("view", "model.frag")
        )
        self.resolve = self.context.program(_shader("resolve.vert"), _shader("resolve.frag"))
        self.resolve["size"] = size
        self.resolve["factor"] = supersampling
        self.fullscreen = self.context.vertex_array(self.resolve, [])

    def render(self, model: Model, views: Views, out: np.ndarray | None = None) -> np.ndarray:
        """uint8 [n, size, size, 4] images, into `out` when given (C-contiguous, may be mapped)."""
        import moderngl

        shape = (len(views), self.size, self.size, 4)
        out = np.empty(shape, np.uint8) if out is None else out
        if out.shape != shape or out.dtype != np.uint8 or not out.flags.c_contiguous:
            raise ValueError(
                f"out: expected C-contiguous uint8 {shape}, got {out.dtype} {out.shape}"
            )
        if not len(views):
            return out
        context = self.context
        scene = _Scene(self, model)
        blocks = context.buffer(_view_blocks(views, model.main.luma))
        try:
            for start in range(0, len(views), TILES):
                chunk = range(start, min(start + TILES, len(views)))
                for tile, number in enumerate(chunk):
                    blocks.bind_to_uniform_block(0, offset=number * BLOCK, size=BLOCK)
                    self.target.use()
                    self.target.clear()
                    context.enable_only(moderngl.DEPTH_TEST)
                    scene.draw(views.position[number], views.stretch[number])
                    self.tiles.use()
                    self.tiles.viewport = (0, tile * self.size, self.size, self.size)
                    context.enable_only(moderngl.NOTHING)
                    self.image.use(1)
                    self.resolve["image"] = 1
                    self.resolve["tile"] = tile
                    self.fullscreen.render(moderngl.TRIANGLES, vertices=3)
                self.tiles.read_into(
                    out[chunk.start : chunk.stop].data.cast("B"),
                    viewport=(0, 0, self.size, self.size * len(chunk)),
                    components=4,
                    alignment=1,
                )
        finally:
            blocks.release()
            scene.release()
        return out


BLOCK = 256  # bytes a view in the uniform buffer: the largest offset alignment that GL may ask


def _view_blocks(views: Views, main_luma: float) -> bytes:
    """The View uniform blocks, std140, BLOCK bytes each."""
    block = np.zeros((len(views), BLOCK // 4), np.float32)
    block[:, :16] = views.view_projection().transpose(0, 2, 1).reshape(-1, 16)
    block[:, 16:19] = views.position
    block[:, 20:24] = views.key
    block[:, 24:28] = views.fill
    block[:, 28:31] = views.sky
    block[:, 32:35] = views.ground
    block[:, 36:39] = views.paint
    block[:, 39] = views.colour >= 0
    block[:, 40:42] = views.gloss
    block[:, 42] = main_luma
    block[:, 44:47] = views.stretch
    return block.tobytes()


VERTEX = np.dtype(
    [
        ("position", "<f4", 3),
        ("normal", "<f4", 3),
        ("uv", "<f4", 2),
        ("colour", "u1", 4),
        ("part", "<f4", 2),
    ]
)


VERTEX_INPUTS = ("in_position", "in_normal", "in_uv", "in_colour", "in_part")


class _Scene:
    """A model's buffers: one draw for all opaque parts, one for each transparent part."""

    def __init__(self, renderer: Renderer, model: Model) -> None:
        context = renderer.context
        self.program = renderer.program
        part_of = np.repeat(np.arange(len(model.parts)), [part.count for part in model.parts])
        is_opaque = np.array([part.opacity >= 1.0 for part in model.parts])
        order = np.argsort(~is_opaque[part_of], kind="stable")  # parts stay together
        part_of = part_of[order]
        triangles = model.triangles[order]
        source, normals, triangles = crease_normals(model.positions, triangles)
        # Materials are flat and per vertex: where parts share a vertex it is split once more.
        key = triangles.ravel().astype(np.int64) * len(model.parts) + np.repeat(part_of, 3)
        key, indices = np.unique(key, return_inverse=True)
        vertex, part = key // len(model.parts), key % len(model.parts)

        data = np.zeros(len(key), VERTEX)
        data["position"] = model.positions[source[vertex]]
        data["normal"] = normals[vertex]
        data["uv"] = model.uvs[source[vertex]]
        table = np.array([(*p.colour, p.opacity) for p in model.parts])
        data["colour"] = np.rint(table * 255)[part]
        data["part"][:, 0] = np.array([p.texture for p in model.parts])[part]
        data["part"][:, 1] = part == model.main.part

        self.vertices = context.buffer(data)
        self.indices = context.buffer(indices.astype("<u4"))
        self.array = context.vertex_array(
            self.program,
            [(self.vertices, "3f 3f 2f 4f1 2f", *VERTEX_INPUTS)],
            index_buffer=self.indices,
        )
        self.textures = _texture_array(context, model.textures)
        self.n_opaque = 3 * int(is_opaque[part_of].sum())
        self.transparent: list[tuple[np.ndarray, int, int]] = []  # centre, first index, count
        for number in np.flatnonzero(~is_opaque):
            mine = np.flatnonzero(part_of == number)
            centre = model.positions[model.triangles[order[mine]]].mean(axis=(0, 1))
            self.transparent.append((centre, 3 * int(mine[0]), 3 * len(mine)))

    def draw(self, camera: np.ndarray, stretch: np.ndarray) -> None:
        """Opaque parts, then the transparent ones from the farthest to the nearest."""
        import moderngl

        self.textures.use(0)
        self.program["textures"] = 0
        if self.n_opaque:
            self.program["alpha_test"] = ALPHA_TEST
            self.array.render(moderngl.TRIANGLES, vertices=self.n_opaque)
        if self.transparent:
            context = self.array.ctx
            context.enable(moderngl.BLEND)
            context.blend_func = moderngl.ONE, moderngl.ONE_MINUS_SRC_ALPHA
            context.fbo.depth_mask = False
            self.program["alpha_test"] = 0.0
            far_first = sorted(
                self.transparent, key=lambda t: -np.sum((t[0] * stretch - camera) ** 2)
            )
            for _, first, count in far_first:
                self.array.render(moderngl.TRIANGLES, vertices=count, first=first)
            context.fbo.depth_mask = True

    def release(self) -> None:
        for resource in (self.array, self.vertices, self.indices, self.textures):
            resource.release()


def _texture_array(
    context: moderngl.Context, textures: tuple[np.ndarray, ...]
) -> moderngl.TextureArray:
    """All textures as layers of one array, resized to the largest; mipmapped, repeating."""
    import moderngl
    from PIL import Image

    textures = textures or (np.full((1, 1, 4), 255, np.uint8),)
    height, width = np.max([image.shape[:2] for image in textures], axis=0).tolist()
    layers = [
        np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
        for image in textures
    ]
    data = np.stack(layers)[:, ::-1]  # OpenGL's first row is the bottom one
    array = context.texture_array((width, height, len(layers)), 4, data.tobytes(), alignment=1)
    array.build_mipmaps()
    array.filter = moderngl.LINEAR_MIPMAP_LINEAR, moderngl.LINEAR
    array.anisotropy = 4.0
    return array


# What a child of the pool keeps between its tasks.
_renderer_on, _pack_of = functools.cache(Renderer), functools.cache(Pack)


def _model_views(cfg: RenderConfig, pack: Pack, number: int) -> Views:
    """The views of one model; the same in the worker that renders and in the index."""
    group = noun_by_id()[pack.ids[number]].group
    recolourable = is_recolourable(group, pack.parts(number), pack.main(number))
    rng = np.random.default_rng([cfg.seed, number])
    n, orbit = cfg.views_per_model, cfg.orbit
    if cfg.quarter_turns:
        return sample_quarters(n // orbit, recolourable, rng)
    if orbit:
        return sample_orbits(n // orbit, orbit, recolourable, rng)
    return sample_views(n, recolourable, rng)


def _render_model(cfg: RenderConfig, number: int) -> str:
    """Fill the model's rows of the image file, in a child; returns the name of its GL renderer."""
    renderer, pack = _renderer_on(cfg.device_index), _pack_of(cfg.pack)
    n = cfg.views_per_model
    images = np.lib.format.open_memmap(cfg.out / IMAGES, mode="r+")
    views = _model_views(cfg, pack, number)
    renderer.render(pack.load(number), views, images[number * n : (number + 1) * n])
    return renderer.name


def render_views(
    cfg: RenderConfig, progress: Callable[[int, int, str], None] | None = None
) -> None:
    """Render `views_per_model` random views of every model.

    Row r belongs to model r // views_per_model and, with orbits, to orbit
    r // orbit, whose views share stretch, light and paint (`sample_orbits`). Files:

    - rgba.npy: uint8 [N, 256, 256, 4], straight alpha; open with `np.load(mmap_mode="r")`
    - meta.npz: model, noun, view, colour, orbit int64 [N] (orbit -1 without orbits); azimuth,
      elevation, distance, fovy float32 [N] (degrees); caption int32 [N, CAPTION_VARIANTS]
    - index.json: models (ids), nouns, views, colours and captions that the indices refer to

    Deterministic from `seed` but for the rasteriser's rounding, whatever the workers.
    `progress` is called with (models done, models, GL renderer name).

    Raises:
        ConfigError: a setting out of its range.
        ValueError: `pack` is no pack.
        ContextError: no EGL context.
    """
    check(cfg)
    pack = Pack(cfg.pack)
    cfg.out.mkdir(parents=True, exist_ok=True)
    shape = (len(pack) * cfg.views_per_model, SIZE, SIZE, 4)
    np.lib.format.open_memmap(cfg.out / IMAGES, mode="w+", dtype=np.uint8, shape=shape)
    _write_index(cfg, pack)

    heavy_first = sorted(range(len(pack)), key=pack.n_triangles, reverse=True)
    work = functools.partial(_render_model, cfg)
    with multiprocessing.get_context("spawn").Pool(cfg.workers) as pool:
        for done, name in enumerate(pool.imap_unordered(work, heavy_first), 1):
            if progress:
                progress(done, len(pack), name)


def _write_index(cfg: RenderConfig, pack: Pack) -> None:
    """meta.npz and index.json of the rendered set."""
    table = noun_by_id()
    nouns = captions.noun_list()
    every = [_model_views(cfg, pack, number) for number in range(len(pack))]
    azimuth = np.concatenate([views.azimuth for views in every])
    elevation = np.concatenate([views.elevation for views in every])
    colour = np.concatenate([views.colour for views in every])
    view = captions.view_index(azimuth, elevation)
    distance = np.concatenate([np.linalg.norm(views.position, axis=1) for views in every])
    model = np.repeat(np.arange(len(pack)), cfg.views_per_model)
    orbit = np.full(len(model), -1)
    if cfg.orbit:
        orbit = np.arange(len(model)) // cfg.orbit
    rows = [table[id_] for id_ in pack.ids]
    texts, caption = captions.caption_set(
        ((rows[m], v, c) for m, v, c in zip(model, view, colour, strict=True)),
        CAPTION_VARIANTS,
        np.random.default_rng([cfg.seed, len(pack)]),
    )
    np.savez(
        cfg.out / "meta.npz",
        model=model,
        noun=np.array([nouns.index(row.noun) for row in rows])[model],
        view=view,
        colour=colour,
        orbit=orbit,
        azimuth=azimuth.astype(np.float32),
        elevation=elevation.astype(np.float32),
        distance=distance.astype(np.float32),
        fovy=np.degrees(np.concatenate([views.fovy for views in every])).astype(np.float32),
        caption=caption,
    )
    index = {
        "models": pack.ids,
        "nouns": nouns,
        "views": captions.VIEWS,
        "colours": captions.COLOURS,
        "captions": texts,
    }
    (cfg.out / "index.json").write_text(json.dumps(index), encoding="utf-8")
