"""What the pose-conditioned prior makes of models that it has never seen, against true renders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from dsd_fast.config import resolve_device
from dsd_fast.diffusion import ViewModel, load_view_model
from dsd_fast.diffusion.ddim import guided_latents
from dsd_fast.files import write_json
from dsd_fast.judge.similarity import psnr, ssim
from dsd_fast.prior.evaluate import SampleConfig
from dsd_fast.prior.orbits import Orbits
from dsd_fast.ranges import AnyPath, Count, NonNegative, UnsignedSeed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

TILE = 128  # side of one picture of the sheet
GAP = 6
SHEET_ROWS = 12
SHEET_COLUMNS = 2


@dataclass(kw_only=True)
class ViewEvaluateConfig(SampleConfig):
    """Settings of the evaluation on held-out models.

    Raises:
        ValueError: a count below one.
    """

    # Folder of rendered orbits.
    views: AnyPath
    # Model to evaluate: a folder, or `embedded`.
    model: str = "embedded"
    # Guidance scale of the samples.
    scale: NonNegative = 3.0
    # Pairs that are sampled, spread over the held-out models.
    pairs: Count = 96
    # Seed of the choice of views and of the noise.
    seed: UnsignedSeed = 0


@torch.no_grad()
def sample_view(
    model: ViewModel, poses: torch.Tensor, noise: torch.Tensor, steps: int, scale: float
) -> torch.Tensor:
    """DDIM samples (eta 0) of views of the object that the model was conditioned on.

    Args:
        poses: [B,4] on the model's device, `relative_pose`.
        noise: [B,C,h,w] float32 there.
        scale: of e_0 + scale (e_c - e_0).
    Returns:
        [B,3,H,W] float32 in [0,1].
    """
    condition = model.conditions(poses)
    without = condition.map(torch.zeros_like)
    z = guided_latents(model, condition, without, noise, steps, scale)
    return model.decode_latents(z)


@dataclass(frozen=True)
class Sampled:
    """One reference and what was sampled from it; pictures [3,H,W] float32 in [0,1] on the CPU."""

    model: str
    reference: torch.Tensor
    truths: torch.Tensor  # [V,3,H,W]
    samples: torch.Tensor
    turned: torch.Tensor  # samples at the mirrored pose


def evaluate_views(cfg: ViewEvaluateConfig) -> dict[str, object]:
    """Sample views of held-out models; writes report.json, which it returns, and view-samples.jpg.

    Beside the samples stand three figures that say what theirs mean: truths through the autoencoder
    (the most that a sample can reach), the reference held for the target (what looking nowhere
    gives), and samples turned the wrong way (what the pose is worth).

    Raises:
        FileNotFoundError, ValueError: unusable views, model or device.
    """
    device = resolve_device(cfg.device)
    model = load_view_model(cfg.model, device, engine="eager")
    orbits = Orbits(cfg.views, device, held_out=True)
    generator = torch.Generator().manual_seed(cfg.seed)
    n_views = min(3, orbits.rows.shape[1])
    n = -(-cfg.pairs // n_views)
    # Evenly over the orbits, which lie model by model.
    chosen = (torch.arange(n) * len(orbits) // n).tolist()
    shown = [_sample(cfg, model, orbits, orbit, n_views, generator) for orbit in chosen]

    truths = torch.cat([s.truths for s in shown])
    decoded = torch.cat([_through(model, s.truths.to(device), generator) for s in shown])
    references = torch.cat([s.reference.expand_as(s.truths) for s in shown])
    report: dict[str, object] = {
        "pairs": len(truths),
        "held_out_models": len({s.model for s in shown}),
        "samples": _against(torch.cat([s.samples for s in shown]), truths),
        "autoencoder_of_truth": _against(decoded, truths),
        "reference_held_for_target": _against(references, truths),
        "samples_turned_the_wrong_way": _against(torch.cat([s.turned for s in shown]), truths),
    }
    write_json(cfg.out / "report.json", report)
    lay_out(shown[:: max(len(shown) // (SHEET_ROWS * SHEET_COLUMNS), 1)]).save(
        cfg.out / "view-samples.jpg", quality=90
    )
    return report


def _sample(
    cfg: ViewEvaluateConfig,
    model: ViewModel,
    orbits: Orbits,
    orbit: int,
    n_views: int,
    generator: torch.Generator,
) -> Sampled:
    """Views of one orbit, seen from a view that may be its reference."""
    views = orbits.rows.shape[1]
    reference = int(orbits.references[orbit, int(torch.randint(views, (), generator=generator))])
    others = torch.tensor([view for view in range(views) if view != reference] or [0])
    targets = others[torch.randperm(len(others), generator=generator)[:n_views]]
    rows = orbits.rows[orbit]
    picture = orbits.images(rows[reference][None])
    model.condition(picture)

    poses = torch.cat([orbits.pose(orbit, targets, reference, mirror) for mirror in (0, 1)])
    shape = (2 * len(targets), model.latent_channels, model.latent_size, model.latent_size)
    noise = torch.randn(shape, generator=generator).to(model.device)
    both = sample_view(model, poses, noise, cfg.steps, cfg.scale)
    samples, turned = both.cpu().chunk(2)
    truths = orbits.images(rows[targets]).cpu()
    return Sampled(orbits.models[orbit], picture[0].cpu(), truths, samples, turned)


def _through(model: ViewModel, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return model.decode_latents(model.encode_images(images, generator)).cpu()


def _against(images: torch.Tensor, truths: torch.Tensor) -> dict[str, float]:
    """Means over pictures [N,3,H,W] in [0,1]."""
    sides = (side.permute(0, 2, 3, 1).numpy() for side in (images, truths))
    pairs = list(zip(*sides, strict=True))
    return {
        "psnr_db": float(np.mean([psnr(a, b) for a, b in pairs])),
        "ssim": float(np.mean([ssim(a, b) for a, b in pairs])),
    }


def lay_out(shown: Sequence[Sampled]) -> Image.Image:
    """A sheet of blocks: the reference on the left, true views above the samples of them."""
    from PIL import Image

    shown = shown[: SHEET_ROWS * SHEET_COLUMNS]
    n_views = len(shown[0].truths)
    width, height = (1 + n_views) * TILE + 2 * GAP, 2 * TILE + GAP
    rows = -(-len(shown) // SHEET_COLUMNS)
    columns = min(len(shown), SHEET_COLUMNS)
    sheet = Image.new("RGB", (columns * width, rows * height), (128, 128, 128))

    def tile(picture: torch.Tensor) -> Image.Image:
        pixels = (picture.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        return Image.fromarray(pixels).resize((TILE, TILE), Image.Resampling.BOX)

    for i, block in enumerate(shown):
        left, top = i % SHEET_COLUMNS * width, i // SHEET_COLUMNS * height
        sheet.paste(tile(block.reference), (left, top + TILE // 2))
        for v, (truth, sample) in enumerate(zip(block.truths, block.samples, strict=True)):
            x = left + GAP + (1 + v) * TILE
            sheet.paste(tile(truth), (x, top))
            sheet.paste(tile(sample), (x, top + TILE))
    return sheet
