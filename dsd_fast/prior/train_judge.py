"""Training of the judge on real renders: as they are, as they come out of the autoencoder, which is
where samples come from, and frayed, as distilled objects are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from dsd_fast.judge.captions import COUNTED_NOUNS
from dsd_fast.judge.features import FEATURE_BATCH, FEATURE_WIDTH, image_features
from dsd_fast.judge.judge import Judge, bin_targets
from dsd_fast.prior.dataset import Views

if TYPE_CHECKING:
    from dsd_fast.diffusion import DiffusionModel

BATCH = 2048
# Largest gain of contrast of the images through the autoencoder that the judge is trained on:
# guidance drives samples to black and white.
CONTRAST = 2.0
# Standard deviation of the displacements that fray images, at most, as a share of their side; and
# the side of the grid on which they are drawn. Objects out of short distillation have ragged edges
# and specks around them, in which a judge that knows clean renders alone sees trees.
FRAY = 0.02
FRAY_GRID = 64
# Images that go through the autoencoder together.
AUTOENCODER_BATCH = 128


def through_autoencoder(
    model: DiffusionModel, images: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Images [B,3,H,W] float32 in [0,1], encoded and decoded."""
    return torch.cat(
        [
            model.decode_latents(model.encode_images(part, generator))
            for part in images.split(AUTOENCODER_BATCH)
        ]
    )


def frayed(images: torch.Tensor, most: float) -> torch.Tensor:
    """Images [B,3,H,W] whose pixels are displaced at random, smoothly over a few of them, by a
    standard deviation of 0 to `most` of the side, another for each image."""
    n = len(images)
    spread = 2 * most * torch.rand(n, 1, 1, 1, device=images.device)
    offsets = spread * torch.randn(n, 2, FRAY_GRID, FRAY_GRID, device=images.device)
    offsets = F.interpolate(offsets, images.shape[2:], mode="bilinear", align_corners=False)
    still = torch.eye(2, 3, device=images.device).expand(n, -1, -1)
    grid = F.affine_grid(still, list(images.shape), align_corners=False)
    moved = grid + offsets.permute(0, 2, 3, 1)
    return F.grid_sample(images, moved, padding_mode="border", align_corners=False)


@torch.no_grad()
def view_features(
    network: nn.Module,
    views: Views,
    rows: torch.Tensor,
    *,
    mirror: bool = False,
    contrast: float = 1.0,
    fray: float = 0.0,
    autoencoder: DiffusionModel | None = None,
) -> torch.Tensor:
    """Features of `rows` of `views`, each over a random background, some softened as a small render
    would be.

    Args:
        rows: [N] int64.
        mirror: flip every image left to right; a side stays a side, and a front a front.
        contrast: stretch every image about mid-grey by a random gain between 1 and this.
        fray: see `frayed`.
        autoencoder: of this model every image is taken through the autoencoder.
    Returns:
        [N,FEATURE_WIDTH] float16 on the device of `views`.
    """
    features = torch.empty(len(rows), FEATURE_WIDTH, dtype=torch.float16, device=views.device)
    generator = torch.Generator().manual_seed(0)
    for out, part in zip(features.split(FEATURE_BATCH), rows.split(FEATURE_BATCH), strict=True):
        images = views.batch(len(part), rows=part, soften=0.2)[0] * 0.5 + 0.5
        if mirror:
            images = images.flip(3)
        gain = contrast ** torch.rand(len(images), 1, 1, 1, device=images.device)
        images = ((images - 0.5) * gain + 0.5).clamp(0, 1)
        if fray:
            images = frayed(images, fray)
        if autoencoder is not None:
            images = through_autoencoder(autoencoder, images, generator)
        out.copy_(image_features(network, images))
    return features


def counted_rows(views: Views) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of `views` that show one of COUNTED_NOUNS, and which; both [N] int64."""
    labels = views.noun_labels(COUNTED_NOUNS)
    rows = (labels >= 0).nonzero().squeeze(1)
    return rows, labels[rows]


def fit_judge(
    features: torch.Tensor, noun: torch.Tensor, target: torch.Tensor, steps: int
) -> Judge:
    """A judge over COUNTED_NOUNS, all tensors on its device.

    Args:
        features: [K*N,FEATURE_WIDTH], K times the same N views in their order.
        noun: [N] int64 index into COUNTED_NOUNS.
        target: [N,N_BINS+1] float32, of `bin_targets`.
    """
    device = features.device
    judge = Judge(len(COUNTED_NOUNS)).to(device)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    weight = 1 / noun.bincount(minlength=len(COUNTED_NOUNS)).clamp(min=1).float().sqrt()
    for _ in range(steps):
        drawn = torch.randint(len(features), (BATCH,), device=device)
        shown = drawn % len(noun)
        said_noun, said_bins = judge(features[drawn].float(), noun[shown])
        loss = F.cross_entropy(said_noun, noun[shown], weight, label_smoothing=0.05)
        loss = loss + F.cross_entropy(said_bins, target[shown])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return judge.eval()


def train_judge(network: nn.Module, model: DiffusionModel, train: Views, steps: int) -> Judge:
    """A judge trained on renders, as they are and, with more contrast, through the autoencoder of
    `model` and frayed, all also mirrored, each time over another background."""
    rows, noun = counted_rows(train)
    kinds: tuple[dict[str, Any], ...] = (
        {},
        {"contrast": CONTRAST, "autoencoder": model},
        {"contrast": CONTRAST, "fray": FRAY},
    )
    features = [
        view_features(network, train, rows, mirror=mirror, **kind)
        for kind in kinds
        for mirror in (False, True)
    ]
    target = bin_targets(train.view[rows], train.azimuth[rows])
    return fit_judge(torch.cat(features), noun, target, steps)
