"""What the prior can do, in figures: reconstruction of held-out views, and whether samples show what was asked.

The judge is a small head over ImageNet features, trained on real renders only; its own accuracy on held-out views
is reported beside what it says of the samples.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from .captions import VIEWS, frequent_nouns, has_front, with_article
from .dataset import Views
from .features import FEATURE_WIDTH, load_features

if TYPE_CHECKING:
    from ..diffusion import DiffusionModel


COUNTED_NOUNS = frequent_nouns(at_least=4)


@dataclass
class EvaluateConfig:
    """Settings of the prior's evaluation."""

    # Folder of rendered views.
    views: Path
    # Where the report and the sheet go.
    out: Path
    # Model to judge: a diffusers folder, or `embedded`.
    model: str = "embedded"
    # Samples of each noun and view.
    seeds: int = 8
    # DDIM steps and guidance scale of the samples.
    steps: int = 50
    scale: float = 7.5
    # Gradient steps of the judge.
    judge_steps: int = 3000
    # Device.
    device: str = "cuda"


class Judge(nn.Module):
    """Noun and view logits of an image's features."""

    def __init__(self, n_nouns: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(FEATURE_WIDTH)
        self.hidden = nn.Linear(FEATURE_WIDTH, 512)
        self.noun = nn.Linear(512, n_nouns)
        self.view = nn.Linear(512, len(VIEWS))

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = F.dropout(F.relu(self.hidden(self.norm(features))), 0.3, self.training)
        return self.noun(h), self.view(h)


@torch.no_grad()
def view_features(
    network: nn.Module, views: Views, rows: torch.Tensor, batch: int = 512
) -> torch.Tensor:
    """Features of `rows` of `views`, each over a random background, some softened as a small render would be."""
    out = []
    for part in rows.split(batch):
        images, _ = views.batch(len(part), rows=part, soften=0.2)
        with torch.autocast(images.device.type, torch.bfloat16):
            out.append(network(images * 0.5 + 0.5).float())
    return torch.cat(out)


def train_judge(
    network: nn.Module, train: Views, held_out: Views, steps: int
) -> tuple[Judge, float, float]:
    """A judge over COUNTED_NOUNS and its noun and view accuracies on held-out views of real renders.

    The view accuracy counts nouns with a front only.
    """
    device = train.device

    def data(views: Views, passes: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        labels = views.noun_labels(COUNTED_NOUNS)
        rows = (labels >= 0).nonzero().squeeze(1)
        features = torch.cat([view_features(network, views, rows) for _ in range(passes)])
        return features, labels[rows].repeat(passes), views.view[rows].repeat(passes)

    features, nouns, seen = data(train, 2)
    judge = Judge(len(COUNTED_NOUNS)).to(device)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    weight = 1 / nouns.bincount(minlength=len(COUNTED_NOUNS)).clamp(min=1).float().sqrt()
    for _ in range(steps):
        rows = torch.randint(len(features), (2048,), device=device)
        noun, view = judge(features[rows])
        loss = F.cross_entropy(noun, nouns[rows], weight, label_smoothing=0.05)
        loss = loss + F.cross_entropy(view, seen[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    judge.eval()
    features, nouns, seen = data(held_out, 1)
    with torch.no_grad():
        noun, view = judge(features)
    fronted = torch.tensor([has_front(n) for n in COUNTED_NOUNS], device=device)[nouns]
    noun_accuracy = (noun.argmax(1) == nouns).float().mean()
    view_accuracy = (view.argmax(1) == seen)[fronted].float().mean()
    return judge, float(noun_accuracy), float(view_accuracy)


@torch.no_grad()
def reconstruction_psnr(model: DiffusionModel, views: Views, limit: int = 2000) -> float:
    """Mean PSNR (dB, images in [0,1]) of encoding and decoding held-out views over random backgrounds."""
    values = []
    for part in torch.arange(min(limit, len(views)), device=views.device).split(100):
        images = views.batch(len(part), rows=part)[0] * 0.5 + 0.5
        decoded = model.decode_latents(
            model.encode_images(images, torch.Generator().manual_seed(0))
        )
        mse = (decoded.float().clamp(0, 1) - images).square().mean((1, 2, 3))
        values.append(-10 * torch.log10(mse))
    return float(torch.cat(values).mean())


@torch.no_grad()
def sample(
    model: DiffusionModel, prompts: list[str], noise: torch.Tensor, steps: int, scale: float
) -> torch.Tensor:
    """DDIM samples (eta 0) with plain classifier-free guidance: noise [B,C,h,w] -> images [B,3,H,W] in [0,1]."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler.from_pretrained(model.path, subfolder="scheduler")
    scheduler.set_timesteps(steps)
    unique = sorted(set(prompts))
    index = torch.tensor([unique.index(p) for p in prompts])
    text = model.encode_prompt(unique)[index].to(noise.device)
    empty = model.encode_prompt([""]).to(noise.device)
    images = []
    for z, rows in zip(noise.split(256), text.split(256), strict=True):
        both = torch.cat([rows, empty.expand(len(rows), -1, -1)])
        for t in scheduler.timesteps:
            times = torch.full((2 * len(z),), int(t), device=z.device)
            cond, uncond = model.predict_noise(torch.cat([z, z]), times, both).chunk(2)
            z = scheduler.step(uncond + scale * (cond - uncond), int(t), z, return_dict=False)[0]
        images += [model.decode_latents(part).float().clamp(0, 1) for part in z.split(64)]
    return torch.cat(images)


def seed_noise(model: DiffusionModel, seeds: list[int]) -> torch.Tensor:
    """Starting noise [len(seeds),C,h,w], drawn on the CPU: the same on every device."""
    shape = (model.latent_channels, model.latent_size, model.latent_size)
    return torch.stack(
        [torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
    )


def evaluate(cfg: EvaluateConfig) -> dict[str, object]:
    """Judge a prior; writes report.json and returns it."""
    from ..diffusion import load_model

    device = torch.device(cfg.device)
    model = load_model(cfg.model, device, engine="eager")
    network = load_features(device)
    train = Views(cfg.views, device)
    held_out = Views(cfg.views, device, held_out=True)
    psnr = reconstruction_psnr(model, held_out)
    judge, noun_accuracy, view_accuracy = train_judge(network, train, held_out, cfg.judge_steps)
    train.free_images()

    cases = [
        (n, v, s) for n in range(len(COUNTED_NOUNS)) for v in range(3) for s in range(cfg.seeds)
    ]
    prompts = [
        f"{with_article(COUNTED_NOUNS[n], COUNTED_NOUNS[n])}, {VIEWS[v]} view" for n, v, _ in cases
    ]
    noise = seed_noise(model, [1000 * n + s for n, _, s in cases]).to(device)
    images = sample(model, prompts, noise, cfg.steps, cfg.scale)
    with torch.no_grad():
        logits = [judge(network(part)) for part in images.split(256)]
    noun = torch.cat([a for a, _ in logits]).argmax(1).tolist()
    view = torch.cat([b for _, b in logits]).argmax(1).tolist()

    right = [noun[i] == n for i, (n, _, _) in enumerate(cases)]
    by_noun = {
        name: sum(r for r, (n, _, _) in zip(right, cases, strict=True) if n == k) / (3 * cfg.seeds)
        for k, name in enumerate(COUNTED_NOUNS)
    }
    confusions: dict[str, int] = {}
    for i, (n, _, _) in enumerate(cases):
        if noun[i] != n:
            key = f"{COUNTED_NOUNS[n]} -> {COUNTED_NOUNS[noun[i]]}"
            confusions[key] = confusions.get(key, 0) + 1
    fronted = [i for i, (n, _, _) in enumerate(cases) if has_front(COUNTED_NOUNS[n])]
    report: dict[str, object] = {
        "reconstruction_psnr_db": psnr,
        "judge_noun_accuracy_on_held_out_renders": noun_accuracy,
        "judge_view_accuracy_on_held_out_renders": view_accuracy,
        "sample_noun_accuracy": sum(right) / len(right),
        "sample_view_accuracy": sum(view[i] == cases[i][1] for i in fronted) / len(fronted),
        "samples": len(cases),
        "by_noun": by_noun,
        "confusions": dict(sorted(confusions.items(), key=lambda item: -item[1])[:40]),
    }
    cfg.out.mkdir(parents=True, exist_ok=True)
    (cfg.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


SHEET_PROMPTS = (
    "an armchair",
    "a red sofa",
    "a wooden chair",
    "a table",
    "a desk",
    "a bed",
    "a blue car",
    "a potted plant",
    "a tree",
    "a bottle",
    "a lamp",
    "a street lamp",
    "a woman",
    "a man",
    "a bookcase",
    "a stool",
    "a bench",
    "a vase",
    "a piano",
    "a dog",
    "a motorcycle",
    "a television",
    "a green armchair",
    "a house",
)


def sample_sheet(cfg: EvaluateConfig) -> Path:
    """The sheet of 24 prompts x 4 seeds x 4 views as a JPEG; returns its path."""
    from PIL import Image

    from ..diffusion import load_model

    device = torch.device(cfg.device)
    model = load_model(cfg.model, device, engine="eager")
    cases = [(p, s, v) for p in SHEET_PROMPTS for s in range(4) for v in VIEWS]
    noise = seed_noise(model, [s for _, s, _ in cases]).to(device)
    images = sample(model, [f"{p}, {v} view" for p, _, v in cases], noise, cfg.steps, cfg.scale)
    tile = 112
    images = F.interpolate(images, (tile, tile), mode="area")
    # a row shows two prompts, each as 4 seeds x 4 views side by side
    grid = images.view(len(SHEET_PROMPTS) // 2, 2, 4, 4, 3, tile, tile)
    grid = grid.permute(0, 2, 5, 1, 3, 6, 4).reshape(-1, 8 * tile, 3)
    cfg.out.mkdir(parents=True, exist_ok=True)
    path = cfg.out / "prior-samples.jpg"
    Image.fromarray((grid.cpu() * 255).round().byte().numpy()).save(path, quality=88)
    return path
