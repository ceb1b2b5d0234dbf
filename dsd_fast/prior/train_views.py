"""Training of the pose-conditioned prior: what one view of an object says of the others.

Zero-1-to-3 (Liu et al. 2023) in the small prior's networks: the UNet reads the reference view's
latents beside the noisy ones, and as tokens joined with the pose of the wanted view. It starts from
the text model's UNet and shares its autoencoder.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from dsd_fast.diffusion.components import quiet
from dsd_fast.diffusion.loader import EMBEDDED, resolve
from dsd_fast.diffusion.noise_path import NoisePath
from dsd_fast.diffusion.reference_picture import (
    POSE_WIDTH,
    CameraProjection,
    latent_feature_width,
    latent_features,
)
from dsd_fast.files import write_json
from dsd_fast.prior import models
from dsd_fast.prior.orbits import Orbits
from dsd_fast.prior.train import (
    BatchSize,
    TrainConfig,
    Trainer,
    World,
    draw_levels,
    load_part,
    load_weights,
    save_part,
)
from dsd_fast.ranges import AnyPath, Share

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

# Of the initial weights of a pose: its part of a token is then as large as the features' part. With
# a linear layer's usual beginning, a tenth of that, training leaves the azimuth unused.
POSE_STD = 0.4


@dataclass(kw_only=True)
class ViewTrainConfig(TrainConfig):
    """Settings of the pose-conditioned UNet's training."""

    batch_size: BatchSize = 512
    # Diffusers folder with the autoencoder, and with the UNet to begin with where `resume` is None.
    text_model: str = EMBEDDED
    # Share of rows trained without reference and pose, for classifier-free guidance (Ho and
    # Salimans 2022).
    dropout: Share = 0.1


@dataclass(kw_only=True)
class ViewExportConfig:
    """From a trained state to a diffusers folder."""

    # Folder that `train-views` wrote: unet.safetensors, camera_projection.safetensors.
    state: AnyPath
    # Folder to write.
    out: AnyPath
    # Diffusers folder with the autoencoder that the state was trained with.
    text_model: str = EMBEDDED
    # Refer to that folder's autoencoder by a relative path instead of copying it: where both ship.
    share_vae: bool = False
    # Keep the UNet's weights in 8 bits, half the size: for the folder that ships.
    int8: bool = False


def train_views(cfg: ViewTrainConfig) -> None:
    """Train UNet and camera projection on pairs of views; writes both as safetensors.

    The loss is the velocity's error, the same at all levels. That of the noise, which `train_unet`
    has, hardly counts the highest levels, and there alone nothing but the pose says what is seen.

    Raises:
        FileNotFoundError, ValueError: unusable views or model to start from, or no time for a step.
        OSError: the output folder cannot be written.
    """
    world = World(cfg.seed)
    device = world.device
    text_model = resolve(cfg.text_model)
    vae, scale = load_autoencoder(text_model)
    vae = vae.to(device, memory_format=torch.channels_last)
    unet = models.build_view_unet()
    if cfg.resume is None:
        unet.load_state_dict(models.narrowed(load_part(text_model, "unet")))
    unet = unet.to(device, memory_format=torch.channels_last)
    projection = _projection()
    torch.nn.init.normal_(projection.proj.weight[:, -POSE_WIDTH:], std=POSE_STD)
    projection = projection.to(device)
    trainer = Trainer(cfg, world, {"unet": unet, "camera_projection": projection})

    orbits = Orbits(cfg.views, device, world.rank, world.size)
    orbits.encode(vae)
    del vae
    if world.rank == 0:
        size = f"{len(orbits)} orbits of {orbits.rows.shape[1]} views"
        print(f"{size} a process, {trainer.seconds():.1f} s", flush=True)

    path = NoisePath.of_scheduler(models.SCHEDULER).to(device)
    forward = torch.compile(unet, dynamic=False) if cfg.compile else unet
    batch = cfg.batch_size

    def loss() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        reference, target, pose = orbits.sample(batch)
        x0 = target * scale
        noise = torch.randn_like(x0)
        t = draw_levels(batch, len(path), device)
        noisy = path.noisy(x0, noise, t)
        known = (torch.rand(batch, device=device) >= cfg.dropout).float()
        rows = torch.cat([noisy, reference * known.view(-1, 1, 1, 1)], dim=1)
        with torch.autocast(device.type, torch.bfloat16):
            context = projection(latent_features(reference), pose) * known.view(-1, 1, 1)
            velocity = forward(
                rows.contiguous(memory_format=torch.channels_last), t, context, return_dict=False
            )[0].float()
        total = F.mse_loss(velocity, path.target(x0, noise, t))
        return total, {"loss": total}

    trainer.run(loss)


def export_views(cfg: ViewExportConfig) -> None:
    """Write a trained state as a diffusers folder, safetensors in float16 or 8 bits (`int8`).

    Raises:
        FileNotFoundError: the state or the text model lacks a piece.
        ValueError: weights of other networks.
        OSError: the folder cannot be written.
    """
    with quiet():
        from diffusers import DDIMScheduler

    text_model = resolve(cfg.text_model)
    unet, projection = models.build_view_unet(), _projection()
    load_weights(unet, cfg.state, "unet")
    load_weights(projection, cfg.state, "camera_projection")
    vae, _ = load_autoencoder(text_model)

    unet.save_config(cfg.out / "unet")
    models.save_unet(unet.state_dict(), cfg.out / "unet", cfg.int8)
    DDIMScheduler(**models.SCHEDULER).save_pretrained(cfg.out / "scheduler")
    folder = cfg.out / "camera_projection"
    folder.mkdir(parents=True, exist_ok=True)
    save_part(projection, folder, "diffusion_pytorch_model")
    index = {
        "_class_name": "Zero1to3Pipeline",
        "camera_projection": ["dsd_fast.diffusion.reference_picture", "CameraProjection"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if cfg.share_vae:
        index["_vae_folder"] = Path(os.path.relpath(text_model / "vae", cfg.out)).as_posix()
        shutil.rmtree(cfg.out / "vae", ignore_errors=True)
    else:
        vae.to(torch.float16).save_pretrained(cfg.out / "vae", safe_serialization=True)
    write_json(cfg.out / "model_index.json", index)


def _projection() -> CameraProjection:
    return CameraProjection(latent_feature_width(4), models.TEXT_WIDTH)


def load_autoencoder(text_model: Path) -> tuple[AutoencoderKL, float]:
    """The autoencoder of a folder, float32 on the CPU, and the scaling factor of its latents."""
    vae = models.build_vae()
    load_weights(vae, text_model, "vae")
    config = text_model / "vae" / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"text_model: expected a diffusers folder with {config}")
    scale = float(json.loads(config.read_text(encoding="utf-8"))["scaling_factor"])
    vae.register_to_config(scaling_factor=scale)
    return vae.requires_grad_(False), scale
