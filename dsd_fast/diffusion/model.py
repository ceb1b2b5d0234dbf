"""A latent diffusion model as guidance sees it: encode, decode, embed, predict noise."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from dsd_fast._backend import backend
from dsd_fast.diffusion.condition import Condition
from dsd_fast.diffusion.engines import make_engine
from dsd_fast.diffusion.networks import Network, dense_vae
from dsd_fast.diffusion.networks.dense_vae import DenseEncoder
from dsd_fast.diffusion.networks.fused_vae import FusedEncoder, unsupported
from dsd_fast.diffusion.noise_path import NoisePath
from dsd_fast.upload import upload

_HASH_CHUNK_BYTES = 1 << 22


class TextEncoder(Protocol):
    """Prompts to embeddings; made again from its files after a release."""

    def __call__(self, prompts: Sequence[str]) -> Tensor: ...

    def release(self) -> None: ...


class DiffusionModel:
    """Frozen UNet and VAE on one device, with the arithmetic around them in float32.

    Use `load_model` to make one from a folder. Attributes: `unet`, `vae`, `noise_path` (on
    the device), `latent_channels`, `latent_size`, `image_size`, `scaling_factor`, `shift_factor`,
    `path`, `device`, `dtype` (of the UNet). On CUDA, in half precision, an AutoencoderKL encodes by
    `FusedEncoder`, on the CPU with products in bfloat16 by `DenseEncoder`.

    Args:
        unet: UNet2DConditionModel (or any module with its call) on `device`.
        vae: AutoencoderKL or AutoencoderTiny on `device`, in its own dtype.
        text_encoder: embeds prompts, or None if embeddings come from elsewhere.
        noise_path: its levels, float32, and what the UNet predicts.
        latent_size: side of the square latents.
        vae_factor: image pixels per latent pixel, along a side.
        weight_files: what `model_hash` covers.
        engine: one of `dsd_fast.diffusion.engines.ENGINES`, see there.
        products: on the CPU, what `dsd_fast.diffusion.engines.on_cpu` found for the UNet.
    """

    def __init__(
        self,
        unet: nn.Module,
        vae: Network,
        text_encoder: TextEncoder | None,
        *,
        noise_path: NoisePath,
        latent_channels: int = 4,
        latent_size: int = 64,
        vae_factor: int = 8,
        scaling_factor: float = 0.18215,
        shift_factor: float = 0.0,
        device: torch.device | str = "cpu",
        path: Path | None = None,
        weight_files: Sequence[Path] = (),
        engine: str = "auto",
        products: torch.dtype | None = None,
    ):
        self.unet = unet.eval().requires_grad_(False)
        self.vae = vae.eval().requires_grad_(False)
        self.latent_channels = latent_channels
        self.latent_size = latent_size
        self.image_size = latent_size * vae_factor
        self.scaling_factor = scaling_factor
        self.shift_factor = shift_factor
        self.device = torch.device(device)
        self.noise_path = noise_path.to(self.device)
        self.path = path
        self.engine = make_engine(self.unet, self.device, engine, products)
        self.dtype = _dtype_of(unet)
        self._vae_dtype = _dtype_of(vae)
        self._text_encoder = text_encoder
        self._weight_files = tuple(weight_files)
        self._encoder = _own_encoder(vae, self.device, self._vae_dtype, products)

    @property
    def n_views(self) -> int:
        """Views of one object that the UNet predicts together, the rows of a batch side by side."""
        return getattr(self.unet, "n_views", 1)

    def encode_prompt(self, prompts: Sequence[str]) -> Tensor:
        """Last hidden state of the text encoder: [K,L,D] float32 on the model's device.

        The encoder is read from its files at the first call, and again after a release.

        Raises:
            ValueError: a prompt has more tokens than the model reads.
        """
        if self._text_encoder is None:
            raise ValueError("this model was built without a text encoder; pass embeddings instead")
        return self._text_encoder(prompts)

    def release_text_encoder(self) -> None:
        """Drop the text encoder's weights. Embeddings already made stay valid."""
        if self._text_encoder is not None:
            self._text_encoder.release()

    def release_decoder(self) -> None:
        """Move the VAE's decoder to the CPU, from where `decode_latents` takes it back.

        Training only encodes; of Stable Diffusion's VAE the decoder is three fifths.
        """
        for module in self._decoder():
            module.to("cpu")

    def encode_images(
        self, rgb: Tensor, generator: torch.Generator, *, sample_posterior: bool = True
    ) -> Tensor:
        """VAE latents of images, with gradient to the images.

        An AutoencoderKL posterior is sampled (mathematics.md 3.3: mean + std * noise, fresh noise
        each call); AutoencoderTiny has no posterior and draws nothing.

        Args:
            rgb: [B,3,H,W] float32 in [0,1] on the model's device, H and W multiples of the VAE
                factor.
            generator: CPU generator of the posterior noise.
            sample_posterior: without it, the posterior's mean; nothing is drawn.
        Returns:
            [B,C,h,w] float32, scaled as the UNet expects.
        """
        noise = None
        if sample_posterior:
            factor = self.image_size // self.latent_size
            size = (rgb.shape[-2] // factor, rgb.shape[-1] // factor)
            noise = self.draw_posterior(len(rgb), generator, size)
        return self.encode_with_noise(rgb, noise)

    def draw_posterior(
        self, n_images: int, generator: torch.Generator, size: tuple[int, int] | None = None
    ) -> Tensor | None:
        """Noise for `encode_with_noise`, [B,C,h,w] on the CPU; latents of the model's size if None.

        None for AutoencoderTiny, which has no posterior; nothing is drawn then.
        """
        if not hasattr(self.vae, "quant_conv"):
            return None
        height, width = size or (self.latent_size, self.latent_size)
        return torch.randn(n_images, self.latent_channels, height, width, generator=generator)

    def encode_with_noise(self, rgb: Tensor, noise: Tensor | None) -> Tensor:
        """`encode_images` with noise drawn by the caller: work for the device alone.

        Both its passes can be captured in a CUDA graph.

        Args:
            rgb: as in `encode_images`.
            noise: of `draw_posterior`, on any device, or None for the posterior's mean.
        """
        mean, std = self._posterior(rgb)
        latents = mean
        if std is not None and noise is not None:
            latents = mean + std * upload(noise, mean.device)
        return (latents - self.shift_factor) * self.scaling_factor

    def _posterior(self, rgb: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and, where the VAE has one, standard deviation, [B,C,h,w] float32."""
        if rgb.ndim != 4 or rgb.shape[1] != 3:
            raise ValueError(f"encode_images: expected rgb [B,3,H,W], got {tuple(rgb.shape)}")
        if self._encoder is not None:
            mean, log_variance = self._encoder.moments(rgb).chunk(2, 1)
            return mean, torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))
        pixels = (rgb * 2 - 1).to(self._vae_dtype)
        with torch.autocast(self.device.type, enabled=False):
            encoded = self.vae.encode(pixels)
        if hasattr(encoded, "latent_dist"):
            return encoded.latent_dist.mean.float(), encoded.latent_dist.std.float()
        return encoded.latents.float(), None

    def _decoder(self) -> list[nn.Module]:
        pieces = (getattr(self.vae, name, None) for name in ("decoder", "post_quant_conv"))
        return [piece for piece in pieces if piece is not None]

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Images of latents [B,C,h,w]: [B,3,H,W] float32, clamped to [0,1]."""
        for module in self._decoder():
            module.to(self.device)
        unscaled = latents / self.scaling_factor + self.shift_factor
        with torch.autocast(self.device.type, enabled=False):
            pixels = self.vae.decode(unscaled.to(self._vae_dtype), return_dict=False)[0]
        return ((pixels.float() + 1) / 2).clamp(0, 1)

    @torch.no_grad()
    def predict_noise(self, latents: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """One UNet forward without guidance, whatever the UNet predicts.

        Args:
            latents: [R,C,h,w] float32.
            t: [R] int64, one level per row.
            condition: of R rows, in any floating dtype.
        Returns:
            [R,C,h,w] float32.
        """
        t = upload(t, self.device)
        output = self.engine(latents.to(self.dtype), t, condition.to(self.dtype)).float()
        return self.noise_path.noise(output, latents, t)

    @cached_property
    def model_hash(self) -> str:
        """SHA-256 over all weight files, in the order of their names, read in pieces."""
        digest = hashlib.sha256()
        for file in sorted(self._weight_files):
            with open(file, "rb") as stream:
                while chunk := stream.read(_HASH_CHUNK_BYTES):
                    digest.update(chunk)
        return digest.hexdigest()


def _own_encoder(
    vae: nn.Module, device: torch.device, dtype: torch.dtype, products: torch.dtype | None
) -> FusedEncoder | DenseEncoder | None:
    """Our own encoder where it is faster: half precision on CUDA, with Triton; products in bfloat16
    on the CPU."""
    if device.type == "cpu" and products == torch.bfloat16 and not dense_vae.unsupported(vae):
        return DenseEncoder(vae, torch.bfloat16)
    if backend(device) != "triton" or dtype not in (torch.float16, torch.bfloat16):
        return None
    config = {**getattr(vae, "config", {}), "_class_name": type(vae).__name__}
    if unsupported(config) is not None:
        return None
    return FusedEncoder(vae)


def _dtype_of(module: nn.Module) -> torch.dtype:
    return next((p.dtype for p in module.parameters()), torch.float32)
