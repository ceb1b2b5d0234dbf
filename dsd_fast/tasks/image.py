"""2D optimisation: an image or a latent in the place of a scene, without cameras or rendering.

python -m dsd_fast.train --task image --prompt "an armchair" --seed 0
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dsd_fast.config import TrainConfig
from dsd_fast.diffusion import DiffusionModel, PromptEmbeddings, view_prompts
from dsd_fast.diffusion.condition import Condition
from dsd_fast.diffusion.loader import picture_shape
from dsd_fast.guidance import (
    Guidance,
    Plan,
    combine,
    distillation_loss,
    view_embeddings,
)
from dsd_fast.guidance.conditions.text import direction
from dsd_fast.guidance.exact import ExactForm
from dsd_fast.guidance.levels import LAST_LEVEL
from dsd_fast.guidance.rows import expand_rows
from dsd_fast.run import pictures
from dsd_fast.run.memory import PhaseMemory
from dsd_fast.run.optimizer import Adam
from dsd_fast.run.outputs import RunFolder
from dsd_fast.run.state import TrainState
from dsd_fast.scene.image import Image, ImageConfig
from dsd_fast.tasks.base import Task
from dsd_fast.tasks.step import TrainStep

log = logging.getLogger("dsd_fast.train")

# Names of a run's numbers, in their order.
NUMBERS = (
    "dsd",
    "loss",
    "guidance_norm",
    "gradient_norm",
    "lr",
    "loss_scale",
    "skipped",
    "bad_run",
)
# Pictures of the strip over the progress: some of the previews, and the result.
STRIP_PICTURES = 8


class _View(NamedTuple):
    """The view whose text is asked for, as `CameraBatch` has it."""

    elevation_deg: Tensor  # [1] on the CPU
    azimuth_deg: Tensor
    height: int


@dataclass(frozen=True)
class _Drawn:
    """What chance decided for one run, on the CPU."""

    views: _View
    noise: Tensor | None  # of the posterior
    t: Tensor
    t_delta: Tensor
    chance: dict[str, Tensor]  # of the guidance, beside its levels

    def tensors(self) -> dict[str, Tensor]:
        """What the device needs of it, by name."""
        return {} if self.noise is None else {"noise": self.noise}

    def replaced(self, tensors: dict[str, Tensor]) -> _Drawn:
        """The same with tensors on the device."""
        return _Drawn(self.views, tensors.get("noise"), self.t, self.t_delta, self.chance)


class ImageStep(TrainStep):
    """Steps of images that differ in their seed alone; see `TrainStep`."""

    names = NUMBERS

    def _can_capture(self) -> bool:
        return True

    def _rooms(self, drawn: Sequence[_Drawn]) -> tuple[int, ...] | None:
        return () if self._captures else None

    def _levels(self) -> tuple[int, ...]:
        return ()

    def _watch_replay(self, drawn: Sequence[_Drawn]) -> None:
        pass

    def _weights(self, step: int) -> dict[str, float]:
        image = self.cfg.image
        share = 1.0 if image.exact else image.share_of_lr(step, self.cfg.max_steps)
        return {"dsd": self._dsd_weight(step), "share": share}

    def _draw(self, state: TrainState, step: int) -> _Drawn:
        noise, image = None, self.cfg.image
        if state.scene.kind == "rgb" and self.cfg.guidance.sample_posterior:
            noise = self.guidance.model.draw_posterior(1, state.rng.guidance)
        t, t_delta = self.guidance.levels(1, step, state.rng.guidance)
        chance = self.guidance.draw_noise(1, state.rng.guidance)
        return _Drawn(_view(image, self.guidance.model.image_size), noise, t, t_delta, chance)

    def _run(
        self,
        drawn: Sequence[_Drawn],
        plan: Plan,
        weights: dict[str, float] | dict[str, Tensor],
    ) -> Tensor:
        latents = []
        for state, d in zip(self.states, drawn):
            with self._phase("encode"):
                value = state.scene.value
                if state.scene.kind == "rgb":
                    value = self.guidance.encode(value, d.noise)
                latents.append(value)
        with self._phase("guidance"):
            guided = self.guidance.at_plan(torch.cat(latents).detach(), plan)
        rows = []
        for state, x, gradient in zip(self.states, latents, guided.grad.split(1)):
            loss = distillation_loss(x, gradient)
            weighted = weights["dsd"] * loss
            optimizer = state.optimizer
            with self._phase("backward and update"):
                # One run's bad gradient leaves the others' steps alone.
                norm = optimizer.step(weighted, gradient.isfinite().all(), weights["share"])
            lr = torch.as_tensor(weights["share"]) * self.cfg.image.rate
            values = [loss, weighted, gradient.norm(), norm, lr.to(loss.device), optimizer.scale]
            values += [optimizer.skipped, optimizer.bad_run]
            rows.append(torch.stack([value.detach().reshape(()).float() for value in values]))
        return torch.stack(rows)


class UnitStep(Adam):
    """Steps of unit length in place of Adam's: the parameter less its gradient."""

    def _move(self, name: str, parameter: nn.Parameter, found_inf: Tensor) -> None:
        value = parameter.detach()
        # Where the gradient is not finite, so is their difference.
        moved = value - parameter.grad / self.scale
        value.copy_(torch.where(found_inf.bool(), value, moved))


class ImageTask(Task):
    """One image a run, told from other tasks by `--task image`."""

    lr_flag = "--image.lr"

    def view_dependent(self, cfg: TrainConfig) -> bool:
        """Whether prompts name the view: only where one is asked for."""
        return cfg.image.azimuth is not None

    def scene(self, cfg: TrainConfig, generator: torch.Generator) -> Image:
        """The image at its start, as noise."""
        return Image(cfg.image, picture_shape(cfg.model), generator)

    def optimizer(self, scene: Image, cfg: TrainConfig, device: torch.device) -> Adam:
        image = cfg.image
        kind = UnitStep if image.exact else Adam
        rates = {scene.kind: image.rate}
        return kind({scene.kind: scene.value}, rates, image.betas, image.eps, device)

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
            state.scene.set_latent(first_prediction(cfg, model, prompts, noise), model)
        _release_decoder(model)

    def step(
        self,
        cfg: TrainConfig,
        states: Sequence[TrainState],
        guidance: Guidance,
        device: torch.device,
        phase: PhaseMemory,
    ) -> ImageStep:
        if cfg.image.exact:
            # From here on one memory: what the guidance writes is what a checkpoint saves.
            for state, link in zip(states, guidance.link.split(1)):
                link.copy_(state.scene.link)
                state.scene.link = link
        return ImageStep(
            cfg, states, guidance, None, device, capture=cfg.trainer.graphs, phase=phase
        )

    def beside_checkpoint(self, state: TrainState, run: RunFolder) -> None:
        """The image of a checkpoint: what comparisons look at."""
        pictures.write_png(_pixels(state), run.image)

    def write_preview(self, state: TrainState, cfg: TrainConfig, run: RunFolder) -> None:
        pictures.write_png(_pixels(state), run.previews / f"step-{state.step:06d}.png")

    def result(self, state: TrainState) -> np.ndarray:
        return _pixels(state)

    def finish(self, result: np.ndarray, cfg: TrainConfig, step: int, run: RunFolder) -> None:
        """Write the image, and the strip of what it was on the way."""
        pictures.write_png(result, run.image)
        log.info("wrote %s", run.image)
        pictures.write_png(progress_strip(run, step, result), run.preview)
        log.info("wrote %s", run.preview)

    def is_finished(self, cfg: TrainConfig, run: RunFolder) -> bool:
        return run.image.exists() and run.preview.exists()


def text_of(cfg: TrainConfig) -> str:
    """The prompt that a 2D run asks with: the bare one, or that of the view its camera is in."""
    if cfg.image.azimuth is None:
        return cfg.prompt
    view = _view(cfg.image, 0)
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
    view = _view(cfg.image, model.image_size)
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

    result: uint8 [H,W,3]; previews of other sizes, of another decoder, are left out.
    """
    import imageio.v3 as imageio

    found = sorted((int(path.stem[5:]), path) for path in run.previews.glob("step-*.png"))
    paths = [path for at, path in found if at < step]
    room = STRIP_PICTURES - 1
    chosen = [paths[i * len(paths) // room] for i in range(room)] if len(paths) > room else paths
    images = [imageio.imread(path) for path in chosen]
    return np.concatenate([*(i for i in images if i.shape == result.shape), result], axis=1)


def _view(cfg: ImageConfig, size: int) -> _View:
    """The view that an image asks for; without one all views have one text."""
    azimuth = 0.0 if cfg.azimuth is None else cfg.azimuth
    elevation = 0.0 if cfg.azimuth is None else cfg.elevation
    return _View(torch.tensor([elevation]), torch.tensor([azimuth]), size)


def _pixels(state: TrainState) -> np.ndarray:
    """The image of a run, uint8 [H,W,3]."""
    pixels = pictures.to_uint8(state.scene.picture(state.model))
    _release_decoder(state.model)
    return pixels


def _release_decoder(model: DiffusionModel) -> None:
    """On a GPU its memory is the UNet's (`load_model`)."""
    if model.device.type == "cuda":
        model.release_decoder()
