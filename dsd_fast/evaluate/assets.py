"""What is compared: runs of dsd_fast, and views and meshes by other tools, as images by method,
prompt and seed."""

from __future__ import annotations

import contextlib
import glob
import json
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from dsd_fast.config import CameraConfig
from dsd_fast.evaluate import meshes, surfaces
from dsd_fast.picture_file import MAX_BYTES, read_rgba
from dsd_fast.run import checkpoint, cli
from dsd_fast.run.checkpoint import CheckpointError
from dsd_fast.run.outputs import RunFolder
from dsd_fast.run.pictures import to_uint8
from dsd_fast.run.saved import SavedRun, open_saved
from dsd_fast.scene.cameras import eval_camera
from dsd_fast.scene.mesh_file import SUFFIXES
from dsd_fast.scene.renderer import OPAQUE, RenderOutput
from dsd_fast.schedules import Schedule

log = logging.getLogger("dsd_fast.evaluate")

IMAGES = {".png", ".jpg", ".jpeg", ".webp"}
# Optional, beside the views of a folder by another tool.
SIDECAR = "asset.json"
# What previews of runs are called; a run's own pictures are rendered anew.
_PREVIEW = re.compile(r"step-\d+")
_NUMBERED = re.compile(r"(?:.*\D)?(\d+)")
_SEED = re.compile(r"(.+?)[-_ ]?seed[-_ ]?(\d+)", re.IGNORECASE)
# How deep below a folder that was named assets are looked for.
MAX_DEPTH = 4
# Views of an object where the command does not say.
DEFAULT_VIEWS = 8
# Behind views with an alpha channel: what the embedded preset shows its objects before.
GREY = 0.7


class EvaluateError(RuntimeError):
    """Input that cannot be compared."""


@dataclass(frozen=True)
class Source:
    """Where an asset lies and what it is called."""

    method: str
    prompt: str
    seed: int
    path: Path
    is_run: bool
    # One image of its own (a 2D run, a sample), not views around an object.
    is_picture: bool = False
    # Of the sidecar: azimuths, elevation, seconds, memory_mib.
    about: dict = field(default_factory=dict)

    def cost(self) -> tuple[float | None, float | None]:
        """seconds and memory_mib, as the sidecar tells them."""
        return self.about.get("seconds"), self.about.get("memory_mib")


@dataclass(frozen=True)
class Asset:
    """Views of one object.

    images: [V,H,W,3] uint8; azimuths: [V] degrees, 0 the front; elevation in degrees. A picture has
    one image, whose azimuth says nothing. seconds and memory_mib are None where nothing tells them;
    masks: [V,H,W] bool, where the object is, None of images without transparency; surface: of runs,
    whose normals are known.
    """

    source: Source
    images: np.ndarray
    azimuths: np.ndarray
    elevation: float
    seconds: float | None = None
    memory_mib: float | None = None
    # Of a run that had not come to its end: the step of the checkpoint and that of the end.
    unfinished: tuple[int, int] | None = None
    masks: np.ndarray | None = None
    surface: surfaces.Surface | None = None


def numbered_images(folder: Path) -> list[Path]:
    """Images of a folder whose names end in a number, by that number."""
    found = []
    for path in folder.iterdir():
        match = _NUMBERED.fullmatch(path.stem)
        if path.suffix.lower() in IMAGES and match and not _PREVIEW.fullmatch(path.stem):
            found.append((int(match[1]), path.name, path))
    return [path for _, _, path in sorted(found)]


def _is_run(path: Path) -> bool:
    if path.is_file():
        return path.suffix == ".safetensors"
    return bool(checkpoint.list_steps(RunFolder(path).checkpoints))


def _assets_below(path: Path, depth: int = 0) -> list[Path]:
    """Run folders, folders of views and meshes at or below ``path``.

    Runs come first: numbered images beside them are contact sheets of them, not views of one asset.
    Views come before meshes, which they are most likely of.
    """
    if _is_run(path):
        return [path]
    if (path / "config.json").is_file():
        log.warning("%s: a run without a checkpoint is left out", path)
        return []
    below = []
    if depth < MAX_DEPTH:
        folders = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
        below = [found for folder in folders for found in _assets_below(folder, depth + 1)]
    if any(map(_is_run, below)):
        return below
    if numbered_images(path):
        return [path]
    return below + sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)


def find_assets(path: Path) -> list[Path]:
    """The run folders, checkpoint files, folders of views and meshes that ``path`` means.

    Raises:
        EvaluateError: there are none.
    """
    if path.is_file() and path.suffix.lower() in SUFFIXES | {".safetensors"}:
        return [path]
    if not path.is_dir():
        raise EvaluateError(
            f"{path}: expected a run folder, a folder of views, or a mesh "
            f"({', '.join(sorted(SUFFIXES))})"
        )
    found = _assets_below(path)
    if not found:
        raise EvaluateError(f"{path}: no run with a checkpoint, numbered images or mesh in it")
    return found


def method_of(config: dict) -> str:
    """A name for the way a run was guided, from its config: the method, the trajectory's share at
    the first and last level where it is not the official 0, the trajectory, and "@" with its scale
    where it has one of its own.

    Of 2D runs it begins with "2D"; the exact form is "dsd*", as on the paper's page.
    """
    guidance = config.get("guidance", {})
    method = str(guidance.get("method", "dsd"))
    in_2d = config.get("task") == "image"
    if in_2d and config.get("image", {}).get("exact"):
        return "2D dsd*"
    # Only DSD follows a trajectory.
    name = method
    if "dsd" in method:
        shares = [value for _, value in Schedule.parse(guidance.get("trajectory_share", 0)).knots]
        if any(shares):
            name += "+" + "-".join(f"{share:g}" for share in dict.fromkeys((shares[-1], shares[0])))
        name = f"{name} {guidance.get('trajectory', '')}".strip()
        own = guidance.get("trajectory_scale")
        if own is not None:
            name += f"@{own:g}"
    return f"2D {name}" if in_2d else name


def describe(path: Path, method: str | None = None) -> Source:
    """What the asset at ``path`` is called.

    A run says so itself. Of a folder of views, or of a mesh, the name gives prompt and seed
    (``an_armchair-seed3``; seed 0 where it has none), and the folder above it the method. A file
    asset.json beside views may say any of method, prompt, seed, azimuths, elevation, seconds and
    memory_mib in their place, and so may one beside a mesh that is called as it is
    (``an_armchair-seed3.json``); azimuths of null make a folder a picture. ``method`` wins over
    both.

    Raises:
        EvaluateError: the run's config, its checkpoint or asset.json cannot be read.
    """
    if _is_run(path):
        saved, folder = cli.find_checkpoint(path)
        # A checkpoint outside its run's folder says the same.
        has_config = folder.config.is_file()
        file = folder.config if has_config else saved
        try:
            config = _read_json(file) if has_config else checkpoint.load(file)["config"]
            if not isinstance(config, dict):
                raise TypeError(f"expected a configuration, got {type(config).__name__}")
            prompt, seed = config["prompt"], config["seed"]
            is_picture = config.get("task") == "image"
            method = method or method_of(config)
        except (CheckpointError, EvaluateError) as error:
            raise EvaluateError(f"{path}: cannot tell its prompt and seed: {error}") from error
        # What else may be there in the place of settings.
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise EvaluateError(
                f"{file}: cannot tell the run's method, prompt and seed: "
                f"{type(error).__name__}: {error}"
            ) from error
        _check({"method": method, "prompt": prompt, "seed": seed}, file)
        return Source(method, prompt, int(seed), path, True, is_picture)
    is_mesh = path.is_file()
    sidecar = path.with_suffix(".json") if is_mesh else path / SIDECAR
    about = _read_json(sidecar) if sidecar.exists() else {}
    name = path.stem if is_mesh else path.resolve().name
    match = _SEED.fullmatch(name)
    name, seed = (match[1], int(match[2])) if match else (name, 0)
    is_picture = about.get("azimuths", 0) is None
    if is_picture:
        del about["azimuths"]
    _check(about, sidecar)
    method = method or about.get("method", path.resolve().parent.name)
    prompt = about.get("prompt", name.replace("_", " "))
    return Source(method, prompt, int(about.get("seed", seed)), path, False, is_picture, about)


# Steps, seeds and seconds are below that; numbers of JSON may be of any size.
_MOST = 2**63


def _check(about: dict, path: Path) -> None:
    """EvaluateError where a value of an asset.json, or of a configuration, is none of its kind."""
    for key in ("method", "prompt"):
        text = about.get(key, "")
        if not isinstance(text, str) or not _is_text(text):
            raise EvaluateError(f"{path}: {key}: expected a text, got {_cut(text)}")
    for key in ("seed", "elevation", "seconds", "memory_mib", "azimuths"):
        value = about.get(key, 0)
        numbers = value if key == "azimuths" and isinstance(value, list) else [value]
        if not all(type(n) in (int, float) and -_MOST <= n < _MOST for n in numbers):
            raise EvaluateError(f"{path}: {key}: expected numbers, got {_cut(value)}")


def _is_readable(path: Path) -> bool:
    """Whether a file of text is a regular one, of a size that such files have."""
    return path.is_file() and path.stat().st_size <= MAX_BYTES


def _is_text(text: str) -> bool:
    """Whether a text can be written: JSON may have halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _cut(value: object) -> str:
    return text if len(text := repr(value)) <= 100 else f"{text[:100]}..."


def _read_json(path: Path) -> dict:
    if not _is_readable(path):
        raise EvaluateError(f"cannot read {path}: expected a file of JSON")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise EvaluateError(f"cannot read {path}: it is nested too deep") from None
    except (OSError, ValueError) as error:
        raise EvaluateError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise EvaluateError(f"{path}: expected a JSON object")
    return value


def parse_groups(words: Sequence[str]) -> dict[str, list[str]]:
    """``NAME=GLOB [GLOB...] [NAME=GLOB...]`` as globs by name; a name may come more than once.

    Raises:
        EvaluateError: the first word names no group, or a name or glob is empty.
    """
    groups: dict[str, list[str]] = {}
    name = ""
    for word in words:
        head, equals, tail = word.partition("=")
        # A path may hold "=" too, a name no "/".
        if equals and "/" not in head:
            name, word = head, tail
        if not name or not word:
            raise EvaluateError(f"--group {word or name}: expected NAME=GLOB")
        groups.setdefault(name, []).append(word)
    return groups


def gather(paths: Iterable[Path], groups: dict[str, list[str]]) -> list[Source]:
    """All assets by method, prompt and seed, in that order.

    Raises:
        EvaluateError: nothing is found, a glob matches nothing, or two assets have the same method,
            prompt and seed.
    """
    sources = [describe(asset) for path in paths for asset in find_assets(path)]
    for name, patterns in groups.items():
        for pattern in patterns:
            # A glob takes logs and the like along: other files than assets are passed over.
            matches = [
                path
                for path in map(Path, sorted(glob.glob(pattern, recursive=True)))
                if path.is_dir() or path.suffix.lower() in SUFFIXES | {".safetensors"}
            ]
            if not matches:
                raise EvaluateError(f"--group {name}={pattern}: no folder matches")
            sources += [describe(a, name) for match in matches for a in find_assets(match)]
    if not sources:
        raise EvaluateError("nothing to compare: pass run folders, or --group NAME=GLOB")
    seen: dict[tuple[str, str, int], Source] = {}
    for source in sources:
        key = (source.method, source.prompt, source.seed)
        other = seen.setdefault(key, source)
        if other is not source:
            raise EvaluateError(
                f"{other.path} and {source.path} are both {source.method!r}, {source.prompt!r}, "
                f"seed {source.seed}: tell them apart with --group NAME=GLOB"
            )
    # Methods stay in the order in which they were named.
    order = list(dict.fromkeys(s.method for s in sources))
    return sorted(sources, key=lambda s: (order.index(s.method), s.prompt, s.seed))


def load(
    source: Source, views: int, size: int, device: torch.device, own_background: bool = False
) -> Asset:
    """The asset with ``views`` views, of a run or a mesh rendered as squares of ``size`` pixels.

    A run is laid over GREY, unless its own background is asked for: a learned one differs from seed
    to seed, which is not the object's diversity.

    Raises:
        EvaluateError: the run or the images cannot be read, or are too few.
    """
    if source.is_picture:
        return _picture(source)
    if source.is_run:
        return _render(source, views, size, device, own_background)
    if source.path.is_file():
        return _render_mesh(source, views, size)
    return _read(source, views)


def open_run(
    path: Path, device: torch.device, background: tuple[float, float, float] | None
) -> SavedRun:
    """`open_saved`, with EvaluateError for what cannot be read."""
    try:
        return open_saved(path, device, background)
    except CheckpointError as error:
        raise EvaluateError(str(error)) from error


def _render(
    source: Source, views: int, size: int, device: torch.device, own_background: bool
) -> Asset:
    run = open_run(source.path, device, None if own_background else (GREY, GREY, GREY))
    azimuths = _around(views)
    images, masks, seen = [], [], []

    def view(azimuth: float, size: int) -> RenderOutput:
        camera = eval_camera(run.cfg.cameras, azimuth, size=(size, size), device=device)
        return run.scene.view(camera, run.step)

    with torch.no_grad():
        for azimuth in azimuths.tolist():
            shown = view(azimuth, size)
            images.append(to_uint8(shown.rgb[0]))
            masks.append((shown.opacity[0, ..., 0] > OPAQUE).cpu().numpy())
            seen.append(view(azimuth, surfaces.SIZE))
    opacity = torch.cat([image.opacity for image in seen])
    normal = torch.cat([2 * image.normal - image.opacity for image in seen])
    surface = surfaces.surface(opacity[..., 0].cpu().numpy(), normal.cpu().numpy())
    elevation, last = float(run.cfg.cameras.eval_elevation_deg), run.cfg.max_steps
    unfinished = (run.step, last) if run.step < last else None
    looks = np.stack(images), azimuths, elevation
    told = cost(run.folder.metrics)
    return Asset(source, *looks, *told, unfinished, np.stack(masks), surface)


def _render_mesh(source: Source, views: int, size: int) -> Asset:
    cfg = CameraConfig()
    if "elevation" in source.about:
        cfg.eval_elevation_deg = float(source.about["elevation"])
    azimuths = _around(views)
    try:
        images, masks = meshes.render_views(source.path, azimuths, size, GREY, cfg)
    except (ValueError, ImportError) as error:
        raise EvaluateError(f"{source.path}: {error}") from error
    elevation = float(cfg.eval_elevation_deg)
    return Asset(source, images, azimuths, elevation, *source.cost(), masks=masks)


def _around(views: int) -> np.ndarray:
    """Azimuths [views] evenly around, from the front on."""
    return np.arange(views) * (360 / views)


def _picture(source: Source) -> Asset:
    """The image of a 2D run, as of its newest checkpoint, or the one that a folder holds."""
    told, unfinished = source.cost(), None
    if source.is_run:
        try:
            path, folder = cli.find_checkpoint(source.path)
            tree = checkpoint.load(path)
            step, last = int(tree["step"]), int(tree["config"]["max_steps"])
        except (CheckpointError, LookupError, TypeError, ValueError) as error:
            raise EvaluateError(f"{source.path}: cannot tell its step: {error}") from error
        unfinished = (step, last) if step < last else None
        told, images = cost(folder.metrics), [folder.image]
        if step != folder.last_step() or not folder.image.is_file():
            raise EvaluateError(
                f"{source.path}: a 2D run shows the image.png of its newest checkpoint, and there "
                "is none of this one: pass a run folder that has it, or resume the run"
            )
    else:
        images = numbered_images(source.path)
        if len(images) != 1:
            raise EvaluateError(
                f"{source.path}: {SIDECAR} says that it is one picture (azimuths null), but it has "
                f"{len(images)} images"
            )
    image = read_image(images[0])
    return Asset(source, image[None], np.zeros(1), 0.0, *told, unfinished)


def views_of(sources: Sequence[Source], wanted: int | None) -> int:
    """How many views assets are compared by: one where any of them is a picture, which has no more.

    Raises:
        EvaluateError: pictures and objects together where no or several views were asked for.
    """
    are_pictures = {source.is_picture for source in sources}
    if are_pictures == {True} and wanted in (None, 1):
        return 1
    if True in are_pictures and wanted != 1:
        picture = next(source for source in sources if source.is_picture)
        raise EvaluateError(
            f"{picture.path} is a single image, and "
            + (f"{wanted} views were asked for" if wanted else "others are objects of many views")
            + ": pass --views 1, which takes objects from the front alone, or compare them apart"
        )
    return DEFAULT_VIEWS if wanted is None else wanted


def cost(metrics: Path) -> tuple[float | None, float | None]:
    """Seconds of training and peak MiB that a run's metrics.jsonl tells; None where it does not.

    `seconds` counts from the start of each session of a run that was resumed: the last value of
    every session is added up.
    """
    if not _is_readable(metrics):
        return None, None
    try:
        lines = metrics.read_bytes().splitlines()
    except OSError:
        return None, None
    records = []
    for line in lines:
        # A crash may cut a line short, or leave one of zeros.
        with contextlib.suppress(ValueError, RecursionError):
            records.append(json.loads(line))
    seconds, memory = (
        [
            record[key]
            for record in records
            if isinstance(record, dict)
            and type(record.get(key)) in (int, float)
            and 0 <= record[key] < _MOST
        ]
        for key in ("seconds", "memory_mib")
    )
    before = sum(last for last, following in pairwise(seconds) if following < last)
    total = before + seconds[-1] if seconds else None
    return total, max(memory, default=None)


def read_image(path: Path) -> np.ndarray:
    """[H,W,3] uint8; transparency over grey.

    Raises:
        EvaluateError: not an image that can be read.
    """
    return over_grey(_read_rgba(path))


def _read_rgba(path: Path) -> np.ndarray:
    """`read_rgba`, with EvaluateError for what cannot be read."""
    try:
        return read_rgba(path)
    except (FileNotFoundError, ValueError) as error:
        raise EvaluateError(str(error)) from error


def over_grey(rgba: np.ndarray) -> np.ndarray:
    """Images [...,H,W,4] uint8 of straight alpha over GREY: [...,H,W,3] uint8."""
    image = rgba.astype(np.float32) / 255
    colour, alpha = image[..., :3], image[..., 3:]
    return ((colour * alpha + GREY * (1 - alpha)) * 255).round().astype(np.uint8)


def _chosen(azimuths: np.ndarray, views: int) -> np.ndarray:
    """Rows [views] of the azimuths [N] that are nearest to evenly spaced ones from 0 on."""
    apart = np.abs((azimuths[None] - _around(views)[:, None] + 180) % 360 - 180)
    return apart.argmin(1)


def _read(source: Source, views: int) -> Asset:
    paths = numbered_images(source.path)
    azimuths = np.asarray(source.about.get("azimuths", _around(len(paths))), np.float64)
    if azimuths.shape != (len(paths),):
        raise EvaluateError(
            f"{source.path / SIDECAR}: {azimuths.size} azimuths for {len(paths)} images"
        )
    rows = _chosen(azimuths, views)
    if len(set(rows.tolist())) < views:
        raise EvaluateError(
            f"{source.path}: {len(paths)} images do not give {views} views evenly spaced around "
            "the object; pass a smaller --views"
        )
    images = [_read_rgba(paths[row]) for row in rows]
    shape = images[0].shape
    if any(image.shape != shape for image in images):
        images = [_resized(image, shape[:2]) for image in images]
    rgba = np.stack(images)
    masks = rgba[..., 3] > 127 if (rgba[..., 3] < 255).any() else None
    elevation = float(source.about.get("elevation", 0.0))
    looks = over_grey(rgba), azimuths[rows], elevation
    return Asset(source, *looks, *source.cost(), masks=masks)


def _resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    x = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    x = F.interpolate(x, size, mode="bilinear", antialias=True)
    return to_uint8(x[0].permute(1, 2, 0))
