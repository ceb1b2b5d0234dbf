"""Checkpoints: exact round trips, atomic writes, and clear words about damaged files."""

import pytest
import torch

from dsd_fast import files
from dsd_fast.run import checkpoint
from dsd_fast.run.checkpoint import CheckpointError


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


def test_foreign_and_missing_files(tmp_path):
    from safetensors.torch import save_file

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
    with pytest.raises(CheckpointError, match=r"No space left.*--resume auto"):
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
