"""Diffusion models to measure with: random weights in a known architecture, or any folder.

The times of a network do not depend on its weights. `random-sd21` is Stable Diffusion 2.1-base's
architecture, made where it runs and without any download; `random-tiny` is for a look at the
benchmarks themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dsd_fast.config import nearest
from dsd_fast.diffusion import DiffusionModel, embed_views, load_model
from dsd_fast.diffusion.components import quiet
from dsd_fast.diffusion.condition import Condition, forward
from dsd_fast.diffusion.engines.base import UNetEngine
from dsd_fast.diffusion.noise_path import NoisePath
from dsd_fast.diffusion.text import VIEWS, PromptEmbeddings

_CROSS_DOWN, _DOWN = "CrossAttnDownBlock2D", "DownBlock2D"
_CROSS_UP, _UP = "CrossAttnUpBlock2D", "UpBlock2D"
_N_TOKENS = 77
_SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}


@dataclass(frozen=True)
class _Architecture:
    """Arguments of UNet2DConditionModel and AutoencoderKL."""

    unet: dict[str, Any]
    vae: dict[str, Any]


RANDOM = {
    "random-sd21": _Architecture(
        unet={
            "sample_size": 64,
            "down_block_types": (_CROSS_DOWN, _CROSS_DOWN, _CROSS_DOWN, _DOWN),
            "up_block_types": (_UP, _CROSS_UP, _CROSS_UP, _CROSS_UP),
            "block_out_channels": (320, 640, 1280, 1280),
            "layers_per_block": 2,
            "attention_head_dim": (5, 10, 20, 20),
            "cross_attention_dim": 1024,
            "use_linear_projection": True,
        },
        vae={
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "block_out_channels": (128, 256, 512, 512),
            "layers_per_block": 2,
            "latent_channels": 4,
            "norm_num_groups": 32,
            "sample_size": 512,
        },
    ),
    "random-tiny": _Architecture(
        unet={
            "sample_size": 8,
            "down_block_types": (_CROSS_DOWN, _DOWN),
            "up_block_types": (_UP, _CROSS_UP),
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "attention_head_dim": 2,
            "cross_attention_dim": 16,
        },
        vae={
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "block_out_channels": (8, 8),
            "layers_per_block": 1,
            "latent_channels": 4,
            "norm_num_groups": 4,
            "sample_size": 16,
        },
    ),
}
# Parameters of Stable Diffusion 2.1-base's UNet: whatever has as many is held against the times
# and operation counts that are known of it.
_SD21_PARAMETERS = 865_910_724
_SD21_UNET_FLOPS = 804e9
_SD21_ENCODER_FLOPS = 1117e9


class CountingEngine:
    """A UNet engine that counts its calls and rows; `filling` marks rows of trajectory caches."""

    def __init__(self, inner: UNetEngine) -> None:
        self.inner = inner
        self.reset()

    def reset(self) -> None:
        """Start to count anew."""
        self.calls = self.rows = self.fill_rows = 0
        self._filling = False

    @contextmanager
    def filling(self) -> Iterator[None]:
        """Within it rows count as those of a cache too."""
        before, self._filling = self._filling, True
        try:
            yield
        finally:
            self._filling = before

    def __call__(self, latents: Tensor, t: Tensor, text: Tensor) -> Tensor:
        self.calls += 1
        self.rows += len(latents)
        self.fill_rows += len(latents) * self._filling
        return self.inner(latents, t, text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


@dataclass(frozen=True)
class Subject:
    """A model whose engine counts, and prompts for it."""

    name: str
    model: DiffusionModel
    prompts: PromptEmbeddings

    @property
    def counter(self) -> CountingEngine:
        return self.model.engine

    @property
    def engine_name(self) -> str:
        """What ran: an engine that fell back says so."""
        engine = self.counter.inner
        return f"{type(engine).__name__}{', fell back' if getattr(engine, '_disabled', 0) else ''}"

    @property
    def is_sd21(self) -> bool:
        """Whether recorded times and counts of Stable Diffusion 2.1-base hold for it."""
        n_parameters = sum(parameter.numel() for parameter in self.model.unet.parameters())
        return n_parameters == _SD21_PARAMETERS

    def unet_flops(self) -> float:
        """Floating-point operations of one row."""
        if self.is_sd21:
            return _SD21_UNET_FLOPS
        inputs = unet_inputs(self, 1)
        return _count(lambda: forward(self.model.unet, *inputs))

    def encoder_flops(self) -> float:
        """Floating-point operations of encoding one image, without the gradient."""
        if self.is_sd21:
            return _SD21_ENCODER_FLOPS
        size = self.model.image_size
        image = torch.zeros(1, 3, size, size, device=self.model.device)
        return _count(lambda: self.model.encode_images(image, torch.Generator()))


def unet_inputs(subject: Subject, n_rows: int) -> tuple[Tensor, Tensor, Condition]:
    """(latents [R,C,h,w], t int64 [R], condition) for a UNet engine, random."""
    model = subject.model
    size, device = model.latent_size, model.device
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(n_rows, model.latent_channels, size, size, generator=generator)
    t = torch.randint(1000, (n_rows,), generator=generator)
    text = subject.prompts.text_vd[torch.arange(n_rows) % len(VIEWS)]
    return latents.to(device, model.dtype), t.to(device), Condition(text.to(device, model.dtype))


def load(name: str, device: torch.device, engine: str = "auto") -> Subject:
    """The model of a name: one of RANDOM, "embedded", a Stable Diffusion folder or a hub id.

    Float16 on CUDA and float32 elsewhere, as in training.

    Raises:
        ValueError: an engine that does not run here, or a random model that does not exist.
        FileNotFoundError, ConnectionError: as `load_model`.
    """
    if name in RANDOM:
        subject = _random(name, device, engine)
    elif name.startswith("random-"):
        raise ValueError(f"there is no model {name!r}{nearest(name, RANDOM)}")
    else:
        model = load_model(name, device, engine=engine)
        subject = Subject(name, model, embed_views(model, "an armchair"))
    subject.model.engine = CountingEngine(subject.model.engine)
    return subject


def _random(name: str, device: torch.device, engine: str) -> Subject:
    with quiet():
        import diffusers

    parts = RANDOM[name]
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    with torch.random.fork_rng([device] if device.type == "cuda" else []), _made_on(device, dtype):
        torch.manual_seed(0)
        unet = diffusers.UNet2DConditionModel(**parts.unet)
        vae = diffusers.AutoencoderKL(**parts.vae)
    model = DiffusionModel(
        _channels_last(unet),
        _channels_last(vae),
        None,
        noise_path=NoisePath.of_scheduler(_SCHEDULER),
        latent_size=parts.unet["sample_size"],
        vae_factor=2 ** (len(parts.vae["block_out_channels"]) - 1),
        device=device,
        engine=engine,
    )
    generator = torch.Generator().manual_seed(0)
    shape = (len(VIEWS), _N_TOKENS, parts.unet["cross_attention_dim"])
    text, uncond = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
    return Subject(name, model, PromptEmbeddings(text, uncond))


@contextmanager
def _made_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Within it modules are made on the device in the dtype: no copy of them passes the host."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def _channels_last(module: nn.Module) -> nn.Module:
    return module.to(memory_format=torch.channels_last)


def _count(call: Any) -> float:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return float(counter.get_total_flops())
