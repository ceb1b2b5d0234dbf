"""Models of the Hugging Face hub: what of a repository is fetched, and what its cache holds."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dsd_fast.diffusion.components import PROJECTIONS, stem_of
from dsd_fast.diffusion.model_files import brief, choose_weights, of_pickles

log = logging.getLogger(__name__)

_GIB = 2**30
# How long the hub may take to say what a repository has.
_SECONDS = 15.0


def download(hub_id: str, pieces: Sequence[str], check: Callable[[Path], object]) -> Path:
    """The local folder of a repository "owner/name", fetched where the cache does not have it.

    Only what is read is fetched: configurations, the tokenizer, and of each piece's safetensors the
    full precision, or fp16 where there is no other. Without the hub, what the cache holds is taken
    as it is, whoever filled it.

    Args:
        pieces: folders with weights.
        check: is given the folder when it has no weights yet; what it raises ends the download.
    Raises:
        ConnectionError: neither the hub nor its cache gives the repository.
        FileNotFoundError: the repository's weights are pickles.
        ValueError: the disk is too small.
    """
    import huggingface_hub

    try:
        info = huggingface_hub.HfApi().model_info(hub_id, files_metadata=True, timeout=_SECONDS)
    # Offline mode, no network, no such repository and no permission have unrelated types there.
    except Exception as error:
        return _cached(hub_id, error)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    settings, weights = _settings(sizes), _weights(hub_id, sizes, pieces)
    # A camera projection is small and has no configuration: that it is there is asked too.
    settings += [name for name in weights if name.startswith(PROJECTIONS)]
    with _errors_of_the_hub(hub_id):
        folder = _fetch(hub_id, settings)
    check(folder)
    known = (huggingface_hub.try_to_load_from_cache(hub_id, n, revision=info.sha) for n in weights)
    missing = [name for name, path in zip(weights, known) if not isinstance(path, str)]
    if missing:
        _announce(hub_id, info, sum(sizes[name] for name in missing), len(missing))
    with _errors_of_the_hub(hub_id):
        return _fetch(hub_id, [*settings, *weights])


@contextmanager
def _errors_of_the_hub(hub_id: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise ConnectionError(
            f"model {hub_id!r}: the hub broke off ({type(error).__name__}: {brief(error)}); the "
            "same command goes on with the download"
        ) from error


def of_cache(path: Path) -> Path:
    """The newest snapshot in a folder of the hub's cache (models--owner--name); others as they are.

    Raises:
        FileNotFoundError: a folder of the cache without a snapshot.
    """
    root = path.parent if path.name == "snapshots" else path
    if not (root / "snapshots").is_dir() or (root / "model_index.json").exists():
        return path
    snapshots = [entry for entry in (root / "snapshots").iterdir() if entry.is_dir()]
    main = root / "refs" / "main"
    if main.is_file():
        named = main.read_text(encoding="utf-8", errors="replace").strip()
        snapshots = [entry for entry in snapshots if entry.name == named] or snapshots
    if not snapshots:
        raise FileNotFoundError(
            f"{path}: expected a snapshot in this folder of the hub's cache, found none; pass the "
            f"hub id, {root.name.removeprefix('models--').replace('--', '/')}, to download it"
        )
    return max(snapshots, key=lambda entry: entry.stat().st_mtime)


def _settings(names: Iterable[str]) -> list[str]:
    """Small files: configurations and the tokenizer."""
    pattern = re.compile(r"(model_index|config)\.json|[^/]+/[^/]+\.(json|txt)")
    return [name for name in names if pattern.fullmatch(name)]


def _weights(hub_id: str, names: dict[str, int], pieces: Sequence[str]) -> list[str]:
    """Safetensors of the pieces that there are; FileNotFoundError where there are pickles alone."""
    chosen = []
    for piece in pieces:
        own = [name.removeprefix(f"{piece}/") for name in names if name.startswith(f"{piece}/")]
        found = choose_weights(own, stem_of(piece))
        if found is not None:
            chosen += [f"{piece}/{name}" for name in found[0]]
        elif told := of_pickles([n for n in own if n.startswith(_STEMS)], hub_id):
            raise FileNotFoundError(
                f"model {hub_id!r}: expected {piece}/{stem_of(piece)}.safetensors{told}"
            )
    return chosen


_STEMS = ("diffusion_pytorch_model", "pytorch_model", "model")


def _announce(hub_id: str, info: Any, size: int, count: int) -> None:
    """Say what is about to be downloaded; ValueError for a disk that cannot hold it."""
    from huggingface_hub import constants

    card = getattr(info, "card_data", None)
    tags = [tag for tag in info.tags or () if tag.startswith("license:")]
    licence = (card.get("license") if card else None) or "".join(tags[:1]).removeprefix("license:")
    log.info(
        "downloading %s: %d files of weights, %.2f GiB, licence %s, to %s",
        hub_id,
        count,
        size / _GIB,
        licence or "not stated",
        constants.HF_HUB_CACHE,
    )
    place = Path(constants.HF_HUB_CACHE)
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < size:
        raise ValueError(
            f"model {hub_id!r}: {size / _GIB:.2f} GiB are to be downloaded, and {place} has "
            f"{free / _GIB:.2f} GiB free: make room, or set HF_HOME to a folder on another disk"
        )


def _fetch(hub_id: str, names: Sequence[str]) -> Path:
    import huggingface_hub

    # Patterns of fnmatch, in which [ has a meaning.
    patterns = [name.replace("[", "[[]") for name in names]
    return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=patterns))


def _cached(hub_id: str, error: Exception) -> Path:
    """What the cache has of a repository that the hub does not give."""
    import huggingface_hub

    try:
        # Of one file alone, for a cache filled by others has other weights than we would fetch.
        folder = huggingface_hub.snapshot_download(
            hub_id, local_files_only=True, allow_patterns=["model_index.json"]
        )
    except Exception as missing:
        raise ConnectionError(
            f"model {hub_id!r}: there is no such local folder, and the hub did not give it "
            f"({type(error).__name__}: {brief(error)}; its cache: {brief(missing)})"
            "; pass the path of a local Stable Diffusion folder, or 'embedded'"
        ) from error
    log.info("%s: the hub is not asked or does not answer; its cache has %s", hub_id, folder)
    return Path(folder)
