"""Networks that look at the views: ImageNet features, the judges of noun and view, CLIP.

Each is optional: what needs one that is not there is left out of the report, with a line that says
so.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from dsd_fast.evaluate.assets import Asset, EvaluateError
from dsd_fast.guidance.conditions.text import direction
from dsd_fast.judge.captions import COUNTED_NOUNS, VIEWS, has_front, noun_of
from dsd_fast.judge.features import image_features, load_features
from dsd_fast.judge.judge import Judge, load_judge

# The last features of EfficientNet-Lite0: the pooled head, as wide as is usual for distances
# between sets of images. The rest (pooled taps of earlier layers) is for the judges.
HEAD_WIDTH = 1280
FRONT = VIEWS.index("front")
# Images [V,H,W,3] uint8 -> features [V,D] float32, D >= HEAD_WIDTH or what a test takes.
Encoder = Callable[[np.ndarray], np.ndarray]


def to_tensor(images: np.ndarray, device: torch.device) -> torch.Tensor:
    """[V,H,W,3] uint8 -> [V,3,H,W] float32 in [0,1]."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 255


def load_encoder(device: torch.device) -> Encoder:
    """The feature network of the judges.

    Raises:
        EvaluateError: its weights are not installed; says how to.
    """
    try:
        network = load_features(device)
    except ImportError as error:
        raise EvaluateError(str(error)) from error

    def encode(images: np.ndarray) -> np.ndarray:
        return image_features(network, to_tensor(images, device)).float().cpu().numpy()

    return encode


@dataclass(frozen=True)
class Verdict:
    """What the judge says of one asset, [V] each; the view only of nouns that have a front, and
    not of pictures, which no camera has seen from a side."""

    noun: int
    said_noun: np.ndarray
    view: np.ndarray
    said_view: np.ndarray | None


def judge_asset(judge: Judge, asset: Asset, features: np.ndarray) -> Verdict | None:
    """The judge's word on the features [V,D] of an asset; None of a prompt without a known noun."""
    noun = noun_of(asset.source.prompt)
    if noun is None:
        return None
    x = torch.from_numpy(features).to(next(judge.parameters()).device)
    with torch.no_grad():
        said = judge.say(x, torch.full((len(x),), noun, device=x.device))
    said_noun, said_view = (column.cpu().numpy() for column in said)
    azimuths = torch.from_numpy(asset.azimuths).float()
    view = direction(torch.full_like(azimuths, asset.elevation), azimuths).numpy()
    seen_from_sides = has_front(COUNTED_NOUNS[noun]) and not asset.source.is_picture
    return Verdict(noun, said_noun, view, said_view if seen_from_sides else None)


def open_judge(path: Path, device: torch.device) -> Judge:
    """`load_judge`, with EvaluateError for what cannot be read."""
    try:
        return load_judge(path, device)
    except (FileNotFoundError, ValueError) as error:
        raise EvaluateError(str(error)) from error


class Clip:
    """A transformers CLIP model of a folder: nothing is downloaded.

    Raises:
        EvaluateError: the folder is missing or holds no CLIP model.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        from transformers import CLIPModel, CLIPTokenizer
        from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

        if not (folder / "config.json").is_file():
            raise EvaluateError(f"--clip {folder}: no config.json of a transformers CLIP model")
        try:
            self.model = CLIPModel.from_pretrained(
                # The folder may not name another implementation, which could be a program.
                folder,
                local_files_only=True,
                attn_implementation="sdpa",
            )
            self.tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
            path = folder / "preprocessor_config.json"
            config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            self.mean, self.std = (
                torch.tensor(config.get(name, usual), dtype=torch.float32).view(1, 3, 1, 1)
                for name, usual in (
                    ("image_mean", OPENAI_CLIP_MEAN),
                    ("image_std", OPENAI_CLIP_STD),
                )
            )
            if not (self.mean.isfinite().all() and (self.std > 0).all()):
                raise ValueError(f"{path}: expected image_mean and image_std of three numbers")
        except Exception as error:  # damaged folders bring errors of all kinds
            words = f"{type(error).__name__}: {error}"
            raise EvaluateError(f"--clip {folder}: not a CLIP model: {words}") from error
        self.model = self.model.float().eval().requires_grad_(False).to(device)
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        self.device = device

    @torch.no_grad()
    def embed(self, images: np.ndarray, prompt: str) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings [V,D] of views [V,H,W,3] uint8 and [D] of a prompt, which is cut to fit.

        Views are resized to a square of the model's size, bicubic with antialiasing, as CLIP's
        own preprocessing does for squares.
        """
        side = self.model.config.vision_config.image_size
        x = to_tensor(images, self.device)
        x = F.interpolate(x, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
        tokens = self.tokenizer(
            [prompt],
            return_tensors="pt",
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
        ).to(self.device)
        output = self.model(
            pixel_values=(x - self.mean) / self.std,
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
        )
        return output.image_embeds.cpu().numpy(), output.text_embeds[0].cpu().numpy()
