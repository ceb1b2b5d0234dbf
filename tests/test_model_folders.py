"""Model folders that anybody may have made: damaged, hostile, of other families, of the hub.

Folders are changed at random, by seed, and opened: they work, or one message says why not, soon.
`DSD_FUZZ_FOLDERS=300` tries so many, in place of the few of a default run.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shlex
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import build_tiny_model, build_tiny_multiview, build_tiny_view_model

from dsd_fast import convert, train
from dsd_fast.diffusion import (
    components,
    embed_views,
    families,
    load_model,
    load_view_model,
    model_settings,
    network_loading,
    single_file,
)
from dsd_fast.diffusion.condition import Condition
from dsd_fast.diffusion.loader import picture_shape, resolve

N_TRIALS = int(os.environ.get("DSD_FUZZ_FOLDERS", "60"))
# What commands turn into a line and exit code 2.
MESSAGES = (ValueError, FileNotFoundError, ConnectionError, ImportError)
# Of the processor, which other work does not lengthen; a test's own limit is of the clock.
LONGEST_SECONDS = 10.0

HOSTILE = (
    None, True, False, -1, 0, 1, 3, 7, 1000, 2**31, 10**9, 10**18, 10**39, 0.5, -0.5, 1e-300, 1e308,
    "", "abc", "../../x", "/etc/passwd", "caf\u00e9", "x" * 10000, "kernels-community/flash-attn3",
    [], [1], [1, 2], [0, 0], [10**9] * 4, ["abc"] * 3, [[1]], {}, {"a": 1}, [None], [True],
)  # fmt: skip
TEXTS = (
    b"", b"{", b"[" * 100_000, b'{"a":' * 100_000, b"[]", b"null", b"NaN", b"\xff\xfe{}",
    b"\0" * 100,
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
        begun = time.process_time()
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
        if (seconds := time.process_time() - begun) > LONGEST_SECONDS:
            failures.append(f"{what}: took {seconds:.1f} s")
        shutil.rmtree(folder)
    assert not failures, "\n".join(failures)
    assert refused


@pytest.mark.parametrize("task", ["text", "image"])
def test_commands_end_with_a_line_and_2(bases, tmp_path, caplog, task: str) -> None:
    flags = ["--prompt", "a chair", "--task", task, "--output", str(tmp_path / "runs")]
    flags += ["--max-steps", "1", "--device", "cpu", "--model"]
    folder = copy(bases["text"], tmp_path / "model")
    edit(folder / "unet" / "config.json", layers_per_block=10**9)
    where = re.escape(str(folder / "unet" / "config.json"))
    for model, message in (
        (str(folder), f"{where}: layers_per_block: expected 64 or less, got 1000000000"),
        ("~no-such-user/model", "is no path"),
        ("x" * 5000, "is no path"),
        ("https://huggingface.co/org/name/tree/main", "pass the hub id, org/name"),
        (str(folder / "unet" / "config.json"), "no whole safetensors file"),
        ("/dev/zero", "a file, not a folder"),
    ):
        caplog.clear()
        begun = time.process_time()
        assert train.main([*flags, model]) == 2
        assert time.process_time() - begun < LONGEST_SECONDS
        assert re.search(message, caplog.text), caplog.text
    assert not list((tmp_path / "runs").rglob("*.safetensors"))


def test_what_may_not_be_read_is_a_message(bases, monkeypatch) -> None:
    def refuse(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_dir", refuse)
    with pytest.raises(ValueError, match=r"cannot read the model.*Permission denied"):
        load_model(bases["text"])


@pytest.mark.parametrize(
    ("file", "entries", "message"),
    [
        ("unet/config.json", {"layers_per_block": 2}, "asks for 4 layers, the weights hold 2"),
        ("unet/config.json", {"layers_per_block": [64, 64]}, "asks for 128 layers"),
        ("unet/config.json", {"transformer_layers_per_block": 64}, "asks for 64 layers"),
        ("vae/config.json", {"block_out_channels": [8]}, "down_block_types: expected 1 values"),
        ("unet/config.json", {"attention_head_dim": [2]}, "attention_head_dim: expected 2 values"),
        ("vae/config.json", {"layers_per_block": 64}, "asks for 128 layers"),
        ("text_encoder/config.json", {"num_hidden_layers": 64}, "asks for 64 layers"),
        (
            "text_encoder/config.json",
            {"vocab_size": 2**20},
            r"has shape \[514, 16\] in its weights",
        ),
        (
            "unet/config.json",
            {"cross_attention_dim": 16, "norm_num_groups": 3},
            "describes no UNet2",
        ),
        (
            "unet/config.json",
            {"encoder_hid_dim_type": "text_proj"},
            "encoder_hid_dim_type: expected",
        ),
        ("vae/config.json", {"scaling_factor": 0}, "scaling_factor: expected more than 0"),
        ("vae/config.json", {"latents_mean": [0.1] * 4}, "latents_mean: expected nothing"),
        ("scheduler/scheduler_config.json", {"beta_end": "x"}, "beta_end: expected a number"),
        ("scheduler/scheduler_config.json", {"trained_betas": [0.1]}, "json: .*1000 numbers"),
        ("tokenizer/vocab.json", {"a": 5}, "several tokens one number"),
        ("tokenizer/vocab.json", {"a": 514}, "'a': expected a number under 514"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": -1}, "model_max_length: expected"),
    ],
)
def test_the_file_and_the_key_are_named(bases, tmp_path, file, entries, message) -> None:
    folder = copy(bases["text"], tmp_path / "model")
    edit(folder / file, **entries)
    begun = time.process_time()
    with pytest.raises(ValueError, match=message) as error:
        load_model(folder)
    assert str(folder / Path(file).parent) in str(error.value)
    assert time.process_time() - begun < 2


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            {"transformer_depth": 63},
            "transformer_depth = 63 asks for 63 layers, the weights hold 1",
        ),
        ({"num_res_blocks": 64}, "num_res_blocks = 64 asks for 130 layers, the weights hold 4"),
        ({"channel_mult": [0, 1]}, r"channel_mult: expected 1 or more"),
        ({"model_channels": 10**9}, "model_channels: expected 65536 or less"),
        ({"num_heads": 0, "num_head_channels": -1}, "num_heads: expected"),
        ({"attention_resolutions": "all"}, "attention_resolutions: expected a list"),
    ],
)
def test_multiview_settings_are_named(bases, tmp_path, entries, message) -> None:
    folder = copy(bases["multiview"], tmp_path / "model")
    edit(folder / "unet" / "config.json", **entries)
    with pytest.raises(ValueError, match=message):
        load_model(folder, n_views=4)


def test_weights_that_nobody_asks_for_are_said(bases, tmp_path, caplog) -> None:
    folder = copy(bases["text"], tmp_path / "model")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    file.unlink()
    save_file(tensors | {"motion.weight": torch.ones(3)}, file, metadata={"format": "pt"})
    load_model(folder)
    assert "1 tensors that its config.json does not ask for, first 'motion.weight'" in caplog.text


# ---- the hub ----


class Hub:
    """A hub on this computer: an HTTP server with the calls that huggingface_hub makes.

    `served` has what was fetched, for the repositories are folders below `root`.
    """

    SHA = "0123456789abcdef0123456789abcdef01234567"

    def __init__(self, root: Path) -> None:
        self.root, self.served = root, []
        self.card: dict[str, Any] = {}

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(handler) -> None:
                self.answer(handler, body=False)

            def do_GET(handler) -> None:
                self.answer(handler, body=True)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, handler: BaseHTTPRequestHandler, body: bool) -> None:
        path = unquote(urlsplit(handler.path).path)
        headers, content = {"X-Repo-Commit": self.SHA}, b""
        if m := re.fullmatch(r"/api/models/(\w+/[\w-]+)(/revision/\w+|/tree/\w+)?", path):
            folder, what = self.root / m[1], m[2] or ""
            if not folder.is_dir():
                headers["X-Error-Code"] = "RepoNotFound"
                return self.send(handler, 404, headers, b"{}", body)
            names = sorted(f for f in folder.rglob("*") if f.is_file())
            entries = [
                {"type": "file", "oid": self.tag(f), "size": f.stat().st_size, "name": f}
                for f in names
            ]
            for entry in entries:
                name = entry.pop("name").relative_to(folder).as_posix()
                entry["path"] = entry["rfilename"] = name
            listing = {"id": m[1], "sha": self.SHA, "siblings": entries, "tags": [], **self.card}
            content = json.dumps(entries if what.startswith("/tree") else listing).encode()
        elif m := re.fullmatch(r"/(\w+/[\w-]+)/resolve/\w+/(.+)", path):
            file = self.root / m[1] / m[2]
            if not file.is_file():
                headers["X-Error-Code"] = "EntryNotFound"
                return self.send(handler, 404, headers, b"", body)
            content = file.read_bytes()
            headers["ETag"] = f'"{self.tag(file)}"'
            if body:
                self.served.append(m[2])
        else:
            return self.send(handler, 404, headers, b"", body)
        return self.send(handler, 200, headers, content, body)

    def tag(self, file: Path) -> str:
        return hashlib.sha1(file.read_bytes()).hexdigest()

    @staticmethod
    def send(
        handler: BaseHTTPRequestHandler, status: int, headers: dict, content: bytes, body: bool
    ) -> None:
        handler.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            handler.send_header(name, value)
        handler.end_headers()
        if body:
            handler.wfile.write(content)

    def weights(self) -> set[str]:
        return {name for name in self.served if name.endswith((".safetensors", ".bin"))}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub, and a cache that is empty: what HF_ENDPOINT and HF_HOME set at the import."""
    from huggingface_hub import constants

    server = Hub(tmp_path / "hub")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", template.replace(constants.ENDPOINT, server.url)
    )
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield server
    server.server.shutdown()
    server.server.server_close()


STEMS = (
    ("unet", "diffusion_pytorch_model"),
    ("vae", "diffusion_pytorch_model"),
    ("text_encoder", "model"),
)


def test_a_repository_is_fetched_with_its_full_weights(bases, hub, tmp_path, caplog) -> None:
    repository = shutil.copytree(bases["text"], hub.root / "org" / "tiny")
    for piece, stem in STEMS:
        for other in (f"{stem}.fp16.safetensors", f"{stem}.non_ema.safetensors", f"{stem}.bin"):
            (repository / piece / other).write_bytes(b"not to be read")
    hub.card = {"cardData": {"license": "openrail"}}
    model = load_model("org/tiny")
    assert hub.weights() == {f"{piece}/{stem}.safetensors" for piece, stem in STEMS}
    assert re.search(r"downloading org/tiny: 3 files.* GiB, licence openrail, to", caplog.text)
    assert model.model_hash == load_model(bases["text"]).model_hash
    # The second time nothing is fetched, and nothing said.
    hub.served.clear()
    caplog.clear()
    load_model("org/tiny")
    assert not hub.weights() and "downloading" not in caplog.text
    # The cache's folder is a model too, with or without its reference.
    root = tmp_path / "cache" / "models--org--tiny"
    assert load_model(root).path == model.path == root / "snapshots" / hub.SHA
    shutil.rmtree(root / "refs")
    assert load_model(root / "snapshots").path == model.path
    shutil.rmtree(root / "snapshots" / hub.SHA)
    with pytest.raises(FileNotFoundError, match=r"snapshot.*org/tiny"):
        load_model(root)


def test_a_repository_of_half_precision_alone(bases, hub) -> None:
    repository = shutil.copytree(bases["text"], hub.root / "org" / "half")
    for piece, stem in STEMS:
        file = repository / piece / f"{stem}.safetensors"
        file.rename(file.with_name(f"{stem}.fp16.safetensors"))
    model = load_model("org/half")
    assert hub.weights() == {f"{piece}/{stem}.fp16.safetensors" for piece, stem in STEMS}
    assert model.model_hash == load_model(bases["text"]).model_hash


@pytest.mark.parametrize("offline", ["HF_HUB_OFFLINE", "no hub"])
def test_a_cache_that_diffusers_filled_is_used_offline(bases, hub, monkeypatch, offline) -> None:
    import huggingface_hub
    from huggingface_hub import constants

    repository = shutil.copytree(bases["text"], hub.root / "org" / "both")
    for piece, stem in STEMS:
        file = repository / piece / f"{stem}.safetensors"
        shutil.copy(file, file.with_name(f"{stem}.fp16.safetensors"))
    huggingface_hub.snapshot_download(
        "org/both", allow_patterns=["*.json", "*.txt", "*.fp16.safetensors"]
    )
    if offline == "no hub":
        hub.server.shutdown()
        hub.server.server_close()
    else:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load_model("org/both").model_hash == load_model(bases["text"]).model_hash
    with pytest.raises(ConnectionError, match=r"'org/other'.*local"):
        load_model("org/other")


def test_a_repository_of_pickles_is_refused_before_it_is_fetched(bases, hub) -> None:
    repository = shutil.copytree(bases["text"], hub.root / "org" / "pickles")
    file = repository / "unet" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(FileNotFoundError, match=r"pickle.*convert the model once.*\n.*org/pickles"):
        load_model("org/pickles")
    assert not hub.weights()


def test_a_repository_of_another_family_is_refused_before_it_is_fetched(bases, hub) -> None:
    repository = shutil.copytree(bases["text"], hub.root / "org" / "xl")
    edit(repository / "model_index.json", _class_name="StableDiffusionXLPipeline")
    with pytest.raises(ValueError, match="Stable Diffusion XL"):
        load_model("org/xl")
    assert not hub.weights()


def test_a_view_model_of_the_hub(bases, hub) -> None:
    shutil.copytree(bases["view"], hub.root / "org" / "views")
    assert load_view_model("org/views").model_hash == load_view_model(bases["view"]).model_hash


# ---- names of weights ----

SHARD_NAMES = (
    ("{stem}-{n}", "{stem}.safetensors.index.json"),
    ("{stem}.fp16-{n}", "{stem}.safetensors.index.fp16.json"),
    ("{stem}-{n}.fp16", "{stem}.fp16.safetensors.index.json"),
    ("{stem}-{n}.fp16", "{stem}.safetensors.index.fp16.json"),
    ("{stem}.fp16-{n}", None),
    # An index that has the other spelling of its shards.
    ("{stem}-{n}.fp16", "{stem}.safetensors.index.fp16.json of {stem}.fp16-{n}"),
)


@pytest.mark.parametrize(("name", "index"), SHARD_NAMES)
def test_shards_by_all_their_names(bases, tmp_path, name: str, index: str | None) -> None:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    folder = shutil.copytree(bases["text"], tmp_path / "shards")
    for piece, stem in (STEMS[0], STEMS[2]):
        whole = folder / piece / f"{stem}.safetensors"
        tensors = load_file(whole)
        whole.unlink()
        places = {}
        for i in range(2):
            part = {key: tensors[key] for key in sorted(tensors)[i::2]}
            number = f"0000{i + 1}-of-00002"
            file = name.format(stem=stem, n=number) + ".safetensors"
            save_file(part, folder / piece / file, metadata={"format": "pt"})
            named = name if " of " not in (index or "") else (index or "").split(" of ")[1]
            places |= dict.fromkeys(part, named.format(stem=stem, n=number) + ".safetensors")
        if index is not None:
            file = index.split(" of ")[0].format(stem=stem)
            replace(folder / piece / file, {"metadata": {}, "weight_map": places})
    assert len(components.inspect_folder(folder).weight_files) == 5
    for cls, (piece, stem) in ((UNet2DConditionModel, STEMS[0]), (CLIPTextModel, STEMS[2])):
        wanted = load_file(bases["text"] / piece / f"{stem}.safetensors")
        network = network_loading.load_component(cls, folder / piece, torch.float32)
        for tensor, parameter in network.named_parameters():
            found = wanted[tensor if tensor in wanted else f"text_model.{tensor}"]
            assert torch.equal(parameter, found)


@pytest.mark.parametrize(
    "name", ["../vae/x.safetensors", "/x.safetensors", "a/b.safetensors", "..", "x.bin", 5, None]
)
def test_an_index_names_files_beside_it_alone(bases, tmp_path, name: object) -> None:
    folder = copy(bases["text"], tmp_path / "model")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    replace(index, {"weight_map": {"conv_in.weight": name}})
    with pytest.raises(ValueError, match=r"index\.json: weight_map: 'conv_in.weight': expected"):
        load_model(folder)


def test_the_line_for_pickles_converts_them(bases, tmp_path, monkeypatch) -> None:
    folder = shutil.copytree(bases["text"], tmp_path / "pickled model")
    for piece, stem in STEMS:
        file = folder / piece / f"{stem}.safetensors"
        name = "pytorch_model" if stem == "model" else stem
        torch.save(load_file(file), folder / piece / f"{name}.bin")
        file.unlink()
    with pytest.raises(FileNotFoundError, match="is a pickle, which can run anything") as error:
        load_model(folder)
    told, line = str(error.value).split("\n")
    monkeypatch.chdir(tmp_path)
    exec(shlex.split(line.removeprefix("python -c "))[0], {})
    new = tmp_path / shlex.split(told.rpartition("--model ")[2].rstrip(":"))[0]
    assert load_model(new).encode_prompt(["a chair"]).shape == (1, 77, 16)


# ---- what a model is ----


def test_no_configuration_chooses_code(bases, tmp_path, monkeypatch) -> None:
    """Kernels of the hub, code and quantisers that a text encoder's configuration names."""
    import huggingface_hub

    folder = copy(bases["text"], tmp_path / "model")
    edit(
        folder / "text_encoder" / "config.json",
        _attn_implementation="kernels-community/flash-attn3",
        attn_implementation="kernels-community/flash-attn3",
        auto_map={"AutoModel": "evil.Model"},
        quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True},
    )
    for piece in ("unet", "vae"):
        edit(folder / piece / "config.json", quantization_config={"quant_method": "gguf"})

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the hub was asked")

    for name in ("snapshot_download", "hf_hub_download"):
        monkeypatch.setattr(huggingface_hub, name, refuse)
    model = load_model(folder)
    expected = load_model(bases["text"]).encode_prompt(["a chair"])
    assert torch.equal(model.encode_prompt(["a chair"]), expected)
    _, encoder = model._text_encoder._loaded
    assert encoder.config._attn_implementation == "sdpa"


SD1 = {"block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 768}


@pytest.mark.parametrize(
    ("unet", "size"),
    [
        ({"sample_size": 32, "_diffusers_version": "0.6.0"}, 64),
        ({"sample_size": 32, "_diffusers_version": "0.8.1"}, 64),
        ({"sample_size": 32, **SD1}, 64),
        ({"sample_size": 32}, 32),
        ({"sample_size": 32, "_diffusers_version": "0.9.0"}, 32),
        ({"sample_size": 32, "_diffusers_version": "0.42.1", **SD1}, 32),
        ({"sample_size": 96, "_diffusers_version": "0.8.1"}, 96),
    ],
)
def test_latents_of_folders_before_diffusers_0_9(tmp_path, caplog, unet: dict, size: int) -> None:
    given = dict(unet)
    families.latents_of_old_folder(tmp_path / "config.json", unet)
    assert unet["sample_size"] == size
    assert ("is taken for 64, as diffusers does" in caplog.text) == (given["sample_size"] != size)


def test_an_old_folder_is_loaded_with_64(bases, tmp_path, caplog) -> None:
    folder = copy(bases["text"], tmp_path / "old")
    edit(folder / "unet" / "config.json", sample_size=32, _diffusers_version="0.6.0")
    assert picture_shape(folder) == (4, 64, 128)
    assert load_model(folder).latent_size == 64
    assert caplog.text.count("is taken for 64") == 1


@pytest.mark.parametrize(
    ("file", "entries", "message"),
    [
        ("unet/config.json", {"time_cond_proj_dim": 256}, "latent consistency model"),
        ("unet/config.json", {"in_channels": 9}, "an inpainting model.*expected.*Stable Diffusion"),
        ("unet/config.json", {"in_channels": 5}, "a depth model, which needs a depth map"),
        ("unet/config.json", {"in_channels": 7}, "an upscaler"),
        ("unet/config.json", {"in_channels": 8}, "--task single-view --image"),
        ("unet/config.json", {"addition_embed_type": "text_time"}, "Stable Diffusion XL's UNet"),
        ("model_index.json", {"_class_name": "StableDiffusion3Pipeline"}, "Stable Diffusion 3"),
        ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, "second text encoder"),
        ("model_index.json", {"_class_name": "FluxPipeline"}, "Flux, a transformer"),
        ("model_index.json", {"_class_name": "Zero1to3StableDiffusionPipeline"}, "single-view"),
        ("model_index.json", {"_class_name": "StableVideoDiffusionPipeline"}, "videos"),
        ("model_index.json", {"_class_name": "PixArtAlphaPipeline"}, "another kind of network"),
        (
            "scheduler/scheduler_config.json",
            {"_class_name": "FlowMatchEulerDiscreteScheduler"},
            "no betas",
        ),
        ("text_encoder/config.json", {"model_type": "t5"}, "model_type: expected clip_text_model"),
        ("tokenizer/tokenizer_config.json", {"tokenizer_class": "T5Tokenizer"}, "tokenizer_class"),
    ],
)
def test_other_families_are_named(bases, tmp_path, file: str, entries: dict, message: str) -> None:
    folder = copy(bases["text"], tmp_path / "model")
    edit(folder / file, **entries)
    with pytest.raises(ValueError, match=message) as error:
        load_model(folder)
    assert Path(file).name in str(error.value)


def test_a_pipeline_is_named_before_its_pieces_are_missed(bases, tmp_path) -> None:
    folder = copy(bases["text"], tmp_path / "model")
    edit(folder / "model_index.json", _class_name="StableDiffusion3Pipeline")
    shutil.rmtree(folder / "unet")
    with pytest.raises(ValueError, match="Stable Diffusion 3, a transformer in place of a UNet"):
        load_model(folder)
    with pytest.raises(ValueError, match="--task single-view --image PICTURE"):
        load_model(bases["view"])
    with pytest.raises(FileNotFoundError, match="text-to-image model cannot say"):
        load_view_model(bases["text"])
    with pytest.raises(ValueError, match="'UNet2DConditionModel': this is one piece"):
        load_model(bases["text"] / "unet")


@pytest.mark.parametrize(
    ("name", "scheduler", "sign"),
    [
        ("sd-turbo", {}, "its name has 'turbo'"),
        ("model", {"_class_name": "LCMScheduler"}, "LCMScheduler"),
        (
            "model",
            {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"},
            "'trailing'",
        ),
        ("model", {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}, None),
        ("turbocharger", {}, None),
    ],
)
def test_what_may_be_distilled_is_said(bases, tmp_path, caplog, name, scheduler, sign) -> None:
    folder = copy(bases["text"], tmp_path / name)
    edit(folder / "scheduler" / "scheduler_config.json", **scheduler)
    components.inspect_folder(folder)
    assert ("may be a model distilled" in caplog.text) == (sign is not None)
    assert (sign or "") in caplog.text


# ---- one file ----


def original_names(folder: Path, text: str) -> dict[str, torch.Tensor]:
    """The weights of a folder under the names of a checkpoint in one file.

    Args:
        text: "clip" for Stable Diffusion 1's names of its text encoder, "open_clip" for 2's.
    """
    parts = {piece: load_file(folder / piece / f"{stem}.safetensors") for piece, stem in STEMS}
    made = {f"model.diffusion_model.{_unet_name(n)}": t for n, t in parts["unet"].items()}
    for name, tensor in parts["vae"].items():
        new, matrix = _vae_name(name), ".attentions." in name and tensor.ndim == 2
        made[f"first_stage_model.{new}"] = tensor[:, :, None, None] if matrix else tensor
    own = {n.removeprefix("text_model."): t for n, t in parts["text_encoder"].items()}
    if text == "clip":
        made |= {f"cond_stage_model.transformer.text_model.{n}": t for n, t in own.items()}
    else:
        made |= {f"cond_stage_model.model.{n}": t for n, t in _open_clip(own).items()}
    return {name: tensor.contiguous() for name, tensor in made.items()}


def _renamed(name: str, pairs: dict[str, str]) -> str:
    for old, new in pairs.items():
        name = re.sub(old, new, name)
    return name


def _unet_name(name: str) -> str:
    layers = 1  # a level, of the tiny model
    if m := re.match(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.*)", name):
        first = int(m[2]) * (layers + 1)
        place = {
            ("down", "resnets"): f"input_blocks.{1 + first + int(m[4])}.0.",
            ("down", "attentions"): f"input_blocks.{1 + first + int(m[4])}.1.",
            ("down", "downsamplers"): f"input_blocks.{1 + first + layers}.0.op.",
            ("up", "resnets"): f"output_blocks.{first + int(m[4])}.0.",
            ("up", "attentions"): f"output_blocks.{first + int(m[4])}.1.",
            # Its first level up, with the one upsampler, has no attention.
            ("up", "upsamplers"): f"output_blocks.{first + layers}.1.conv.",
        }[m[1], m[3]]
        name = place + m[5].removeprefix("conv.")
    names = {
        r"^mid_block\.resnets\.0": "middle_block.0",
        r"^mid_block\.attentions\.0": "middle_block.1",
        r"^mid_block\.resnets\.1": "middle_block.2",
        r"^time_embedding\.linear_1": "time_embed.0",
        r"^time_embedding\.linear_2": "time_embed.2",
        r"^conv_in": "input_blocks.0.0",
        r"^conv_norm_out": "out.0",
        r"^conv_out": "out.2",
    }
    inner = {
        r"\.norm1\.(weight|bias)$": r".in_layers.0.\1",
        r"\.conv1": ".in_layers.2",
        r"\.norm2\.(weight|bias)$": r".out_layers.0.\1",
        r"\.conv2": ".out_layers.3",
        r"\.time_emb_proj": ".emb_layers.1",
        r"\.conv_shortcut": ".skip_connection",
    }
    return _renamed(name, names | ({} if "transformer_blocks" in name else inner))


def _vae_name(name: str) -> str:
    levels = 2
    if m := re.match(r"decoder\.up_blocks\.(\d)(.*)", name):
        name = f"decoder.up.{levels - 1 - int(m[1])}{m[2]}"
    names = {
        r"down_blocks": "down",
        r"mid_block\.resnets\.0": "mid.block_1",
        r"mid_block\.resnets\.1": "mid.block_2",
        r"mid_block\.attentions\.0": "mid.attn_1",
        r"resnets": "block",
        r"(down|up)samplers\.0": r"\1sample",
        r"conv_norm_out": "norm_out",
        r"conv_shortcut": "nin_shortcut",
        r"attn_1\.group_norm": "attn_1.norm",
        r"attn_1\.to_(q|k|v)": r"attn_1.\1",
        r"attn_1\.to_out\.0": "attn_1.proj_out",
    }
    return _renamed(name, names)


def _open_clip(own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = {
        r"^embeddings\.token_embedding": "token_embedding",
        r"^embeddings\.position_embedding\.weight": "positional_embedding",
        r"^final_layer_norm": "ln_final",
        r"^encoder\.layers": "transformer.resblocks",
        r"self_attn\.out_proj": "attn.out_proj",
        r"layer_norm1": "ln_1",
        r"layer_norm2": "ln_2",
        r"mlp\.fc1": "mlp.c_fc",
        r"mlp\.fc2": "mlp.c_proj",
    }
    made = {_renamed(n, names): t for n, t in own.items() if not re.search(r"\.[qkv]_proj", n)}
    for end in ("weight", "bias"):
        qkv = [own[f"encoder.layers.0.self_attn.{part}_proj.{end}"] for part in "qkv"]
        made[f"transformer.resblocks.0.attn.in_proj_{end}"] = torch.cat(qkv)
    return made


@pytest.fixture(scope="module")
def single(bases, tmp_path_factory) -> dict[str, Path]:
    """The tiny model in one file, with either text encoder's names."""
    folder = tmp_path_factory.mktemp("single")
    found = {}
    for text in ("clip", "open_clip"):
        found[text] = folder / f"{text}.safetensors"
        extra = {"model_ema.num_updates": torch.tensor(5), "alphas_cumprod": torch.ones(3)}
        save_file(original_names(bases["text"], text) | extra, found[text])
    return found


@pytest.mark.parametrize("text", ["clip", "open_clip"])
def test_one_file_becomes_the_folder_that_it_was(bases, single, tmp_path, text: str) -> None:
    argv = ["--file", str(single[text]), "--output", str(tmp_path / "new")]
    assert convert.main([*argv, "--like", str(bases["text"])]) == 0
    model, expected = load_model(tmp_path / "new"), load_model(bases["text"])
    for piece in ("unet", "vae"):
        mine, theirs = (getattr(m, piece).state_dict() for m in (model, expected))
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    prompts = ["a chair", ""]
    assert torch.equal(model.encode_prompt(prompts), expected.encode_prompt(prompts))
    assert list(tmp_path.iterdir()) == [tmp_path / "new"]
    # What is there is not written over.
    assert convert.main(argv) == 2


def test_a_file_is_a_model_and_converted_once(bases, single, tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setenv("DSD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(single_file, "_kind", lambda *_, **__: "Stable Diffusion 1")
    monkeypatch.setattr(
        single_file, "_write_settings", lambda to, _: single_file._copy_settings(bases["text"], to)
    )
    file = tmp_path / "model.ckpt"  # what is inside counts, and not the name
    shutil.copy(single["clip"], file)
    first = load_model(str(file))
    assert caplog.text.count("converting") == 1 and first.path.parent == tmp_path / "cache/models"
    assert load_model(file).path == first.path
    assert picture_shape(file) == (4, 8, 16)
    assert caplog.text.count("converting") == 1


def test_a_pickled_file_is_refused_with_the_line_that_converts(bases, single, tmp_path) -> None:
    file = tmp_path / "a model.ckpt"
    torch.save({"state_dict": load_file(single["clip"]), "global_step": 5}, file)
    with pytest.raises(ValueError, match="is a pickle, which can run anything") as error:
        load_model(file)
    line = str(error.value).split("\n")[1]
    code = shlex.split(line)[2]
    exec(code, {})
    assert load_file(file.with_suffix(".safetensors")).keys() == load_file(single["clip"]).keys()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"lora_unet_x.lora_down.weight": (4, 4)}, "a LoRA"),
        ({"cc_projection.weight": (4, 4), "model.diffusion_model.x": (1,)}, "Zero-1-to-3"),
        ({"conditioner.embedders.1.model.x": (4,)}, "Stable Diffusion XL"),
        ({"model.diffusion_model.joint_blocks.0.x": (4,)}, "Stable Diffusion 3"),
        ({"double_blocks.0.img_attn.x": (4,)}, "Flux"),
        ({"control_model.time_embed.0.weight": (4,)}, "a ControlNet"),
        ({"down_blocks.0.x": (4,)}, "one piece of a folder"),
        ({"x": (4,)}, r"found no tensors model.diffusion_model.\*, first_stage_model.\*"),
    ],
)
def test_other_files_are_named(tmp_path, tensors: dict, message: str) -> None:
    file = tmp_path / "model.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, file)
    with pytest.raises(ValueError, match=message) as error:
        load_model(file)
    assert str(file) in str(error.value)


def test_a_file_that_does_not_fit_leaves_nothing(bases, single, tmp_path) -> None:
    weights = load_file(single["clip"])
    like, output = bases["text"], tmp_path / "new"
    cases: list[tuple[dict, str]] = [
        (
            {n: t for n, t in weights.items() if "time_embed.0" not in n},
            r"lacks 2 tensors of its u",
        ),
        (weights | {"first_stage_model.quant_conv.bias": torch.zeros(5)}, "quant_conv.bias has sh"),
        (
            weights | {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(8, 9, 3, 3)},
            "inpainting",
        ),
    ]
    for i, (changed, message) in enumerate(cases):
        file = tmp_path / f"{i}.safetensors"
        save_file(changed, file)
        with pytest.raises(ValueError, match=message):
            single_file.convert(file, output, like)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="no whole safetensors file"):
        single_file.convert(file, output, like)
    with pytest.raises(ValueError, match=r"320 channels.*--like"):
        single_file.convert(single["clip"], output)
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".safetensors"] * 3


@pytest.mark.parametrize(
    ("kind", "unet", "text"),
    [
        ("Stable Diffusion 1", 859_520_964, 123_060_480),
        ("Stable Diffusion 2", 865_910_724, 340_387_840),
    ],
)
def test_the_configurations_of_the_package(tmp_path, kind: str, unet: int, text: int) -> None:
    """Numbers of parameters and of tokens are those that are known of the models."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    single_file._write_settings(tmp_path, kind)
    components.inspect_configs(tmp_path)
    counts = []
    for cls, piece in ((UNet2DConditionModel, "unet"), (AutoencoderKL, "vae")):
        config = json.loads((tmp_path / piece / "config.json").read_text())
        with torch.device("meta"):
            counts.append(sum(p.numel() for p in network_loading._build(cls, config).parameters()))
    config = model_settings.read_settings(tmp_path / "text_encoder" / "config.json", "text_encoder")
    with torch.device("meta"):
        encoder = network_loading._build(
            CLIPTextModel, model_settings.known(config, "text_encoder")
        )
    counts.append(sum(p.numel() for p in encoder.parameters()))
    assert counts == [unet, 83_653_863, text]
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    padding = 49407 if kind.endswith("1") else 0
    tokens = tokenizer("a photo of a cat", padding="max_length", max_length=9)["input_ids"]
    assert tokens == [49406, 320, 1125, 539, 320, 2368, 49407, padding, padding]


def test_noise_and_velocity_are_told_apart() -> None:
    def noise(latents: torch.Tensor, t: torch.Tensor, **_: object) -> tuple[torch.Tensor]:
        return (latents + 0.3 * torch.randn_like(latents),)

    def velocity(latents: torch.Tensor, t: torch.Tensor, **_: object) -> tuple[torch.Tensor]:
        return (0.07 * latents - 0.5 * torch.randn_like(latents),)

    assert not single_file.predicts_velocity(noise, 16)
    assert single_file.predicts_velocity(velocity, 16)
