"""Checkpoints: one safetensors file that is either whole or absent.

A checkpoint is a tree of dictionaries. Its tensors are stored as safetensors entries named by their
path in the tree ("field/grid.table"); everything else is one JSON text in the file's metadata. No
pickle is read or written, and a checksum over all that is read tells a damaged file from a sound
one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dsd_fast.files import replacing

log = logging.getLogger(__name__)

FORMAT_VERSION = 2
# Its checksum leaves out types and shapes, and its metadata have an entry for each of their parts.
_FIRST_VERSION = 1
_MARK = "dsd_fast checkpoint"
SUFFIX = ".safetensors"
# Beside checkpoints, those of steps that a run which went on from an older one has yet to do again.
ASIDE = "set-aside"
# How the names of checkpoints begin that are whole and wait for those of runs beside theirs.
READY = ".ready-"


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


def _checksum(state: str, tensors: dict[str, torch.Tensor], version: int = FORMAT_VERSION) -> str:
    crc = zlib.crc32(state.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        layout = "" if version == _FIRST_VERSION else f" {tensor.dtype} {list(tensor.shape)}"
        crc = zlib.crc32((name + layout).encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, crc)
    return str(crc)


def save(path: Path, tree: dict) -> None:
    """Write ``tree`` (nested dictionaries of tensors and JSON values) to ``path`` atomically.

    Tensors may live on any device. Raises CheckpointError when the file cannot be written; an older
    file of the same name then remains as it was.
    """
    tensors: dict[str, torch.Tensor] = {}
    state = json.dumps(_flatten(tree, "", tensors))
    # One entry: safetensors writes several in an order that chance decides.
    metadata = {_MARK: "\n".join((str(FORMAT_VERSION), _checksum(state, tensors), state))}
    try:
        # Asked first: a disk that is full to the last byte helps nobody.
        path.parent.mkdir(parents=True, exist_ok=True)
        size, free = sum(t.nbytes for t in tensors.values()), shutil.disk_usage(path.parent).free
        if free < size:
            raise OSError(f"{size / 2**20:.0f} MiB are needed and {free / 2**20:.0f} MiB are free")
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write the checkpoint {path}: {error}") from error


def load(path: Path) -> dict:
    """Read a checkpoint back as the tree that was saved, all tensors on the CPU.

    Raises CheckpointError, saying what to do, when the file is missing, cut short, damaged, or not
    one of ours.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}{_others(path)}")
    try:
        return _load(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}{_others(path)}") from error.__cause__


def _load(path: Path) -> dict:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    # torch has no tensors of some types and sizes that a damaged header may ask for.
    except (OSError, SafetensorError, RuntimeError, ValueError, TypeError) as error:
        raise CheckpointError(f"the checkpoint {path} cannot be read ({error})") from error
    if metadata.get("format") == _MARK:
        version, crc, state = (metadata.get(name, "") for name in ("version", "crc32", "state"))
        known = _FIRST_VERSION
    elif _MARK in metadata:
        version, crc, state = (*metadata[_MARK].split("\n", 2), "", "")[:3]
        known = FORMAT_VERSION
    else:
        raise CheckpointError(f"{path} is a safetensors file but not a dsd_fast checkpoint")
    if version != str(known):
        raise CheckpointError(
            f"{path} has checkpoint format {version!r} and this dsd_fast reads {_FIRST_VERSION} "
            f"and {FORMAT_VERSION}: use the version of dsd_fast named in the run's versions.json"
        )
    if crc != _checksum(state, tensors, known):
        raise CheckpointError(f"the checkpoint {path} is damaged: its checksum does not match")
    try:
        return _unflatten(json.loads(state), tensors)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} holds no tree of tensors: {error}") from error


def step_path(folder: Path, step: int) -> Path:
    """The file of the checkpoint taken when ``step`` steps were done."""
    return folder / f"step-{step:06d}{SUFFIX}"


def list_steps(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints in ``folder`` as (step, path), oldest first; empty when there are none."""
    found = []
    for path in folder.glob(f"step-*{SUFFIX}"):
        digits = path.name[len("step-") : -len(SUFFIX)]
        if digits.isascii() and digits.isdigit():
            found.append((int(digits), path))
    return sorted(found)


def prune(folder: Path, keep: int) -> None:
    """Delete all but the ``keep`` newest checkpoints of ``folder``, and what was set aside of steps
    that are done again."""
    steps = list_steps(folder)
    for _, path in steps[:-keep]:
        path.unlink(missing_ok=True)
    for step, path in list_steps(folder / ASIDE):
        if steps and step <= steps[-1][0]:
            path.unlink(missing_ok=True)
    _drop_empty(folder / ASIDE)


def set_aside(folder: Path, step: int) -> None:
    """Take the checkpoints after ``step`` out of ``folder``: a run goes on from there.

    They stay until it has come as far (`prune`).
    """
    for newer, path in list_steps(folder):
        if newer > step:
            (folder / ASIDE).mkdir(exist_ok=True)
            os.replace(path, folder / ASIDE / path.name)
            log.info(
                "continuing from step %d: the checkpoint of step %d is set aside in %s",
                *(step, newer, folder / ASIDE),
            )


def save_together(paths: Sequence[Path], trees: Iterable[dict]) -> None:
    """`save` for runs side by side: all of the files are there, or none.

    A process that is killed between the last names that it gives leaves that to `settle_ready`.
    """
    waiting = [path.with_name(READY + path.name) for path in paths]
    try:
        for path, tree in zip(waiting, trees):
            save(path, tree)
        for path, final in zip(waiting, paths):
            os.replace(path, final)
    except OSError as error:
        raise CheckpointError(f"cannot write the checkpoint {error.filename}: {error}") from error
    finally:
        for path in waiting:
            path.unlink(missing_ok=True)


def settle_ready(folders: Sequence[Path]) -> None:
    """Finish what a killed `save_together` of runs with these folders had begun, or undo it."""
    ready = [{path.name: path for path in folder.glob(f"{READY}step-*")} for folder in folders]
    for name in set().union(*ready):
        final = [folder / name[len(READY) :] for folder in folders]
        whole = all(name in of or path.exists() for of, path in zip(ready, final))
        for of, path in zip(ready, final):
            if name in of:
                if whole:
                    os.replace(of[name], path)
                else:
                    of[name].unlink()


def clear_aside(folder: Path) -> None:
    """Delete what was set aside of a folder, and what waits in it."""
    for path in [*(path for _, path in list_steps(folder / ASIDE)), *folder.glob(f"{READY}*")]:
        path.unlink(missing_ok=True)
    _drop_empty(folder / ASIDE)


def _drop_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _others(path: Path) -> str:
    """The end of an error message: the newest whole checkpoint beside ``path``."""
    for _, other in reversed(list_steps(path.parent)):
        if other != path:
            with contextlib.suppress(CheckpointError):
                _load(other)
                return f"; continue from one that is whole: --resume {other}"
    return "; there is no whole checkpoint beside it: start again with --overwrite"
