"""A mesh or a video from a run that has been trained: no diffusion model is loaded.

python -m dsd_fast.export outputs/diverse-score-distillation/an_armchair-seed0
python -m dsd_fast.export RUN --format usdz --texture-size 2048 --max-faces 50000
python -m dsd_fast.export RUN --output chair.obj
python -m dsd_fast.export RUN --output chair.gif --of mesh
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from annotated_types import Interval

from dsd_fast._backend import keep_freed_memory
from dsd_fast.asset import formats
from dsd_fast.config import ConfigError, check, resolve_device
from dsd_fast.output_file import check_output
from dsd_fast.ranges import CountOrNone, Length, Share
from dsd_fast.run import cli, pictures
from dsd_fast.run.about import about
from dsd_fast.run.checkpoint import CheckpointError
from dsd_fast.run.command import run_command
from dsd_fast.run.outputs import RunFolder
from dsd_fast.run.saved import SavedRun, open_saved
from dsd_fast.scene.fidelity import fidelity
from dsd_fast.scene.mesh import FormatName, GridPoints, Iso, Made, MeshConfig, Seconds, TextureSize
from dsd_fast.scene.painted import PaintedMesh
from dsd_fast.scene.surface import MeshError

# Not __name__, which is "__main__" when this module is the command.
log = logging.getLogger("dsd_fast.export")

# Flags that are of a mesh, and of a video, alone.
_OF_MESH = (
    "iso",
    "resolution",
    "min_component",
    "max_faces",
    "texture_size",
    "atlas_seconds",
    "height",
)
_OF_VIDEO = ("views", "size", "panels", "of")


@dataclass
class ExportCommand:
    """Write the mesh of a trained run, or a video of it."""

    # A run folder (its newest checkpoint is taken) or a checkpoint file.
    run: Annotated[Path, tyro.conf.Positional]
    # The file to write; its ending says what: a mesh (.glb, .gltf, .obj, .ply, .stl, .usdz) or a
    # video (.mp4, .webm, .gif). By default mesh.glb (or turntable.mp4) in the run folder.
    output: Path | None = None
    # The same of a mesh in the run folder, by the ending alone.
    format: FormatName | None = None
    # Density of the surface: a number, or "auto" for the one at which outlines are those of the
    # pictures; by default, as of what follows, what the run was configured with.
    iso: Iso | None = None
    # Grid points along the longest side of the object.
    resolution: GridPoints | None = None
    # Components with fewer faces than this fraction of the largest one are dropped.
    min_component: Share | None = None
    # Decimate to this many triangles; 0 keeps all.
    max_faces: CountOrNone | None = None
    # Rows and columns of the texture; 0 colours vertices instead.
    texture_size: TextureSize | None = None
    # Give the texture a normal map of the fine surface.
    normal_map: bool = True
    # Seconds that texture coordinates may take; after that, vertices are coloured instead.
    atlas_seconds: Seconds | None = None
    # Height of the object in metres.
    height: Length | None = None
    # Stand the object on y = 0, its middle above the origin.
    ground: bool = True
    # Tell how true the mesh is to the field: views of both are compared.
    measure: bool = False
    # Render the turntable video instead of a mesh.
    turntable: bool = False
    # What the video is of: the field, or the mesh.
    of: Literal["field", "mesh"] | None = None
    # Views in the video.
    views: Annotated[int, Interval(ge=1, le=100_000)] | None = None
    # Height and width of the video's panels in pixels.
    size: Annotated[int, Interval(ge=2, le=4096)] | None = None
    # What the video shows: the colours, or colours, normals and opacity side by side; by default
    # what the run was configured with.
    panels: Literal["color", "all"] | None = None
    # "auto" (CUDA if there is one), "cpu" or "cuda".
    device: str = "auto"

    def is_video(self) -> bool:
        named = self.output is not None and self.output.suffix.lower() in pictures.VIDEOS
        return self.turntable or named


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
    """Do what the command says; returns the file that was written, the first if there are more."""
    check(command, flags=True)
    video = command.is_video()
    _warn_of_flags_without_use(command, video)
    output = command.output
    if output is not None:
        output = _checked(output, command)
    device = resolve_device(command.device)
    _, folder = cli.find_checkpoint(command.run)
    keep_freed_memory(device)
    run = open_saved(command.run, device)
    settings = _settings(run.cfg.mesh, command)
    if output is None:
        # A link that somebody has left in the folder is replaced, not followed.
        output = _in_folder(folder, settings, video)
    log.info(
        "%s, seed %d, step %d of %d", run.cfg.prompt, run.cfg.seed, run.step, run.cfg.max_steps
    )
    try:
        return (
            _write_video(run, settings, command, output)
            if video
            else _write_mesh(run, settings, command, output)
        )
    except (MemoryError, torch.OutOfMemoryError) as error:
        advice = "a smaller --size" if video else "a smaller --resolution or --texture-size"
        raise MeshError(
            f"the memory of {device} is too small for {output}: pass {advice}, or another --device "
            f"({(str(error) or 'MemoryError').splitlines()[0]})"
        ) from error


def _warn_of_flags_without_use(command: ExportCommand, video: bool) -> None:
    of_mesh = () if video and command.of == "mesh" else _OF_MESH
    for name in of_mesh if video else _OF_VIDEO:
        if getattr(command, name) is not None:
            what = "mesh, and a video is written" if video else "video (--turntable)"
            log.warning("--%s does nothing: it is of the %s", name.replace("_", "-"), what)


def _checked(output: Path, command: ExportCommand) -> Path:
    """The file to write, if it can be written and no other flag wants another kind.

    Raises:
        ConfigError: else.
    """
    if command.format is not None:
        raise ConfigError(
            f"--format {command.format} is for the file in the run folder, and --output {output} "
            "says by its ending what it is: drop one of them"
        )
    if command.is_video():
        return check_output(output, tuple(pictures.VIDEOS))
    if output.suffix.lower() not in formats.SUFFIXES:
        check_output(output, (*formats.SUFFIXES, *pictures.VIDEOS))
    return formats.check_asset_output(output)


def _settings(cfg: MeshConfig, command: ExportCommand) -> MeshConfig:
    """The run's, with those of the command."""
    named = (*_OF_MESH, "format")
    chosen = {name: value for name in named if (value := getattr(command, name)) is not None}
    if command.output is not None and not command.is_video():
        chosen["format"] = command.output.suffix[1:].lower()
    settings = replace(cfg, **chosen)
    settings.normal_map &= command.normal_map
    settings.ground &= command.ground
    return settings


def _in_folder(folder: RunFolder, settings: MeshConfig, video: bool) -> Path:
    if video:
        return check_output(folder.turntable)
    output = folder.mesh_as(settings.format)
    formats.check_format(settings.format, "--format")
    for file in formats.files_of(output):
        check_output(file)
    return output


def _write_video(run: SavedRun, settings: MeshConfig, command: ExportCommand, output: Path) -> Path:
    cfg, scene = run.cfg, run.scene
    size = (command.size, command.size) if command.size else None
    if command.panels is not None:
        cfg.pictures.panels = command.panels
    if size:
        # Whoever asks for a size wants its pixels.
        cfg.pictures.enlarge = 1
    shown = scene
    if command.of == "mesh":
        made = scene.asset(replace(settings, format="glb"), run.step, log.info, _say())
        shown = PaintedMesh(made, scene.background, cfg.material).to(scene.device)
    pictures.write_turntable(shown, cfg, run.step, output, command.views, size)
    log.info("wrote %s", output)
    return output


def _write_mesh(run: SavedRun, settings: MeshConfig, command: ExportCommand, output: Path) -> Path:
    made = run.scene.asset(settings, run.step, log.info, _say())
    asset = made.asset.called(run.cfg.prompt, about(run.cfg, run.step, run.folder))
    files = formats.write(asset, output)
    log.info(
        "wrote %s, %d vertices, %d faces, %s",
        ", ".join(map(str, files)),
        len(asset.points),
        len(asset.faces),
        _colored(made, settings),
    )
    if command.measure:
        log.info("%s", fidelity(run.scene, made, run.cfg.cameras, run.step))
    return output


def _colored(made: Made, settings: MeshConfig) -> str:
    if settings.format == "stl":
        return "no colours"
    if made.asset.texture is None:
        return "colours at the vertices"
    size = len(made.asset.texture)
    normals = "" if made.asset.normal_map is None else " and normal map"
    return f"texture{normals} of {size} x {size}"


def _say() -> Callable[[str], None]:
    """Tells what is being done."""
    return lambda what: log.info("%s", what)


if __name__ == "__main__":
    sys.exit(main())
