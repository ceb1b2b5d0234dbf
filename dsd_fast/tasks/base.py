"""A task: what a kind of run does in its own way. `train` has all that runs have in common.

A new one is a class in a file of its own, registered there (`register`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dsd_fast.config import ConfigError, Preset, TrainConfig, register_task
from dsd_fast.diffusion import DiffusionModel, PromptEmbeddings, embed_views, load_model
from dsd_fast.guidance import FORMULATIONS, Guidance, make_guidance
from dsd_fast.run import needs
from dsd_fast.run.memory import PhaseMemory
from dsd_fast.run.optimizer import Adam
from dsd_fast.run.outputs import RunFolder
from dsd_fast.run.state import TrainState
from dsd_fast.scene.protocol import Scene
from dsd_fast.tasks.step import Cameras, StepOutput, TrainStep

# The tasks by the name that `--task` asks for.
TASKS: dict[str, Task] = {}


def register(name: str, preset: Preset | None = None) -> Callable[[type[Task]], type[Task]]:
    """Decorator of a class of tasks: `--task NAME` does one.

    Args:
        preset: its starting values (`config.register_task`); without, it takes those of the presets
            as they are.
    """

    def add(task: type[Task]) -> type[Task]:
        TASKS[name] = task()
        register_task(name, preset)
        return task

    return add


class Task:
    """Methods in the order in which a run calls them; those without a body do nothing here."""

    # The flag that a run of bad gradients is told to lower.
    lr_flag: str
    # What one run makes, in a word.
    makes: str = "object"
    # What its steps are.
    step_class: type[TrainStep] = TrainStep

    def check(self, cfg: TrainConfig, n_runs: int) -> None:
        """ConfigError for what `n_runs` runs side by side cannot have, before any work."""
        needs.check(cfg, n_runs)
        if cfg.guidance.has_anchors and (cfg.cameras.n_view == 1 or cfg.multiview.at_bins):
            raise ConfigError(
                "guidance.anchors: expected a multi-view model, some of whose views come from "
                "elsewhere: pass --cameras.n-view 4 --multiview.no-at-bins, or "
                f"--guidance.anchors 0; got {cfg.guidance.anchors}"
            )
        self.cameras(cfg)  # ValueError for what they cannot do

    def is_finished(self, cfg: TrainConfig, run: RunFolder) -> bool:
        """Whether a run that did all of its steps has written its pictures too."""
        raise NotImplementedError

    def scene(self, cfg: TrainConfig, generator: torch.Generator) -> Scene:
        """What is optimised, on the CPU."""
        raise NotImplementedError

    def cameras(self, cfg: TrainConfig) -> Cameras:
        """Where a step's views come from."""
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

    def optimizer(self, scene: Scene, cfg: TrainConfig, device: torch.device) -> Adam:
        return Adam(scene.trainables(), cfg.optimizer.betas, cfg.optimizer.eps, device)

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
        cameras, capture = self.cameras(cfg), cfg.trainer.graphs
        return self.step_class(cfg, states, guidance, cameras, device, capture, phase)

    def doing(self, cfg: TrainConfig, step: int) -> str:
        """What a run does at a step, in words for whoever waits for it."""
        return "shaping" if 2 * step < cfg.max_steps else "adding detail"

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

    def finish(
        self,
        result: Any,
        cfg: TrainConfig,
        step: int,
        run: RunFolder,
        say: Callable[[str], None],
    ) -> None:
        """Write what a run was for; `say` shows what is being done."""
        raise NotImplementedError
