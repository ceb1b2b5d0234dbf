"""DDIM samples as single images: the upper reference of 2D optimisation.

python -m dsd_fast.sample --prompt "an armchair" --num-seeds 4
python -m dsd_fast.sample --like outputs/diverse-score-distillation-2d --guidance-scale 4
python -m dsd_fast.evaluate outputs/diverse-score-distillation-2d outputs/ddim --html report.html
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from annotated_types import Interval

from dsd_fast._backend import keep_freed_memory
from dsd_fast.config import ConfigError, read_config, resolve_device
from dsd_fast.diffusion import DiffusionModel, load_model, view_prompts
from dsd_fast.diffusion.ddim import sample
from dsd_fast.diffusion.noise_path import NUM_TRAIN_TIMESTEPS
from dsd_fast.diffusion.text import VIEWS
from dsd_fast.files import write_json
from dsd_fast.guidance import seed_noise
from dsd_fast.ranges import AnyPath, FolderName, NonNegative, Seed, Seeds
from dsd_fast.rng import RngStreams
from dsd_fast.run import pictures
from dsd_fast.run.command import run_command
from dsd_fast.run.outputs import OutputError, RunFolder
from dsd_fast.run.progress import memory_mib
from dsd_fast.tasks.image import text_of

# Not __name__, which is "__main__" when this module is the command.
log = logging.getLogger("dsd_fast.sample")

# The image of a sample, and what it is, as `dsd_fast.evaluate` reads them.
IMAGE, ABOUT = "000.png", "asset.json"
# Of more at once memory has no bound.
SAMPLED_TOGETHER = 64


@dataclass
class SampleCommand:
    """Sample images with DDIM, from the seed noises that runs of the same seeds have.

    Each lands in OUTPUT/NAME/PROMPT-seedN/000.png, with asset.json beside it.
    """

    # What to make; several prompts may follow.
    prompt: tuple[str, ...] = ()
    # First seed.
    seed: Seed = 0
    # So many seeds of each prompt.
    num_seeds: Seeds = 1
    # Sample the prompts, negatives, views, seeds and model of these 2D runs: run folders, or
    # folders that hold run folders.
    like: tuple[AnyPath, ...] = ()
    # Diffusion model: "embedded", a Stable Diffusion folder, or a hub id.
    model: str = "embedded"
    # Guidance scale e_0 + scale (e_y - e_0).
    guidance_scale: NonNegative = 4.0
    # DDIM steps.
    steps: Annotated[int, Interval(ge=1, lt=NUM_TRAIN_TIMESTEPS)] = 50
    # The negative prompt.
    negative: str = ""
    # Ask for this view; none asks for no view.
    view: Literal["side", "front", "back", "overhead"] | None = None
    # Folder under which the folders of samples are made.
    output: AnyPath = Path("outputs")
    # Folder inside --output, which names the method in comparisons.
    name: FolderName = "ddim"
    # Replace samples that are there.
    overwrite: bool = False
    # Precision of the UNet, as of dsd_fast.train.
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    # "auto" (CUDA if there is one), "cpu" or "cuda".
    device: str = "auto"


@dataclass(frozen=True)
class Request:
    """One sample: `text` is what the model is asked for, with the view, of `prompt`."""

    prompt: str
    text: str
    negative: str
    seed: int

    def folder(self, command: SampleCommand) -> RunFolder:
        return RunFolder.named(command.output, command.name, self.prompt, self.seed)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 done, 2 wrong input."""
    return run_command(
        write_samples, SampleCommand, "dsd_fast.sample", argv, (ConfigError, OutputError)
    )


def write_samples(command: SampleCommand) -> list[Path]:
    """Do what the command says; returns the folders that were written.

    Raises:
        ConfigError, OutputError: wrong input, before any work.
    """
    model_name, requests = _requests(command)
    folders = [request.folder(command) for request in requests]
    try:
        _write_all(command, model_name, requests, folders)
    finally:
        for folder in folders:
            folder.release()
    return [folder.path for folder in folders]


def _write_all(
    command: SampleCommand, model_name: str, requests: list[Request], folders: list[RunFolder]
) -> None:
    for folder in folders:
        folder.claim()
        if (folder.path / IMAGE).exists() and not command.overwrite:
            raise OutputError(
                f"{folder.path} holds a sample: pass --overwrite to replace it, or another "
                "--output or --name"
            )
        folder.ask_for_room(2**20)
    device = resolve_device(command.device)
    keep_freed_memory(device)
    dtype = None if command.dtype == "auto" else getattr(torch, command.dtype)
    try:
        # The graphs and compilations of other engines pay for long runs.
        model = load_model(model_name, device, dtype, engine="eager")
        for negative in dict.fromkeys(request.negative for request in requests):
            alike = [r for r in requests if r.negative == negative]
            for first in range(0, len(alike), SAMPLED_TOGETHER):
                _sample(command, model, alike[first : first + SAMPLED_TOGETHER])
    except torch.OutOfMemoryError as error:
        raise ConfigError(f"the GPU is too small for these samples at once: {error}") from error
    except (ValueError, FileNotFoundError, ConnectionError, ImportError) as error:
        raise ConfigError(str(error)) from error


def _sample(command: SampleCommand, model: DiffusionModel, requests: Sequence[Request]) -> None:
    """Sample and write requests of one negative prompt."""
    shape = (1, model.latent_channels, model.latent_size, model.latent_size)
    noise = torch.cat([seed_noise(RngStreams(r.seed).noise, shape) for r in requests])
    begun = time.monotonic()
    images = sample(
        model,
        [request.text for request in requests],
        noise.to(model.device),
        command.steps,
        command.guidance_scale,
        requests[0].negative,
    )
    images = images.cpu()  # waits for the device
    seconds = (time.monotonic() - begun) / len(requests)
    for request, image in zip(requests, images):
        folder = request.folder(command).path
        pictures.write_png(pictures.to_uint8(image.permute(1, 2, 0)), folder / IMAGE)
        about = {
            "prompt": request.prompt,
            "seed": request.seed,
            "azimuths": None,  # a picture, not views around an object
            "seconds": seconds,
            "memory_mib": memory_mib(model.device),
            "steps": command.steps,
            "guidance_scale": command.guidance_scale,
            "text": request.text,
            "negative": request.negative,
            "model_sha256": model.model_hash,
        }
        write_json(folder / ABOUT, about)
        log.info("wrote %s", folder / IMAGE)


def _requests(command: SampleCommand) -> tuple[str, list[Request]]:
    """The model and the samples that a command asks for; ConfigError where it asks for none."""
    if bool(command.like) == bool(command.prompt):
        raise ConfigError('pass either --prompt "an armchair" or --like RUN, not both')
    if command.like:
        return _like(command.like)
    requests = []
    for prompt in command.prompt:
        try:
            texts = view_prompts(prompt, view_dependent=command.view is not None)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        text = texts[VIEWS.index(command.view or VIEWS[0])]
        requests += [
            Request(prompt, text, command.negative, command.seed + i)
            for i in range(command.num_seeds)
        ]
    return command.model, requests


def _like(paths: Sequence[Path]) -> tuple[str, list[Request]]:
    """What 2D runs ask for, each request once though several methods have answered it."""
    models, requests = set(), {}
    for config in (file for path in paths for file in _configs(path)):
        cfg = read_config(config)
        if cfg.task != "image":
            continue
        models.add(cfg.model)
        request = Request(cfg.prompt, text_of(cfg), cfg.text.negative, cfg.seed)
        other = requests.setdefault((cfg.prompt, cfg.seed), request)
        if other != request:
            raise ConfigError(
                f"{config}: another run of {cfg.prompt!r}, seed {cfg.seed}, asks for "
                f"{other.text!r} in place of {request.text!r}: name the runs of one of them"
            )
    if len(models) != 1:
        found = f"models {', '.join(sorted(models))}" if models else "none"
        raise ConfigError(f"--like: expected 2D runs (--task image) of one model, found {found}")
    return models.pop(), [requests[key] for key in sorted(requests)]


def _configs(path: Path) -> Iterator[Path]:
    """The config.json of a run folder, or of all below a folder."""
    if not path.is_dir():
        raise ConfigError(f"--like {path}: expected a run folder, or a folder that holds some")
    own = path / "config.json"
    yield from [own] if own.is_file() else sorted(path.rglob("config.json"))


if __name__ == "__main__":
    sys.exit(main())
