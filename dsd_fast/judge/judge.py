"""What the prior can do, in figures: reconstruction of held-out views, and whether samples show
what was asked.

The judge is a small head over ImageNet features, trained on real renders, as they are, as they come
out of the autoencoder, which is where samples come from, and frayed, as distilled objects are; its
own accuracy on held-out views as they are and out of the autoencoder is reported beside what it
says of the samples.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from dsd_fast.diffusion.ddim import sample
from dsd_fast.guidance.conditions.text import direction, wrapped
from dsd_fast.judge.captions import VIEWS, frequent_nouns, has_front, with_article
from dsd_fast.judge.features import FEATURE_WIDTH, load_features
from dsd_fast.prior.dataset import Views

if TYPE_CHECKING:
    from PIL import Image

    from dsd_fast.diffusion import DiffusionModel

COUNTED_NOUNS = frequent_nouns(at_least=4)
# The views that the accuracies of samples count: overhead is in the confusions alone.
N_COUNTED_VIEWS = VIEWS.index("overhead")
# Confusions of nouns that the report lists.
N_CONFUSIONS = 40
JUDGE_BATCH = 2048
# Images that go through the feature network together.
FEATURE_BATCH = 1024
# Width of each of the judge's two hidden layers.
HIDDEN = 512

# The judge tells views by bins of |azimuth|, whose edges include the boundaries between names, and
# one more for overhead. Neighbouring bins share the target of a view: an azimuth is a quantity.
N_BINS = 12
BIN_DEG = 180 / N_BINS
BLUR_DEG = 12.0
# Views whose name changes within this many degrees of azimuth are left out of the accuracy away
# from boundaries.
MARGIN_DEG = 10.0

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


@dataclass(kw_only=True)
class SampleConfig:
    """Settings of the samples.

    Raises:
        ValueError: fewer than one step.
    """

    # Where the report and the sheet go.
    out: Path
    # Model to judge: a diffusers folder, or `embedded`.
    model: str = "embedded"
    # DDIM steps of a sample.
    steps: int = 50
    # Guidance scale of the samples.
    scale: float = 7.5
    # Device.
    device: str = "cuda"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps: expected at least 1, got {self.steps}")


@dataclass(kw_only=True)
class EvaluateConfig(SampleConfig):
    """Settings of the prior's evaluation.

    Raises:
        ValueError: fewer than one step or seed.
    """

    # Folder of rendered views.
    views: Path
    # Samples of each noun and view.
    seeds: int = 8
    # Gradient steps of the judge.
    judge_steps: int = 3000

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("seeds", "judge_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")


def _bin_centres(device: torch.device | None = None) -> torch.Tensor:
    """[N_BINS] float32, degrees."""
    return (torch.arange(N_BINS, device=device) + 0.5) * BIN_DEG


def bin_targets(view: torch.Tensor, azimuth_deg: torch.Tensor) -> torch.Tensor:
    """Target probabilities [B,N_BINS+1] float32 of views [B] seen from azimuths [B], any range."""
    distance = wrapped(azimuth_deg).abs()[:, None] - _bin_centres(view.device)
    around = torch.softmax(-0.5 * (distance / BLUR_DEG).square(), 1)
    overhead = (view == VIEWS.index("overhead"))[:, None]
    return torch.cat([around * ~overhead, overhead.float()], 1)


def is_clear(azimuth_deg: torch.Tensor, elevation_deg: torch.Tensor) -> torch.Tensor:
    """[B] bool: no other view's name lies within MARGIN_DEG of azimuth."""
    here = direction(elevation_deg, azimuth_deg)
    return (direction(elevation_deg, azimuth_deg - MARGIN_DEG) == here) & (
        direction(elevation_deg, azimuth_deg + MARGIN_DEG) == here
    )


class Judge(nn.Module):
    """A noun head and a view head over features [B,FEATURE_WIDTH] float32.

    The view is judged for a noun that is known: the one shown, or asked for. It scales and shifts
    the hidden layer, since what tells a front from a back is the noun's own.
    """

    def __init__(self, n_nouns: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(FEATURE_WIDTH)
        self.noun_hidden = nn.Linear(FEATURE_WIDTH, HIDDEN)
        self.noun = nn.Linear(HIDDEN, n_nouns)
        self.view_hidden = nn.Linear(FEATURE_WIDTH, HIDDEN)
        self.scale = nn.Embedding(n_nouns, HIDDEN)
        self.shift = nn.Embedding(n_nouns, HIDDEN)
        self.bins = nn.Linear(HIDDEN, N_BINS + 1)
        nn.init.zeros_(self.scale.weight)
        nn.init.zeros_(self.shift.weight)
        bin_view = torch.cat(
            [
                direction(torch.zeros(N_BINS), _bin_centres()),
                torch.tensor([VIEWS.index("overhead")]),
            ]
        )
        self.register_buffer("view_of_bin", F.one_hot(bin_view, len(VIEWS)).float())

    def forward(
        self, features: torch.Tensor, noun: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Noun logits [B,n_nouns], and logits [B,N_BINS+1] of the view of `noun` [B] int64."""
        x = self.norm(features)
        h = F.dropout(F.relu(self.noun_hidden(x)), 0.3, self.training)
        v = self.view_hidden(x) * (1 + self.scale(noun)) + self.shift(noun)
        return self.noun(h), self.bins(F.dropout(F.relu(v), 0.3, self.training))

    def say(self, features: torch.Tensor, noun: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The likeliest noun, and the likeliest view of `noun`; all [B] int64."""
        nouns, bins = self(features, noun)
        return nouns.argmax(1), (bins.softmax(1) @ self.view_of_bin).argmax(1)


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


def save_judge(judge: Judge, path: Path) -> None:
    """Write the judge's weights, with the nouns that it knows, as safetensors."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: value.cpu().contiguous() for name, value in judge.state_dict().items()}
    save_file(state, path, metadata={"nouns": json.dumps(COUNTED_NOUNS)})


def load_judge(path: Path, device: torch.device | str = "cpu") -> Judge:
    """The judge that `save_judge` wrote, in evaluation mode.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a judge's, or was made for other nouns.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file of a judge's weights")
    try:
        with safe_open(path, "pt") as file:
            nouns = json.loads((file.metadata() or {}).get("nouns", "null"))
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file: {error}") from error
    if nouns != COUNTED_NOUNS:
        raise ValueError(
            f"{path}: not a judge of the nouns that this version counts; "
            "`python -m dsd_fast.prior evaluate` writes one"
        )
    judge = Judge(len(COUNTED_NOUNS))
    try:
        judge.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path}: not the weights of a judge: {error}") from error
    return judge.eval().requires_grad_(False).to(device)


def _mean(right: torch.Tensor) -> float:
    """Share of True; NaN of nothing."""
    return float(right.float().mean())


@torch.no_grad()
def image_features(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Features [B,FEATURE_WIDTH] float16 of images [B,3,H,W] in [0,1], on their device.

    Renders and samples take this one way.
    """
    features = torch.empty(len(images), FEATURE_WIDTH, dtype=torch.float16, device=images.device)
    with torch.autocast(images.device.type, torch.bfloat16):
        for out, part in zip(
            features.split(FEATURE_BATCH), images.split(FEATURE_BATCH), strict=True
        ):
            out.copy_(network(part))
    return features


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
        drawn = torch.randint(len(features), (JUDGE_BATCH,), device=device)
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
    features = [
        view_features(network, train, rows, mirror=mirror, **kind)
        for kind in (
            {},
            {"contrast": CONTRAST, "autoencoder": model},
            {"contrast": CONTRAST, "fray": FRAY},
        )
        for mirror in (False, True)
    ]
    target = bin_targets(train.view[rows], train.azimuth[rows])
    return fit_judge(torch.cat(features), noun, target, steps)


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


def check_device(name: str) -> torch.device:
    """The device that a setting names; ValueError where it is not there."""
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: {name} asked for, but torch finds no CUDA; use cpu")
    return device


def _load(cfg: SampleConfig) -> DiffusionModel:
    from dsd_fast.diffusion import load_model

    return load_model(cfg.model, check_device(cfg.device), engine="eager")


def evaluate(cfg: EvaluateConfig) -> dict[str, object]:
    """Judge a prior; writes report.json, which it returns, and judge.safetensors.

    The accuracies of samples count side, front and back views; the confusions of views overhead
    too. Views are counted over the nouns that have a front, and judged for the noun that was asked.

    Raises:
        FileNotFoundError, ValueError: unusable views, model or device.
        ImportError: the extra `prior` is not installed.
    """
    model = _load(cfg)
    device = model.device
    network = load_features(device).to(memory_format=torch.channels_last)
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
    cfg.out.mkdir(parents=True, exist_ok=True)
    (cfg.out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
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


SHEET_SEEDS = 4
SHEET_COLUMNS = 4  # prompts in a row
TILE = 120  # side of one sample
TITLE = 18  # height of the prompt above its block
GAP = 8  # around each block


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
    model = _load(cfg)
    cases = [(p, s, v) for p in SHEET_PROMPTS for s in range(SHEET_SEEDS) for v in VIEWS]
    noise = seed_noise(model, [s for _, s, _ in cases]).to(model.device)
    images = sample(model, [f"{p}, {v} view" for p, _, v in cases], noise, cfg.steps, cfg.scale)
    grid = images.view(len(SHEET_PROMPTS), SHEET_SEEDS, len(VIEWS), *images.shape[1:])
    cfg.out.mkdir(parents=True, exist_ok=True)
    path = cfg.out / "prior-samples.jpg"
    lay_out(grid, SHEET_PROMPTS).save(path, quality=88)
    return path
