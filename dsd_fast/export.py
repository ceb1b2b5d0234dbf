"""A mesh or a video from a run that has been trained: no diffusion model is loaded.

python -m dsd_fast.export outputs/diverse-score-distillation/an_armchair-seed0
python -m dsd_fast.export RUN --iso 5 --resolution 256 --output chair.glb
python -m dsd_fast.export RUN --turntable
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from annotated_types import Interval

from dsd_fast._backend import keep_freed_memory
from dsd_fast.config import ConfigError, check, resolve_device
from dsd_fast.output_file import check_output
from dsd_fast.ranges import CountOrNone, Share
from dsd_fast.run import cli, pictures
from dsd_fast.run.checkpoint import CheckpointError
from dsd_fast.run.command import run_command
from dsd_fast.run.saved import SavedRun, open_saved
from dsd_fast.scene.mesh import GridPoints, Iso, MeshError, write_glb

# Not __name__, which is "__main__" when this module is the command.
log = logging.getLogger("dsd_fast.export")


# What is written, and the flags that are of it alone.
MESH = (".glb",)
VIDEO = (".mp4",)
_OF_MESH = ("iso", "resolution", "min_component", "max_faces")
_OF_VIDEO = ("views", "size", "panels")


@dataclass
class ExportCommand:
    """Write the mesh of a trained run as GLB, with colours at the vertices."""

    # A run folder (its newest checkpoint is taken) or a checkpoint file.
    run: Annotated[Path, tyro.conf.Positional]
    # The file to write, .glb (or .mp4 with --turntable); by default mesh.glb (or turntable.mp4) in
    # the run folder.
    output: Path | None = None
    # Density of the surface: a number, or "auto"; by default what the run was configured with.
    iso: Iso | None = None
    # Grid points along the longest side of the object.
    resolution: GridPoints | None = None
    # Components with fewer faces than this fraction of the largest one are dropped.
    min_component: Share | None = None
    # Decimate to this many faces (needs fast-simplification); 0 keeps all.
    max_faces: CountOrNone | None = None
    # Render the turntable video instead of a mesh.
    turntable: bool = False
    # Views in the video.
    views: Annotated[int, Interval(ge=1, le=100_000)] | None = None
    # Height and width of the video's panels in pixels.
    size: Annotated[int, Interval(ge=2, le=4096)] | None = None
    # What the video shows: the colours, or colours, normals and opacity side by side; by default
    # what the run was configured with.
    panels: Literal["color", "all"] | None = None
    # "auto" (CUDA if there is one), "cpu" or "cuda".
    device: str = "auto"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 done, 1 no surface, 2 wrong input."""
    return run_command(
        export,
        ExportCommand,
        "dsd_fast.export",
        argv,
        wrong_input=(CheckpointError, ConfigError),
        failed=(MeshError,),
    )


def export(command: ExportCommand) -> Path:
    """Do what the command says; returns the file that was written."""
    check(command, flags=True)
    output = command.output
    if output is not None:
        output = check_output(output, VIDEO if command.turntable else MESH)
    for name in _OF_MESH if command.turntable else _OF_VIDEO:
        if getattr(command, name) is not None:
            what = "mesh, and a video is written" if command.turntable else "video (--turntable)"
            log.warning("--%s does nothing: it is of the %s", name.replace("_", "-"), what)
    device = resolve_device(command.device)
    _, folder = cli.find_checkpoint(command.run)
    if output is None:
        # A link that somebody has left in the folder is replaced, not followed.
        output = folder.turntable if command.turntable else folder.mesh
        check_output(output)
    keep_freed_memory(device)
    run = open_saved(command.run, device)
    log.info(
        "%s, seed %d, step %d of %d", run.cfg.prompt, run.cfg.seed, run.step, run.cfg.max_steps
    )
    try:
        _write(run, command, output)
    except (MemoryError, torch.OutOfMemoryError) as error:
        advice = "a smaller --size" if command.turntable else "a smaller --resolution"
        raise MeshError(
            f"the memory of {device} is too small for {output}: pass {advice}, or another --device "
            f"({(str(error) or 'MemoryError').splitlines()[0]})"
        ) from error
    return output


def _write(run: SavedRun, command: ExportCommand, output: Path) -> None:
    cfg, scene, step = run.cfg, run.scene, run.step
    if command.turntable:
        size = (command.size, command.size) if command.size else None
        if command.panels is not None:
            cfg.pictures.panels = command.panels
        if size:
            # Whoever asks for a size wants its pixels.
            cfg.pictures.enlarge = 1
        pictures.write_turntable(scene, cfg, step, output, command.views, size)
        log.info("wrote %s", output)
        return
    chosen = {name: value for name in _OF_MESH if (value := getattr(command, name)) is not None}
    settings = replace(cfg.mesh, **chosen)
    if settings.max_faces and find_spec("fast_simplification") is None:
        raise ConfigError(
            f"--max-faces {settings.max_faces} needs a package: pip install 'dsd_fast[mesh]', "
            "or pass --max-faces 0"
        )
    mesh = scene.mesh(settings, step, log.info)
    write_glb(mesh, output)
    log.info("wrote %s, %d vertices, %d faces", output, len(mesh.vertices), len(mesh.faces))


if __name__ == "__main__":
    sys.exit(main())
