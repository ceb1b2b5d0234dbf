"""The networks of a diffusion model, as a step calls them: UNet rows, and the VAE's encoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.models import Subject, unet_inputs
from benchmarks.peers import NETWORKS, RECORDED_ON
from benchmarks.timing import measure
from dsd_fast.graphs import captured

# (subject) -> a call, and its floating-point operations
Prepared = tuple[Callable[[], object], float]


def unet(subject: Subject, n_rows: int) -> Prepared:
    """The UNet by its engine, without gradient."""
    inputs = unet_inputs(subject, n_rows)
    return lambda: subject.model.engine(*inputs), n_rows * subject.unet_flops()


def encode(subject: Subject, backward: bool = True) -> Prepared:
    """Latents of one image of the model's size, forward and back to the image's gradient.

    On CUDA a graph holds it, as one holds the step that it is a part of.
    """
    model = subject.model
    generator = torch.Generator().manual_seed(0)
    shape = (1, 3, model.image_size, model.image_size)
    image = torch.rand(shape, generator=generator).to(model.device)
    latent_shape = (1, model.latent_channels, model.latent_size, model.latent_size)
    noise, grad = (torch.randn(latent_shape, generator=generator).to(model.device) for _ in "12")

    def forward() -> object:
        with torch.no_grad():
            return model.encode_with_noise(image, noise)

    def forward_backward() -> object:
        # Not a leaf: those belong to a stream, which a capture must not wait for.
        rgb = image.detach().requires_grad_() * 1.0
        return torch.autograd.grad(model.encode_with_noise(rgb, noise), rgb, grad)

    call = forward_backward if backward else forward
    if model.device.type == "cuda":
        call = captured(call)
    # With frozen weights the way back has as many operations as the way there.
    return call, subject.encoder_flops() * (2 if backward else 1)


def run(
    name: str, prepare: Callable[[Subject], Prepared], subject: Subject, budget_s: float
) -> dict[str, Any]:
    """Time a network; the record that goes to JSON.

    The host's time counts on CUDA: an engine of the UNet that wants CUDA graphs makes its own.
    """
    device = subject.model.device
    call, flops = prepare(subject)
    times = measure([call], device, budget_s)
    peers = []
    if device.type == "cuda" and subject.is_sd21:
        peers = [
            {
                "peer": peer,
                "ms": ms,
                "recorded_on": RECORDED_ON,
                "speedup": ms / times.median,
            }
            for peer, ms in NETWORKS.get(name, ())
        ]
    return {
        "case": name,
        "model": subject.name,
        "engine": subject.engine_name,
        "device": str(device),
        "ms": asdict(times),
        "flops": flops,
        "tflop_per_s": 1e-9 * flops / times.median,
        "peers": peers,
    }


def row(record: dict[str, Any]) -> str:
    """A line for a person."""
    ms = record["ms"]
    text = (
        f"{record['case']:<14} {ms['median']:>9.3f} ms ({ms['p20']:.3f} to {ms['p80']:.3f}), "
        f"{record['tflop_per_s']:.3g} TFLOP/s, {record['engine']}"
    )
    peers = ", ".join(f"{peer['peer']} {peer['ms']:.3g}" for peer in record["peers"])
    return f"{text}; recorded on an {RECORDED_ON}: {peers}" if peers else text
