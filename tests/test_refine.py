"""Refining: the mesh of a run goes on under the guidance."""

import json
import re
import shutil

import numpy as np
import pytest
import torch

from dsd_fast import refine
from dsd_fast.run import checkpoint, outputs
from dsd_fast.run.cli import find_checkpoint
from dsd_fast.tasks.refine import LEVELS, refinement

pytest.importorskip("xatlas")
pytest.importorskip("fast_simplification")
trimesh = pytest.importorskip("trimesh")

NAME = "diverse-score-distillation"
# Renderings of a size that tests have time for; everything else as the command has it.
FAST = ("--pictures.no-turntable", "--pictures.no-mesh")


@pytest.fixture(autouse=True)
def small(monkeypatch) -> None:
    monkeypatch.setattr("dsd_fast.tasks.refine.SIZE_CPU", 12)


def refined(runner, seed: int = 0) -> outputs.RunFolder:
    return outputs.RunFolder.named(runner.folder, NAME, "a chair", seed, "refine")


def test_the_command(runner) -> None:
    """A run beside the object's, with its colours and background to begin with."""
    assert runner(*FAST, steps=2) == 0
    flags = ["--device", "cpu", "--max-faces", "300", "--texture-size", "512"]
    assert refine.main([str(runner.run.path), "--steps", "3", *flags]) == 0
    run = refined(runner)
    assert {p.name for p in run.path.iterdir()} >= {"preview.png", "config.json", "metrics.jsonl"}
    cfg = json.loads(run.config.read_text())
    assert cfg["task"] == "refine" and cfg["max_steps"] == 3 and cfg["seed"] == 0
    records = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3]
    assert all(1000 * LEVELS[0] <= record["t"] <= 1000 * LEVELS[1] for record in records)
    before = checkpoint.load(find_checkpoint(runner.run.path)[0])["scene"]
    after = checkpoint.load(find_checkpoint(run.path)[0])["scene"]
    assert set(after) == {name for name in before if not name.startswith("renderer.")}
    table, first = after["field.grid.table"], before["field.grid.table"]
    assert 0 < (table - first).abs().max() < 3 * 0.01
    for name in after:
        if "density" in name:
            assert torch.equal(after[name], before[name])


def test_the_mesh_of_it(runner) -> None:
    """Textured, of no more triangles than asked for; what was ended goes on to the same."""
    assert runner("--pictures.no-turntable", steps=2) == 0
    folder = outputs.RunFolder(runner.run.path)
    job = refinement(folder, "cpu", steps=4, max_faces=300, texture_size=512)
    from dsd_fast.train import train

    stopped = job.__class__(job.config, job.folder, None, False, stop_at=2)
    assert train([stopped]) == ()
    stopped.folder.release()
    again = refinement(outputs.RunFolder(runner.run.path), "cpu")
    assert again.state is not None and again.state["step"] == 2
    assert len(train([again])) == 1
    again.folder.release()
    mesh = trimesh.load(refined(runner).mesh, force="mesh", process=False)
    assert 12 <= len(mesh.faces) <= 300
    texture = np.asarray(mesh.visual.material.baseColorTexture)
    assert texture.shape[:2] == (512, 512)
    tensors = checkpoint.load(find_checkpoint(refined(runner).path)[0])["scene"]

    shutil.rmtree(refined(runner).path)
    whole = refinement(outputs.RunFolder(runner.run.path), "cpu", 4, 300, 512)
    train([whole])
    whole.folder.release()
    straight = checkpoint.load(find_checkpoint(refined(runner).path)[0])["scene"]
    assert all(torch.equal(straight[name], value) for name, value in tensors.items())


def test_after_training(runner) -> None:
    """--refine: for every seed, by the same command, which may be repeated."""
    flags = (*FAST, "--refine", "2", "--num-seeds", "2", "--refine.max-faces", "200")
    assert runner(*flags, steps=2) == 0
    for seed in (0, 1):
        assert runner.folder_of(seed).preview.exists() and refined(runner, seed).preview.exists()
        assert refined(runner, seed).last_step() == 2
    assert runner(*flags, "--resume", "auto", steps=2) == 0


@pytest.mark.parametrize(
    "flags, text",
    [
        (["--task", "refine"], r"--task refine is of an object that is there: python -m dsd_fast"),
        (["--task", "image", "--refine", "5"], "--refine goes on with objects from prompts"),
    ],
)
def test_flags_that_cannot_be(flags, text, runner, capfd) -> None:
    assert runner(*flags, steps=2) == 2
    assert re.search(text, capfd.readouterr().err)


def test_runs_that_cannot_be_refined(runner, tmp_path, capfd) -> None:
    assert refine.main([str(tmp_path / "nowhere"), "--device", "cpu"]) == 2
    assert "there is no such run folder or checkpoint" in capfd.readouterr().err
    flags = ["--task", "image", "--image.parameter", "latent"]
    assert runner(*flags, steps=2) == 0
    image = outputs.RunFolder.named(runner.folder, f"{NAME}-2d", "a chair", 0, "image")
    assert refine.main([str(image.path), "--device", "cpu"]) == 2
    assert "is a run of --task image: expected one of --task text" in capfd.readouterr().err


def test_another_object_in_its_place(runner, capfd) -> None:
    assert runner(*FAST, steps=2) == 0
    command = [str(runner.run.path), "--device", "cpu", "--steps", "2", "--max-faces", "200"]
    assert refine.main(command) == 0
    assert runner(*FAST, "--overwrite", steps=3) == 0
    shutil.rmtree(refined(runner).previews, ignore_errors=True)
    refined(runner).preview.unlink()
    assert refine.main(command) == 2
    assert "has gone on since its mesh was first refined" in capfd.readouterr().err
    assert refine.main([*command, "--overwrite"]) == 0
