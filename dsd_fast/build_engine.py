"""Build TensorRT engines of a model's UNet before a run, on this computer or for another one."""

from __future__ import annotations

import logging
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from annotated_types import Interval

from dsd_fast.diffusion.components import (
    PipelineFolder,
    inspect_folder,
    latent_size,
    quiet,
)
from dsd_fast.diffusion.engines import cache, tensorrt_library
from dsd_fast.diffusion.engines.base import UNetShape
from dsd_fast.diffusion.engines.onnx_export import export_unet
from dsd_fast.diffusion.engines.tensorrt import DEFAULT_ROWS, engine_key
from dsd_fast.diffusion.engines.tensorrt_library import Capability, Library
from dsd_fast.diffusion.loader import resolve
from dsd_fast.diffusion.network_loading import load_component
from dsd_fast.ranges import AnyPath
from dsd_fast.run.command import run_command
from dsd_fast.run.progress import memory_mib

log = logging.getLogger("dsd_fast.build_engine")

# Of a batch of the UNet: far more than a GPU holds of Stable Diffusion.
MOST_ROWS = 1024


@dataclass
class BuildCommand:
    """Build TensorRT engines of a UNet.

    TensorRT-RTX builds for any compute capability and needs no GPU. A run finds the engine by
    itself in the default output folder; elsewhere, through the environment variable DSD_CACHE.
    """

    # A Stable Diffusion folder or file, a hub id, or "embedded".
    model: str = "embedded"
    # "auto" takes tensorrt_rtx where it is installed and supports the GPU, else tensorrt.
    library: Literal["auto", "tensorrt", "tensorrt_rtx"] = "auto"
    # Compute capabilities such as 8.6 8.9 12.0, which one engine serves; default: the GPU present.
    compute_capability: tuple[str, ...] = ()
    # Row counts to build for; a run looks for the default ones.
    rows: tuple[Annotated[int, Interval(ge=1, le=MOST_ROWS)], ...] = DEFAULT_ROWS
    # Where the engines go; default DSD_CACHE, or ~/.cache/dsd_fast/engines.
    output: AnyPath | None = None
    # Precision of the weights; a run on a GPU takes float16.
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"


class CommandError(ValueError):
    """The command asks for what cannot be done."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 done, 1 the build failed, 2 wrong input."""
    return run_command(
        build_engines,
        BuildCommand,
        "dsd_fast.build_engine",
        argv,
        wrong_input=(
            ValueError,
            ImportError,
            ConnectionError,
            FileNotFoundError,
            tensorrt_library.UnsupportedGPU,
        ),
        failed=(tensorrt_library.BuildError,),
    )


def build_engines(command: BuildCommand) -> list[Path]:
    """Build what the command asks for; returns the engine files. One that exists is kept."""
    if not command.rows:
        raise CommandError("--rows takes numbers from 1 on, got none")
    capabilities = _capabilities(command)
    libraries = [tensorrt_library.find_library(command.library, c) for c in capabilities]
    for library, capability in zip(libraries, capabilities):
        if library.needs_gpu_to_build and capability != _present():
            raise CommandError(
                "tensorrt builds for the GPU of this computer alone; tensorrt_rtx builds for "
                "others (--library tensorrt_rtx)"
            )
    folder = inspect_folder(resolve(command.model))
    dtype = getattr(torch, command.dtype)
    unet = _read_unet(folder, dtype)
    shape = shape_of(folder)
    where = command.output or cache.folder()
    paths, missing = [], {}
    for library, capability in zip(libraries, capabilities):
        name = engine_key(unet, shape, command.rows, dtype, library, capability)
        paths.append(path := cache.path_of(name, where))
        if path.is_file():
            log.info("%s is there already", path)
        else:
            missing.setdefault(library, {})[capability] = path
    if missing:
        with tempfile.TemporaryDirectory(prefix="dsd_fast-") as temporary:
            log.info("exporting the UNet of %s to ONNX", folder.path)
            onnx_file = export_unet(unet, shape, Path(temporary))
            # The builder holds the weights three times over; a fourth copy would be for nothing.
            del unet
            for library, targets in missing.items():
                _build(onnx_file, shape, command.rows, library, targets)
    return paths


def _build(
    onnx_file: Path,
    shape: UNetShape,
    rows: Sequence[int],
    library: Library,
    targets: dict[Capability, Path],
) -> None:
    """Build one engine for all compute capabilities and write it under the name of each."""
    start = time.monotonic()
    spelled = ", ".join(map(tensorrt_library.spelled, targets))
    log.info("compute capability %s: %s %s", spelled, library.name, library.version)
    engine = tensorrt_library.build(library, onnx_file, shape, rows, list(targets))
    first, *others = targets.values()
    size = cache.write(first, engine)
    for path in others:
        cache.link(first, path)
    log.info("wrote %s", "\n  and ".join(map(str, targets.values())))
    log.info(
        "%.0f MiB in %.0f s, peak memory %.0f MiB",
        size / 2**20,
        time.monotonic() - start,
        memory_mib(torch.device("cpu")),
    )


def shape_of(folder: PipelineFolder) -> UNetShape:
    """Input sizes of a model's UNet, as its configurations give them."""
    unet = folder.configs["unet"]
    size = latent_size(unet)
    tokens = folder.configs["text_encoder"].get("max_position_embeddings", 77)
    limit = folder.configs["tokenizer"].get("model_max_length", tokens)
    text = (int(min(tokens, limit)), unet.get("cross_attention_dim", 1280))
    return UNetShape((unet.get("in_channels", 4), size, size), (("tokens", text),))


def _read_unet(folder: PipelineFolder, dtype: torch.dtype) -> torch.nn.Module:
    with quiet():
        import diffusers
    unet = load_component(diffusers.UNet2DConditionModel, folder.path / "unet", dtype)
    return unet.eval().requires_grad_(False)


def _capabilities(command: BuildCommand) -> list[Capability]:
    found = []
    for text in command.compute_capability:
        match = re.fullmatch(r"(\d+)\.(\d)", text)
        if match is None:
            raise CommandError(f"--compute-capability takes numbers such as 8.9, got {text!r}")
        found.append((int(match[1]), int(match[2])))
    if found:
        return found
    present = _present()
    if present is None:
        raise CommandError("no GPU is present: say for which one, as in --compute-capability 8.9")
    return [present]


def _present() -> Capability | None:
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


if __name__ == "__main__":
    sys.exit(main())
