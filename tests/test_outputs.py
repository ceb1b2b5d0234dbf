"""The run folder: names that every file system takes, and no silent overwriting."""

import collections
import json
import shutil

import pytest

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


def make_checkpoint(run: RunFolder, step: int) -> None:
    checkpoint.save(checkpoint.step_path(run.checkpoints, step), {"step": step})


def test_used_folders_are_refused(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.refuse_if_used(10)
    make_checkpoint(run, 5)
    with pytest.raises(OutputError, match=r"unfinished run at step 5 of 10.*--resume auto"):
        run.refuse_if_used(10)
    make_checkpoint(run, 10)
    with pytest.raises(OutputError, match=r"finished run.*--overwrite.*--output"):
        run.refuse_if_used(10)


def test_clear_deletes_only_what_a_run_writes(tmp_path):
    run = RunFolder(tmp_path)
    make_checkpoint(run, 5)
    for path in (
        run.metrics,
        run.mesh,
        run.previews / "step-000001.png",
        run.previews / "mine.png",
    ):
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
    run.clear()
    left = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert left == {"previews/mine.png"}
    run.refuse_if_used(10)


def test_unwritable_output(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot write to the run folder .*--output"):
        RunFolder.named(tmp_path / "file", "name", "a chair", 0).prepare(0)


def test_full_disk(tmp_path, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**40, 2**40, 2**20))
    with pytest.raises(OutputError, match=r"1 MiB free and the run needs about 64 MiB"):
        RunFolder(tmp_path / "run").prepare(64 * 2**20)


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
