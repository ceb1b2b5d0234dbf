"""Pairs of views of one object: latents of rendered orbits, in the memory of the device."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from dsd_fast.diffusion.reference_picture import relative_pose
from dsd_fast.prior.dataset import open_views

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

# One model in so many is never trained on; which, its id decides.
HELD_OUT_MODELS = 20
# Reference views are taken from below this elevation in degrees, as photographs are.
MAX_REFERENCE_ELEVATION = 45.0
ENCODE_BATCH = 256


def is_held_out(model_id: str) -> bool:
    """Whether a model is never trained on."""
    return zlib.crc32(model_id.encode()) % HELD_OUT_MODELS == 0


def on_white(rgba: torch.Tensor) -> torch.Tensor:
    """[B,3,h,w] float32 in [0,1] of straight-alpha images [B,h,w,4] uint8, on white."""
    x = rgba.permute(0, 3, 1, 2).float() / 255
    return x[:, :3] * x[:, 3:] + 1 - x[:, 3:]


class Pairs(NamedTuple):
    """B pairs, on the device of the orbits."""

    # Latents of the reference, the posterior's mean, and of the target, drawn from it: [B,4,32,32]
    # float32 without the scaling factor.
    reference: torch.Tensor
    target: torch.Tensor
    # [B,4] float32, `relative_pose` of the target.
    pose: torch.Tensor


class Orbits:
    """This process's share of rendered orbits.

    Attributes: `rows` [n,K] int64 on the CPU, the rows of each orbit's views in the folder;
    `references` [n,K] int64, for each orbit the numbers of views that may be a reference, repeated
    to fill the row; `azimuth`, `elevation`, `distance` [n,K] float32, in degrees and units of the
    world; the last four on `device`. `models`: the model's id of each orbit.

    Args:
        folder: what `render --views-per-orbit` wrote.
        rank, size: this process and how many share the orbits.
        held_out: the models that are never trained on, instead of all others.
    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: views without orbits, or no orbit is left for this process.
    """

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        rank: int = 0,
        size: int = 1,
        held_out: bool = False,
    ) -> None:
        self._rgba, meta, index = open_views(folder, ("model", "orbit"))
        if (meta["orbit"] < 0).any():
            raise ValueError(
                f"{folder}: expected orbits, got views each under a light of its own; render with "
                "`python -m dsd_fast.prior render --views-per-orbit 12`"
            )
        self.device = device
        by_orbit = np.split(np.arange(len(self._rgba)), np.flatnonzero(np.diff(meta["orbit"])) + 1)
        names = index["models"]
        self._elevation = meta["elevation"]
        keep = [
            rows
            for rows in by_orbit
            if is_held_out(names[meta["model"][rows[0]]]) == held_out
            and (meta["elevation"][rows] <= MAX_REFERENCE_ELEVATION).any()
        ][rank::size]
        if not keep:
            raise ValueError(
                f"{folder}: {len(by_orbit)} orbits leave none for process {rank} of {size}"
                f"{' among the models held out' if held_out else ''}; render more models"
            )
        rows = np.stack(keep)
        self.rows = torch.from_numpy(rows)
        self.models: list[str] = [names[number] for number in meta["model"][rows[:, 0]]]
        usable = [np.flatnonzero(low) for low in meta["elevation"][rows] <= MAX_REFERENCE_ELEVATION]
        references = np.stack([np.resize(numbers, rows.shape[1]) for numbers in usable])
        self.references = torch.from_numpy(references).to(device)
        self.azimuth, self.elevation, self.distance = (
            torch.from_numpy(meta[name][rows]).to(device, torch.float32)
            for name in ("azimuth", "elevation", "distance")
        )
        self._mean = self._std = torch.empty(0)

    def __len__(self) -> int:
        return len(self.rows)

    def images(self, rows: torch.Tensor) -> torch.Tensor:
        """Views of rows [B] on white: [B,3,256,256] float32 in [0,1] on the device."""
        return on_white(torch.from_numpy(self._rgba[rows.numpy()]).to(self.device))

    def pose(
        self,
        orbit: torch.Tensor | int,
        target: torch.Tensor,
        reference: torch.Tensor | int,
        mirror: torch.Tensor | int,
    ) -> torch.Tensor:
        """[B,4] float32, `relative_pose` of views `target` [B] of orbits; where `mirror` is 1, that
        of their mirror images."""
        azimuth = self.azimuth[orbit, target] - self.azimuth[orbit, reference]
        return relative_pose(
            self.elevation[orbit, target],
            azimuth * (1 - 2 * mirror),
            self.distance[orbit, target],
            self.elevation[orbit, reference],
            0.0,
            self.distance[orbit, reference],
        )

    @torch.no_grad()
    def encode(self, vae: AutoencoderKL) -> None:
        """Encode every view, as it is and mirrored, for `sample`: 32 KiB a view.

        Args:
            vae: AutoencoderKL on the device, left in evaluation mode.
        """
        vae.eval()
        n, views = self.rows.shape
        means, stds = [], []
        for rows in self.rows.flatten().split(ENCODE_BATCH):
            images = self.images(rows) * 2 - 1
            both = torch.stack([images, images.flip(3)]).flatten(0, 1)
            both = both.contiguous(memory_format=torch.channels_last)
            with torch.autocast(self.device.type, torch.bfloat16):
                posterior = vae.encode(both).latent_dist
            means.append(posterior.mean.to(torch.float16).unflatten(0, (2, -1)))
            stds.append(posterior.std.to(torch.float16).unflatten(0, (2, -1)))
        self._mean = torch.cat(means, dim=1).unflatten(1, (n, views))
        self._std = torch.cat(stds, dim=1).unflatten(1, (n, views))

    def sample(self, batch: int) -> Pairs:
        """Random pairs of a view that may be a reference and any view of the same orbit.

        Half of them are mirrored: the mirror image of an object is an object, seen from the
        opposite azimuths. Draws from torch's global generator of the device; can be captured in a
        CUDA graph.
        """
        n, views = self.rows.shape

        def integers(end: int) -> torch.Tensor:
            return torch.randint(end, (batch,), device=self.device)

        orbit, target, mirror = integers(n), integers(views), integers(2)
        reference = self.references[orbit, integers(views)]
        pose = self.pose(orbit, target, reference, mirror)
        mean = self._mean[mirror, orbit, target].float()
        std = self._std[mirror, orbit, target].float()
        drawn = mean + std * torch.randn_like(mean)
        return Pairs(self._mean[mirror, orbit, reference].float(), drawn, pose)
