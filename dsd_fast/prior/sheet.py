"""Samples of the prior on one sheet, to be looked at."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from dsd_fast.diffusion.ddim import sample, sample_objects
from dsd_fast.diffusion.networks.multiview_unet import N_VIEWS
from dsd_fast.judge.captions import VIEWS
from dsd_fast.prior.evaluate import SampleConfig, load_sampled, seed_noise

if TYPE_CHECKING:
    from PIL import Image

# fmt: off
SHEET_PROMPTS = (
    "an armchair", "a red sofa", "a wooden chair", "a table", "a desk", "a bed", "a blue car",
    "a potted plant", "a tree", "a bottle", "a lamp", "a street lamp", "a woman", "a man",
    "a bookcase", "a stool", "a bench", "a vase", "a piano", "a dog", "a motorcycle",
    "a television", "a green armchair", "a house",
)
# fmt: on
SHEET_SEEDS = 4
SHEET_COLUMNS = 4  # prompts in a row
TILE = 120  # side of one sample
TITLE = 18  # height of the prompt above its block
GAP = 8  # around each block
# Of the cameras of a multi-view sheet, degrees: from the front left on.
FIRST_AZIMUTH, ELEVATION = 30.0, 15.0


def lay_out(images: torch.Tensor, prompts: tuple[str, ...]) -> Image.Image:
    """A sheet of blocks, SHEET_COLUMNS to a row, each titled with its prompt.

    Args:
        images: [prompts, seeds, views, 3, H, W] float32 in [0,1]; a block's rows are seeds, its
            columns views.
    Returns:
        an RGB image, at most 2000 pixels wide.
    """
    from PIL import Image, ImageDraw

    n_seeds, n_views = images.shape[1:3]
    small = F.interpolate(images.flatten(0, 2), (TILE, TILE), mode="area")
    blocks = small.view(*images.shape[:3], 3, TILE, TILE).permute(0, 1, 4, 2, 5, 3)
    blocks = blocks.reshape(len(prompts), n_seeds * TILE, n_views * TILE, 3)
    pixels = (blocks.cpu() * 255).round().byte().numpy()
    width, height = n_views * TILE + GAP, TITLE + n_seeds * TILE + GAP
    rows = -(-len(prompts) // SHEET_COLUMNS)
    sheet = Image.new("RGB", (SHEET_COLUMNS * width + GAP, rows * height + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for i, prompt in enumerate(prompts):
        left, top = GAP + i % SHEET_COLUMNS * width, GAP + i // SHEET_COLUMNS * height
        draw.text((left, top), prompt, fill="black")
        sheet.paste(Image.fromarray(pixels[i]), (left, top + TITLE))
    return sheet


def sample_sheet(cfg: SampleConfig) -> Path:
    """Samples of 24 prompts x 4 seeds x 4 views as prior-samples.jpg; returns its path.

    Raises:
        FileNotFoundError, ValueError: unusable model or device.
    """
    model = load_sampled(cfg)
    cases = [(p, s, v) for p in SHEET_PROMPTS for s in range(SHEET_SEEDS) for v in VIEWS]
    noise = seed_noise(model, [s for _, s, _ in cases]).to(model.device)
    images = sample(model, [f"{p}, {v} view" for p, _, v in cases], noise, cfg.steps, cfg.scale)
    grid = images.view(len(SHEET_PROMPTS), SHEET_SEEDS, len(VIEWS), *images.shape[1:])
    cfg.out.mkdir(parents=True, exist_ok=True)
    path = cfg.out / "prior-samples.jpg"
    lay_out(grid, SHEET_PROMPTS).save(path, quality=88)
    return path


def multiview_sheet(cfg: SampleConfig) -> Path:
    """Objects of the multi-view prior, 24 prompts x 4 seeds x 4 views, as multiview-samples.jpg;
    returns its path.

    Raises:
        FileNotFoundError, ValueError: unusable model or device.
    """
    model = load_sampled(cfg, N_VIEWS)
    cases = [(p, s) for p in SHEET_PROMPTS for s in range(SHEET_SEEDS)]
    noise = torch.stack(
        [seed_noise(model, [s * N_VIEWS + v for v in range(N_VIEWS)]) for _, s in cases]
    )
    azimuth = (FIRST_AZIMUTH + 90.0 * torch.arange(N_VIEWS)).expand(len(cases), -1)
    elevation = torch.full(azimuth.shape, ELEVATION)
    images = sample_objects(
        model,
        [p for p, _ in cases],
        noise.to(model.device),
        elevation,
        azimuth,
        cfg.steps,
        cfg.scale,
    )
    grid = images.unflatten(0, (len(SHEET_PROMPTS), SHEET_SEEDS))
    cfg.out.mkdir(parents=True, exist_ok=True)
    path = cfg.out / "multiview-samples.jpg"
    lay_out(grid, SHEET_PROMPTS).save(path, quality=88)
    return path
