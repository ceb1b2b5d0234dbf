"""The run folder: names that every file system takes, and no silent overwriting."""

import collections
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dsd_fast.config import TrainConfig
from dsd_fast.run import checkpoint
from dsd_fast.run.outputs import MAX_SLUG, OutputError, RunFolder, slugify


def test_plain_prompts_keep_the_official_name():
    assert slugify("a toy robot") == "a_toy_robot"
    assert slugify("Mini-Garden.2") == "Mini-Garden.2"


@pytest.mark.parametrize(
    "prompt",
    [
        "a/b",
        "../../etc/passwd",
        "a  chair",
        "x" * 300,
        "ein grüner Stuhl",
        "椅子",
        "a\nb",
        ".",
        "con:",
    ],
)
def test_other_prompts_get_a_bounded_name_with_a_hash(prompt):
    slug = slugify(prompt)
    assert len(slug) <= MAX_SLUG
    assert all(c.isascii() and (c.isalnum() or c in "._-") for c in slug)
    assert slug[0] not in "._-"
    assert slug != slugify(prompt + " ")


def test_run_folder_path(tmp_path):
    run = RunFolder.named(tmp_path, "diverse-score-distillation", "a chair", 3)
    assert run.path == tmp_path / "diverse-score-distillation" / "a_chair-seed3"


def settings(max_steps: int, **others) -> TrainConfig:
    return replace(TrainConfig(prompt="a chair", max_steps=max_steps), **others)


def make_checkpoint(run: RunFolder, step: int) -> None:
    checkpoint.save(checkpoint.step_path(run.checkpoints, step), {"step": step})


def test_used_folders_are_refused(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.refuse_if_used(settings(10))
    run.path.mkdir()
    run.write_config({})
    with pytest.raises(OutputError, match=r"a run without a checkpoint.*--resume auto.*--overw"):
        run.refuse_if_used(settings(10))
    make_checkpoint(run, 5)
    with pytest.raises(OutputError, match=r"unfinished run at step 5 of 10.*--resume auto"):
        run.refuse_if_used(settings(10))
    make_checkpoint(run, 10)
    with pytest.raises(OutputError, match=r"finished run.*--max-steps N.*--overwrite.*--output"):
        run.refuse_if_used(settings(10))
    exact = settings(10)
    exact.image.exact = True
    with pytest.raises(OutputError, match="finished run") as refusal:
        run.refuse_if_used(exact)
    assert "--max-steps" not in str(refusal.value), "its length is part of what it is"


def test_other_tasks_and_methods_have_other_folders(tmp_path):
    cfg = settings(10, output=tmp_path)
    names = [RunFolder.of(cfg, 0).path.name]
    cfg.guidance.method = "sds"
    names.append(RunFolder.of(cfg, 0).path.name)
    cfg.task = "image"
    names.append(RunFolder.of(cfg, 0).path.name)
    assert names == ["a_chair-seed0", "a_chair+sds-seed0", "a_chair+image+sds-seed0"]
    prompts = ["a chair", "a_chair", "a  chair", "a chair+sds", "A chair"]
    assert len({slugify(prompt) for prompt in prompts}) == len(prompts)


def test_clear_deletes_only_what_a_run_writes(tmp_path):
    run = RunFolder(tmp_path)
    make_checkpoint(run, 5)
    checkpoint.set_aside(run.checkpoints, 4)
    make_checkpoint(run, 4)
    for path in (
        run.metrics,
        run.mesh,
        run.previews / "step-000001.png",
        run.previews / "mine.png",
    ):
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
    run._clear()
    left = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert left == {"previews/mine.png"}
    run.refuse_if_used(settings(10))


def test_unwritable_output(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot write to the run folder .*--output"):
        RunFolder.named(tmp_path / "file", "name", "a chair", 0).claim()


def test_full_disk(tmp_path, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**40, 2**40, 2**20))
    with pytest.raises(OutputError, match=r"1 MiB free and the run needs about 64 MiB"):
        RunFolder(tmp_path).ask_for_room(64 * 2**20)


def test_metrics_are_cut_at_the_resumed_step(tmp_path):
    run = RunFolder(tmp_path)
    run.truncate_metrics(3)
    for step in (1, 2, 3, 4):
        run.append_metrics({"step": step})
    with open(run.metrics, "a") as file:
        file.write('{"step": 5, "lo')
    run.truncate_metrics(3)
    lines = run.metrics.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


def test_failing_metrics_do_not_raise(tmp_path, caplog):
    run = RunFolder(tmp_path / "absent")
    run.append_metrics({"step": 1})
    run.append_metrics({"step": 2})
    assert len([r for r in caplog.records if "without metrics" in r.message]) == 1


# Damaged metrics


@pytest.mark.parametrize(
    "damage",
    [b"\xff\xfe{\n", b"3\n", b"[1]\n", b"{}\n", b'{"step": "2"}\n', b"\0\0\n", b"{" * 9999],
)
def test_damaged_metrics_are_dropped_with_a_line(tmp_path, caplog, damage):
    run = RunFolder(tmp_path)
    run.append_metrics({"step": 1})
    with open(run.metrics, "ab") as file:
        file.write(damage)
    if damage.endswith(b"\n"):
        run.append_metrics({"step": 2})
    run.truncate_metrics(2)
    steps = [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()]
    assert steps == ([1, 2] if damage.endswith(b"\n") else [1])
    assert "1 damaged lines are dropped" in caplog.text


def test_metrics_that_are_no_file_are_replaced(tmp_path):
    run, victim = RunFolder(tmp_path / "run"), tmp_path / "mine.txt"
    run.path.mkdir()
    victim.write_text('{"step": 1}\n')
    run.metrics.symlink_to(victim)
    run.truncate_metrics(0)
    run.append_metrics({"step": 1})
    assert victim.read_text() == '{"step": 1}\n' and not run.metrics.is_symlink()


# One writer

# Claims the folder that it is given, says so, and waits.
HOLDER = """
import sys
from pathlib import Path
from dsd_fast.run.outputs import RunFolder
folder = RunFolder(Path(sys.argv[1]))
folder.claim()
print("held", flush=True)
sys.stdin.read()
"""


def test_one_process_writes_and_its_death_lets_go(tmp_path):
    run = RunFolder(tmp_path / "run")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(OutputError, match=r"being written by another process.*--output"):
            run.claim()
        holder.kill()
    run.claim()
    run.claim()
    run.release()


def test_an_abandoned_run_leaves_nothing(tmp_path):
    run = RunFolder(tmp_path / "a" / "b" / "run")
    run.claim()
    assert run.path.is_dir()
    run.abandon()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine").touch()
    run.claim()
    run.abandon()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["mine"]


def test_claiming_follows_no_link(tmp_path):
    run, victim = RunFolder(tmp_path / "run"), tmp_path / "mine.txt"
    run.path.mkdir()
    victim.write_text("mine")
    for name in (".probe", ".lock"):
        (run.path / name).symlink_to(victim)
    with pytest.raises(OutputError, match="cannot write to the run folder"):
        run.claim()
    assert victim.read_text() == "mine"


# A run in the place of another


def older_run(folder: Path) -> RunFolder:
    run = RunFolder(folder)
    run.claim()
    run.begin()
    run.write_config({"old": True})
    run.append_metrics({"step": 1})
    make_checkpoint(run, 4)
    run.mesh.write_text("mesh")
    (folder / "mine.txt").write_text("mine")
    run.release()
    return run


def tree_of(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_an_older_run_goes_with_the_first_checkpoint_of_the_new_one(tmp_path):
    old = tree_of(older_run(tmp_path).path)
    run = RunFolder(tmp_path)
    run.claim()
    run.begin()
    run.write_config({"old": False})
    run.append_metrics({"step": 1})
    run.previews.mkdir()
    (run.previews / "step-000001.png").write_text("new")
    kept = {name: content for name, content in tree_of(tmp_path).items() if ".next" not in name}
    assert kept == old
    make_checkpoint(run, 2)
    run.take_over()
    run.append_metrics({"step": 3})
    assert set(tree_of(tmp_path)) == {
        "mine.txt",
        "config.json",
        "metrics.jsonl",
        "previews/step-000001.png",
        "checkpoints/step-000002.safetensors",
    }
    assert json.loads(run.config.read_text()) == {"old": False}
    assert len(run.metrics.read_text().splitlines()) == 2


def test_a_new_run_that_comes_to_nothing_leaves_the_older_one(tmp_path):
    old = tree_of(older_run(tmp_path).path)
    for end in (RunFolder.release, RunFolder.abandon, lambda run: run._lock.release()):
        run = RunFolder(tmp_path)
        run.claim()
        run.begin()
        run.write_config({"old": False})
        end(run)
        again = RunFolder(tmp_path)
        again.claim()
        again.release()
        assert tree_of(tmp_path) == old


class Killed(BaseException):
    pass


def test_taking_over_goes_on_wherever_it_was_killed(tmp_path, monkeypatch):
    """Each call of the system that changes a folder is the last one once."""
    wanted = None
    for n_calls in range(100):
        folder = tmp_path / str(n_calls)
        older_run(folder)
        run = RunFolder(folder)
        run.claim()
        run.begin()
        run.write_config({"old": False})
        run.append_metrics({"step": 1})
        make_checkpoint(run, 2)
        left = n_calls

        def dying(call):
            def counted(*arguments, **others):
                nonlocal left
                if left == 0:
                    raise Killed
                left -= 1
                return call(*arguments, **others)

            return counted

        with monkeypatch.context() as patch:
            for owner, name in ((os, "replace"), (os, "rmdir"), (os, "unlink"), (Path, "unlink")):
                patch.setattr(owner, name, dying(getattr(owner, name)))
            try:
                run.take_over()
                ended = True
            except Killed:
                ended = False
        run._lock.release()
        RunFolder(folder).settle()
        found = tree_of(folder)
        wanted = wanted or found
        assert found.keys() == wanted.keys() and "mine.txt" in found
        assert json.loads(found["config.json"]) == {"old": False}
        if ended:
            break
    assert 5 < n_calls < 99
