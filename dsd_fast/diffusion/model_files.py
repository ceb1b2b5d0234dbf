"""The files of a model folder, which may be anybody's: JSON, safetensors, words; read with bounds.

Nothing here runs what a file says, follows a name out of its folder or opens a pickle, and what is
damaged costs a message that names the file.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dsd_fast.diffusion import int8

# Far above what models have: a tokenizer.json takes 4 MB, nests 8 levels, and the longest number is
# a tokenizer's limit of 10^30.
_LARGEST_JSON = 64 * 2**20
_DEEPEST_JSON = 32
_MOST_DIGITS = 40
# What is looked for in file names between stem and ".safetensors", the preferred one first.
VARIANTS = (None, "fp16", "bf16", int8.VARIANT)
# Of weights.
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_LFS_MARK = b"version https://git-lfs"


class _Unfit(ValueError):
    """JSON that can be parsed, and is no configuration."""


def read_json(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        ValueError: a file that cannot be read, is no JSON object or is beyond what models have:
            64 MiB, 32 levels, 40 digits; NaN, and text that UTF-8 cannot hold.
    """
    try:
        if file.stat().st_size > _LARGEST_JSON:
            raise _Unfit(f"expected at most {_LARGEST_JSON >> 20} MiB")
        text = file.read_bytes().decode("utf-8")
        content = json.loads(text, parse_int=_integer, parse_constant=_constant)
        _check_depth(content, _DEEPEST_JSON)
        # A text may be half of a surrogate pair, which no file name or terminal takes.
        json.dumps(content, ensure_ascii=False).encode("utf-8")
    except RecursionError as error:
        raise ValueError(f"{file} is not readable JSON: {_too_deep()}") from error
    except UnicodeEncodeError as error:
        raise ValueError(f"{file} is not readable JSON: half of a surrogate pair") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is not readable JSON: {brief(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(content).__name__}")
    return content


def brief(error: BaseException) -> str:
    """The first line of an error's message, cut to a length that a terminal takes."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) <= 300 else f"{line[:300]}..."


def listing(folder: Path) -> str:
    """Names of what a folder holds, the first eight, for messages."""
    if not folder.is_dir():
        return "no such folder"
    names = sorted(
        entry.name if entry.exists() else f"{entry.name} (a link to nothing)"
        for entry in folder.iterdir()
    )
    if len(names) > 8:
        names = [*names[:8], f"and {len(names) - 8} more"]
    return ", ".join(names) if names else "nothing"


@dataclass(frozen=True)
class Weights:
    """Safetensors files of one piece, and the variant that their names carry, if any."""

    files: list[Path]
    variant: str | None


def choose_weights(names: Iterable[str], stem: str) -> tuple[list[str], str | None] | None:
    """Of the names in one folder those of a piece's weights, and their variant; None without any.

    One file, or all of its shards; full precision comes before fp16. The variant stands before a
    shard's number (`model.fp16-00001-of-00002`) or behind it (`model-00001-of-00002.fp16`).
    """
    present = set(names)
    for variant in VARIANTS:
        infix = _infix(variant)
        if (single := f"{stem}{infix}.safetensors") in present:
            return [single], variant
        if shards := _shards(present, stem, infix):
            return shards, variant
    return None


def find_weights(folder: Path, stem: str) -> Weights:
    """The weights of the piece in a folder: `choose_weights`, or what an index of shards names.

    Raises:
        FileNotFoundError: none in safetensors, or a shard that is missing.
        ValueError: an index that is damaged, or that names what lies elsewhere.
    """
    present = {e.name for e in folder.iterdir() if e.is_file()} if folder.is_dir() else set()
    for variant in VARIANTS:
        infix = _infix(variant)
        if (single := f"{stem}{infix}.safetensors") in present:
            return Weights([folder / single], variant)
        for index in (
            f"{stem}.safetensors.index{infix}.json",
            f"{stem}{infix}.safetensors.index.json",
        ):
            if index in present:
                return Weights(_indexed(folder / index), variant)
        if shards := _shards(present, stem, infix):
            return Weights([folder / name for name in shards], variant)
    raise FileNotFoundError(
        f"{folder}: expected {stem}.safetensors, found {listing(folder)}"
        f"{of_pickles(present, str(folder.parent))}"
    )


def of_pickles(names: Iterable[str], model: str) -> str:
    """What to say of a model's weights that are there as pickles alone, with the line that
    converts them; nothing where there are none."""
    found = sorted(name for name in names if name.endswith((".bin", ".ckpt", ".pt", ".pth")))
    if not found:
        return ""
    variant = ", variant='fp16'" if all(".fp16." in name for name in found) else ""
    new = f"{model.rstrip('/').rpartition('/')[2]}-safetensors"
    code = (
        "from diffusers import StableDiffusionPipeline as P; "
        f"P.from_pretrained({model!r}{variant}, safety_checker=None).save_pretrained({new!r})"
    )
    return (
        f"; {found[0]} is a pickle, which can run anything when it is opened, and never is here. "
        f"If you trust its maker, convert the model once, and pass --model {shlex.quote(new)}:\n"
        f"python -c {shlex.quote(code)}"
    )


def _infix(variant: str | None) -> str:
    return f".{variant}" if variant else ""


def _shards(names: Iterable[str], stem: str, infix: str) -> list[str]:
    """All shards of a piece, or none."""
    number, stem, infix = r"-(\d{5})-of-(\d{5})", re.escape(stem), re.escape(infix)
    for spelling in (f"{stem}{infix}{number}", f"{stem}{number}{infix}"):
        pattern = re.compile(rf"{spelling}\.safetensors")
        found = {m[0]: int(m[2]) for name in names if (m := pattern.fullmatch(name))}
        if found and len(found) == max(found.values()):
            return sorted(found)
    return []


def _indexed(index: Path) -> list[Path]:
    """The shards of an index: files of its own folder."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ValueError(
            f"{index}: weight_map: expected an object of tensor names and files, got {shards!r:.80}"
        )
    files = []
    for tensor, name in shards.items():
        if not isinstance(name, str) or not _is_plain(name):
            raise ValueError(
                f"{index}: weight_map: {tensor!r:.80}: expected the name of a safetensors file "
                f"beside it, got {name!r:.80}"
            )
        files.append(name)
    found = []
    for name in sorted(set(files)):
        spellings = (name, _respelled(name))
        shard = next((f for n in spellings if (f := index.parent / n).is_file()), None)
        if shard is None:
            raise FileNotFoundError(
                f"{index.parent}: expected {name} (a shard named in {index.name}), found "
                f"{listing(index.parent)}"
            )
        found.append(shard)
    return found


def _is_plain(name: str) -> bool:
    """Whether a name stands for a file in the folder that names it, and for safetensors."""
    return (
        name.endswith(".safetensors")
        and not name.startswith(".")
        and not any(c in "/\\:" or ord(c) < 32 for c in name)
        and len(name) <= 255
    )


def _respelled(name: str) -> str:
    """A shard's name with its variant in the other place."""
    if m := re.fullmatch(r"(.+)\.(\w+)(-\d{5}-of-\d{5})\.safetensors", name):
        return f"{m[1]}{m[3]}.{m[2]}.safetensors"
    if m := re.fullmatch(r"(.+)(-\d{5}-of-\d{5})\.(\w+)\.safetensors", name):
        return f"{m[1]}.{m[3]}{m[2]}.safetensors"
    return name


def headers(
    files: Sequence[Path], kinds: Collection[str] | None = FLOATS
) -> dict[str, tuple[int, ...]]:
    """Shapes by tensor name over safetensors files, whose data is not read.

    Args:
        kinds: dtypes that tensors may have, in safetensors' words; None for any.
    Raises:
        ValueError: a file that is damaged, or a tensor of another dtype.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt", device="cpu") as opened:
                for name in opened.keys():  # noqa: SIM118 (it has no iterator)
                    piece = opened.get_slice(name)
                    shapes[name] = tuple(piece.get_shape())
                    kind = str(piece.get_dtype())
                    # A table of positions is no weight: old text encoders keep it.
                    fits = kinds is None or kind in kinds or name.endswith("position_ids")
                    if not fits:
                        raise ValueError(
                            f"{file}: {name}: expected {', '.join(sorted(kinds or ()))}, got {kind}"
                        )
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file}: {_damage(file, error)}") from error
    return shapes


def check_tokenizer(folder: Path, vocabulary: int) -> None:
    """ValueError for a CLIP tokenizer's files that are damaged, naming file and place.

    Args:
        vocabulary: tokens that the text encoder has embeddings of.
    """
    whole, vocab, merges = (folder / n for n in ("tokenizer.json", "vocab.json", "merges.txt"))
    for name in ("special_tokens_map.json", "added_tokens.json"):
        if (folder / name).is_file():
            read_json(folder / name)
    if whole.is_file():
        model = read_json(whole).get("model")
        tokens = model.get("vocab") if isinstance(model, dict) else None
        _check_vocabulary(whole, "model.vocab: ", tokens, vocabulary)
    if not vocab.is_file():
        return
    tokens = read_json(vocab)
    _check_vocabulary(vocab, "", tokens, vocabulary)
    if not merges.is_file():
        return
    try:
        lines = merges.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{merges} is not readable text: {brief(error)}") from error
    for number, line in enumerate(lines, 1):
        line = line.rstrip("\r")
        if line.startswith("#version") or not line:
            continue
        pair = line.split(" ")
        if len(pair) != 2 or not {*pair, "".join(pair)} <= tokens.keys():
            raise ValueError(
                f"{merges}: line {number}: expected two tokens that {vocab.name} has, and their "
                f"joint, got {line!r:.80}: the files are damaged or of different tokenizers"
            )


def _check_vocabulary(file: Path, key: str, tokens: Any, vocabulary: int) -> None:
    if not isinstance(tokens, dict) or not tokens:
        raise ValueError(
            f"{file}: {key}expected an object of tokens and numbers, got {tokens!r:.80}"
        )
    for token, number in tokens.items():
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < vocabulary:
            raise ValueError(
                f"{file}: {key}{token!r:.80}: expected a number under {vocabulary}, the text "
                f"encoder's vocab_size, got {number!r:.80}"
            )
    if len(set(tokens.values())) < len(tokens):
        raise ValueError(f"{file}: {key or 'it '}gives several tokens one number")


def _damage(file: Path, error: Exception) -> str:
    try:
        with open(file, "rb") as stream:
            start = stream.read(len(_LFS_MARK))
    except OSError:
        start = b""
    if start == _LFS_MARK:
        return "it is a pointer of Git LFS, not the file itself: run git lfs pull in its folder"
    return f"it is no whole safetensors file ({brief(error)}): copy or download it again"


def _integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise _Unfit(f"a number of {len(digits)} digits, {digits[:12]}...")
    return int(digits)


def _constant(name: str) -> float:
    raise _Unfit(f"{name} is no number of JSON")


def _check_depth(value: Any, left: int) -> None:
    if left == 0:
        raise _Unfit(_too_deep())
    if isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, Mapping) else value:
            _check_depth(item, left - 1)


def _too_deep() -> str:
    return f"expected at most {_DEEPEST_JSON} levels of nesting"
