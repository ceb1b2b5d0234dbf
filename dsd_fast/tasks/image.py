"""2D optimisation: an image or a latent in the place of a scene, without cameras or rendering.

python -m dsd_fast.train --task image --prompt "an armchair" --seed 0
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from dsd_fast.config import TrainConfig
from dsd_fast.diffusion import DiffusionModel, PromptEmbeddings, view_prompts
from dsd_fast.diffusion.condition import Condition
from dsd_fast.diffusion.loader import picture_shape
from dsd_fast.guidance import (
    Guidance,
    combine,
    view_embeddings,
)
from dsd_fast.guidance.conditions.text import direction
from dsd_fast.guidance.exact import ExactForm
from dsd_fast.guidance.levels import LAST_LEVEL
from dsd_fast.guidance.rows import expand_rows
from dsd_fast.picture_file import read_rgba
from dsd_fast.run import pictures
from dsd_fast.run.memory import PhaseMemory
from dsd_fast.run.optimizer import Adam
from dsd_fast.run.outputs import RunFolder
from dsd_fast.run.state import TrainState
from dsd_fast.scene.cameras import CameraBatch, eval_camera
from dsd_fast.scene.image import Image, ImageSeen
from dsd_fast.scene.protocol import Scene
from dsd_fast.tasks.base import Task, register
from dsd_fast.tasks.step import NORMS, SCALING, TrainStep, Weights

log = logging.getLogger("dsd_fast.train")

# Pictures of the strip over the progress: some of the previews, and the result.
STRIP_PICTURES = 8


class StillView:
    """The one view that an image asks for, in the place of cameras; no picture is taken of it."""

    def __init__(self, cfg: TrainConfig) -> None:
        azimuth = cfg.image.azimuth
        # Without a view to ask for all views have one text.
        at = (0.0, 0.0) if azimuth is None else (azimuth, cfg.image.elevation)
        self.view = eval_camera(cfg.cameras, *at)

    def sample(self, step: int, generator: torch.Generator) -> CameraBatch:
        return self.view


class ImageStep(TrainStep):
    """Steps of images, whose learning rate has a schedule."""

    figures = (*NORMS, "lr", *SCALING)

    def _weights(self, step: int) -> dict[str, float]:
        image = self.cfg.image
        share = 1.0 if image.exact else image.share_of_lr(step, self.cfg.max_steps)
        return super()._weights(step) | {"share": share}

    def _figures(self, seen: ImageSeen, weights: Weights) -> dict[str, Tensor]:
        return {"lr": torch.as_tensor(weights["share"]) * self.cfg.image.rate}


class UnitStep(Adam):
    """Steps of unit length in place of Adam's: the parameter less its gradient."""

    def _move(
        self, name: str, gradient: Tensor, found_inf: Tensor, share: Tensor | float | None
    ) -> None:
        # Its share of the rate is all of it (`ImageStep`).
        value = self._trainables[name].parameter.detach()
        # Where the gradient is not finite, so is their difference.
        moved = value - gradient / self.scale
        value.copy_(torch.where(found_inf.bool(), value, moved))


@register("image")
class ImageTask(Task):
    """One image a run."""

    lr_flag = "--image.lr"
    makes = "image"
    step_class = ImageStep

    def view_dependent(self, cfg: TrainConfig) -> bool:
        """Whether prompts name the view: only where one is asked for."""
        return cfg.image.azimuth is not None

    def scene(self, cfg: TrainConfig, generator: torch.Generator) -> Image:
        """The image at its start, as noise."""
        shape = picture_shape(cfg.model)
        latent_shape = (shape.channels, shape.latent_size, shape.latent_size)
        return Image(cfg.image, latent_shape, shape.image_size, generator)

    def cameras(self, cfg: TrainConfig) -> StillView:
        return StillView(cfg)

    def optimizer(self, scene: Scene, cfg: TrainConfig, device: torch.device) -> Adam:
        kind = UnitStep if cfg.image.exact else Adam
        return kind(scene.trainables(), cfg.image.betas, cfg.image.eps, device)

    def guidance(
        self, cfg: TrainConfig, model: DiffusionModel, prompts: PromptEmbeddings, noise: Tensor
    ) -> Guidance:
        if cfg.image.exact:
            return ExactForm(cfg.guidance, model, prompts, noise, cfg.max_steps)
        return super().guidance(cfg, model, prompts, noise)

    def begin(
        self,
        cfg: TrainConfig,
        states: Sequence[TrainState],
        model: DiffusionModel,
        prompts: PromptEmbeddings,
    ) -> None:
        """Have images begin as what the model sees in their seed noise, where that is asked for."""
        if cfg.image.exact or cfg.image.start == "noise":
            return
        for state in states:
            noise = state.noise.to(model.device)
            latent = first_prediction(cfg, model, prompts, noise)
            state.scene.set_latent(latent, model.decode_latents)
        _release_decoder(model)

    def step(
        self,
        cfg: TrainConfig,
        states: Sequence[TrainState],
        guidance: Guidance,
        device: torch.device,
        phase: PhaseMemory,
    ) -> TrainStep:
        if isinstance(guidance, ExactForm):
            # From here on one memory: what the guidance writes is what a checkpoint saves.
            for state, link in zip(states, guidance.link.split(1)):
                link.copy_(state.scene.link)
                state.scene.link = link
        return super().step(cfg, states, guidance, device, phase)

    def beside_checkpoint(self, state: TrainState, run: RunFolder) -> None:
        """The image of a checkpoint: what comparisons look at."""
        pictures.write_png(_pixels(state), run.image)

    def write_preview(self, state: TrainState, cfg: TrainConfig, run: RunFolder) -> None:
        pictures.write_png(_pixels(state), run.previews / f"step-{state.step:06d}.png")

    def result(self, state: TrainState) -> np.ndarray:
        return _pixels(state)

    def finish(
        self,
        result: np.ndarray,
        cfg: TrainConfig,
        step: int,
        run: RunFolder,
        say: Callable[[str], None],
    ) -> None:
        """Write the image, and the strip of what it was on the way."""
        pictures.write_png(result, run.image)
        pictures.write_png(progress_strip(run, step, result), run.preview)

    def is_finished(self, cfg: TrainConfig, run: RunFolder) -> bool:
        return run.image.exists() and run.preview.exists()


def text_of(cfg: TrainConfig) -> str:
    """The prompt that a 2D run asks with: the bare one, or that of the view its camera is in."""
    if cfg.image.azimuth is None:
        return cfg.prompt
    view = StillView(cfg).view
    prompts = view_prompts(cfg.prompt, prefix=cfg.text.prefix, overrides=cfg.text.overrides())
    return prompts[int(direction(view.elevation_deg, view.azimuth_deg))]


def first_prediction(
    cfg: TrainConfig, model: DiffusionModel, prompts: PromptEmbeddings, noise: Tensor
) -> Tensor:
    """The clean latent that the guided model sees in noise at the highest level, [B,C,h,w].

    (n - sigma eps(n)) / alpha at level 999: where Score Distillation via Inversion (Lukoianov et
    al. 2024) begins in 2D.

    Args:
        noise: [B,C,h,w] float32 on the model's device.
    """
    guidance, n_items = cfg.guidance, len(noise)
    view = StillView(cfg).view
    text, weights = view_embeddings(
        prompts.text_vd,
        prompts.uncond_vd,
        view.elevation_deg.expand(n_items),
        view.azimuth_deg.expand(n_items),
        guidance.use_perp_neg,
    )
    levels = torch.full((n_items,), LAST_LEVEL)
    rows = expand_rows(noise, guidance.use_perp_neg)
    eps = combine(
        model.predict_noise(rows, expand_rows(levels, guidance.use_perp_neg), Condition(text)),
        weights,
        guidance.guidance_scale,
        standard_cfg=guidance.standard_cfg,
    )
    return model.noise_path.clean(noise, eps, levels)


def progress_strip(run: RunFolder, step: int, result: np.ndarray) -> np.ndarray:
    """Previews of a run up to a step, evenly chosen, and its result, side by side.

    result: uint8 [H,W,3]; previews of other sizes, of another decoder, are left out, as are those
    that cannot be read, with a line in the log.
    """
    found = sorted(
        (int(path.stem[5:]), path)
        for path in run.previews.glob("step-*.png")
        if re.fullmatch("[0-9]{1,18}", path.stem[5:])
    )
    paths = [path for at, path in found if at < step]
    room = STRIP_PICTURES - 1
    chosen = [paths[i * len(paths) // room] for i in range(room)] if len(paths) > room else paths
    images = []
    for path in chosen:
        try:
            images.append(read_rgba(path)[..., :3])
        except (FileNotFoundError, ValueError) as error:
            log.warning("left out of the strip: %s", error)
    return np.concatenate([*(i for i in images if i.shape == result.shape), result], axis=1)


def _pixels(state: TrainState) -> np.ndarray:
    """The image of a run, uint8 [H,W,3]."""
    pixels = pictures.to_uint8(state.scene.picture(state.model.decode_latents))
    _release_decoder(state.model)
    return pixels


def _release_decoder(model: DiffusionModel) -> None:
    """On a GPU its memory is the UNet's (`load_model`)."""
    if model.device.type == "cuda":
        model.release_decoder()
