"""Cases that need a diffusion model and have no reference twin, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks import iteration, networks
from benchmarks.models import Subject

Record = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What the command line says about them."""

    device: torch.device
    progress: tuple[float, ...] = (0.0, 0.5, 1.0)
    iterations: int = 40
    trajectory: str | None = None  # None: as the preset has it
    budget_s: float = 1.0


@dataclass(frozen=True)
class ModelCase:
    """Something to time with a diffusion model."""

    run: Callable[[Subject, Options], Iterator[Record]]  # records, one row each
    row: Callable[[Record], str]
    description: str


def _iterations(width: int, subject: Subject, options: Options) -> Iterator[Record]:
    for progress in options.progress:
        yield iteration.measure(
            subject,
            width,
            progress,
            options.device,
            iterations=options.iterations,
            trajectory=options.trajectory,
        )


def _network(
    name: str, prepare: Callable[[Subject], networks.Prepared], subject: Subject, options: Options
) -> Iterator[Record]:
    yield networks.run(name, prepare, subject, options.budget_s)


def _networks() -> dict[str, ModelCase]:
    prepared = {
        "unet/b4": (partial(networks.unet, n_rows=4), "Four rows of the UNet."),
        "unet/b8": (partial(networks.unet, n_rows=8), "Eight rows of the UNet."),
        "vae/forward": (partial(networks.encode, backward=False), "Latents of one image."),
        "vae/encode": (networks.encode, "Latents of one image, and back to its gradient."),
    }
    return {
        name: ModelCase(partial(_network, name, prepare), networks.row, description)
        for name, (prepare, description) in prepared.items()
    }


MODEL_CASES: dict[str, ModelCase] = {
    f"iteration/{width}": ModelCase(
        partial(_iterations, width),
        iteration.row,
        f"A whole iteration of the dsd preset at {width}² pixels.",
    )
    for width in iteration.WIDTHS
}
MODEL_CASES |= _networks()
