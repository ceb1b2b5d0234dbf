"""What a run needs of the computer, asked before it begins: memory, and optional packages.

The sizes are lower bounds, without the diffusion model: what is refused here cannot work, and what
passes may still be too much.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch

from dsd_fast.asset.formats import check_format
from dsd_fast.config import ConfigError, TrainConfig, resolve_device
from dsd_fast.guidance import FORMULATIONS
from dsd_fast.ops.hashgrid import GridSpec
from dsd_fast.schedules import Schedule

# A parameter in float32 with its gradient and two moments.
_PER_PARAMETER = 16
# Origin, direction, colour, normal, opacity and depth of a pixel, once each.
_PER_PIXEL = 64
# Bounds and ray of a sample before any is left out; of the steps across the box's diagonal that a
# ray could take, few rays take more than this share less.
_PER_SAMPLE = 12
_SAMPLES_SHARE = 1 / 8
# A latent of the embedded model, the smallest that is used in earnest.
_PER_LATENT = 4 * 4 * 32 * 32


def check(cfg: TrainConfig, n_runs: int) -> None:
    """ConfigError for what `n_runs` runs side by side cannot have on this computer."""
    check_packages(cfg)
    check_memory(cfg, n_runs)


def check_packages(cfg: TrainConfig) -> None:
    """ConfigError for an optional package that is missing, and needed later: a mesh is decimated
    when all training is done."""
    in_3d = cfg.task != "image"
    needed = []
    if cfg.task in ("text", "single-view") and cfg.pictures.mesh:
        check_format(cfg.mesh.format, "--mesh.format")
    if in_3d and cfg.pictures.turntable:
        needed.append(("the video", "imageio_ffmpeg", "", "pass --pictures.no-turntable"))
    if FORMULATIONS[cfg.guidance.method].one_run:  # it has adapters
        flag = f"--guidance.method {cfg.guidance.method}"
        needed.append((flag, "peft", "[vsd]", "pass another method"))
    for what, package, extra, other in needed:
        if find_spec(package) is None:
            raise ConfigError(
                f"{what} needs the package {package.replace('_', '-')}: pip install "
                f"'dsd_fast{extra}', or {other}"
            )


def check_memory(cfg: TrainConfig, n_runs: int) -> None:
    """ConfigError, with the sizes, for what fits neither the GPU nor, on the CPU, the computer."""
    device = resolve_device(cfg.device)
    host = computer_gib()
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory / 2**30
        place, there = "GPU", min(total, cfg.vram or math.inf)
    else:
        place, there = "computer", host
    held = list(_held(cfg, n_runs))
    most, _, flags = max(held, key=lambda need: need[1])
    whole = (f"{most}, with what else a run holds,", sum(size for _, size, _ in held), flags)
    needs = [(*need, place, there) for need in (whole, *_pictures(cfg, n_runs))]
    needs += [(*need, "computer", host) for need in _of_computer(cfg)]
    for what, size, flags, place, there in needs:
        if size / 2**30 > there:
            raise ConfigError(
                f"{what} would need about {size / 2**30:,.1f} GiB, and the {place} has "
                f"{there:,.1f} GiB: pass smaller {flags}"
            )


def computer_gib() -> float:
    """The memory that this process may take at most, infinity where nobody says."""
    try:
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows
        return math.inf
    limits = [pages]
    # Of a container.
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limits.append(int(Path(file).read_text()))
        except (OSError, ValueError):  # another version, or "max"
            continue
    return min(limits) / 2**30


Need = tuple[str, float, str]


def _held(cfg: TrainConfig, n_runs: int) -> Iterator[Need]:
    """(what, bytes, flags) of what lies on the device all the time."""
    seeds = f" of {n_runs} seeds" if n_runs > 1 else ""
    fewer = ", --num-seeds" if n_runs > 1 else ""
    tables = _trajectories(cfg) * n_runs
    yield (
        f"the trajectories{seeds}",
        tables,
        f"--guidance.azimuth-bins (or a larger --guidance.noise-table-step){fewer}",
    )
    if cfg.task == "image":
        side = cfg.image.size or 0
        size = 3 * side * side * _PER_PARAMETER * n_runs
        yield f"an image of {side} x {side} pixels{seeds}", size, f"--image.size{fewer}"
        return
    yield (
        f"the field{seeds}, its gradients and moments",
        _parameters(cfg) * _PER_PARAMETER * n_runs,
        f"--field.grid.log2-table-size, --field.grid.n-levels, --field.n-neurons{fewer}",
    )
    cells = cfg.renderer.occupancy.resolution**3
    yield (
        f"the occupancy grid{seeds}",
        5 * cells * n_runs,
        f"--renderer.occupancy.resolution{fewer}",
    )


def _pictures(cfg: TrainConfig, n_runs: int) -> Iterator[Need]:
    """The same of what lies there for a time."""
    if cfg.task == "image":
        return
    cameras, samples = cfg.cameras, cfg.renderer.num_samples_per_ray
    stages = zip(*(cameras.per_stage(name) for name in ("height", "width", "batch_size")))
    height, width, views = max(stages, key=math.prod)
    views *= n_runs
    per_ray = _PER_PIXEL + samples * _SAMPLES_SHARE * _PER_SAMPLE
    yield (
        f"a step of {views} views of {height} x {width} pixels and {samples} samples a ray",
        height * width * views * per_ray,
        "--cameras.height, --cameras.width, --cameras.batch-size, --renderer.num-samples-per-ray",
    )
    pictures = cfg.pictures
    sheets = [("contact sheet", "sheet", pictures.sheet_views, pictures.sheet_size)]
    if cfg.trainer.preview_every:
        sheets.append(("preview", "preview", pictures.preview_views, pictures.preview_size))
    for what, name, n_views, size in sheets:
        # Colours above normals, held until all are there, and the rays of one view.
        yield (
            f"a {what} of {n_views} views of {size} x {size} pixels",
            size * size * (n_views * 24 + per_ray),
            f"--pictures.{name}-views, --pictures.{name}-size",
        )
    if pictures.turntable:
        height, width = pictures.rendered(cameras.eval_height, cameras.eval_width)
        yield (
            f"a video rendered at {height} x {width} pixels and {samples} samples a ray",
            height * width * per_ray,
            "--cameras.eval-height, --cameras.eval-width, --renderer.num-samples-per-ray",
        )


def _of_computer(cfg: TrainConfig) -> Iterator[Need]:
    """The same of what lies in the computer's memory wherever the run is."""
    if cfg.task != "image" and cfg.pictures.mesh:
        points = cfg.mesh.resolution
        yield f"a mesh of {points}^3 grid points", 4 * points**3, "--mesh.resolution"


def _parameters(cfg: TrainConfig) -> int:
    """Numbers that are learned, at least."""
    grid, field, background = cfg.field.grid, cfg.field, cfg.background
    spec = GridSpec(
        grid.n_levels,
        grid.n_features,
        grid.log2_table_size,
        grid.base_resolution,
        grid.per_level_scale,
    )
    networks = (
        2 * field.n_neurons * (spec.n_outputs + field.n_neurons * (field.n_hidden_layers - 1))
    )
    return spec.n_params + networks + background.n_neurons**2 * (background.n_hidden_layers - 1)


def _trajectories(cfg: TrainConfig) -> float:
    """Bytes of a seed's tables, at least (`guidance.tables`)."""
    guidance = cfg.guidance
    if guidance.method != "dsd" or guidance.trajectory != "cached" or cfg.image.exact:
        return 0
    bins = guidance.azimuth_bins
    if cfg.task == "single-view":
        bins = cfg.single_view.azimuth_bins * cfg.single_view.elevation_bins
    elif cfg.task == "image":
        bins = 1
    span = 1 - Schedule.parse(guidance.min_step_percent).maximum
    entries = span * 1000 / guidance.noise_table_step if guidance.noise_table_step else 1
    return bins * max(entries, 1) * _PER_LATENT
