"""A task: what a kind of run does in its own way. `train` has all that runs have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dsd_fast.config import TrainConfig
from dsd_fast.diffusion import DiffusionModel, PromptEmbeddings, embed_views, load_model
from dsd_fast.guidance import FORMULATIONS, Guidance, make_guidance
from dsd_fast.run.memory import PhaseMemory
from dsd_fast.run.optimizer import Adam
from dsd_fast.run.outputs import RunFolder
from dsd_fast.run.state import TrainState
from dsd_fast.tasks.step import StepOutput, TrainStep


class Task:
    """Methods in the order in which a run calls them; those without a body do nothing here."""

    # The flag that a run of bad gradients is told to lower.
    lr_flag: str

    def check(self, cfg: TrainConfig, n_runs: int) -> None:
        """ConfigError for what `n_runs` runs side by side cannot have, before any work."""

    def is_finished(self, cfg: TrainConfig, run: RunFolder) -> bool:
        """Whether a run that did all of its steps has written its pictures too."""
        raise NotImplementedError

    def scene(self, cfg: TrainConfig, generator: torch.Generator) -> Any:
        """What is optimised, an nn.Module on the CPU with `load_checkpoint` and `device`."""
        raise NotImplementedError

    def view_dependent(self, cfg: TrainConfig) -> bool:
        """Whether prompts name the view."""
        return cfg.text.view_dependent

    def load(
        self, cfg: TrainConfig, device: torch.device, dtype: torch.dtype | None
    ) -> tuple[DiffusionModel, Any]:
        """The model, and what its guidance is conditioned on: the prompts' embeddings."""
        model = load_model(
            cfg.model,
            device,
            dtype,
            engine=cfg.diffusion.engine,
            n_views=cfg.cameras.n_view,
        )
        prompts = embed_views(
            model,
            cfg.prompt,
            cfg.text.negative,
            prefix=cfg.text.prefix,
            view_dependent=self.view_dependent(cfg),
            overrides=cfg.text.overrides(),
            poor=cfg.text.poor if FORMULATIONS[cfg.guidance.method].needs_poor else None,
        )
        return model, prompts

    def optimizer(self, scene: Any, cfg: TrainConfig, device: torch.device) -> Adam:
        raise NotImplementedError

    def guidance(
        self, cfg: TrainConfig, model: DiffusionModel, prompts: PromptEmbeddings, noise: Tensor
    ) -> Guidance:
        """The guidance of all runs; seed noise [S,C,h,w]."""
        return make_guidance(cfg.guidance, model, prompts, noise, cfg.max_steps)

    def begin(
        self,
        cfg: TrainConfig,
        states: Sequence[TrainState],
        model: DiffusionModel,
        prompts: PromptEmbeddings,
    ) -> None:
        """What new runs start from, where that takes the model."""

    def step(
        self,
        cfg: TrainConfig,
        states: Sequence[TrainState],
        guidance: Guidance,
        device: torch.device,
        phase: PhaseMemory,
    ) -> TrainStep:
        raise NotImplementedError

    def record(self, state: TrainState, output: StepOutput) -> dict[str, float]:
        """What metrics.jsonl tells beside the step's numbers."""
        return {}

    def beside_checkpoint(self, state: TrainState, run: RunFolder) -> None:
        """Write what goes with a checkpoint."""

    def write_preview(self, state: TrainState, cfg: TrainConfig, run: RunFolder) -> None:
        """Write a picture of a run in progress; OSError where that fails."""
        raise NotImplementedError

    def result(self, state: TrainState) -> Any:
        """What `finish` needs of a run, when the diffusion model may go."""
        raise NotImplementedError

    def finish(self, result: Any, cfg: TrainConfig, step: int, run: RunFolder) -> None:
        """Write what a run was for."""
        raise NotImplementedError
