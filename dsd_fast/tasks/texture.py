"""Painting a mesh that somebody brings.

python -m dsd_fast.train --task texture --mesh chair.glb --prompt "a wooden chair" --num-seeds 4
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dsd_fast.config import CameraConfig, ConfigError, TrainConfig
from dsd_fast.diffusion import DiffusionModel, PromptEmbeddings
from dsd_fast.guidance import DSDGuidance, Guidance
from dsd_fast.run import pictures
from dsd_fast.run.about import about
from dsd_fast.run.outputs import RunFolder
from dsd_fast.run.state import TrainState
from dsd_fast.scene.atlas import Atlas, AtlasError
from dsd_fast.scene.cameras import eval_camera
from dsd_fast.scene.mesh_file import MeshFile, MeshFileError, read_mesh_file
from dsd_fast.scene.mesh_scene import MeshScene, Surface
from dsd_fast.scene.renderer import RenderOutput
from dsd_fast.scene.texture import choose_atlas, write_painted
from dsd_fast.tasks.base import register
from dsd_fast.tasks.step import Drawn, StepOutput, TrainStep, Weights
from dsd_fast.tasks.text import FieldStep, TextTask


class MeshStep(FieldStep):
    """Steps of scenes whose shape is given: there is nothing to regularise."""

    losses = TrainStep.losses

    def _weights(self, step: int) -> dict[str, float]:
        weights = TrainStep._weights(self, step)
        share = self.cfg.optimizer.share(step)
        return weights if share is None else {**weights, "share": share}

    def _losses(
        self, state: TrainState, drawn: Drawn, seen: RenderOutput, weights: Weights
    ) -> dict[str, Tensor]:
        return {}


class Canvas(NamedTuple):
    """What is painted."""

    mesh: MeshFile  # as it is written
    surface: Surface  # as it is looked at
    atlas: Atlas | None  # where its texture lies; None where vertices are coloured


class MeshTask(TextTask):
    """Colours of a mesh, whose shape stays."""

    makes = "texture"
    step_class = MeshStep

    def canvas(self, cfg: TrainConfig) -> Canvas:
        """The mesh of a run; ConfigError where there is none."""
        raise NotImplementedError

    def check(self, cfg: TrainConfig, n_runs: int) -> None:
        """ConfigError for what `n_runs` runs side by side cannot have, before any work."""
        super().check(cfg, n_runs)
        self.canvas(cfg)

    def scene(self, cfg: TrainConfig, generator: torch.Generator) -> MeshScene:
        return MeshScene(cfg, self.canvas(cfg).surface, cfg.texture.samples, generator)

    def record(self, state: TrainState, output: StepOutput) -> dict[str, float]:
        return {"size": output.height}

    def finish(
        self,
        result: MeshScene,
        cfg: TrainConfig,
        step: int,
        run: RunFolder,
        say: Callable[[str], None],
    ) -> None:
        """Write the painted mesh, the turntable and the contact sheet."""
        if cfg.pictures.mesh:
            say("finishing: the texture")
            mesh, surface, atlas = self.canvas(cfg)

            def colors(points: np.ndarray) -> np.ndarray:
                return result.colors(points, step)

            told = about(cfg, step, run)
            write_painted(mesh, atlas, colors, surface.points, cfg.texture.size, run.mesh, told)
        if cfg.pictures.turntable:
            say("finishing: the video")
            pictures.write_turntable(result, cfg, step, run.turntable)
        say("finishing: the picture")
        views, size = cfg.pictures.sheet_views, cfg.pictures.sheet_size
        sheet = pictures.contact_sheet(result, cfg.cameras, step, views, size)
        pictures.write_png(sheet, run.preview)


@register("texture")
class TextureTask(MeshTask):
    """One texture a run; runs of the same mesh and settings share geometry and coordinates."""

    def guidance(
        self, cfg: TrainConfig, model: DiffusionModel, prompts: PromptEmbeddings, noise: Tensor
    ) -> Guidance:
        """With DSD the seeds' trajectories begin from the shape: those that begin from noise come
        to objects of other shapes, whose colours fit this one nowhere."""
        guidance = super().guidance(cfg, model, prompts, noise)
        if isinstance(guidance, DSDGuidance):
            scene = self.scene(cfg, torch.Generator()).to(model.device)
            guidance.begin_from(shapes(scene, cfg.cameras, guidance))
        return guidance

    def doing(self, cfg: TrainConfig, step: int) -> str:
        return "painting"

    def canvas(self, cfg: TrainConfig) -> Canvas:
        """ConfigError where there is no mesh, or not the one of the run's start."""
        own = cfg.texture
        assert own.mesh is not None  # cfg.validate
        try:
            digest = hashlib.sha256(own.mesh.read_bytes()).hexdigest()
        except OSError as error:
            raise ConfigError(f"--mesh {own.mesh}: cannot be read: {error.strerror}") from error
        if own.digest and own.digest != digest:
            raise ConfigError(
                f"{own.mesh} is not the mesh that this run was started with: put that back, or "
                "start a new run"
            )
        try:
            found = _read(own.mesh, digest, own.up, own.uv, own.unwrap_seconds, own.turn)
        except (MeshFileError, ImportError) as error:
            raise ConfigError(f"--mesh: {error}") from error
        except AtlasError as error:
            raise ConfigError(
                f"--texture.uv keep: {error}: pass --texture.uv new for new ones"
            ) from error
        own.digest = digest
        return found


@lru_cache(maxsize=1)
def _read(path: Path, digest: str, up: str, uv: str, seconds: float, turn: float) -> Canvas:
    """Once for all seeds of a command, and for its beginning and end."""
    mesh = read_mesh_file(path, up)
    return Canvas(mesh, mesh.surface(turn), choose_atlas(mesh, uv, seconds))


@torch.no_grad()
def shapes(scene: MeshScene, cfg: CameraConfig, guidance: Guidance) -> Tensor:
    """The shape alone as the cameras of trajectories see it, latents [n_bins*V,C,h,w]."""
    fovy = sum(cfg.fovy_range) / 2
    distance = sum(cfg.camera_distance_range) / 2
    if cfg.relative_distance:
        distance /= math.tan(math.radians(fovy) / 2)
    middle = replace(cfg, eval_camera_distance=distance, eval_fovy_deg=fovy)
    bins, n_views, size = guidance.conditions.bins, guidance.n_views, guidance.model.image_size
    latents = []
    for number in range(len(bins)):
        elevation, azimuth = bins.camera(number)
        for view in range(n_views):
            at = azimuth + 360.0 / n_views * view
            camera = eval_camera(middle, at, elevation, (size, size), scene.device)
            latents.append(guidance.encode(scene.clay(camera), None))
    return torch.cat(latents)
