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
from pathlib import Path
from typing import Annotated

import tyro

from dsd_fast._backend import keep_freed_memory
from dsd_fast.config import ConfigError, TrainConfig, from_dict, resolve_device
from dsd_fast.run import checkpoint, cli, pictures
from dsd_fast.run.checkpoint import CheckpointError
from dsd_fast.run.command import run_command
from dsd_fast.run.state import saved_scene
from dsd_fast.scene.mesh import MeshError, write_glb

# Not __name__, which is "__main__" when this module is the command.
log = logging.getLogger("dsd_fast.export")


@dataclass
class ExportCommand:
    """Write the mesh of a trained run as GLB, with colours at the vertices."""

    # A run folder (its newest checkpoint is taken) or a checkpoint file.
    run: Annotated[Path, tyro.conf.Positional]
    # The file to write; by default mesh.glb (or turntable.mp4) in the run folder.
    output: Path | None = None
    # Density of the surface: a number, or "auto"; by default what the run was configured with.
    iso: str | None = None
    # Grid points along the longest side of the object.
    resolution: int | None = None
    # Components with fewer faces than this fraction of the largest one are dropped.
    min_component: float | None = None
    # Decimate to this many faces (needs fast-simplification); 0 keeps all.
    max_faces: int | None = None
    # Render the turntable video instead of a mesh.
    turntable: bool = False
    # Views in the video.
    views: int | None = None
    # Height and width of the video's panels in pixels.
    size: int | None = None
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
    device = resolve_device(command.device)
    keep_freed_memory(device)
    path, folder = cli.find_checkpoint(command.run)
    tree = checkpoint.load(path)
    cfg, step = from_dict(TrainConfig, tree["config"]), tree["step"]
    scene = saved_scene(cfg, tree["scene"]).to(device)
    log.info("%s, seed %d, step %d of %d", cfg.prompt, cfg.seed, step, cfg.max_steps)
    if command.turntable:
        size = command.size
        pictures.write_turntable(
            scene,
            cfg.cameras,
            step,
            output := command.output or folder.turntable,
            cfg.pictures.fps,
            command.views or None,
            (size, size) if size else None,
        )
        log.info("wrote %s", output)
        return output
    chosen = {
        name: value
        for name in ("iso", "resolution", "min_component", "max_faces")
        if (value := getattr(command, name)) is not None
    }
    mesh = scene.mesh(replace(cfg.mesh, **chosen), step)
    output = command.output or folder.mesh
    write_glb(mesh, output)
    log.info("wrote %s, %d vertices, %d faces", output, len(mesh.vertices), len(mesh.faces))
    return output


if __name__ == "__main__":
    sys.exit(main())
