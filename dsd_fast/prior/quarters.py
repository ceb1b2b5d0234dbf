"""Four views of one object, a quarter turn apart: latents of rendered orbits on the device."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from dsd_fast.diffusion.networks.multiview_unet import N_VIEWS
from dsd_fast.prior.dataset import RAREST, composite, open_views
from dsd_fast.prior.orbits import is_held_out
from dsd_fast.scene.cameras import camera_condition

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

ENCODE_OBJECTS = 64
# Degrees by which views may be off their quarters.
_TOLERANCE = 0.1


class Objects(NamedTuple):
    """B objects of V views, on the device of the quarters."""

    # [B,V,4,32,32] float32, drawn from the posterior, without the scaling factor.
    latents: torch.Tensor
    # [B,V,16] float32, `camera_condition`.
    cameras: torch.Tensor
    # [B] int64, a row of each one's first view in the folder: its captions are the object's.
    rows: torch.Tensor


class Quarters:
    """This process's share of rendered quarter turns.

    Attributes: `rows` [n,4] int64 on the CPU, rows of the folder; `azimuth`, `elevation` [n,4]
    float32 in degrees on `device`; `models`: the model's id of each object.

    Args:
        folder: what `render --quarter-turns` wrote.
        rank, size: this process and how many share the objects.
        held_out: the models that are never trained on, instead of all others.
    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: views that are no quarter turns, or no object is left for this process.
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
        azimuth, elevation = meta["azimuth"], meta["elevation"]
        whole = len(azimuth) % N_VIEWS == 0
        if whole:
            azimuth, elevation = azimuth.reshape(-1, N_VIEWS), elevation.reshape(-1, N_VIEWS)
            turn = (azimuth - azimuth[:, :1] - np.arange(N_VIEWS) * 90.0 + 180.0) % 360.0 - 180.0
            level = elevation - elevation[:, :1]
            whole = np.abs(turn).max() < _TOLERANCE and np.abs(level).max() < _TOLERANCE
        if not whole or (meta["orbit"] < 0).any():
            raise ValueError(
                f"{folder}: expected objects of {N_VIEWS} views a quarter turn apart; render with "
                "`python -m dsd_fast.prior render --quarter-turns`"
            )
        self.device = device
        names = index["models"]
        rows = np.arange(len(self._rgba)).reshape(-1, N_VIEWS)
        models = meta["model"][rows[:, 0]]
        keep = np.flatnonzero([is_held_out(names[m]) == held_out for m in models])[rank::size]
        if not len(keep):
            raise ValueError(
                f"{folder}: {len(rows)} objects leave none for process {rank} of {size}"
                f"{' among the models held out' if held_out else ''}; render more models"
            )
        self.rows = torch.from_numpy(rows[keep])
        self.models: list[str] = [names[m] for m in models[keep]]
        self.azimuth = torch.from_numpy(azimuth[keep]).to(device, torch.float32)
        self.elevation = torch.from_numpy(elevation[keep]).to(device, torch.float32)
        self._first = self.rows[:, 0].to(device)
        self._cameras = torch.stack([self._camera(1.0), self._camera(-1.0)])
        # Rarer nouns come up more often than their models' count would have it, as in `Views`.
        noun = torch.from_numpy(meta["noun"][rows[keep, 0]])
        count = noun.bincount(minlength=len(index["nouns"]))
        weight = (count.double() / count.max()).clamp(min=RAREST) ** -0.5
        self._cumulative = weight[noun].cumsum(0).to(device)
        self._mean = self._std = torch.empty(0)
        self._mirrored = torch.empty(0)

    def __len__(self) -> int:
        return len(self.rows)

    def _camera(self, side: float) -> torch.Tensor:
        """Cameras [n,4,16] of the objects, or of their mirror images where `side` is -1."""
        angles = self.elevation.flatten(), side * self.azimuth.flatten()
        return camera_condition(*angles).view(len(self), N_VIEWS, -1)

    def images(self, rows: torch.Tensor) -> torch.Tensor:
        """Straight-alpha views of rows [B] of the folder: [B,256,256,4] uint8 on the device."""
        return torch.from_numpy(self._rgba[rows.numpy()]).to(self.device)

    @torch.no_grad()
    def encode(self, vae: AutoencoderKL, encodings: int) -> None:
        """Encode every object for `sample`, 64 KiB an encoding: each on a background of its own,
        the same in its four views, and mirrored by a coin.

        Args:
            vae: AutoencoderKL on the device, left in evaluation mode.
        """
        vae.eval()
        n, side = len(self), 32
        shape = encodings, n, N_VIEWS, 4, side, side
        self._mean = torch.empty(shape, dtype=torch.float16, device=self.device)
        self._std = torch.empty_like(self._mean)
        self._mirrored = torch.randint(2, (encodings, n), device=self.device)
        for start in range(0, n, ENCODE_OBJECTS):
            part = slice(start, min(start + ENCODE_OBJECTS, n))
            rgba = self.images(self.rows[part].flatten())
            for k in range(encodings):
                # Its views side by side are one picture with one background.
                wide = rgba.unflatten(0, (-1, N_VIEWS)).transpose(1, 2).flatten(2, 3)
                images = composite(wide).unflatten(3, (N_VIEWS, -1)).permute(0, 3, 1, 2, 4)
                mirrored = self._mirrored[k, part].view(-1, 1, 1, 1, 1)
                images = torch.where(mirrored == 1, images.flip(4), images).flatten(0, 1)
                images = images.contiguous(memory_format=torch.channels_last)
                with torch.autocast(self.device.type, torch.bfloat16):
                    posterior = vae.encode(images).latent_dist
                self._mean[k, part] = posterior.mean.unflatten(0, (-1, N_VIEWS)).half()
                self._std[k, part] = posterior.std.unflatten(0, (-1, N_VIEWS)).half()

    def sample(self, batch: int) -> Objects:
        """Random objects, drawn with weights.

        Draws from torch's global generator of the device; can be captured in a CUDA graph.
        """
        u = torch.rand(batch, device=self.device, dtype=torch.float64) * self._cumulative[-1]
        index = torch.searchsorted(self._cumulative, u).clamp(max=len(self) - 1)
        k = torch.randint(len(self._mean), (batch,), device=self.device)
        mean, std = self._mean[k, index].float(), self._std[k, index].float()
        cameras = self._cameras[self._mirrored[k, index], index]
        return Objects(mean + std * torch.randn_like(mean), cameras, self._first[index])
