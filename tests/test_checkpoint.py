"""Checkpoints: exact round trips, atomic writes, and clear words about damaged files."""

import json
import random

import pytest
import torch
from safetensors.torch import save_file

from dsd_fast import files
from dsd_fast.run import checkpoint
from dsd_fast.run.checkpoint import CheckpointError
from dsd_fast.run.state import load_run


@pytest.fixture
def tree() -> dict:
    generator = torch.Generator().manual_seed(3)
    return {
        "step": 7,
        "config": {"prompt": "a chair", "ranges": [1, 2.5], "empty": {}},
        "field": {"grid.table": torch.randn(31, generator=generator), "nothing": torch.zeros(0, 3)},
        "rng": {"noise": generator.get_state()},
        "flags": {"binary": torch.tensor([[True, False]]), "scalar": torch.tensor(2.0)},
    }


def same(a: object, b: object) -> bool:
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    return a == b


def test_round_trip(tmp_path, tree):
    path = tmp_path / "step-000007.safetensors"
    checkpoint.save(path, tree)
    assert same(checkpoint.load(path), tree)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_views_of_one_buffer_are_saved(tmp_path):
    buffer = torch.arange(6.0).reshape(2, 3)
    checkpoint.save(tmp_path / "a.safetensors", {"x": {"row": buffer[0], "column": buffer[:, 1]}})
    loaded = checkpoint.load(tmp_path / "a.safetensors")
    assert loaded["x"]["column"].tolist() == [1.0, 4.0]


@pytest.mark.parametrize("cut", [0, 5, 200, -1])
def test_truncated_file_is_refused_with_an_older_one_named(tmp_path, tree, cut):
    older, newer = (checkpoint.step_path(tmp_path, step) for step in (5, 7))
    checkpoint.save(older, tree)
    checkpoint.save(newer, tree)
    newer.write_bytes(newer.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match=f"(?s)cannot be read.*--resume .*{older.name}"):
        checkpoint.load(newer)


def test_flipped_bit_is_noticed(tmp_path, tree):
    path = tmp_path / "step-000007.safetensors"
    checkpoint.save(path, tree)
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"damaged.*--overwrite"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"dtype":"F32","shape":[31]', b'"dtype":"I32","shape":[31]'),
        (b'"shape":[1,2]', b'"shape":[2,1]'),
        (b'"shape":[0,3]', b'"shape":[3,0]'),
        (b"field/grid.table", b"field/grid.tabla"),
        (b'"dtype":"BOOL"', b'"dtype":"U8"  '),
        (b"a chair", b"a choir"),
        (b'"2\\n', b'"1\\n'),
        (b"dsd_fast checkpoint", b"dsd_fast_checkpoint"),
    ],
)
def test_a_damaged_header_is_noticed(tmp_path, tree, old, new):
    path = tmp_path / "step-000007.safetensors"
    checkpoint.save(path, tree)
    content = path.read_bytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))
    with pytest.raises(CheckpointError, match=r"damaged|has checkpoint format '1'|not a dsd_fast"):
        checkpoint.load(path)


def test_the_whole_one_is_named_beside_damaged_ones(tmp_path, tree):
    paths = [checkpoint.step_path(tmp_path, step) for step in (1, 2, 3)]
    for path in paths:
        checkpoint.save(path, tree)
    for path in paths[1:]:
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"whole: --resume {paths[0]}"):
        checkpoint.load(paths[2])


def test_checkpoints_of_the_first_format_are_read(tmp_path, tree):
    path = tmp_path / "step-000007.safetensors"
    tensors: dict = {}
    state = json.dumps(checkpoint._flatten(tree, "", tensors))
    metadata = {
        "format": "dsd_fast checkpoint",
        "version": "1",
        "crc32": checkpoint._checksum(state, tensors, 1),
        "state": state,
    }
    save_file(tensors, path, metadata=metadata)
    assert same(checkpoint.load(path), tree)


def test_equal_trees_make_equal_files(tmp_path, tree):
    paths = [tmp_path / f"{i}.safetensors" for i in range(5)]
    for path in paths:
        checkpoint.save(path, tree)
    assert len({path.read_bytes() for path in paths}) == 1


def damaged(content: bytes, generator: random.Random) -> bytes:
    """The same bytes with one kind of damage."""
    data = bytearray(content)
    header = 8 + int.from_bytes(content[:8], "little")
    at = generator.randrange(header if generator.random() < 0.6 else len(data))
    kind = generator.randrange(5)
    if kind == 0:
        data[at] ^= 1 << generator.randrange(8)
    elif kind == 1:
        data[at : at + 16] = generator.randbytes(16)
    elif kind == 2:
        del data[at:]
    elif kind == 3:
        del data[at : at + generator.randrange(1, 9)]
    else:
        data[at:at] = generator.randbytes(generator.randrange(1, 9))
    return bytes(data)


def test_no_damage_goes_unnoticed(tmp_path, tree):
    """200 damaged files: a message, or, where the damage changed nothing that counts, the same."""
    path, generator = tmp_path / "step-000007.safetensors", random.Random(0)
    checkpoint.save(path, tree)
    content = path.read_bytes()
    refused = 0
    for _ in range(200):
        path.write_bytes(damaged(content, generator))
        try:
            assert same(checkpoint.load(path), tree)
        except CheckpointError:
            refused += 1
    assert refused > 190


@pytest.mark.parametrize(
    "state", ["[]", "3", "nul", '{"a": ' * 100_000, '{"field": 1}', '{"step": ' + "9" * 5000 + "}"]
)
def test_a_whole_file_of_something_else(tmp_path, state):
    """The checksum is right and the content is not: what a stranger's file may have."""
    tensors = {"field/a": torch.zeros(2)}
    crc = checkpoint._checksum(state, tensors)
    metadata = {"dsd_fast checkpoint": f"2\n{crc}\n{state}"}
    path = tmp_path / "step-000001.safetensors"
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(CheckpointError, match=r"holds no tree|not the checkpoint of a run"):
        load_run(path)


@pytest.mark.parametrize(
    "change",
    [{"step": "7"}, {"step": -1}, {"step": True}, {"config": []}, {"scene": None}, {"rng": {}}],
)
def test_parts_of_a_run_are_looked_at(tmp_path, change):
    parts = {"config": {}, "scene": {}, "optimizer": {}, "guidance": {}, "rng": {}}
    path = tmp_path / "step-000001.safetensors"
    whole = {"step": 7, "model_hash": "0", **parts}
    checkpoint.save(path, whole)
    assert load_run(path) == whole
    if change != {"rng": {}}:
        checkpoint.save(path, {**whole, **change})
        with pytest.raises(CheckpointError, match=f"expected {next(iter(change))}|its step is -1"):
            load_run(path)
    checkpoint.save(path, {name: part for name, part in whole.items() if name not in change})
    with pytest.raises(CheckpointError, match=f"expected {next(iter(change))}"):
        load_run(path)


def test_what_is_set_aside_goes_when_the_run_has_come_as_far(tmp_path):
    for step in (2, 4, 6):
        checkpoint.save(checkpoint.step_path(tmp_path, step), {"step": step})
    checkpoint.set_aside(tmp_path, 2)
    names = [[step for step, _ in checkpoint.list_steps(tmp_path / at)] for at in ("", "set-aside")]
    assert names == [[2], [4, 6]]
    checkpoint.save(checkpoint.step_path(tmp_path, 5), {"step": 5})
    checkpoint.prune(tmp_path, keep=1)
    names = [[step for step, _ in checkpoint.list_steps(tmp_path / at)] for at in ("", "set-aside")]
    assert names == [[5], [6]]
    checkpoint.save(checkpoint.step_path(tmp_path, 6), {"step": 6})
    checkpoint.prune(tmp_path, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000006.safetensors"]


def test_a_link_in_the_place_of_the_unfinished_file_is_not_followed(tmp_path, tree):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".unfinished-step-000001.safetensors").symlink_to(victim)
    checkpoint.save(checkpoint.step_path(folder, 1), tree)
    assert victim.read_text() == "mine"
    assert same(checkpoint.load(checkpoint.step_path(folder, 1)), tree)


def test_foreign_and_missing_files(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="not a dsd_fast checkpoint"):
        checkpoint.load(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        checkpoint.load(tmp_path / "b.safetensors")


def test_failed_write_keeps_the_old_file(tmp_path, tree, monkeypatch):
    path = tmp_path / "step-000007.safetensors"
    checkpoint.save(path, tree)

    def full_disk(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full_disk)
    with pytest.raises(CheckpointError, match=r"cannot write the checkpoint.*No space left"):
        checkpoint.save(path, {"step": 8})
    monkeypatch.undo()
    assert same(checkpoint.load(path), tree)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_list_and_prune(tmp_path):
    assert checkpoint.list_steps(tmp_path / "absent") == []
    for step in (1000000, 20, 3):
        checkpoint.save(checkpoint.step_path(tmp_path, step), {"step": step})
    (tmp_path / "step-notes.safetensors").touch()
    assert [step for step, _ in checkpoint.list_steps(tmp_path)] == [3, 20, 1000000]
    checkpoint.prune(tmp_path, keep=2)
    assert [step for step, _ in checkpoint.list_steps(tmp_path)] == [20, 1000000]


def test_keys_must_be_plain(tmp_path):
    with pytest.raises(TypeError, match="strings without '/'"):
        checkpoint.save(tmp_path / "a.safetensors", {"state": {0: torch.zeros(1)}})
