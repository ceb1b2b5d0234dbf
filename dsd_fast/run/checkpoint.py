"""Checkpoints: one safetensors file that is either whole or absent.

A checkpoint is a tree of dictionaries. Its tensors are stored as safetensors entries named by their
path in the tree ("field/grid.table"); everything else is one JSON text in the file's metadata. No
pickle is read or written, and a checksum over both tells a damaged file from a sound one.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dsd_fast.files import replacing

FORMAT_VERSION = 1
SUFFIX = ".safetensors"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, found, read or used."""


def _flatten(tree: dict, prefix: str, tensors: dict[str, torch.Tensor]) -> dict:
    """Move the tensors of ``tree`` into ``tensors`` under their paths; return the rest."""
    rest = {}
    for key, value in tree.items():
        if not isinstance(key, str) or "/" in key:
            raise TypeError(
                f"checkpoint keys must be strings without '/', got {key!r} under '{prefix}'"
            )
        if isinstance(value, torch.Tensor):
            # Clone: entries must not share memory in the file, and views of one buffer are common.
            tensors[prefix + key] = value.detach().to("cpu", copy=True).contiguous()
        elif isinstance(value, dict):
            rest[key] = _flatten(value, f"{prefix}{key}/", tensors)
        else:
            rest[key] = value
    return rest


def _unflatten(rest: dict, tensors: dict[str, torch.Tensor]) -> dict:
    for path, tensor in tensors.items():
        *parents, name = path.split("/")
        node = rest
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = tensor
    return rest


def _checksum(state: str, tensors: dict[str, torch.Tensor]) -> str:
    crc = zlib.crc32(state.encode())
    for name in sorted(tensors):
        crc = zlib.crc32(name.encode(), crc)
        crc = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, crc)
    return str(crc)


def save(path: Path, tree: dict) -> None:
    """Write ``tree`` (nested dictionaries of tensors and JSON values) to ``path`` atomically.

    Tensors may live on any device. Raises CheckpointError when the file cannot be written; an older
    file of the same name then remains as it was.
    """
    tensors: dict[str, torch.Tensor] = {}
    state = json.dumps(_flatten(tree, "", tensors))
    metadata = {
        "format": "dsd_fast checkpoint",
        "version": str(FORMAT_VERSION),
        "crc32": _checksum(state, tensors),
        "state": state,
    }
    try:
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot write the checkpoint {path}: {error}. Earlier checkpoints are untouched; "
            "free some space, then --resume auto continues from them."
        ) from error


def load(path: Path) -> dict:
    """Read a checkpoint back as the tree that was saved, all tensors on the CPU.

    Raises CheckpointError, saying what to do, when the file is missing, cut short, damaged, or not
    one of ours.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}{_others(path)}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"the checkpoint {path} cannot be read ({error}){_others(path)}"
        ) from error
    if metadata.get("format") != "dsd_fast checkpoint":
        raise CheckpointError(
            f"{path} is a safetensors file but not a dsd_fast checkpoint{_others(path)}"
        )
    if metadata["version"] != str(FORMAT_VERSION):
        raise CheckpointError(
            f"{path} has checkpoint format {metadata['version']} and this dsd_fast reads "
            f"{FORMAT_VERSION}: use the version of dsd_fast named in the run's versions.json"
        )
    if metadata["crc32"] != _checksum(metadata["state"], tensors):
        raise CheckpointError(
            f"the checkpoint {path} is damaged: its checksum does not match{_others(path)}"
        )
    return _unflatten(json.loads(metadata["state"]), tensors)


def step_path(folder: Path, step: int) -> Path:
    """The file of the checkpoint taken when ``step`` steps were done."""
    return folder / f"step-{step:06d}{SUFFIX}"


def list_steps(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints in ``folder`` as (step, path), oldest first; empty when there are none."""
    found = []
    for path in folder.glob(f"step-*{SUFFIX}"):
        digits = path.name[len("step-") : -len(SUFFIX)]
        if digits.isdigit():
            found.append((int(digits), path))
    return sorted(found)


def prune(folder: Path, keep: int) -> None:
    """Delete all but the ``keep`` newest checkpoints of ``folder``."""
    for _, path in list_steps(folder)[:-keep]:
        path.unlink(missing_ok=True)


def _others(path: Path) -> str:
    """The end of an error message: which sound-looking checkpoints are beside ``path``."""
    others = [str(other) for _, other in list_steps(path.parent) if other != path]
    if not others:
        return "; there is no other checkpoint beside it: start again with --overwrite"
    return f"; continue from an older one: --resume {others[-1]}"
