"""Training of the multi-view prior: four views of one object at once, a quarter turn apart.

MVDream (Shi et al. 2023, arXiv 2308.16512) in the small prior's networks. It starts from the text
model's UNet and shares its text encoder and its autoencoder, which stay as they are.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from dsd_fast.diffusion.components import quiet
from dsd_fast.diffusion.loader import EMBEDDED, resolve
from dsd_fast.diffusion.networks.multiview_unet import N_VIEWS
from dsd_fast.diffusion.noise_path import NoisePath
from dsd_fast.files import write_json
from dsd_fast.prior import models
from dsd_fast.prior.dataset import EMPTY, NO_VIEW, CaptionTable
from dsd_fast.prior.quarters import Quarters
from dsd_fast.prior.train import (
    BatchSize,
    TrainConfig,
    Trainer,
    World,
    draw_levels,
    load_part,
    load_weights,
)
from dsd_fast.prior.train_views import load_autoencoder
from dsd_fast.ranges import AnyPath, Count, Share

_CAPTIONS_TOGETHER = 1024


@dataclass(kw_only=True)
class MultiviewTrainConfig(TrainConfig):
    """Settings of the multi-view UNet's training."""

    # Objects a step and process, four views each.
    batch_size: BatchSize = 256
    # Diffusers folder with text encoder and autoencoder, and with the UNet to begin with where
    # `resume` is None.
    text_model: str = EMBEDDED
    # Encodings of each object, each on another background and mirrored by a coin.
    encodings: Count = 3
    # Share of objects trained without a caption, for classifier-free guidance (Ho and Salimans
    # 2022); their cameras are told all the same.
    dropout: Share = 0.1


@dataclass(kw_only=True)
class MultiviewExportConfig:
    """From a trained state to a folder in MVDream's layout."""

    # Folder that `train-multiview` wrote: unet.safetensors.
    state: AnyPath
    # Folder to write.
    out: AnyPath
    # Diffusers folder with the text encoder and autoencoder that the state was trained with; the
    # folder written refers to them by relative paths.
    text_model: str = EMBEDDED
    # Keep the UNet's weights in 8 bits, half the size: for the folder that ships.
    int8: bool = False


def train_multiview(cfg: MultiviewTrainConfig) -> None:
    """Train the UNet on four views at a time; writes unet.safetensors.

    The loss is the velocity's error, the same at all levels, as `train_views` has it: at the
    highest ones an object is decided that all views are to agree on.

    Raises:
        FileNotFoundError, ValueError: unusable views or model to start from, or no time for a step.
        OSError: the output folder cannot be written.
    """
    world = World(cfg.seed)
    device = world.device
    text_model = resolve(cfg.text_model)
    vae, scale = load_autoencoder(text_model)
    vae = vae.to(device, memory_format=torch.channels_last)
    unet = models.build_multiview_unet()
    if cfg.resume is None:
        unet.load_state_dict(models.of_multiview(load_part(text_model, "unet")))
    unet = unet.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    trainer = Trainer(cfg, world, {"unet": unet})

    table, text = _embedded_captions(cfg.views, text_model, device)
    quarters = Quarters(cfg.views, device, world.rank, world.size)
    quarters.encode(vae, cfg.encodings)
    del vae
    if world.rank == 0:
        print(f"{len(quarters)} objects a process, {trainer.seconds():.1f} s", flush=True)

    path = NoisePath.of_scheduler(models.SCHEDULER).to(device)
    forward = torch.compile(unet, dynamic=False) if cfg.compile else unet
    batch = cfg.batch_size

    def loss() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        latents, cameras, rows = quarters.sample(batch)
        x0 = latents.flatten(0, 1) * scale
        noise = torch.randn_like(x0)
        t = draw_levels(batch, len(path), device).repeat_interleave(N_VIEWS)
        noisy = path.noisy(x0, noise, t).contiguous(memory_format=torch.channels_last)
        wording = torch.randint(table.choices.shape[1], (batch,), device=device)
        caption = table.choices[rows, wording]
        said = torch.rand(batch, device=device) >= cfg.dropout
        # Row 0 is the empty caption.
        tokens = text[(caption + 1) * said].repeat_interleave(N_VIEWS, dim=0)
        with torch.autocast(device.type, torch.bfloat16):
            velocity = forward(noisy, t, tokens, cameras.flatten(0, 1))[0].float()
        error = (velocity - path.target(x0, noise, t)).square().mean((1, 2, 3))
        high = (t >= len(path) // 2).float()
        values = {
            "loss": error.mean(),
            "high": (error * high).sum() / high.sum().clamp_min(1),
        }
        return F.mse_loss(velocity, path.target(x0, noise, t)), values

    trainer.run(loss)


@torch.no_grad()
def _embedded_captions(
    views: Path, text_model: Path, device: torch.device
) -> tuple[CaptionTable, torch.Tensor]:
    """Captions of the views, and the embeddings [1 + captions,L,D] float32 of the empty caption and
    of each caption without a view."""
    with quiet():
        from transformers import CLIPTokenizer

        tokenizer = CLIPTokenizer.from_pretrained(text_model / "tokenizer")
    table = CaptionTable(views, device, tokenizer)
    encoder = models.build_text_encoder(tokenizer)
    load_weights(encoder, text_model, "text_encoder")
    encoder = encoder.to(device).eval()
    ids = torch.cat([table.tokens[:1, EMPTY], table.tokens[:, NO_VIEW]])
    parts = [encoder(part).last_hidden_state for part in ids.split(_CAPTIONS_TOGETHER)]
    return table, torch.cat(parts)


def export_multiview(cfg: MultiviewExportConfig) -> None:
    """Write a trained state as a folder in MVDream's layout, float16 or 8 bits (`int8`).

    Raises:
        FileNotFoundError: the state or the text model lacks a piece.
        ValueError: weights of another network.
        OSError: the folder cannot be written.
    """
    with quiet():
        from diffusers import DDIMScheduler

    text_model = resolve(cfg.text_model)
    unet = models.build_multiview_unet()
    load_weights(unet, cfg.state, "unet")
    models.save_unet(unet.state_dict(), cfg.out / "unet", cfg.int8)
    write_json(cfg.out / "unet" / "config.json", models.MULTIVIEW)
    DDIMScheduler(**models.SCHEDULER).save_pretrained(cfg.out / "scheduler")
    shared = {
        f"_{piece}_folder": Path(os.path.relpath(text_model / piece, cfg.out)).as_posix()
        for piece in ("vae", "text_encoder", "tokenizer")
    }
    index = {
        "_class_name": "MVDreamPipeline",
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["mv_unet", "MultiViewUNetModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    write_json(cfg.out / "model_index.json", index | shared)
