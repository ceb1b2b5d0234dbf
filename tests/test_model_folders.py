"""Model folders that anybody may have made: damaged, hostile, of other families, of the hub.

Folders are changed at random, by seed, and opened: they work, or one message says why not, soon.
`DSD_FUZZ_FOLDERS=300` tries so many, in place of the few of a default run.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import build_tiny_model, build_tiny_multiview, build_tiny_view_model

from dsd_fast.diffusion import embed_views, load_model, load_view_model
from dsd_fast.diffusion.condition import Condition
from dsd_fast.diffusion.loader import resolve

N_TRIALS = int(os.environ.get("DSD_FUZZ_FOLDERS", "60"))
# What commands turn into a line and exit code 2.
MESSAGES = (ValueError, FileNotFoundError, ConnectionError, ImportError)
LONGEST_SECONDS = 10.0

HOSTILE = (
    None, True, False, -1, 0, 1, 3, 7, 1000, 2**31, 10**9, 10**18, 10**39, 0.5, -0.5, 1e-300, 1e308,
    "", "abc", "../../x", "/etc/passwd", "caf\u00e9", "x" * 10000, "kernels-community/flash-attn3",
    [], [1], [1, 2], [0, 0], [10**9] * 4, ["abc"] * 3, [[1]], {}, {"a": 1}, [None], [True],
)  # fmt: skip
TEXTS = (
    b"", b"{", b"[" * 100_000, b'{"a":' * 100_000, b"[]", b"null", b"NaN", b"\xff\xfe{}", b"\0" * 100,
    b'{"a": NaN}', b'{"sample_size": ' + b"9" * 5000 + b"}", b'{"a": "\\ud800"}', b"<html></html>",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", b"\xef\xbb\xbf{}",
)  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {
        "text": build_tiny_model(root / "text"),
        "tiny-vae": build_tiny_model(root / "tiny-vae", vae="tiny", prediction_type="v_prediction"),
        "multiview": build_tiny_multiview(root / "multiview"),
        "view": build_tiny_view_model(root / "view"),
        "small-view": build_tiny_view_model(root / "small-view", clip=False),
        "embedded": resolve("embedded"),
    }


def copy(base: Path, to: Path) -> Path:
    """The folder with links in place of its files, to be replaced by what is changed."""
    for file in base.rglob("*"):
        if file.is_file():
            (to / file.relative_to(base)).parent.mkdir(parents=True, exist_ok=True)
            (to / file.relative_to(base)).symlink_to(file)
    return to


def replace(file: Path, content: bytes | str | dict) -> None:
    file.unlink(missing_ok=True)
    if isinstance(content, dict):
        content = json.dumps(content)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)


def edit(file: Path, **entries: object) -> None:
    replace(file, json.loads(file.read_text()) | entries)


def use(kind: str, folder: Path) -> None:
    """Everything that a run asks of a model, once; results are finite and of the right shape."""
    generator = torch.Generator().manual_seed(0)
    if kind in ("view", "small-view"):
        view = load_view_model(folder)
        view.condition(torch.rand(1, 3, 16, 16, generator=generator))
        model, condition = view, view.conditions(torch.zeros(1, 4))
    else:
        n_views = 4 if kind == "multiview" else 1
        model = load_model(folder, n_views=n_views)
        text = embed_views(model, "a red chair").text_vd
        assert text.isfinite().all()
        condition = Condition(text[:1])
        if n_views > 1:
            condition = Condition(text, camera=torch.zeros(4, 16))
    rows, side = len(condition.tokens), model.latent_size
    picture = torch.rand(1, 3, model.image_size, model.image_size, generator=generator)
    latents = model.encode_images(picture, generator)
    assert latents.shape == (1, model.latent_channels, side, side)
    noise = torch.randn(rows, *latents.shape[1:], generator=generator)
    predicted = model.predict_noise(noise, torch.full((rows,), 500), condition)
    assert predicted.shape == noise.shape
    assert len(model.model_hash) == 64


# ---- changes ----


def change_value(rng: random.Random, folder: Path) -> str:
    """Some value of some JSON file, at any depth, becomes another or goes."""
    file = rng.choice(files(folder, ".json"))
    content = json.loads(file.read_text())
    places = [(content, key) for key in content]
    for parent, key in list(places):
        child = parent[key]
        if isinstance(child, (dict, list)) and child:
            keys = range(len(child)) if isinstance(child, list) else child
            places += [(child, key) for key in keys]
    parent, key = rng.choice(places)
    if rng.random() < 0.15:
        del parent[key]
        what = "gone"
    else:
        parent[key] = rng.choice(HOSTILE)
        what = repr(parent[key])[:40]
    replace(file, content)
    return f"{file.relative_to(folder)}: {key!r:.40} {what}"


def change_key_of_any_size(rng: random.Random, folder: Path) -> str:
    """A number of a configuration that shapes its network."""
    file = folder / rng.choice(["unet", "vae"]) / "config.json"
    if not file.exists():
        return change_value(rng, folder)
    content = json.loads(file.read_text())
    keys = [k for k, v in content.items() if isinstance(v, int) and not isinstance(v, bool)]
    keys += [k for k, v in content.items() if isinstance(v, list)]
    key = rng.choice(sorted(keys))
    number = rng.choice([-1, 0, 1, 2, 63, 64, 128, 4096, 65536, 10**6, 10**9, 2**63])
    content[key] = [number] * len(content[key]) if isinstance(content[key], list) else number
    replace(file, content)
    return f"{file.relative_to(folder)}: {key} {content[key]}"


def change_text(rng: random.Random, folder: Path) -> str:
    """A JSON file or a table of merges is something else, or damaged."""
    file = rng.choice([*files(folder, ".json"), *files(folder, ".txt")])
    data = file.read_bytes()
    how = rng.choice(["other", "cut", "flip", "doubled"])
    if how == "other":
        data = rng.choice(TEXTS)
    elif how == "cut":
        data = data[: rng.randrange(len(data))]
    elif how == "doubled":
        data += data
    else:
        data = flipped(rng, data, rng.randint(1, 5))
    replace(file, data)
    return f"{file.relative_to(folder)}: {how} {data[:30]!r}"


def change_weights(rng: random.Random, folder: Path) -> str:
    """A safetensors file is damaged: its length, its header, its data, a tensor."""
    file = rng.choice(files(folder, ".safetensors"))
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    how = rng.choice(
        ["cut", "header", "length", "dtype", "shape", "data", "nan", "other", "longer"]
    )
    if how == "cut":
        data = data[: rng.randrange(len(data))]
    elif how == "header":
        data = data[:8] + flipped(rng, data[8 : 8 + length], 3) + data[8 + length :]
    elif how == "length":
        data = rng.choice([0, 1, 2**40, 2**64 - 1]).to_bytes(8, "little") + data[8:]
    elif how == "dtype":
        new = rng.choice(["I32", "BF16", "F64", "BOOL", "U8", "XXX"])
        data = (
            data[:8]
            + data[8 : 8 + length].replace(b"F32", new.encode()[:3].ljust(3), 1)
            + data[8 + length :]
        )
    elif how == "shape":
        data = data[:8] + data[8 : 8 + length].replace(b"[8,", b"[4,", 1) + data[8 + length :]
    elif how == "data":
        data = data[: 8 + length] + flipped(rng, data[8 + length :], 100)
    elif how == "nan":
        middle = (8 + length + len(data)) // 2
        data = data[:middle] + b"\xff" * 64 + data[middle + 64 :]
    elif how == "longer":
        data += b"abc"
    else:
        data = rng.choice(TEXTS)
    replace(file, data)
    return f"{file.relative_to(folder)}: {how}"


def change_files(rng: random.Random, folder: Path) -> str:
    """A file is gone, a folder, or a link to nowhere or to itself."""
    file = rng.choice([f for f in folder.rglob("*") if f.is_file()])
    how = rng.choice(["gone", "folder", "nowhere", "loop", "piece gone"])
    file.unlink()
    if how == "folder":
        file.mkdir()
    elif how == "nowhere":
        file.symlink_to("nowhere")
    elif how == "loop":
        file.symlink_to(file.name)
    elif how == "piece gone" and file.parent != folder:
        shutil.rmtree(file.parent)
    return f"{file.relative_to(folder)}: {how}"


def change_shards(rng: random.Random, folder: Path) -> str:
    """The UNet's weights are shards with an index, which names what it should not."""
    file = next((folder / "unet").glob("*.safetensors"))
    shard = "diffusion_pytorch_model-00001-of-00001.safetensors"
    file.rename(file.with_name(shard))
    index: Any = {"metadata": {}, "weight_map": {"conv_in.weight": shard, "conv_in.bias": shard}}
    bad = [
        "../unet/x.safetensors",
        "/etc/passwd",
        "",
        ".",
        "..",
        "x\0.safetensors",
        None,
        5,
        [shard],
    ]
    bad += ["y" * 300 + ".safetensors", "a\\b.safetensors", "missing.safetensors", "x.bin", shard]
    how = rng.choice(["name", "map", "none", "whole"])
    if how == "name":
        index["weight_map"]["conv_in.bias"] = rng.choice(bad)
    elif how == "map":
        index["weight_map"] = rng.choice(HOSTILE)
    elif how == "none":
        del index["weight_map"]
    replace(folder / "unet" / "diffusion_pytorch_model.safetensors.index.json", index)
    return f"unet shards: {how} {index.get('weight_map')!r:.80}"


def change_words(rng: random.Random, folder: Path) -> str:
    """Vocabulary and merges no longer fit each other, or the text encoder."""
    vocab, merges = folder / "tokenizer" / "vocab.json", folder / "tokenizer" / "merges.txt"
    if not vocab.exists():
        return change_weights(rng, folder)
    tokens = json.loads(vocab.read_text(encoding="utf-8"))
    how = rng.choice(["gone", "number", "few", "merge", "end", "same"])
    some = rng.choice(sorted(tokens))
    if how == "gone":
        del tokens[some]
    elif how == "number":
        tokens[some] = rng.choice(HOSTILE)
    elif how == "few":
        tokens = dict(list(tokens.items())[: rng.randrange(20)])
    elif how == "end":
        tokens.pop("<|endoftext|>")
    elif how == "same":
        tokens = dict.fromkeys(tokens, 5)
    else:
        replace(
            merges, merges.read_text(encoding="utf-8") + rng.choice(["a", "a b c", "zz qq", "\0"])
        )
    if rng.random() < 0.5:
        (folder / "tokenizer" / "tokenizer.json").unlink(missing_ok=True)
    replace(vocab, tokens)
    return f"tokenizer: {how} {some!r}"


def files(folder: Path, ending: str) -> list[Path]:
    return sorted(f for f in folder.rglob(f"*{ending}") if f.is_file())


def flipped(rng: random.Random, data: bytes, count: int) -> bytes:
    array = bytearray(data)
    for _ in range(count if array else 0):
        array[rng.randrange(len(array))] ^= 1 << rng.randrange(8)
    return bytes(array)


CHANGES: tuple[Callable[[random.Random, Path], str], ...] = (
    change_value, change_value, change_value, change_key_of_any_size, change_text, change_weights,
    change_files, change_shards, change_words,
)  # fmt: skip


@pytest.mark.parametrize("part", range(max(1, N_TRIALS // 30)))
def test_changed_folders_work_or_are_refused(
    part: int, bases: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    failures, refused = [], 0
    for trial in range(part * 30, min(N_TRIALS, part * 30 + 30)):
        rng = random.Random(trial)
        # The embedded model is larger, and takes its time.
        kind = rng.choice([*list(bases) * 3, "text", "text", "text"])
        folder = copy(bases[kind], tmp_path / f"model{trial}")
        what = f"{trial} {kind} {rng.choice(CHANGES)(rng, folder)}"
        begun = time.monotonic()
        try:
            use(kind, folder)
        except MESSAGES as error:
            refused += 1
            if len(str(error)) > 1500 or not str(error).strip():
                failures.append(f"{what}: a message of {len(str(error))} letters")
            if os.environ.get("DSD_FUZZ_SHOW"):
                with capfd.disabled():
                    print(f"{what}\n    -> {error}")
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            failures.append(f"{what}: {type(error).__name__}: {error!s:.200}")
        if (seconds := time.monotonic() - begun) > LONGEST_SECONDS:
            failures.append(f"{what}: took {seconds:.1f} s")
        shutil.rmtree(folder)
    assert not failures, "\n".join(failures)
    assert refused
