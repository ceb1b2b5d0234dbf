"""Reconstruction of an object from one picture.

python -m dsd_fast.train --task single-view --image chair.png
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

import torch
from torch import Tensor

from dsd_fast.config import ConfigError, TrainConfig
from dsd_fast.diffusion import ViewModel, load_view_model
from dsd_fast.guidance import Guidance, make_guidance
from dsd_fast.guidance.conditions.pose import OrbitBins, PoseConditions, Reference
from dsd_fast.run.state import TrainState
from dsd_fast.scene.cameras import CameraBatch, RandomCameras, eval_camera
from dsd_fast.scene.losses import REGULARIZERS
from dsd_fast.scene.picture import on_color, read_picture
from dsd_fast.scene.picture_scene import PICTURE_LOSSES, PictureScene
from dsd_fast.scene.renderer import RenderOutput
from dsd_fast.schedules import Schedule
from dsd_fast.tasks.base import register
from dsd_fast.tasks.step import Drawn, Weights
from dsd_fast.tasks.text import FieldStep, TextTask


class ReferenceCameras(RandomCameras):
    """The reference view, and random ones behind it, which guidance is asked about.

    Random views are on the centres of the bins that have cached trajectories, where there are any.
    """

    def __init__(self, cfg: TrainConfig) -> None:
        cached = cfg.guidance.method == "dsd" and cfg.guidance.trajectory == "cached"
        super().__init__(cfg.cameras, OrbitBins(reference(cfg)) if cached else None)
        self._elevation = cfg.single_view.elevation

    def sample(self, step: int, generator: torch.Generator) -> CameraBatch:
        """All views of a step; the angles are those of the random ones."""
        views = super().sample(step, generator)
        at = eval_camera(self.cfg, 0.0, self._elevation, size=(views.height, views.width))
        here, others = at.tensors(), views.tensors()
        return replace(views, **{name: torch.cat([here[name], others[name]]) for name in others})


class SingleViewStep(FieldStep):
    """The reference view is held against the picture, the random ones are guided; both are
    regularised."""

    losses = ("dsd", *PICTURE_LOSSES, *REGULARIZERS)

    def _weights(self, step: int) -> dict[str, float]:
        schedules = self.cfg.single_view.schedules().items()
        own = {name: Schedule.parse(value)(step) for name, value in schedules}
        return super()._weights(step) | {name: w for name, w in own.items() if w != 0}

    def _guided(self, seen: RenderOutput) -> Tensor:
        return seen.rgb[1:]

    def _losses(
        self, state: TrainState, drawn: Drawn, seen: RenderOutput, weights: Weights
    ) -> dict[str, Tensor]:
        losses = state.scene.losses(drawn.views, drawn.draws, seen, weights)
        for name in REGULARIZERS:
            if name in weights:
                # Against emptiness the reference view has its picture.
                of = _of_views(seen, 1) if name == "sparsity" else seen
                losses[name] = REGULARIZERS[name](of)
        return losses


@register("single-view")
class SingleViewTask(TextTask):
    """One object a run, from one picture."""

    step_class = SingleViewStep

    def check(self, cfg: TrainConfig, n_runs: int) -> None:
        """ConfigError for what `n_runs` runs side by side cannot have, before any work."""
        check(cfg)
        super().check(cfg, n_runs)

    def load(
        self, cfg: TrainConfig, device: torch.device, dtype: torch.dtype | None
    ) -> tuple[ViewModel, Reference]:
        """The model, conditioned on the picture, and what guidance is told of it."""
        model = load_view_model(cfg.model, device, dtype, engine=cfg.diffusion.engine)
        model.condition(on_color(self._picture(cfg)))
        return model, reference(cfg)

    def scene(self, cfg: TrainConfig, generator: torch.Generator) -> PictureScene:
        heights = cfg.cameras.height
        sizes = (heights,) if isinstance(heights, int) else heights
        return PictureScene(cfg, generator, self._picture(cfg), sizes)

    def cameras(self, cfg: TrainConfig) -> ReferenceCameras:
        return ReferenceCameras(cfg)

    def guidance(
        self, cfg: TrainConfig, model: ViewModel, prompts: Reference, noise: Tensor
    ) -> Guidance:
        conditions = PoseConditions(prompts, model, cfg.guidance)
        return make_guidance(cfg.guidance, model, conditions, noise, cfg.max_steps)

    def _picture(self, cfg: TrainConfig) -> Tensor:
        """The picture of a run, [1,4,S,S]; ConfigError where it is not the one of its start."""
        own = cfg.single_view
        rgba = read_picture(own.image, own.recenter)
        assert own.image is not None
        digest = hashlib.sha256(own.image.read_bytes()).hexdigest()
        if own.digest and own.digest != digest:
            raise ConfigError(
                f"{own.image} is not the picture that this run was started with: put that back, "
                "or start a new run"
            )
        own.digest = digest
        return rgba


def reference(cfg: TrainConfig) -> Reference:
    """Where the picture was taken from, as guidance is told."""
    own = cfg.single_view
    return Reference(
        own.elevation,
        0.0,
        cfg.cameras.elevation_range,
        own.azimuth_bins,
        own.elevation_bins,
        own.polar_pose,
    )


def check(cfg: TrainConfig) -> None:
    """ConfigError for settings with which a picture cannot be reconstructed."""
    cameras = cfg.cameras
    near, far = cameras.camera_distance_range
    if near != far or near != cameras.eval_camera_distance:
        raise ConfigError(
            "--task single-view: training cameras stand as far away as the picture's, expected "
            "cameras.camera_distance_range of twice cameras.eval_camera_distance = "
            f"{cameras.eval_camera_distance}, got {near} {far}"
        )
    if tuple(cameras.fovy_range) != (cameras.eval_fovy_deg,) * 2:
        raise ConfigError(
            "--task single-view: training cameras have the picture's field of view, expected "
            f"cameras.fovy_range of twice cameras.eval_fovy_deg = {cameras.eval_fovy_deg}, got "
            f"{cameras.fovy_range[0]} {cameras.fovy_range[1]}"
        )
    if cameras.height != cameras.width:
        raise ConfigError(
            "--task single-view renders squares, as its picture is one: expected the same "
            f"cameras.height and cameras.width, got {cameras.height} and {cameras.width}"
        )
    if cfg.material.ambient_only_steps < cfg.max_steps and cfg.material.diffuse_prob > 0:
        raise ConfigError(
            "--task single-view: the picture's light is part of its colours, so views cannot be "
            "lit beside it: expected material.diffuse_prob 0, got "
            f"{cfg.material.diffuse_prob}"
        )
    try:
        PoseConditions.check(cfg.guidance)
        OrbitBins(reference(cfg))
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _of_views(image: RenderOutput, first: int) -> RenderOutput:
    """The views from number `first` on; the count of samples is that of all."""
    parts = {name: value[first:] for name, value in vars(image).items() if name != "n_samples"}
    return RenderOutput(**parts, n_samples=image.n_samples)
