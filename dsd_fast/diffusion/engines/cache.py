"""Where built engines are kept, under which name, and what happens to a file that does not load."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from dsd_fast.files import replacing

log = logging.getLogger(__name__)

T = TypeVar("T")

# Part of every key: raise it when a change to the export or the build changes what engines do.
_FORMAT = 3


def folder() -> Path:
    """The engine folder: DSD_CACHE if it is set, else ~/.cache/dsd_fast/engines."""
    given = os.environ.get("DSD_CACHE")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "dsd_fast" / "engines"


def weights_digest(unet: nn.Module) -> str:
    """SHA-256 of a UNet's configuration and weights: names, shapes, dtypes and values.

    Weights on a GPU are copied over one at a time. Memory formats make no difference.
    """
    digest = hashlib.sha256()
    settings = {
        name: value
        for name, value in dict(getattr(unet, "config", {})).items()
        if not name.startswith("_")  # where it was loaded from, and with which version
    }
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(unet.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().contiguous().cpu().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()


def key(
    weights: str,
    shape: Any,
    rows: Sequence[int],
    dtype: torch.dtype,
    library: str,
    version: str,
    capability: tuple[int, int],
) -> str:
    """The name of an engine: 64 hexadecimal digits over all that decides its content.

    Args:
        weights: of `weights_digest`.
        shape: UNetShape.
        rows: row counts of the profiles, in their order.
        library, version: of the package that builds it.
    """
    parts = (_FORMAT, weights, repr(shape), list(rows), str(dtype), library, version, capability)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def path_of(name: str, where: Path | None = None) -> Path:
    """The file of an engine."""
    return (where or folder()) / f"{name}.engine"


def write(path: Path, engine: Any) -> int:
    """Write an engine (any buffer) so that the file is whole or absent; returns its bytes."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        return file.write(memoryview(engine))


def link(path: Path, name: Path) -> None:
    """Give the engine `path` a second name, without a second copy where the disk can do that."""
    with replacing(name) as temporary:
        temporary.unlink(missing_ok=True)  # left by a process that was killed
        try:
            os.link(path, temporary)
        except OSError:  # the file system has no hard links
            shutil.copyfile(path, temporary)


def load_or_build(path: Path, load: Callable[[Path], T | None], build: Callable[[], Any]) -> T:
    """The engine of a file, built and written first if there is none or it does not load.

    Args:
        load: gives None or raises where the file is of no use.
        build: gives the serialised engine, a buffer.
    Raises:
        RuntimeError: a fresh engine does not load either; its file is removed.
    """
    if path.is_file():
        problem = "the library does not read it"
        try:
            if (engine := load(path)) is not None:
                return engine
        except Exception as error:  # the libraries raise their own, unrelated types
            problem = str(error)
        log.warning("building the engine %s again: %s", path, problem)
    size = write(path, build())
    log.info("wrote the engine %s (%.0f MiB)", path, size / 2**20)
    engine = load(path)
    if engine is None:
        path.unlink(missing_ok=True)
        raise RuntimeError(f"the engine {path} does not load although it was just built")
    return engine
