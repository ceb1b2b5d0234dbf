"""The passes of a guidance step outside the UNet, at sizes of Stable Diffusion's latents.

``python -m benchmarks.guidance`` counts what each launches on a CUDA device, and the same by torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.case import Call, Workload, by_reference
from dsd_fast.diffusion.noise_path import NoisePath
from dsd_fast.guidance import passes as package
from dsd_fast.guidance.conditions.text import text_mix
from dsd_fast.guidance.passes import Form, Guide

_CHANNELS = 4
_TEXT = (77, 1024)
_SCALE = 7.5
# Rows of an item in a batch of the UNet, and slots of the table for each item.
_ROWS, _SLOTS = 4, 8
_SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


class _Step:
    """Random inputs of a step: `n_items` latents of `size` px, predictions in half on CUDA."""

    def __init__(self, size: int, device: torch.device, generator: torch.Generator, n_items: int):
        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device)

        latent = (_CHANNELS, size, size)
        self.n = n_items * _CHANNELS * size * size  # numbers in the latents
        self.dtype = torch.float16 if device.type == "cuda" else torch.float32
        self.width = self.dtype.itemsize
        self.guide = Guide(-randn(n_items, 2).abs())
        self.x = randn(n_items, *latent)
        self.eps = randn(2 * _ROWS * n_items, *latent).to(self.dtype)
        self.first = self.eps[: _ROWS * n_items]
        self.table = randn(_SLOTS * n_items, *latent)
        self.slot = torch.arange(n_items, device=device) * _SLOTS
        self.mix = torch.rand(n_items, generator=generator).to(device)
        self.t = torch.randint(320, 900, (n_items,), generator=generator).to(device)
        self.t_delta = self.t + 20
        self.path = NoisePath.of_scheduler(_SCHEDULE).to(device)
        self.form = Form(self.path, self.dtype, perp_neg=True)
        self.done = torch.zeros((), dtype=torch.int32, device=device)
        self.bank = randn(8, *_TEXT)
        azimuth = 360 * torch.rand(n_items, generator=generator)
        views = text_mix(torch.zeros(n_items), azimuth)
        self.text_rows = [torch.cat([rows, rows]).to(device) for rows in views[:3]]

    def combine(self) -> tuple[Tensor]:
        return (package.combine(self.first, self.guide, _SCALE),)

    def step(self) -> tuple[Tensor, ...]:
        levels = (self.t_delta, self.t, self.form)
        return package.step(self.first, self.guide, _SCALE, self.x, *levels)

    def link(self) -> tuple[Tensor, ...]:
        levels = (self.t, self.t_delta, self.form)
        return package.link(self.first, self.guide, _SCALE, self.x, *levels)

    def link_table(self) -> tuple[Tensor, ...]:
        levels = (self.t, self.t_delta, self.form)
        slots = (self.slot, self.slot + 1, self.mix)
        return package.link_table(self.table, *slots, self.x, *levels)

    def text(self) -> tuple[Tensor]:
        return (package.text(self.bank, *self.text_rows, self.dtype),)

    def gradient(self) -> tuple[Tensor, ...]:
        scales = (1.0, _SCALE)
        return package.gradient(
            self.eps, self.guide, scales, self.x, self.t, self.path, "sds", self.done
        )

    def passes(self) -> tuple[Tensor, ...]:
        """All of a step with tabulated noise but the UNet between the last two."""
        return (*self.text(), *self.link_table(), *self.gradient())


# Names of what each pass returns.
_BATCH = ("value", "rows", "levels")
_OUTPUTS = {
    "combine": ("guided",),
    "step": _BATCH,
    "link": _BATCH,
    "link_table": _BATCH,
    "text": ("text",),
    "gradient": package.Gradient._fields,
    "passes": ("text", *_BATCH, *package.Gradient._fields),
}


def workload(
    size: int,
    device: torch.device,
    generator: torch.Generator,
    name: str = "passes",
    n_items: int = 1,
) -> Workload:
    """A pass of this module by its name, for latents [n_items,4,size,size]."""
    step = _Step(size, device, generator, n_items)
    call: Call = getattr(step, name)
    return Workload(call, by_reference(call), _OUTPUTS[name], step.n, _bytes(step)[name])


def combine(size: int, device: torch.device, generator: torch.Generator, **more) -> Workload:
    """Four predictions of an item into one, Perp-Neg."""
    return workload(size, device, generator, "combine", **more)


def step(size: int, device: torch.device, generator: torch.Generator, **more) -> Workload:
    """Combine, a DDIM step, and rows for the UNet."""
    return workload(size, device, generator, "step", **more)


def link(size: int, device: torch.device, generator: torch.Generator, **more) -> Workload:
    """Combine, the rendering at two levels, and rows for the UNet."""
    return workload(size, device, generator, "link", **more)


def link_table(size: int, device: torch.device, generator: torch.Generator, **more) -> Workload:
    """The same with noise between two entries of a table."""
    return workload(size, device, generator, "link_table", **more)


def text(size: int, device: torch.device, generator: torch.Generator, **more) -> Workload:
    """Text rows [8B,77,1024] of the views."""
    return workload(size, device, generator, "text", **more)


def gradient(size: int, device: torch.device, generator: torch.Generator, **more) -> Workload:
    """Combine at both levels, gradient, target, loss and norm."""
    return workload(size, device, generator, "gradient", **more)


def passes(size: int, device: torch.device, generator: torch.Generator, **more) -> Workload:
    """All of a step outside the UNet: text, link_table, gradient."""
    return workload(size, device, generator, "passes", **more)


def _bytes(step: _Step) -> dict[str, int]:
    """Each number in and out once: latents in float32, rows of the UNet in its dtype."""
    latents, rows = 4 * step.n, _ROWS * step.width * step.n
    text_row = _TEXT[0] * _TEXT[1]
    sizes = {
        "combine": rows + latents,
        "step": 2 * rows + 2 * latents,
        "link": 3 * rows + 2 * latents,
        "link_table": 2 * rows + 4 * latents,
        "text": 4 * step.bank.numel() + step.width * text_row * len(step.text_rows[0]),
        "gradient": 2 * rows + 3 * latents,
    }
    sizes["passes"] = sizes["text"] + sizes["link_table"] + sizes["gradient"]
    return sizes


def launches(call: Callable[[], object]) -> int:
    """Kernels and copies that a call puts on the CUDA device."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    on_device = torch.autograd.DeviceType.CUDA
    return sum(event.device_type == on_device for event in profile.events())


def counts(size: int = 64, n_items: int = 1) -> Iterator[tuple[str, int, int]]:
    """(pass, its launches, its launches by torch) on the CUDA device."""
    device = torch.device("cuda")
    for name in _OUTPUTS:
        generator = torch.Generator().manual_seed(0)
        case = workload(size, device, generator, name, n_items)
        yield name, launches(case.compiled), launches(case.reference)


if __name__ == "__main__":
    if not torch.cuda.is_available():
        raise SystemExit("launches are counted on a CUDA device, and there is none")
    for line in counts():
        print("{:<12} {:>4}, by torch {:>4}".format(*line))
