"""Reconstruction of an object from one picture.

python -m dsd_fast.train --task single-view --image chair.png
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from dsd_fast.config import ConfigError, TrainConfig
from dsd_fast.diffusion import ViewModel, load_view_model
from dsd_fast.guidance import Guidance, make_guidance
from dsd_fast.guidance.conditions.pose import OrbitBins, PoseConditions, Reference
from dsd_fast.run.memory import PhaseMemory
from dsd_fast.run.state import TrainState
from dsd_fast.scene.cameras import RandomCameras
from dsd_fast.scene.picture import on_color, read_picture, resized
from dsd_fast.scene.scene import Scene
from dsd_fast.tasks.single_view_step import SingleViewStep
from dsd_fast.tasks.text import TextTask, check_batches

# The picture is kept at this size at most, that of the largest rendering.
LARGEST_PICTURE = 512


class PictureScene(Scene):
    """A scene with the picture that it is to look like; the picture is no part of its state.

    Args:
        rgba: [1,4,S,S] of `read_picture`.
    """

    def __init__(self, cfg: TrainConfig, generator: torch.Generator | None, rgba: Tensor) -> None:
        super().__init__(cfg, generator)
        heights = cfg.cameras.height
        sizes = (heights,) if isinstance(heights, int) else heights
        for size in dict.fromkeys(sizes):
            picture = resized(rgba, size).permute(0, 2, 3, 1).contiguous()
            self.register_buffer(f"picture_{size}", picture, persistent=False)

    def picture(self, size: int) -> Tensor:
        """The picture at the size of a rendering, [1,size,size,4] straight alpha."""
        return self.get_buffer(f"picture_{size}")


class SingleViewTask(TextTask):
    """One object a run, from one picture."""

    def check(self, cfg: TrainConfig, n_runs: int) -> None:
        """ConfigError for what `n_runs` runs side by side cannot have, before any work."""
        check(cfg)
        check_batches(cfg, n_runs)
        _cameras(cfg)

    def load(
        self, cfg: TrainConfig, device: torch.device, dtype: torch.dtype | None
    ) -> tuple[ViewModel, Reference]:
        """The model, conditioned on the picture, and what guidance is told of it."""
        model = load_view_model(cfg.model, device, dtype, engine=cfg.diffusion.engine)
        model.condition(on_color(self._picture(cfg)))
        return model, reference(cfg)

    def scene(self, cfg: TrainConfig, generator: torch.Generator) -> PictureScene:
        return PictureScene(cfg, generator, self._picture(cfg))

    def guidance(
        self, cfg: TrainConfig, model: ViewModel, prompts: Reference, noise: Tensor
    ) -> Guidance:
        conditions = PoseConditions(prompts, model, cfg.guidance)
        return make_guidance(cfg.guidance, model, conditions, noise, cfg.max_steps)

    def step(
        self,
        cfg: TrainConfig,
        states: list[TrainState],
        guidance: Guidance,
        device: torch.device,
        phase: PhaseMemory,
    ) -> SingleViewStep:
        return SingleViewStep(
            cfg, states, guidance, _cameras(cfg), device, capture=cfg.trainer.graphs, phase=phase
        )

    def _picture(self, cfg: TrainConfig) -> Tensor:
        """The picture of a run, [1,4,S,S]; ConfigError where it is not the one of its start."""
        own = cfg.single_view
        rgba = read_picture(own.image, own.recenter)
        digest = hashlib.sha256(Path(own.image).read_bytes()).hexdigest()
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
        tuple(cfg.cameras.elevation_range),
        own.azimuth_bins,
        own.elevation_bins,
        own.polar_pose,
    )


def check(cfg: TrainConfig) -> None:
    """ConfigError for settings with which a picture cannot be reconstructed."""
    cameras = cfg.cameras
    if cfg.single_view.image is None:
        raise ConfigError("--task single-view needs a picture: pass --image chair.png")
    if not -90 < cfg.single_view.elevation < 90:
        raise ConfigError(
            f"--single-view.elevation: expected between -90 and 90, got {cfg.single_view.elevation}"
        )
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


def _cameras(cfg: TrainConfig) -> RandomCameras:
    """On the centres of the bins that have cached trajectories, where there are any."""
    cached = cfg.guidance.method == "dsd" and cfg.guidance.trajectory == "cached"
    return RandomCameras(cfg.cameras, OrbitBins(reference(cfg)) if cached else None)
