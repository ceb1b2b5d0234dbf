"""What the prior can do, in figures: reconstruction of held-out views, and whether samples show
what was asked.

What samples show a judge says, whose own accuracy on held-out views, as they are and out of the
autoencoder, is reported beside it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import torch
from annotated_types import Interval
from torch import nn

from dsd_fast.config import resolve_device
from dsd_fast.diffusion.ddim import sample
from dsd_fast.diffusion.noise_path import NUM_TRAIN_TIMESTEPS
from dsd_fast.files import write_json
from dsd_fast.guidance.conditions.text import direction
from dsd_fast.judge.captions import COUNTED_NOUNS, VIEWS, has_front, with_article
from dsd_fast.judge.features import image_features, load_features
from dsd_fast.judge.judge import Judge, save_judge
from dsd_fast.prior.dataset import Views
from dsd_fast.prior.train_judge import (
    AUTOENCODER_BATCH,
    counted_rows,
    through_autoencoder,
    train_judge,
    view_features,
)
from dsd_fast.ranges import AnyPath, Count, NonNegative, check

if TYPE_CHECKING:
    from dsd_fast.diffusion import DiffusionModel

# The views that the accuracies of samples count: overhead is in the confusions alone.
N_COUNTED_VIEWS = VIEWS.index("overhead")
# Confusions of nouns that the report lists.
N_CONFUSIONS = 40
JUDGE_BATCH = 2048
# Views whose name changes within this many degrees of azimuth are left out of the accuracy away
# from boundaries.
MARGIN_DEG = 10.0


@dataclass(kw_only=True)
class SampleConfig:
    """Settings of the samples.

    Raises:
        ValueError: fewer than one step.
    """

    # Where the report and the sheet go.
    out: AnyPath
    # Model to judge: a diffusers folder, or `embedded`.
    model: str = "embedded"
    # DDIM steps of a sample.
    steps: Annotated[int, Interval(ge=1, lt=NUM_TRAIN_TIMESTEPS)] = 50
    # Guidance scale of the samples.
    scale: NonNegative = 7.5
    # Device.
    device: str = "cuda"

    def __post_init__(self) -> None:
        check(self)


@dataclass(kw_only=True)
class EvaluateConfig(SampleConfig):
    """Settings of the prior's evaluation.

    Raises:
        ValueError: fewer than one step or seed.
    """

    # Folder of rendered views.
    views: AnyPath
    # Samples of each noun and view.
    seeds: Count = 8
    # Gradient steps of the judge.
    judge_steps: Count = 3000


def is_clear(azimuth_deg: torch.Tensor, elevation_deg: torch.Tensor) -> torch.Tensor:
    """[B] bool: no other view's name lies within MARGIN_DEG of azimuth."""
    here = direction(elevation_deg, azimuth_deg)
    return (direction(elevation_deg, azimuth_deg - MARGIN_DEG) == here) & (
        direction(elevation_deg, azimuth_deg + MARGIN_DEG) == here
    )


@dataclass(frozen=True)
class Verdicts:
    """What images show and what the judge says, all [N] on the CPU.

    noun, said_noun int64 index COUNTED_NOUNS; view, said_view int64 index captions.VIEWS. Samples
    show what was asked, as far as is known.
    """

    noun: torch.Tensor
    view: torch.Tensor
    said_noun: torch.Tensor
    said_view: torch.Tensor

    def where(self, keep: torch.Tensor) -> Verdicts:
        """Those of the rows [N] bool."""
        return Verdicts(*(x[keep] for x in (self.noun, self.view, self.said_noun, self.said_view)))

    def counted(self) -> Verdicts:
        """Those that the accuracies of samples count."""
        return self.where(self.view < N_COUNTED_VIEWS)

    def _fronted(self) -> torch.Tensor:
        return torch.tensor([has_front(name) for name in COUNTED_NOUNS])[self.noun]

    def noun_accuracy(self) -> float:
        return _mean(self.noun == self.said_noun)

    def view_accuracy(self) -> float:
        """Over the nouns that have a front."""
        return _mean((self.view == self.said_view)[self._fronted()])

    def noun_accuracy_by_noun(self) -> dict[str, float]:
        return self._by_noun(self.noun == self.said_noun, fronted=False)

    def view_accuracy_by_noun(self) -> dict[str, float]:
        """Of the nouns that have a front, where there are images of them."""
        return self._by_noun(self.view == self.said_view, fronted=True)

    def _by_noun(self, right: torch.Tensor, fronted: bool) -> dict[str, float]:
        present = set(self.noun.tolist())
        return {
            name: _mean(right[self.noun == k])
            for k, name in enumerate(COUNTED_NOUNS)
            if k in present and (has_front(name) or not fronted)
        }

    def noun_confusions(self) -> dict[str, int]:
        """How often which noun was taken for which other, most frequent first."""
        pairs = zip(self.noun.tolist(), self.said_noun.tolist(), strict=True)
        wrong = Counter(f"{COUNTED_NOUNS[a]} -> {COUNTED_NOUNS[b]}" for a, b in pairs if a != b)
        return dict(wrong.most_common(N_CONFUSIONS))

    def view_confusion(self) -> dict[str, dict[str, int]]:
        """Counts by view shown, then by view said, over the nouns that have a front."""
        fronted = self._fronted()
        pair = (self.view * len(VIEWS) + self.said_view)[fronted]
        counts = pair.bincount(minlength=len(VIEWS) ** 2).view(len(VIEWS), -1).tolist()
        return {view: dict(zip(VIEWS, row, strict=True)) for view, row in zip(VIEWS, counts)}


def _mean(right: torch.Tensor) -> float:
    """Share of True; NaN of nothing."""
    return float(right.float().mean())


@torch.no_grad()
def verdicts(
    judge: Judge, features: torch.Tensor, noun: torch.Tensor, view: torch.Tensor
) -> Verdicts:
    """The judge's words on features [N,FEATURE_WIDTH] of images that show `noun`, `view` [N]."""
    nouns = noun.to(features.device)
    said = [
        judge.say(f.float(), n)
        for f, n in zip(features.split(JUDGE_BATCH), nouns.split(JUDGE_BATCH), strict=True)
    ]
    said_noun, said_view = (torch.cat(column) for column in zip(*said, strict=True))
    return Verdicts(noun.cpu(), view.cpu(), said_noun.cpu(), said_view.cpu())


def judge_report(
    judge: Judge, network: nn.Module, held_out: Views, autoencoder: DiffusionModel | None
) -> dict[str, object]:
    """How right the judge is on held-out views, through an autoencoder or not.

    View accuracy is given over all of them, over the views that samples count (overhead, which is
    easily told, is not among them), and over those of them clear of boundaries: near a boundary two
    names are both half right, but a sample may stay away from it.
    """
    rows, noun = counted_rows(held_out)
    features = view_features(network, held_out, rows, autoencoder=autoencoder)
    said = verdicts(judge, features, noun, held_out.view[rows])
    clear = is_clear(held_out.azimuth[rows], held_out.elevation[rows]).cpu()
    return {
        "noun_accuracy": said.noun_accuracy(),
        "view_accuracy": said.view_accuracy(),
        "view_accuracy_without_overhead": said.counted().view_accuracy(),
        "view_accuracy_without_overhead_away_from_boundaries": said.where(clear)
        .counted()
        .view_accuracy(),
        "view_accuracy_by_noun": said.view_accuracy_by_noun(),
        "view_confusion": said.view_confusion(),
    }


@torch.no_grad()
def reconstruction_psnr(model: DiffusionModel, views: Views, limit: int = 2000) -> float:
    """Mean PSNR (dB, images in [0,1]) of encoding and decoding `views` over random backgrounds."""
    values = []
    generator = torch.Generator().manual_seed(0)
    for part in torch.arange(min(limit, len(views)), device=views.device).split(AUTOENCODER_BATCH):
        images = views.batch(len(part), rows=part)[0] * 0.5 + 0.5
        mse = (through_autoencoder(model, images, generator) - images).square().mean((1, 2, 3))
        values.append(-10 * torch.log10(mse))
    return float(torch.cat(values).mean())


def seed_noise(model: DiffusionModel, seeds: list[int]) -> torch.Tensor:
    """Starting noise [len(seeds),C,h,w] float32, drawn on the CPU: the same on every device."""
    shape = (model.latent_channels, model.latent_size, model.latent_size)
    return torch.stack(
        [torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
    )


def load_sampled(cfg: SampleConfig, n_views: int = 1) -> DiffusionModel:
    """The model that is asked for samples, of one view or of several together."""
    from dsd_fast.diffusion import load_model

    return load_model(cfg.model, resolve_device(cfg.device), engine="eager", n_views=n_views)


def evaluate(cfg: EvaluateConfig) -> dict[str, object]:
    """Judge a prior; writes report.json, which it returns, and judge.safetensors.

    The accuracies of samples count side, front and back views; the confusions of views overhead
    too. Views are counted over the nouns that have a front, and judged for the noun that was asked.

    Raises:
        FileNotFoundError, ValueError: unusable views, model or device.
        ImportError: the extra `prior` is not installed.
    """
    model = load_sampled(cfg)
    device = model.device
    network = load_features(device).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    train = Views(cfg.views, device)
    held_out = Views(cfg.views, device, held_out=True)
    psnr = reconstruction_psnr(model, held_out)
    judge = train_judge(network, model, train, cfg.judge_steps)
    train.free_images()
    save_judge(judge, cfg.out / "judge.safetensors")

    cases = [
        (n, v, s)
        for n in range(len(COUNTED_NOUNS))
        for v in range(len(VIEWS))
        for s in range(cfg.seeds)
    ]
    prompts = [
        f"{with_article(COUNTED_NOUNS[n], COUNTED_NOUNS[n])}, {VIEWS[v]} view" for n, v, _ in cases
    ]
    noise = seed_noise(model, [1000 * n + s for n, _, s in cases]).to(device)
    images = sample(model, prompts, noise, cfg.steps, cfg.scale)
    asked_noun, asked_view, _ = torch.tensor(cases).unbind(1)
    every = verdicts(judge, image_features(network, images), asked_noun, asked_view)
    samples = every.counted()

    report: dict[str, object] = {
        "reconstruction_psnr_db": psnr,
        "judge_on_held_out_renders": judge_report(judge, network, held_out, None),
        "judge_on_held_out_renders_through_autoencoder": judge_report(
            judge, network, held_out, model
        ),
        "sample_noun_accuracy": samples.noun_accuracy(),
        "sample_view_accuracy": samples.view_accuracy(),
        "samples": len(samples.noun),
        "by_noun": samples.noun_accuracy_by_noun(),
        "confusions": samples.noun_confusions(),
        "sample_view_accuracy_by_noun": samples.view_accuracy_by_noun(),
        "sample_view_confusion": every.view_confusion(),
    }
    write_json(cfg.out / "report.json", report)
    return report
