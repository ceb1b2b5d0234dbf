"""Rendered views in GPU memory, composited over fresh backgrounds at every draw, and their captions as tokens."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from . import models
from .captions import VIEWS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import CLIPTokenizer

# one view in this many is never trained on
HELD_OUT = 50
# the frame's half height over the distance to the object, inverted: above it the object fills the view
CLOSE_ZOOM = 0.95


def composite(rgba: torch.Tensor, mirror: bool = False) -> torch.Tensor:
    """Views uint8 [B,h,w,4] with straight alpha over random backgrounds -> [B,3,h,w] float32 in [-1,1].

    Backgrounds are plain colours, a quarter of them greys, a quarter with a soft vertical gradient, as a training
    loop with a learned and randomly replaced background shows them. `mirror` flips rows by a coin.
    """
    batch, height = rgba.shape[:2]
    device = rgba.device
    x = rgba.permute(0, 3, 1, 2).float() / 255
    colour = torch.rand(batch, 3, 1, 1, device=device)
    grey = torch.rand(batch, 1, 1, 1, device=device).expand(-1, 3, -1, -1)
    colour = torch.where(torch.rand(batch, 1, 1, 1, device=device) < 0.25, grey, colour)
    slope = (torch.rand(batch, 3, 1, 1, device=device) - 0.5) * 0.6
    slope = slope * (torch.rand(batch, 1, 1, 1, device=device) < 0.25)
    ramp = torch.linspace(-0.5, 0.5, height, device=device).view(1, 1, -1, 1)
    background = (colour + slope * ramp).clamp(0, 1)
    x = x[:, :3] * x[:, 3:] + background * (1 - x[:, 3:])
    if mirror:
        x = torch.where(torch.rand(batch, 1, 1, 1, device=device) < 0.5, x.flip(3), x)
    return x * 2 - 1


class Views:
    """This process's share of the rendered views.

    Attributes: rgba uint8 [N,256,256,4]; noun, view int64 [N]; azimuth, elevation float32 [N] degrees; index int64
    [N], the row in the whole set.
    """

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        rank: int = 0,
        size: int = 1,
        held_out: bool = False,
    ) -> None:
        rgba = np.load(folder / "rgba.npy", mmap_mode="r")
        meta = np.load(folder / "meta.npz")
        keep = np.flatnonzero((np.arange(len(rgba)) % HELD_OUT == 0) == held_out)[rank::size]
        self.device = device
        self.rgba = torch.empty((len(keep), *rgba.shape[1:]), dtype=torch.uint8, device=device)
        for i in range(0, len(keep), 4096):
            self.rgba[i : i + 4096] = torch.from_numpy(rgba[keep[i : i + 4096]]).to(device)

        def column(name: str, dtype: torch.dtype) -> torch.Tensor:
            return torch.from_numpy(meta[name][keep]).to(device, dtype)

        self.index = torch.from_numpy(keep).to(device)
        self.noun = column("noun", torch.int64)
        self.view = column("view", torch.int64)
        self.azimuth = column("azimuth", torch.float32)
        self.elevation = column("elevation", torch.float32)
        self.noun_names: list[str] = json.loads((folder / "index.json").read_text())["nouns"]
        # Rarer nouns are drawn more often than their count of models would have it, and so are
        # views that an object fills: that is where the pixels are.
        count = self.noun.bincount(minlength=len(self.noun_names)).clamp(min=1)
        zoom = 1 / (
            column("distance", torch.float32)
            * torch.tan(column("fovy", torch.float32) * (math.pi / 360))
        )
        weight = count[self.noun].double() ** -0.35 * torch.where(zoom > CLOSE_ZOOM, 3.0, 1.0)
        self._cumulative = weight.cumsum(0)

    def __len__(self) -> int:
        return len(self.index)

    def free_images(self) -> None:
        """Drop the pixels, once latents or features are there."""
        self.rgba = self.rgba[:0]

    def sample(self, batch: int) -> torch.Tensor:
        """Row numbers [batch] int64, weighted by noun."""
        u = torch.rand(batch, device=self.device, dtype=torch.float64) * self._cumulative[-1]
        return torch.searchsorted(self._cumulative, u).clamp(max=len(self) - 1)

    def batch(
        self, batch: int, soften: float = 0.0, rows: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Images [batch,3,256,256] in [-1,1] over random backgrounds, and their rows.

        `soften` is the share shrunk to a quarter and enlarged bilinearly, as a low-resolution render reaches the VAE.
        """
        rows = self.sample(batch) if rows is None else rows
        images = composite(self.rgba[rows])
        soft = int(batch * soften)
        if soft:
            small = F.interpolate(images[:soft], scale_factor=0.25, mode="area")
            images[:soft] = F.interpolate(
                small, images.shape[2:], mode="bilinear", align_corners=False
            )
        return images, rows

    def noun_labels(self, nouns: Sequence[str]) -> torch.Tensor:
        """Index into `nouns` of each row's noun, -1 where it is not among them: int64 [N]."""
        label = [nouns.index(n) if n in nouns else -1 for n in self.noun_names]
        return torch.tensor(label, device=self.device)[self.noun]


class CaptionTable:
    """Tokens of every caption of the views: [captions, 6, MAX_TOKENS]; the six are no view, side, front, back,
    overhead, and the empty caption.

    Each view has several wordings; the rows of `choices` [all views, wordings] say which.
    """

    def __init__(
        self, folder: Path, device: torch.device, tokenizer: CLIPTokenizer | None = None
    ) -> None:
        captions = json.loads((folder / "index.json").read_text())["captions"]
        suffixes = [f", {view} view" for view in VIEWS]
        bases = [next((c.removesuffix(s) for s in suffixes if c.endswith(s)), c) for c in captions]
        unique = sorted(set(bases))
        number = {base: i for i, base in enumerate(unique)}
        of_caption = np.array([number[base] for base in bases])
        texts = [text for base in unique for text in (base, *(base + s for s in suffixes), "")]
        self.tokenizer = tokenizer or models.build_tokenizer(texts)
        tokens = models.tokenize(self.tokenizer, texts)
        self.tokens = tokens.view(len(unique), 2 + len(VIEWS), -1).to(device)
        choices = of_caption[np.load(folder / "meta.npz")["caption"]]
        self.choices = torch.from_numpy(choices).to(device)

    def draw(
        self, views: Views, rows: torch.Tensor, interpolated: float, dropout: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Two token rows [B, MAX_TOKENS] each and the first's share [B] of the embedding.

        A row is captioned with its view's name (share 1), or, for a share `interpolated` of them, with the mix of
        two views' captions that view-dependent guidance forms at its azimuth (DreamFusion's prompts as
        interpolated by Perp-Neg, Armandpour et al. 2023): front to side to back.
        """
        batch = len(rows)
        device = rows.device
        wording = torch.randint(self.choices.shape[1], (batch,), device=device)
        caption = self.choices[views.index[rows], wording]
        side, front, back = 1, 2, 3
        view = views.view[rows] + 1
        # one caption in ten names no view
        plain = torch.where(torch.rand(batch, device=device) < 0.1, torch.zeros_like(view), view)

        a = (torch.remainder(views.azimuth[rows] + 180, 360) - 180).abs()
        near = a < 90
        mixed = (torch.rand(batch, device=device) < interpolated) & (views.elevation[rows] <= 60)
        first = torch.where(mixed, torch.where(near, front, side), plain)
        second = torch.where(mixed, torch.where(near, side, back), plain)
        share = torch.where(mixed, torch.where(near, 1 - a / 90, 2 - a / 90), torch.ones_like(a))

        empty = torch.rand(batch, device=device) < dropout
        first = torch.where(empty, 5, first)
        second = torch.where(empty, 5, second)
        return self.tokens[caption, first], self.tokens[caption, second], share
