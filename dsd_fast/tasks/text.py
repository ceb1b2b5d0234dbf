"""Text to 3D: a scene that cameras see from all around."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dsd_fast.asset import formats
from dsd_fast.config import ConfigError, TrainConfig
from dsd_fast.diffusion import DiffusionModel, PromptEmbeddings
from dsd_fast.guidance import Guidance, Plan, make_guidance
from dsd_fast.guidance.conditions.multiview import MultiViewConditions, camera_lattice
from dsd_fast.run import memory, pictures
from dsd_fast.run.about import about
from dsd_fast.run.outputs import RunFolder
from dsd_fast.run.state import TrainState
from dsd_fast.scene.cameras import RandomCameras
from dsd_fast.scene.field_scene import FieldScene
from dsd_fast.scene.losses import REGULARIZERS, regularizer_weights
from dsd_fast.scene.renderer import RenderOutput
from dsd_fast.scene.surface import MeshError
from dsd_fast.tasks.base import Task, register
from dsd_fast.tasks.step import NORMS, SCALING, Cameras, Drawn, StepOutput, TrainStep, Weights

log = logging.getLogger("dsd_fast.train")


class FieldStep(TrainStep):
    """Steps of field scenes, which are regularised."""

    losses = ("dsd", *REGULARIZERS)
    figures = (*NORMS, "opacity", *SCALING, "samples")

    def _weights(self, step: int) -> dict[str, float]:
        weights = super()._weights(step) | regularizer_weights(self.cfg.loss, step)
        share = self.cfg.optimizer.share(step)
        return weights if share is None else {**weights, "share": share}

    def _seeing(self, plan: Plan, drawn: Sequence[Drawn], seen: Sequence[RenderOutput]) -> Plan:
        runs = zip(self.states, drawn, seen)
        return plan.seeing(torch.cat([s.scene.surface(d.views, image) for s, d, image in runs]))

    def _losses(
        self, state: TrainState, drawn: Drawn, seen: RenderOutput, weights: Weights
    ) -> dict[str, Tensor]:
        return {name: REGULARIZERS[name](seen) for name in REGULARIZERS if name in weights}

    def _figures(self, seen: RenderOutput, weights: Weights) -> dict[str, Tensor]:
        return {"opacity": seen.opacity.mean(), "samples": seen.n_samples}


@register("text")
class TextTask(Task):
    """One object a run."""

    lr_flag = "--optimizer.geometry-lr"
    step_class = FieldStep

    def check(self, cfg: TrainConfig, n_runs: int) -> None:
        n_view = cfg.cameras.n_view
        if n_runs > 1 and memory.largest(cfg.cameras.batch_size) > n_view:
            own = "view" if n_view == 1 else f"{n_view} views"
            raise ConfigError(
                f"--num-seeds needs --cameras.batch-size {n_view}: each seed has its own {own}"
            )
        if n_view > 1:
            MultiViewConditions.check(cfg.guidance)
        super().check(cfg, n_runs)

    def is_finished(self, cfg: TrainConfig, run: RunFolder) -> bool:
        """The contact sheet is the last of a run's files."""
        return run.preview.exists() and (run.turntable.exists() or not cfg.pictures.turntable)

    def scene(self, cfg: TrainConfig, generator: torch.Generator) -> FieldScene:
        return FieldScene(cfg, generator)

    def cameras(self, cfg: TrainConfig) -> Cameras:
        lattice = cfg.guidance.lattice
        if cfg.cameras.n_view > 1:
            ranges = (cfg.cameras.elevation_range, cfg.cameras.n_view)
            lattice = camera_lattice(cfg.guidance, cfg.multiview, *ranges)
            if lattice is not None and not cfg.multiview.at_bins:
                return RandomCameras(cfg.cameras, lattice, cfg.guidance.is_anchored)
        return RandomCameras(cfg.cameras, lattice)

    def guidance(
        self, cfg: TrainConfig, model: DiffusionModel, prompts: PromptEmbeddings, noise: Tensor
    ) -> Guidance:
        if cfg.cameras.n_view == 1:
            return super().guidance(cfg, model, prompts, noise)
        views = (cfg.multiview, cfg.cameras.elevation_range)
        conditions = MultiViewConditions(prompts, model, cfg.guidance, *views)
        return make_guidance(cfg.guidance, model, conditions, noise, cfg.max_steps)

    def doing(self, cfg: TrainConfig, step: int) -> str:
        """Detail comes with the last and largest size of renderings, where they grow."""
        milestones = [at for at in cfg.cameras.resolution_milestones if 0 < at < cfg.max_steps]
        if not milestones:
            return super().doing(cfg, step)
        return "shaping" if step < milestones[-1] else "adding detail"

    def record(self, state: TrainState, output: StepOutput) -> dict[str, float]:
        return {"dropped_samples": state.scene.n_dropped, "size": output.height}

    def write_preview(self, state: TrainState, cfg: TrainConfig, run: RunFolder) -> None:
        views, size = cfg.pictures.preview_views, cfg.pictures.preview_size
        sheet = pictures.contact_sheet(state.scene, cfg.cameras, state.step, views, size)
        pictures.write_png(sheet, run.previews / f"step-{state.step:06d}.png")

    def result(self, state: TrainState) -> FieldScene:
        return state.scene

    def finish(
        self,
        result: FieldScene,
        cfg: TrainConfig,
        step: int,
        run: RunFolder,
        say: Callable[[str], None],
    ) -> None:
        """Write the mesh, the turntable and the contact sheet of a trained scene."""
        if cfg.pictures.mesh:
            say("finishing: the mesh")
            write_mesh(result, cfg, step, run, say)
        if cfg.pictures.turntable:
            say("finishing: the video")
            pictures.write_turntable(result, cfg, step, run.turntable)
        say("finishing: the picture")
        views, size = cfg.pictures.sheet_views, cfg.pictures.sheet_size
        sheet = pictures.contact_sheet(result, cfg.cameras, step, views, size)
        pictures.write_png(sheet, run.preview)


def write_mesh(
    scene: FieldScene, cfg: TrainConfig, step: int, run: RunFolder, say: Callable[[str], None]
) -> None:
    """Write the mesh; a scene without a surface is worth a warning, not the loss of the rest."""
    try:
        made = scene.asset(cfg.mesh, step, say=lambda what: say(f"finishing: the mesh, {what}"))
    except MeshError as error:
        log.warning("no mesh: %s", error)
        return
    asset = made.asset.called(cfg.prompt, about(cfg, step, run))
    formats.write(asset, run.mesh_as(cfg.mesh.format))
