"""What a run trains: a field, a background, and the renderer that shows them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsd_fast.config import TrainConfig
from dsd_fast.run.checkpoint import CheckpointError
from dsd_fast.scene.background import Background
from dsd_fast.scene.cameras import CameraBatch
from dsd_fast.scene.field import Field
from dsd_fast.scene.renderer import Renderer, RenderOutput


class Scene(nn.Module):
    """Field, background and renderer of a configuration; weights drawn from a CPU generator.

    Its state dict (parameters and occupancy grid) is all that rendering and export need.
    """

    def __init__(self, cfg: TrainConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.field = Field(cfg.field, generator)
        self.background = Background(cfg.background, generator)
        self.renderer = Renderer(cfg.renderer, cfg.material)

    @classmethod
    def from_checkpoint(cls, cfg: TrainConfig, state: dict[str, Tensor]) -> Scene:
        """The scene of a checkpoint's ``scene`` entry. CheckpointError when it does not fit."""
        scene = cls(cfg)
        scene.load_checkpoint(state)
        return scene

    def load_checkpoint(self, state: dict[str, Tensor]) -> None:
        """Take over a checkpoint's ``scene`` entry. CheckpointError when it does not fit."""
        try:
            self.load_state_dict(state)
        except RuntimeError as error:
            raise CheckpointError(
                f"the checkpoint does not fit this configuration: {error}. A resumed run keeps the "
                "sizes of its field; start a new run (another --output) to change them."
            ) from error

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def render(
        self, cameras: CameraBatch, step: int, generator: torch.Generator | None = None
    ) -> RenderOutput:
        """Render as of ``step``; with a generator for training, without one for looking at."""
        return self.renderer(
            self.field, self.background, cameras, step, generator is not None, generator
        )
