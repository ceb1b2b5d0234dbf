"""DDIM samples of a model (Song et al. 2021, eta 0): what distillation is measured against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dsd_fast.diffusion.condition import Condition
from dsd_fast.diffusion.model import DiffusionModel
from dsd_fast.diffusion.noise_path import NUM_TRAIN_TIMESTEPS
from dsd_fast.scene.cameras import camera_condition

if TYPE_CHECKING:
    from diffusers import DDIMScheduler

# Latent pixels that are sampled together: small launches leave a GPU idle.
SAMPLE_PIXELS = 1536 * 32**2
# Images that are decoded together.
_DECODED_TOGETHER = 64


def ddim_scheduler(model: DiffusionModel, n_steps: int) -> DDIMScheduler:
    """diffusers' scheduler with the settings of the model's folder, for noise predictions.

    Raises:
        ValueError: the model is of no folder, or n_steps is not in 1 to 999.
    """
    from diffusers import DDIMScheduler

    if model.path is None:
        raise ValueError("DDIM: this model is of no folder, which would say how it is sampled")
    # With diffusers' offset of 1, as many steps as levels would begin above the last level.
    if not 1 <= n_steps < NUM_TRAIN_TIMESTEPS:
        raise ValueError(f"DDIM: expected 1 to {NUM_TRAIN_TIMESTEPS - 1} steps, got {n_steps}")
    # Latents have no bounds to be clipped to; diffusers' pipeline sees to that as well.
    scheduler = DDIMScheduler.from_pretrained(
        model.path, subfolder="scheduler", prediction_type="epsilon", clip_sample=False
    )
    scheduler.set_timesteps(n_steps)
    return scheduler


def ddim_levels(model: DiffusionModel, n_steps: int) -> tuple[int, ...]:
    """The levels, falling, at which DDIM with n_steps asks the UNet. Errors: `ddim_scheduler`."""
    return tuple(ddim_scheduler(model, n_steps).timesteps.tolist())


@torch.no_grad()
def sample_latents(
    model: DiffusionModel,
    prompts: Sequence[str],
    noise: Tensor,
    n_steps: int,
    scale: float,
    negative: str = "",
) -> Tensor:
    """DDIM samples with plain classifier-free guidance e_0 + scale (e_y - e_0).

    Args:
        prompts: B of them.
        noise: [B,C,h,w] float32 on the model's device.
        negative: what e_0 is the prediction for.
    Returns:
        [B,C,h,w] float32, latents as `DiffusionModel.decode_latents` takes them.
    Raises:
        ValueError: a prompt has more tokens than the model reads, or as `ddim_scheduler`.
    """
    if len(prompts) != len(noise):
        raise ValueError(f"DDIM: expected a noise for each of {len(prompts)} prompts")
    unique = sorted(set(prompts))
    index = torch.tensor([unique.index(p) for p in prompts])
    embeddings = model.encode_prompt([*unique, negative]).to(noise.device)
    text, empty = embeddings[index.to(noise.device)], embeddings[-1:]
    conditions = Condition(text), Condition(empty.expand_as(text))
    return guided_latents(model, *conditions, noise, n_steps, scale)


@torch.no_grad()
def guided_latents(
    model: DiffusionModel,
    condition: Condition,
    without: Condition,
    noise: Tensor,
    n_steps: int,
    scale: float,
) -> Tensor:
    """The same for what predictions are conditioned on, with and without: B rows each."""
    scheduler = ddim_scheduler(model, n_steps)
    latents = []
    together = max(SAMPLE_PIXELS // noise[0, 0].numel(), model.n_views)
    together -= together % model.n_views
    for start in range(0, len(noise), together):
        stop = start + together
        z = noise[start:stop]
        both = Condition.cat([condition.rows(start, stop), without.rows(start, stop)])
        for t in scheduler.timesteps:
            times = torch.full((2 * len(z),), int(t), device=z.device)
            cond, uncond = model.predict_noise(torch.cat([z, z]), times, both).chunk(2)
            z = scheduler.step(uncond + scale * (cond - uncond), int(t), z, return_dict=False)[0]
        latents.append(z)
    return torch.cat(latents)


def sample(
    model: DiffusionModel,
    prompts: Sequence[str],
    noise: Tensor,
    n_steps: int,
    scale: float,
    negative: str = "",
) -> Tensor:
    """The images [B,3,H,W] float32 in [0,1] of `sample_latents`, arguments as there."""
    return _decoded(model, sample_latents(model, prompts, noise, n_steps, scale, negative))


@torch.no_grad()
def sample_objects(
    model: DiffusionModel,
    prompts: Sequence[str],
    noise: Tensor,
    elevation_deg: Tensor,
    azimuth_deg: Tensor,
    n_steps: int,
    scale: float,
) -> Tensor:
    """Images of objects by a model that predicts V views together: [B,V,3,H,W] float32 in [0,1].

    Args:
        prompts: B of them.
        noise: [B,V,C,h,w] float32 on the model's device.
        elevation_deg, azimuth_deg: [B,V], of the views' cameras.
        n_steps, scale: as `sample_latents`.
    Raises:
        ValueError: as `sample_latents`.
    """
    unique = sorted(set(prompts))
    index = torch.tensor([unique.index(p) for p in prompts]).repeat_interleave(model.n_views)
    embeddings = model.encode_prompt([*unique, ""]).to(noise.device)
    text, empty = embeddings[index.to(noise.device)], embeddings[-1:]
    camera = camera_condition(elevation_deg.flatten(), azimuth_deg.flatten()).to(noise.device)
    latents = guided_latents(
        model,
        Condition(text, camera=camera),
        Condition(empty.expand_as(text), camera=camera),
        noise.flatten(0, 1),
        n_steps,
        scale,
    )
    return _decoded(model, latents).unflatten(0, (-1, model.n_views))


def _decoded(model: DiffusionModel, latents: Tensor) -> Tensor:
    parts = latents.split(_DECODED_TOGETHER)
    return torch.cat([model.decode_latents(part) for part in parts])
