"""The state of a run: what must survive a stop, for the run to go on as if there had been none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from torch import Tensor

from dsd_fast.config import TrainConfig, to_dict
from dsd_fast.diffusion import DiffusionModel
from dsd_fast.rng import RngStreams
from dsd_fast.run import checkpoint
from dsd_fast.run.checkpoint import CheckpointError
from dsd_fast.run.optimizer import Adam
from dsd_fast.scene.field_scene import FieldScene
from dsd_fast.scene.protocol import Scene

S = TypeVar("S", bound=Scene)


@dataclass
class TrainState(Generic[S]):
    """The parts of a run that change or that chance made; `step` counts finished steps."""

    scene: S
    optimizer: Adam
    # The seed noise [1,C,h,w] on the CPU (deviations.md Q12).
    noise: Tensor
    rng: RngStreams
    # Unchanged; a checkpoint tells which one it was.
    model: DiffusionModel
    step: int = 0
    # What the run's guidance has learned, where it learns (`Guidance.learned_state`).
    learned: Callable[[], dict] = dict

    def to_tree(self, cfg: TrainConfig) -> dict:
        """The checkpoint of this moment, with the configuration that explains it."""
        return {
            "step": self.step,
            "config": to_dict(cfg),
            "model_hash": self.model.model_hash,
            "scene": self.scene.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "guidance": {"noise": self.noise, **self.learned()},
            "rng": self.rng.state_dict(),
            **self._rooms(),
        }

    def restore(self, tree: dict) -> None:
        """Take over a checkpoint. CheckpointError when it does not fit the configuration."""
        _load(self.scene, tree["scene"])
        noise = tree["guidance"].get("noise")
        if not isinstance(noise, Tensor) or noise.shape != self.noise.shape:
            raise CheckpointError(
                f"the checkpoint does not fit this run: expected seed noise "
                f"{list(self.noise.shape)}, the size of the model's latents, got "
                f"{list(noise.shape) if isinstance(noise, Tensor) else noise!r}"
            )
        self.noise = noise
        try:
            self.optimizer.load_state_dict(tree["optimizer"])
            self.rng.load_state_dict(tree["rng"])
        # Of a file that is whole and yet none of ours.
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"the checkpoint does not fit this run: {error}") from error
        self.step = tree["step"]
        self._restore_rooms(tree)

    def _rooms(self) -> dict:
        """Not of the scene's own state: rendering a finished scene needs none of it."""
        if not isinstance(self.scene, FieldScene):
            return {}
        return {"rooms": self.scene.renderer.room_state()}

    def _restore_rooms(self, tree: dict) -> None:
        """Older checkpoints have none: their run learns again."""
        if not isinstance(self.scene, FieldScene) or "rooms" not in tree:
            return
        try:
            self.scene.renderer.load_room_state(tree["rooms"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the checkpoint does not fit this run: its rooms for samples cannot be read "
                f"({type(error).__name__}: {error})"
            ) from error


# The parts of a checkpoint of a run, and their types (`TrainState.to_tree`).
_PARTS = {
    "step": int,
    "config": dict,
    "model_hash": str,
    "scene": dict,
    "optimizer": dict,
    "guidance": dict,
    "rng": dict,
}


def load_run(path: Path) -> dict:
    """Read the checkpoint of a run (`TrainState.to_tree`), its tensors on the CPU.

    CheckpointError when it cannot be read (`checkpoint.load`), or is of something else.
    """
    tree = checkpoint.load(path)
    for name, kind in _PARTS.items():
        if type(tree.get(name)) is not kind:
            raise CheckpointError(
                f"{path} is not the checkpoint of a run: expected {name} to be of type "
                f"{kind.__name__}, got {type(tree.get(name)).__name__}"
            )
    if tree["step"] < 0:
        raise CheckpointError(f"{path} is not the checkpoint of a run: its step is {tree['step']}")
    return tree


def saved_scene(cfg: TrainConfig, state: dict[str, Tensor]) -> FieldScene:
    """The scene of a checkpoint's ``scene`` entry, on the CPU. CheckpointError where that does not
    fit."""
    scene = FieldScene(cfg)
    _load(scene, state)
    return scene


def _load(scene: Scene, state: dict[str, Tensor]) -> None:
    try:
        scene.load_state_dict(state)
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"the checkpoint does not fit this configuration: {error}. A resumed run keeps "
            f"{scene.fixed}; start a new run (another --output) to change them."
        ) from error
