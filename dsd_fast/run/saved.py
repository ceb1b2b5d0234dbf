"""The object of a run that has been trained, as its checkpoint holds it, whoever wrote that."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from dsd_fast.config import TrainConfig, from_dict
from dsd_fast.ranges import ConfigError
from dsd_fast.run import checkpoint, cli
from dsd_fast.run.checkpoint import CheckpointError
from dsd_fast.run.outputs import RunFolder
from dsd_fast.run.state import saved_scene
from dsd_fast.scene.field_scene import FieldScene


class SavedRun(NamedTuple):
    """A run as of a checkpoint, its scene on a device."""

    cfg: TrainConfig
    config: dict  # of `cfg`, as it was saved
    scene: FieldScene
    step: int
    folder: RunFolder


def open_saved(
    path: Path,
    device: torch.device,
    background: tuple[float, float, float] | None = None,
) -> SavedRun:
    """The run that a run folder (its newest checkpoint) or a checkpoint holds.

    Args:
        background: a plain one in the place of the run's own.
    Raises:
        CheckpointError: there is none, it is damaged, or it is of a run without an object.
    """
    file, folder = cli.find_checkpoint(path)
    tree = checkpoint.load(file)
    config, step, state = (tree.get(name) for name in ("config", "step", "scene"))
    if not isinstance(config, dict) or not isinstance(state, dict) or type(step) is not int:
        raise CheckpointError(f"{file}: expected a configuration, a scene and the number of a step")
    try:
        cfg = from_dict(TrainConfig, config)
        if cfg.task == "image":
            raise CheckpointError(
                f"{path} is a run of --task image, which has no object: its image is {folder.image}"
            )
        if cfg.task in ("texture", "refine"):
            raise CheckpointError(
                f"{path} is a run of --task {cfg.task}, whose object is a mesh: it is {folder.mesh}"
            )
        if background is not None:
            cfg.background.eval_color = background
        _check_sizes(cfg, state, file)
    except ConfigError as error:
        raise CheckpointError(f"{file}: its configuration: {error}") from error
    return SavedRun(cfg, config, saved_scene(cfg, state).to(device), step, folder)


def _check_sizes(cfg: TrainConfig, state: dict[str, Any], file: Path) -> None:
    """CheckpointError where the scene of this configuration, which may ask for any memory, is not
    the checkpoint's."""
    with torch.device("meta"):
        expected = FieldScene(cfg).state_dict()
    for name, tensor in expected.items():
        found = state.get(name)
        shape = list(found.shape) if isinstance(found, torch.Tensor) else "no tensor"
        if shape != list(tensor.shape):
            raise CheckpointError(
                f"{file} does not fit its own configuration: {name}: expected "
                f"{list(tensor.shape)}, got {shape}"
            )
