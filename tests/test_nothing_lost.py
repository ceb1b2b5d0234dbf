"""Whatever ends a run, what it has come to is saved, and nothing older is lost."""

import contextlib
import logging
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from runs import SMALL, Runner, equal
from test_train import not_finite
from tiny_model import build_tiny_model

from dsd_fast import train as module
from dsd_fast.config import ConfigError
from dsd_fast.guidance import DSDGuidance
from dsd_fast.run import checkpoint, outputs, pictures, saving, terminal
from dsd_fast.run.checkpoint import CheckpointError
from dsd_fast.run.progress import Reporter
from dsd_fast.tasks import text
from dsd_fast.tasks.step import TrainStep

BARE = ["--pictures.no-turntable", "--pictures.no-mesh"]
NO_PREVIEWS = ["--trainer.preview-every", "0"]


def whole(run: outputs.RunFolder) -> dict[str, bytes]:
    files = (path for path in run.path.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(run.path)): path.read_bytes() for path in files}


def at_step(monkeypatch, step: int, do) -> None:
    """Have a run call `do` when it begins the step after `step`."""
    call = TrainStep.__call__

    def changed(self):
        if self.states[0].step == step:
            do()
        return call(self)

    monkeypatch.setattr(TrainStep, "__call__", changed)


def raises(error: BaseException):
    def do(*arguments, **others):
        raise error

    return do


class Killed(BaseException):
    """In the place of SIGKILL: nothing that the command does on its way out is done."""


def kill(monkeypatch, runner: Runner, *flags: str, **settings) -> None:
    """Run to where `Killed` is raised, as if the process ended there."""
    with monkeypatch.context() as patch:
        patch.setattr(saving.Saver, "save_last", raises(Killed()))
        patch.setattr(module, "_explained", raises(Killed()))
        patch.setattr(outputs.RunFolder, "release", lambda run: run._lock.release())
        with pytest.raises(Killed):
            runner(*flags, **settings)


# An older run in the folder


REFUSED = """
    --optimizer.betas 2 2
    --optimizer.geometry-lr -1
    --renderer.near-plane nan
    --renderer.occupancy.decay 2
    --model nowhere
    --field.grid.n-levels 64
    --guidance.method vsd --num-seeds 2
    --cameras.resolution-milestones 1 2
""".strip().splitlines()


def test_a_refused_overwrite_changes_nothing(runner, caplog):
    assert runner(*BARE, steps=2) == 0
    run = runner.run
    before = whole(run)
    beside = set(runner.folder.rglob("*"))
    for flags in [*map(str.split, REFUSED), ["--text.side", "very " * 100]]:
        try:
            assert runner(*BARE, "--overwrite", *flags, steps=2) == 2
        except SystemExit as end:  # of the flags' own parser
            assert end.code == 2
        assert "Traceback" not in caplog.text
        assert whole(run) == before
        assert set(runner.folder.rglob("*")) == beside, "a refused run leaves no folder"


def test_an_overwrite_that_fails_at_once_leaves_the_older_run(runner, monkeypatch, caplog):
    assert runner(*BARE, steps=2) == 0
    before = whole(runner.run)
    with monkeypatch.context() as patch:
        at_step(patch, 0, raises(RuntimeError("no kernel image")))
        assert runner(*BARE, "--overwrite", steps=4) == 1
    assert "no step of it is saved, and nothing older is lost" in caplog.text
    assert {
        name: content for name, content in whole(runner.run).items() if name in before
    } == before
    assert runner("--resume", "auto", *BARE, steps=2) == 0
    assert "nothing to do" in caplog.text


def test_a_killed_overwrite_leaves_the_older_run_until_it_has_a_checkpoint(runner, monkeypatch):
    assert runner(*BARE, steps=2) == 0
    before = whole(runner.run)
    again = [*BARE, "--overwrite", "--trainer.checkpoint-every", "2"]
    at_step(monkeypatch, 1, raises(Killed()))
    kill(monkeypatch, runner, *again)
    assert before.items() <= whole(runner.run).items()
    monkeypatch.undo()
    at_step(monkeypatch, 3, raises(Killed()))
    kill(monkeypatch, runner, *again)
    assert runner.run.last_step() == 2 and not runner.run.preview.exists()
    assert [record["step"] for record in runner.metrics()] == [1, 2, 3]


def test_a_folder_with_a_config_is_used(runner, monkeypatch, caplog):
    at_step(monkeypatch, 0, raises(Killed()))
    kill(monkeypatch, runner, *BARE)
    monkeypatch.undo()
    assert runner(*BARE) == 2
    assert "holds a run without a checkpoint: --resume auto begins it again" in caplog.text
    assert runner(*BARE, "--resume", "auto") == 0


# What ends the loop


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("step", RuntimeError("a bug")),
        ("step", MemoryError()),
        ("progress", OSError(5, "Input/output error")),
        ("progress", KeyError("x")),
        ("preview", OSError(28, "No space left on device")),
        ("preview", ValueError("a bug")),
        ("metrics", TypeError("a bug")),
    ],
)
def test_any_error_saves_what_was_done(runner, tmp_path, monkeypatch, caplog, where, error):
    every = ["--trainer.preview-every", "1", "--trainer.checkpoint-every", "100"]
    with monkeypatch.context() as patch:
        if where == "step":
            at_step(patch, 2, raises(error))
        else:
            method = {
                "progress": (Reporter, "__call__"),
                "preview": (text.TextTask, "write_preview"),
                "metrics": (outputs.RunFolder, "append_metrics"),
            }[where]
            call = getattr(*method)

            def third(self, *arguments, times=[]):  # noqa: B006
                times.append(1)
                return raises(error)() if len(times) == 3 else call(self, *arguments)

            patch.setattr(*method, third)
        ends = 0 if (where, type(error)) == ("preview", OSError) else 1
        assert runner(*BARE, *every) == ends
    if not ends:
        return
    done = 2 if where == "step" else 3
    assert runner.run.last_step() == done
    assert f"step {done} of 4 is saved" in caplog.text and "Traceback" not in caplog.text
    assert ("details in" in caplog.text) == (not isinstance(error, OSError))
    assert runner(*BARE, *every, "--resume", "auto") == 0
    straight = Runner(tmp_path / "straight", runner.model)
    assert straight(*BARE, *every) == 0
    assert equal(runner.tensors(4), straight.tensors(4))


def test_the_traceback_of_a_bug_is_kept(runner, monkeypatch, caplog):
    at_step(monkeypatch, 1, raises(RuntimeError("a bug\nin two lines")))
    assert runner(*BARE) == 1
    assert "RuntimeError: a bug (details in" in caplog.text
    kept = (runner.run.path / "error.log").read_text()
    assert "Traceback" in kept and "in two lines" in kept


def test_a_device_that_fails_is_told_of(runner, monkeypatch, caplog):
    """Nothing can be read back from it: what was saved before is named."""
    flags = [*BARE, "--trainer.checkpoint-every", "1"]

    def fail():
        monkeypatch.setattr(checkpoint, "save", raises(RuntimeError("CUDA error: unspecified")))
        raise RuntimeError("CUDA error: unspecified")

    at_step(monkeypatch, 2, fail)
    assert runner(*flags) == 1
    assert "the state cannot be saved (RuntimeError: CUDA error" in caplog.text
    assert "step 2 of 4 is saved" in caplog.text


def test_a_run_whose_steps_are_all_skipped_fails(runner, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        not_finite(patch, lambda step: True)
        assert runner(*BARE, "--stop-at", "2") == 1
        assert runner(*BARE, "--resume", "auto") == 1
    assert "not one of 4 steps was finite" in caplog.text and "--diffusion.dtype" in caplog.text
    assert runner.run.last_step() == 4 and not runner.run.preview.exists()
    assert runner(*BARE, "--resume", "auto") == 1, "nor does it look finished later"
    assert runner(*BARE, "--resume", "auto", steps=5) == 0


def test_a_run_whose_steps_are_all_skipped_costs_no_other(runner, monkeypatch, caplog):
    guide = DSDGuidance.at_plan

    def bad_for_the_first(self, latents, plan):
        guided = guide(self, latents, plan)
        weights = torch.tensor([float("nan"), 1.0]).view(2, 1, 1, 1)
        return guided._replace(grad=guided.grad * weights)

    monkeypatch.setattr(DSDGuidance, "at_plan", bad_for_the_first)
    assert runner(*BARE, "--num-seeds", "2") == 1
    bad, good = folders_of(runner)
    assert f"none changed a parameter, in {bad.path}." in caplog.text
    assert good.preview.exists() and not bad.preview.exists()


# Signals


SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize(
    ("phase", "number"),
    [*(("load", number) for number in SIGNALS), *zip(("mesh", "video", "sheet"), SIGNALS)],
)
def test_signals_outside_the_loop(runner, monkeypatch, caplog, number, phase):
    owner, name = {
        "load": (text.TextTask, "load"),
        "mesh": (text, "write_mesh"),
        "video": (pictures, "write_turntable"),
        "sheet": (pictures, "contact_sheet"),
    }[phase]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, lambda *arguments: signal.raise_signal(number))
        assert runner(*NO_PREVIEWS) == 130
    if phase == "load":
        assert "nothing older is lost" in caplog.text
        assert runner.files() == set() and not runner.run.path.exists()
        assert runner(*BARE) == 0
        return
    assert "step 4 of 4 is saved" in caplog.text
    assert runner("--resume", "auto") == 0
    assert {"mesh.glb", "turntable.mp4", "preview.png"} <= runner.files()


@pytest.mark.parametrize("number", SIGNALS[:2])
def test_a_second_signal_does_not_wait_for_the_step(runner, tmp_path, monkeypatch, caplog, number):
    def twice():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(number)
        raise AssertionError("still running")

    with monkeypatch.context() as patch:
        at_step(patch, 2, twice)
        assert runner(*BARE, "--trainer.checkpoint-every", "100") == 130
    assert "step 2 of 4 is saved" in caplog.text
    assert runner(*BARE, "--resume", "auto") == 0
    straight = Runner(tmp_path / "straight", runner.model)
    assert straight(*BARE) == 0
    assert equal(runner.tensors(4), straight.tensors(4))


def command(*flags: str) -> list[str]:
    return [sys.executable, "-m", "dsd_fast.train", *SMALL, "--prompt", "a chair", *flags]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_while_the_command_loads(tmp_path, number):
    flags = ["--output", str(tmp_path / "out"), *BARE]
    with subprocess.Popen(command(*flags), stderr=subprocess.PIPE, text=True) as process:
        time.sleep(1)
        process.send_signal(number)
        words = process.communicate()[1]
    assert process.returncode == 130, words
    assert "interrupted" in words and "Traceback" not in words


def test_nohup_is_respected(runner, monkeypatch):
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        at_step(monkeypatch, 1, lambda: signal.raise_signal(signal.SIGHUP))
        assert runner(*BARE) == 0
    finally:
        signal.signal(signal.SIGHUP, previous)


# The terminal


@pytest.mark.parametrize("redirection", [">&- 2>&- <&-", "2>&1 | head -1"])
def test_terminal_output_never_ends_a_run(tmp_path, tiny_model, redirection):
    out = tmp_path / "out"
    flags = ["--model", str(tiny_model), "--output", str(out), "--max-steps", "3", *BARE]
    words = " ".join(f"'{word}'" for word in [*command(*flags), "--trainer.progress"])
    shell = f"set -o pipefail; {words} {redirection}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done
    run = outputs.RunFolder.named(out, "diverse-score-distillation", "a chair", 0)
    assert run.last_step() == 3 and run.preview.exists()
    assert {path.name for path in run.path.iterdir()} >= {"config.json", "metrics.jsonl"}


def test_a_log_on_a_full_disk_ends_nothing():
    with open("/dev/full", "w") as full:
        stream = terminal.Unfailing(full)
        print("x" * 100_000, file=stream, flush=True)
        logger = logging.getLogger("full")
        logger.addHandler(logging.StreamHandler(stream))
        logger.warning("a line")
        logger.handlers.clear()
        stream.flush()
        with contextlib.suppress(OSError):
            full.close()


# Two processes


def test_a_second_process_is_refused(runner, tmp_path, tiny_model, caplog):
    """Not only the same command: any that would write there."""
    flags = ["--model", str(tiny_model), "--output", str(runner.folder), "--max-steps", "100000"]
    with subprocess.Popen([*command(*flags), *BARE], stderr=subprocess.PIPE, text=True) as process:
        try:
            while not runner.run.metrics.exists():
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.1)
            for others in ("", "--overwrite", "--resume auto", "--loss.lambda-opaque 1"):
                caplog.clear()
                assert runner(*BARE, *others.split()) == 2
                assert "is being written by another process" in caplog.text
        finally:
            process.send_signal(signal.SIGTERM)
            words = process.communicate()[1]
    assert process.returncode == 130, words
    last = runner.run.last_step()
    assert [record["step"] for record in runner.metrics()] == list(range(1, last + 1))
    assert runner(*BARE, "--resume", "auto", steps=last + 1) == 0


# Several seeds


def folders_of(runner: Runner, n_seeds: int = 2) -> list[outputs.RunFolder]:
    name = "diverse-score-distillation"
    return [outputs.RunFolder.named(runner.folder, name, "a chair", i) for i in range(n_seeds)]


def steps_of(run: outputs.RunFolder) -> list[int]:
    return [step for step, _ in checkpoint.list_steps(run.checkpoints)]


@pytest.mark.parametrize("save", [2, 3, 4])
def test_killed_between_the_saves_of_two_seeds(runner, monkeypatch, tmp_path, save):
    flags = [*BARE, "--num-seeds", "2", "--trainer.keep-checkpoints", "1"]
    flags += ["--trainer.checkpoint-every", "1"]
    write, calls = checkpoint.save, []

    def killed(path, tree):
        calls.append(path)
        raises(Killed())() if len(calls) == save else write(path, tree)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", killed)
        kill(patch, runner, *flags)
    assert runner(*flags, "--resume", "auto") == 0
    straight = Runner(tmp_path / "straight", runner.model)
    assert straight(*flags) == 0
    for ours, theirs in zip(folders_of(runner), folders_of(straight)):
        assert steps_of(ours) == [4]
        files = [checkpoint.step_path(run.checkpoints, 4) for run in (ours, theirs)]
        flat = [{}, {}]
        for path, tensors in zip(files, flat):
            checkpoint._flatten(checkpoint.load(path), "", tensors)
        assert equal(*flat)


def test_a_damaged_checkpoint_of_one_seed_costs_no_other(runner, caplog):
    flags = [*BARE, "--num-seeds", "2", "--trainer.checkpoint-every", "2"]
    assert runner(*flags) == 0
    damaged, other = (checkpoint.step_path(run.checkpoints, 4) for run in folders_of(runner))
    kept = other.read_bytes()
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert runner(*flags, "--resume", "auto", "--stop-at", "3") == 0
    assert f"{damaged} cannot be read" in caplog.text and "continuing from step 2" in caplog.text
    aside = other.parent / checkpoint.ASIDE / other.name
    assert aside.read_bytes() == kept, "a whole one stays until the run has come as far"
    assert runner(*flags, "--resume", "auto") == 0
    assert other.read_bytes() == kept and not aside.parent.exists()


# Full disks


def full_after(monkeypatch, n_saves: int):
    """Have the disk take so many checkpoints and no more."""
    write, calls = checkpoint.save, []

    def save(path, tree):
        calls.append(path)
        if len(calls) > n_saves:
            raise CheckpointError(f"cannot write the checkpoint {path}: No space left on device")
        write(path, tree)

    monkeypatch.setattr(checkpoint, "save", save)


def test_a_last_checkpoint_without_room_is_saved_elsewhere(runner, monkeypatch, caplog, tmp_path):
    elsewhere, write = tmp_path / "tmp", checkpoint.save
    elsewhere.mkdir()
    monkeypatch.setattr(saving.tempfile, "tempdir", str(elsewhere))

    def full(path, tree):
        if tree["step"] == 4 and elsewhere not in path.parents:
            raise CheckpointError(f"cannot write the checkpoint {path}: No space left on device")
        write(path, tree)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", full)
        assert runner(*BARE, "--trainer.checkpoint-every", "2") == 1
    assert "No space left" in caplog.text and "free some space, move" in caplog.text
    assert steps_of(runner.run) == [2], "the older one is whole"
    (saved,) = elsewhere.rglob("step-000004.safetensors")
    shutil.move(saved, runner.run.checkpoints)
    assert runner(*BARE, "--resume", "auto") == 0
    assert len(runner.metrics()) == 4 and runner.run.preview.exists()


def test_a_last_checkpoint_without_any_room(runner, monkeypatch, caplog):
    full_after(monkeypatch, 1)
    assert runner(*BARE, "--trainer.checkpoint-every", "2") == 1
    assert "is lost; step 2 of 4 is saved" in caplog.text
    monkeypatch.undo()
    assert runner(*BARE, "--resume", "auto") == 0


def test_older_checkpoints_give_way_to_a_new_one(runner, monkeypatch, caplog):
    flags = [*BARE, "--trainer.checkpoint-every", "1", "--trainer.keep-checkpoints", "9"]
    write = checkpoint.save

    def room_for_two(path, tree):
        if len(steps_of(runner.run)) == 2:
            raise CheckpointError(f"cannot write the checkpoint {path}: No space left on device")
        write(path, tree)

    monkeypatch.setattr(checkpoint, "save", room_for_two)
    assert runner(*flags) == 0
    assert "older checkpoints have given way" in caplog.text
    assert steps_of(runner.run) == [3, 4]


def test_the_file_system_is_asked_before_a_checkpoint_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    path = checkpoint.step_path(tmp_path, 1)
    with pytest.raises(CheckpointError, match="1 MiB are needed and 0 MiB are free"):
        checkpoint.save(path, {"a": torch.zeros(2**18)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("write", OSError(28, "No space left", "x")),
        ("write_turntable", OSError(28, "No space left", "x")),
        ("write_png", OSError(28, "No space left", "x")),
        ("contact_sheet", RuntimeError("a bug")),
    ],
)
def test_a_disk_that_is_full_at_the_end(runner, monkeypatch, caplog, name, error):
    owner = text.formats if name == "write" else pictures
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, raises(error))
        assert runner(*NO_PREVIEWS) == 1
    assert "training is done and saved" in caplog.text and "--resume auto" in caplog.text
    assert str(error.args[-1])[:10] in caplog.text or "No space left" in caplog.text
    assert runner("--resume", "auto") == 0
    assert {"mesh.glb", "turntable.mp4", "preview.png"} <= runner.files()


# Things that have moved


def test_a_run_goes_on_wherever_it_is(runner, tmp_path, monkeypatch, caplog):
    assert runner(*BARE, "--stop-at", "1") == 0
    spelled = Runner(runner.folder / ".." / runner.folder.name, runner.model)
    assert spelled(*BARE, "--resume", "auto", "--stop-at", "2") == 0
    moved = Runner(tmp_path / "moved", runner.model)
    shutil.move(runner.folder, moved.folder)
    moved.run = folders_of(moved, 1)[0]
    assert moved(*BARE, "--resume", "auto", "--stop-at", "3") == 0
    monkeypatch.chdir(moved.folder)
    relative = Runner(Path(), runner.model)
    assert relative(*BARE, "--resume", "auto") == 0
    assert [record["step"] for record in moved.metrics()] == [1, 2, 3, 4]
    argv = ["--resume", str(moved.run.path), "--max-steps", "5", "--device", "cpu"]
    assert module.main([*argv, "--output", str(tmp_path / "elsewhere")]) == 2
    assert "name another folder: drop them" in caplog.text


def test_a_model_may_move_but_not_change(runner, tmp_path, caplog):
    model = build_tiny_model(tmp_path / "model")
    runner.model = model
    assert runner(*BARE, "--stop-at", "1") == 0
    runner.model = shutil.copytree(model, tmp_path / "copy")
    shutil.rmtree(model)
    assert runner(*BARE, "--resume", "auto", "--stop-at", "2") == 0
    assert "model = " in caplog.text and "instead of" in caplog.text
    runner.model = build_tiny_model(tmp_path / "other", seed=5)
    before = whole(runner.run)
    assert runner(*BARE, "--resume", "auto") == 2
    assert "is not the model that this run was started with" in caplog.text
    assert whole(runner.run) == before


def test_runs_of_different_methods_do_not_meet(runner):
    for flags in ([], ["--guidance.method", "sds"], ["--task", "image"]):
        assert runner(*BARE, *flags, steps=1) == 0
    runs = sorted(path.parent.name for path in runner.folder.rglob("config.json"))
    assert runs == ["a_chair+image-seed0", "a_chair+sds-seed0", "a_chair-seed0"]


@pytest.mark.parametrize("kind", [ConfigError, OSError])
def test_an_interruption_that_a_library_takes_for_its_own_error(kind, monkeypatch, caplog):
    def parse(argv):
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt as interruption:
            raise kind("unable to load weights") from interruption

    monkeypatch.setattr(module.cli, "parse", parse)
    assert module.main([]) == 130
    assert "interrupted" in caplog.text and "unable to load" not in caplog.text
