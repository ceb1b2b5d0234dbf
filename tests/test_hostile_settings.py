"""Files of settings that anybody may have made: values, or one message with the file, in a moment.

DSD_HOSTILE=5 tries five times as many files.
"""

import json
import os
import random
import string
import time
from pathlib import Path

import pytest

from dsd_fast import train
from dsd_fast.config import (
    ConfigError,
    TrainConfig,
    check,
    from_dict,
    official,
    preset,
    read_config,
    to_dict,
)
from dsd_fast.run import cli

DSD = Path(__file__).parent / "data" / "dsd.yaml"
TRIALS = 40 * int(os.environ.get("DSD_HOSTILE", "1"))
# On a computer that does other work at the same time.
SECONDS = 3.0


def read(path: Path) -> TrainConfig:
    return read_config(path) if path.suffix == ".json" else official.load(path)


def refused(path: Path) -> str:
    """The words with which a file is refused, at once and with its name."""
    began = time.monotonic()
    with pytest.raises(ConfigError) as error:
        read(path)
    assert time.monotonic() - began < SECONDS
    words = str(error.value)
    assert path.name in words and len(words) < 1000
    return words


def ten_of(name: str) -> str:
    return ", ".join([f"*{name}"] * 10)


LAUGHS = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{ten_of(f'a{i - 1}')}]\n" for i in range(1, 12))
MERGES = "a0: &a0 {x: 1}\n" + "".join(
    f"a{i}: &a{i}\n  <<: [{ten_of(f'a{i - 1}')}]\n" for i in range(1, 12)
)
PROMPT = "system: {prompt_processor: {prompt: 'x'}}\n"
DOUBLES = "tag: ${name}${name}\nname: ${exp_root_dir}${exp_root_dir}\nexp_root_dir: " + "x" * 4000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1: 2", "line 1: expected the name of a setting, got '1'"),
        ("seed: 1\nnull: 2", "line 2: expected the name of a setting, got 'null'"),
        ("? [a]\n: 1", "expected the name of a setting"),
        ("true: 1", "expected the name of a setting"),
        ("seed: 1\nseed: 2", "line 2: 'seed' is there twice"),
        ("data.width: 3\ndata: {width: 4}", "data.width is there twice"),
        ("system:", "system: expected a group of settings"),
        ("system: [1]", "system: expected a group of settings"),
        ("system: {}", "system: expected a group of settings"),
        ("", "expected groups of settings, got None"),
        ("seed: {a: 1}", "'seed.a' is not a known setting"),
        (LAUGHS, "at most 10000 values"),
        (MERGES, "at most 10000 values"),
        ("seed: &a [*a]", "line 1: this alias is a part of what it stands for"),
        ("seed: *a", "undefined alias"),
        ("seed: " + "[" * 100000, "nests deeper than 32 levels"),
        ("{seed: " * 1000, "nests deeper than 32 levels"),
        ("".join(" " * i + "a:\n" for i in range(400)), "nests deeper"),
        ("seed: [" + "1," * 50000, "at most 10000 values"),
        ("seed: " + "9" * 5000, "a number of 5000"),
        ("seed: " + ":".join(["1"] * 50000), "cannot read"),
        ("seed: !!float " + ":".join(["1"] * 50000), "cannot read"),
        ("seed: !!bool x", "line 1: cannot read 'x' as bool"),
        ("seed: !!timestamp x", "cannot read 'x' as timestamp"),
        ("seed: 2001-99-99", "month must be in 1..12"),
        ("seed: !!python/object/apply:os.system [ls]", "python/object"),
        ('name: "\\UFFFFFFFF"', "line 1"),
        ('name: "\\ud800"', "name: expected text in UTF-8"),
        ('tag: "a\\0b"', "control character '\\x00'"),
        ("name: ../..", "name: expected the name of a folder inside another one"),
        ("name: /etc", "inside another one"),
        ("tag: " + "x" * 50000, "tag: expected at most 10000 characters"),
        ("tag: '" + "x" * 500000 + "'", "larger than 256 KiB"),
        ("seed: ${mul:abc,900000000}", "expected 2 numbers, got 'abc,900000000'"),
        ("seed: ${mul:900000000,[1]}", "expected 2 numbers"),
        ("seed: ${mul:1}", "expected 2 numbers, got '1'"),
        ("data: {width: '${tuple2:abc}'}", "data.width: cannot evaluate 'tuple2:abc'"),
        ("data: {width: '${tuple2:%s}'}" % ("9" * 3000), "data.width"),
        ("seed: ${div:1,0}", "division by zero"),
        ("seed: ${idiv:1e400,0}", "division by zero"),
        ("tag: ${rmspace:a}", "cannot evaluate"),
        (DOUBLES, "when its references are resolved"),
        ("tag: '" + "${not:1}" * 1200 + "'", "takes more than 1000 references"),
        ("tag: ${name}\nname: ${tag}", "the references go in a circle"),
        ("%YAML 9.9\n---\nseed: 1", "incompatible YAML"),
        ("seed:\n\ta: 1", "line 2"),
        ("a: 1\n---\nb: 2", "line 2"),
    ],
)
def test_yaml(tmp_path, text, message):
    path = tmp_path / "x.yaml"
    path.write_text(text, encoding="utf-8")
    assert message in refused(path)


def test_aliases_that_stand_for_little(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("seed: &a 3\ntrainer: {max_steps: *a}\n")
    assert official.load(path).max_steps == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "the configuration: expected a group of settings, got []"),
        ("null", "expected a group of settings"),
        ('{"seed": 1, "seed": 2}', "'seed' is there twice"),
        ('{"guidance": {"method": "dsd", "method": "sds"}}', "'method' is there twice"),
        ('{"guidance": 7}', "guidance: expected a group of settings, got 7"),
        ('{"guidance": null}', "guidance: expected a group of settings, got None"),
        ('{"seed": ' + "9" * 5000 + "}", "a number of 5000"),
        ('{"seed": ' + "9" * 30 + "}", "seed: expected less than"),
        ('{"max_steps": 1e400}', "max_steps: expected an integer"),
        ('{"seed": ' + "[" * 100000 + "}", "nests too deep"),
        ('{"seed":' + '{"a":' * 20000, "nests too deep"),
        ('{"prompt": "\\ud800"}', "prompt: expected text in UTF-8"),
        ('{"text": {"front": "a\\u0000b"}}', "text.front: expected text"),
        ('{"cameras": {"width": [1, [2]]}}', "cameras.width"),
        ('{"cameras": {"fovy_range": {}}}', "cameras.fovy_range: expected a list"),
        ('{"name": "../.."}', "name: expected the name of a folder inside another one"),
        ('{"name": ""}', "name: expected"),
        ('{"output": "a\\u0000b"}', "output: expected a path"),
        ('{"optimizer": {"eps": NaN}}', "optimizer.eps: expected a finite number"),
        ('{"' + "k" * 5000 + '": 1}', "there is no such setting"),
        ('{"renderer": {"radius": ' + "9" * 39 + "}}", "renderer.radius: expected that of the"),
        ("", "not a JSON file"),
        ("{", "not a JSON file"),
    ],
)
def test_json(tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_text(text, encoding="utf-8")
    assert message in refused(path)


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_what_is_no_file_of_text(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    assert "No such file" in refused(path)
    path.mkdir()
    assert "folder" in refused(path) or "not a regular file" in refused(path)
    path.rmdir()
    os.mkfifo(path)
    assert "not a regular file" in refused(path)
    path.unlink()
    path.symlink_to("/dev/zero")
    assert "not a regular file" in refused(path)
    path.unlink()
    path.symlink_to(path)
    refused(path)
    path.unlink()
    path.write_bytes("seed: 1".encode("utf-16"))
    assert "UTF-16" in refused(path)
    path.write_bytes(b"\xff\x00\x01")
    assert "byte 0 is not UTF-8" in refused(path)
    path.write_bytes(b"\xef\xbb\xbf" + (b"seed: 5" if suffix == ".yaml" else b'{"seed": 5}'))
    assert read(path).seed == 5


def test_non_string_keys_of_a_library_user():
    with pytest.raises(ConfigError, match="1: there is no such setting"):
        from_dict(TrainConfig, {1: 2})
    with pytest.raises(ConfigError, match="None: there is no such setting"):
        from_dict(TrainConfig, {None: 2})
    with pytest.raises(ConfigError, match=r"seed: expected .* that is too long"):
        from_dict(TrainConfig, {"seed": 10**5000})


def test_overrides(tmp_path):
    for override in ("a" + ".a" * 5000 + "=1", "seed=" + "[" * 9999, "seed=!!bool x", "x=${a}"):
        with pytest.raises(ConfigError):
            official.load(DSD, [override])


@pytest.mark.parametrize("elsewhere", ["/nowhere/at/all", "../beside"])
def test_a_file_names_no_folder_elsewhere(tmp_path, elsewhere, monkeypatch, caplog):
    """A stranger's configuration; that of a run of one's own lies in the folder that it names."""
    monkeypatch.chdir(tmp_path)
    cfg = preset("embedded", on_cpu=True)
    cfg.prompt, cfg.output = "a chair", Path(elsewhere)
    (tmp_path / "config.json").write_text(json.dumps(to_dict(cfg)))
    (tmp_path / "x.yaml").write_text(f"exp_root_dir: {elsewhere}\n{PROMPT}")
    for name in ("config.json", "x.yaml"):
        assert train.main(["--config", name, "--device", "cpu"]) == 2
        assert "pass --output" in caplog.text
        caplog.clear()
        job = cli.parse(["--config", name, "--device", "cpu", "--output", "mine"])[0]
        assert job.config.output == Path("mine")
    cfg.output = tmp_path
    (tmp_path / "config.json").write_text(json.dumps(to_dict(cfg)))
    assert cli.parse(["--config", "config.json", "--device", "cpu"])[0].config.output == tmp_path


# ---- at random ----------------------------------------------------------------------------------

ATOMS = [None, True, -1, 0, 1e308, float("nan"), float("inf"), 2**63, 10**30, "", " ", "\udce9"]
ATOMS += ["²", "a\0b", "../..", "/dev/zero", "${seed}", "${mul:9,9}", "x" * 20000, [], {}, [[]]]
ATOMS += [[1, 2, 3], ["a", None], {"a": {"b": []}}, "🪑", "1e3", "???", "\x1b[31m"]
YAML_BITS = ["&a ", "*a", "!!int ", "!!set ", "- ", "? ", ": ", "|\n", ">\n", "<<: *a\n", "---\n"]
YAML_BITS += ["%TAG ! x\n", "${", "}", "[", "{", '"\\u', "'", "\t", "\0", "\ufeff", "#", "@", "`"]


def damage(rng: random.Random, content: bytes) -> bytes:
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(content) + 1)
        end = min(at + rng.choice([1, 3, 50]), len(content))
        bit = rng.choice(YAML_BITS) if rng.random() < 0.6 else rng.choice(string.printable)
        content = rng.choice(
            [
                content[:at],
                content[:at] + content[end:],
                content[:at] + bit.encode() + content[at:],
                content[:at] + bytes([rng.randrange(256)]) + content[end:],
                content[:end] + content[at:],
                content[:at] + content[at:end] * 200 + content[end:],
            ]
        )
    return content


def put_anywhere(rng: random.Random, tree: dict) -> None:
    while True:
        name = rng.choice(list(tree))
        if not isinstance(tree[name], dict) or not tree[name] or rng.random() < 0.1:
            break
        tree = tree[name]
    if rng.random() < 0.2:
        tree[rng.choice(["", "x", "a.b", "\udce9", "k" * 500, "__class__"])] = tree.pop(name)
    else:
        tree[name] = rng.choice(ATOMS)


@pytest.mark.parametrize("seed", range(TRIALS))
def test_random_files(tmp_path, seed):
    rng = random.Random(seed)
    suffix = rng.choice([".json", ".yaml"])
    tree = to_dict(preset("embedded", max_steps=10, on_cpu=True)) | {"prompt": "a chair"}
    if suffix == ".yaml" and rng.random() < 0.7:
        content = damage(rng, DSD.read_bytes())
    else:
        if suffix == ".yaml":
            tree = {"seed": 1, "name": "x", "data": {"width": 3, "height": [4]}, "tag": "y"}
            tree |= {"system": {"geometry": {"radius": 2.0}}, "trainer": {"max_steps": 3}}
        for _ in range(rng.randint(1, 3)):
            put_anywhere(rng, tree)
        content = json.dumps(tree).encode()  # is YAML too
        if rng.random() < 0.4:
            content = damage(rng, content)
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    began = time.monotonic()
    try:
        cfg = read(path)
    except ConfigError as error:
        assert path.name in str(error) and len(str(error)) < 2000
    else:
        try:
            check(cfg, flags=True)
        except ConfigError as error:
            assert str(error)
    assert time.monotonic() - began < SECONDS
