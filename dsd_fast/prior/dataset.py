"""Rendered views in GPU memory, over a fresh background at every draw, and their caption tokens."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from dsd_fast.guidance.conditions.text import mix_of_views
from dsd_fast.judge.captions import VIEWS, has_front
from dsd_fast.prior import models

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import CLIPTokenizer

# One view in this many is never trained on.
HELD_OUT = 50
# Half a frame's height at the object is distance * tan(fovy / 2); its inverse is the zoom. Objects
# have a radius of 0.6: within these zooms one fills half of the view or more and is not cut off.
# Guidance does not tell the prior how far its camera is: what it draws must fit into most frames.
GOOD_ZOOM = (0.8, 1.3)
GOOD_ZOOM_WEIGHT = 4.0
# A model is drawn by its noun's count of models to the power of -1/2, so that rarer nouns come up
# more often than their count would have it; counts below this share of the largest are taken as
# this share, or the many nouns of one model would crowd out the others.
RAREST = 0.1
# Fronts and backs of things that have a front are what is mixed up, hardly ever a side.
FRONT_BACK_WEIGHT = 1.5
# Rows moved to the device at once: 1 GiB of pixels.
UPLOAD_ROWS = 4096
# Columns of CaptionTable.tokens: no view, then VIEWS in their order, then the empty caption.
NO_VIEW, SIDE, FRONT, BACK = 0, *(1 + VIEWS.index(view) for view in ("side", "front", "back"))
EMPTY = 1 + len(VIEWS)
# Share of captions that name no view.
PLAIN_SHARE = 0.05


def composite(rgba: torch.Tensor, mirror: bool = False) -> torch.Tensor:
    """Views over random backgrounds.

    Backgrounds are plain colours, a quarter of them greys, a quarter with a soft vertical gradient,
    as a training loop with a learned and randomly replaced background shows them.

    Args:
        rgba: [B,h,w,4] uint8 with straight alpha, on any device.
        mirror: flip each image left to right by a coin.
    Returns:
        [B,3,h,w] float32 in [-1,1] on the device of `rgba`. Draws from torch's global generator of
        that device.
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


META_COLUMNS = ("noun", "view", "azimuth", "elevation", "distance", "fovy", "caption")


def open_views(
    folder: Path, extra: Sequence[str] = ()
) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, list[str]]]:
    """Pixels (memory-mapped), columns and index of a folder that `render_views` wrote.

    extra: columns besides META_COLUMNS.

    Raises:
        FileNotFoundError: the folder or one of its three files is missing.
        ValueError: the files do not belong together.
    """
    names = ("rgba.npy", "meta.npz", "index.json")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder}: expected a folder of rendered views with rgba.npy, meta.npz and "
            f"index.json, found no {' and no '.join(missing)}; "
            "`python -m dsd_fast.prior render` writes one"
        )
    rgba = np.load(folder / "rgba.npy", mmap_mode="r")
    with np.load(folder / "meta.npz") as file:
        wanted = (*META_COLUMNS, *extra)
        meta = {name: file[name] for name in wanted if name in file}
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    absent = [name for name in wanted if name not in meta]
    absent += [name for name in ("nouns", "captions") if name not in index]
    side = models.IMAGE_SIZE
    if absent or rgba.shape[1:] != (side, side, 4) or rgba.dtype != np.uint8:
        raise ValueError(
            f"{folder}: expected views [N,{side},{side},4] uint8 with {', '.join(wanted)}, "
            f"nouns and captions, got {list(rgba.shape)} {rgba.dtype}"
            + (f" without {', '.join(absent)}" if absent else "")
            + "; render them again with `python -m dsd_fast.prior render`"
        )
    lengths = {name: len(column) for name, column in meta.items()}
    if set(lengths.values()) != {len(rgba)}:
        raise ValueError(
            f"{folder}: rgba.npy has {len(rgba)} views, meta.npz {lengths}: the files come from "
            "different runs; render them again with `python -m dsd_fast.prior render`"
        )
    return rgba, meta, index


class Views:
    """This process's share of the rendered views, in the memory of its device.

    Attributes: `rgba` [N,256,256,4] uint8; `noun`, `view` [N] int64, indices into `noun_names` and
    captions.VIEWS; `azimuth`, `elevation` [N] float32 in degrees; `index` [N] int64, the row in the
    whole set; all on `device`.

    Args:
        folder: what `render_views` wrote.
        rank, size: this process and how many share the views.
        held_out: the one view in HELD_OUT that is never trained on, instead of all others.
    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: the files do not belong together, or no view is left for this process.
    """

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        rank: int = 0,
        size: int = 1,
        held_out: bool = False,
    ) -> None:
        rgba, meta, index = open_views(folder)
        keep = np.flatnonzero((np.arange(len(rgba)) % HELD_OUT == 0) == held_out)[rank::size]
        if len(keep) == 0:
            raise ValueError(
                f"{folder}: {len(rgba)} views leave none for process {rank} of {size}"
                f"{' among those held out' if held_out else ''}; render more"
            )
        self.device = device
        self.rgba = torch.empty((len(keep), *rgba.shape[1:]), dtype=torch.uint8, device=device)
        for i in range(0, len(keep), UPLOAD_ROWS):
            part = keep[i : i + UPLOAD_ROWS]
            self.rgba[i : i + UPLOAD_ROWS] = torch.from_numpy(rgba[part]).to(device)

        def column(name: str, dtype: torch.dtype) -> torch.Tensor:
            return torch.from_numpy(meta[name][keep]).to(device, dtype)

        self.index = torch.from_numpy(keep).to(device)
        self.noun = column("noun", torch.int64)
        self.view = column("view", torch.int64)
        self.azimuth = column("azimuth", torch.float32)
        self.elevation = column("elevation", torch.float32)
        self.noun_names: list[str] = index["nouns"]
        count = self.noun.bincount(minlength=len(self.noun_names))
        commonness = count.double() / count.max()
        rarity = commonness.clamp(min=RAREST) ** -0.5
        zoom = 1 / (
            column("distance", torch.float32)
            * torch.tan(column("fovy", torch.float32) * (math.pi / 360))
        )
        is_good = (zoom > GOOD_ZOOM[0]) & (zoom < GOOD_ZOOM[1])
        fronted = torch.tensor([has_front(name) for name in self.noun_names], device=device)
        is_end = (self.view == VIEWS.index("front")) | (self.view == VIEWS.index("back"))
        weight = rarity[self.noun] * torch.where(is_good, GOOD_ZOOM_WEIGHT, 1.0)
        weight = weight * torch.where(fronted[self.noun] & is_end, FRONT_BACK_WEIGHT, 1.0)
        self._cumulative = weight.cumsum(0)

    def __len__(self) -> int:
        return len(self.index)

    def free_images(self) -> None:
        """Drop the pixels, once latents or features are there; `batch` works no more."""
        self.rgba = self.rgba[:0]

    def sample(self, batch: int) -> torch.Tensor:
        """Row numbers [batch] int64 on the device, drawn with weights, with replacement."""
        u = torch.rand(batch, device=self.device, dtype=torch.float64) * self._cumulative[-1]
        return torch.searchsorted(self._cumulative, u).clamp(max=len(self) - 1)

    def batch(
        self, batch: int, soften: float = 0.0, rows: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Images over random backgrounds.

        Args:
            soften: share of the images that is shrunk to a quarter and enlarged bilinearly, as a
                low-resolution render reaches the VAE.
            rows: [batch] int64 on the device, which views; drawn by `sample` when None.
        Returns:
            images [batch,3,256,256] float32 in [-1,1], and their rows.
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
        """[N] int64: the index into `nouns` of each row's noun, -1 where it is not among them."""
        label = [nouns.index(n) if n in nouns else -1 for n in self.noun_names]
        return torch.tensor(label, device=self.device)[self.noun]


class CaptionTable:
    """Tokens of every caption of the views.

    Attributes: `tokens` [captions, 6, MAX_TOKENS] int64, each caption without a view, with each of
    VIEWS, and the empty caption; `choices` [all views, wordings] int64, the captions of each view;
    both on `device`; `tokenizer`.

    Args:
        folder: what `render_views` wrote.
        tokenizer: of the model to go on from; None makes one for these captions.
    Raises:
        FileNotFoundError, ValueError: as `Views`; or a caption is too long.
    """

    def __init__(
        self, folder: Path, device: torch.device, tokenizer: CLIPTokenizer | None = None
    ) -> None:
        _, meta, index = open_views(folder)
        captions = index["captions"]
        suffixes = [f", {view} view" for view in VIEWS]
        bases = [next((c.removesuffix(s) for s in suffixes if c.endswith(s)), c) for c in captions]
        unique = sorted(set(bases))
        number = {base: i for i, base in enumerate(unique)}
        of_caption = np.array([number[base] for base in bases])
        texts = [text for base in unique for text in (base, *(base + s for s in suffixes), "")]
        self.tokenizer = tokenizer or models.build_tokenizer(texts)
        tokens = models.tokenize(self.tokenizer, texts)
        self.tokens = tokens.view(len(unique), 2 + len(VIEWS), -1).to(device)
        self.choices = torch.from_numpy(of_caption[meta["caption"]]).to(device)

    def draw(
        self, views: Views, rows: torch.Tensor, interpolated: float, dropout: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Captions of `rows`, as two texts to be embedded and mixed.

        A row is captioned with its view's name (or, one in twenty, none), or, for a share
        `interpolated` of them, with the mix of two views' captions that view-dependent guidance
        forms at its azimuth (DreamFusion's prompts as interpolated by Perp-Neg, Armandpour et al.
        2023): front to side to back. Overhead views are never mixed.

        Args:
            rows: [B] int64 rows of `views`.
            dropout: share of rows with the empty caption.
        Returns:
            two token rows [B, MAX_TOKENS] int64 and the share [B] float32 of the first one's
            embedding.
        """
        batch = len(rows)
        device = rows.device
        wording = torch.randint(self.choices.shape[1], (batch,), device=device)
        caption = self.choices[views.index[rows], wording]
        # masked_fill, since torch.where copies numbers to the device: this is captured in a graph.
        plain = views.view[rows] + 1
        plain.masked_fill_(torch.rand(batch, device=device) < PLAIN_SHARE, NO_VIEW)

        near, share = mix_of_views(views.azimuth[rows])
        mixed = torch.rand(batch, device=device) < interpolated
        mixed &= views.view[rows] != VIEWS.index("overhead")
        side = torch.full_like(plain, SIDE)
        first = torch.where(mixed, side.masked_fill(near, FRONT), plain)
        second = torch.where(mixed, side.masked_fill(~near, BACK), plain)
        share.masked_fill_(~mixed, 1)

        empty = torch.rand(batch, device=device) < dropout
        first.masked_fill_(empty, EMPTY)
        second.masked_fill_(empty, EMPTY)
        return self.tokens[caption, first], self.tokens[caption, second], share
