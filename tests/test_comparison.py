"""The driver of the comparison: which runs it makes, and the table that comes of their report."""

import pytest

from benchmarks import comparison
from dsd_fast.guidance import FORMULATIONS


def _arguments(tmp_path, *more):
    return comparison.parse(["text", "--out", str(tmp_path), *more])


def test_every_method_gets_the_same_work(tmp_path):
    arguments = _arguments(tmp_path, "--prompts", "a cup", "a bed", "--seeds", "3", "--steps", "9")
    jobs = comparison.jobs_of(arguments)
    assert [job.name for job in jobs[:2]] == ["dsd, a cup", "cfd@7.5, a cup"]
    # adapters learn for one run
    alone = [job.name for job in jobs if "vsd" in job.name]
    assert alone[:3] == [f"vsd, a cup, seed {i}" for i in range(3)]
    assert len(jobs) == 2 * (len(comparison.METHODS["text"]) - 1 + 3)
    stripped = {
        tuple(w for w in job.argv if w != method and not w.endswith(f"/{method}"))
        for job in jobs
        for method in [job.name.split(",")[0]]
        if job.name.endswith("a bed") and "@" not in method
    }
    assert len(stripped) == 1
    flags = stripped.pop()
    assert flags[-4:] == ("--max-steps", "9", "--num-seeds", "3") and "--resume" in flags


def test_what_has_adapters_is_made_one_seed_at_a_time():
    learning = {name for name, formulation in FORMULATIONS.items() if formulation.one_run}
    assert learning == {"vsd", "dive3d"} == comparison.ALONE - {"single-view"}


def test_a_method_may_have_a_scale_of_its_own():
    assert comparison.method_flags("sds") == ["--guidance.method", "sds"]
    against = ["--guidance.method", "dsd", "--guidance.trajectory-share", "1"]
    assert comparison.method_flags("dsd+1") == against
    scaled = [*against[:2], "--guidance.guidance-scale", "7.5", *against[2:]]
    assert comparison.method_flags("dsd@7.5+1") == scaled
    assert comparison.method_flags("sds@7.5") == [
        "--guidance.method", "sds", "--guidance.guidance-scale", "7.5"
    ]  # fmt: skip


def test_single_views_are_of_pictures(tmp_path, capsys):
    arguments = comparison.parse(
        ["single-view", "--out", str(tmp_path), "--objects", "things", "--prompts", "cup", "pan"]
    )
    jobs = comparison.jobs_of(arguments)
    assert [job.name for job in jobs] == [
        f"{method}, {name}, seed 0" for name in ("cup", "pan") for method in ("dsd", "sds")
    ]
    argv = jobs[0].argv
    assert argv[argv.index("--image") + 1] == "things/cup/cup.png" and "--prompt" not in argv
    more = comparison.parse(["text", "--out", "x", "--steps", "9", "--", "--model", "m"])
    assert more.steps == 9 and comparison.jobs_of(more)[0].argv[-6:-4] == ("--model", "m")
    assert "--num-seeds" not in argv and len(comparison.OBJECTS) == 10
    with pytest.raises(SystemExit):
        comparison.parse(["single-view", "--out", str(tmp_path)])
    assert "needs --objects" in capsys.readouterr().err


def test_wrong_counts_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        _arguments(tmp_path, "--seeds", "0")
    assert "--seeds: expected 1 to 1024, got 0" in capsys.readouterr().err


def test_jobs_run_in_processes_and_failures_are_named(tmp_path):
    jobs = [
        comparison.Job("help", ("--help",)),
        comparison.Job("nonsense", ("--no-such-flag",)),
        comparison.Job("no prompt", ("--device", "cpu", "--output", str(tmp_path))),
    ]
    failed = comparison.run_all(jobs, [None], 2, tmp_path / "logs")
    assert sorted(line.split(" (")[0] for line in failed) == ["no prompt", "nonsense"]
    logs = "".join(path.read_text() for path in (tmp_path / "logs").iterdir())
    assert "no-such-flag" in logs and "--prompt" in logs


def test_table_of_a_report():
    figures = {"dsd": 0.3, "sds": 0.25, "sds@7.5": 0.2, "real": 0.4}
    report = {
        "methods": {
            name: {"figures": {"cosine": value, "noun": 0.5}} for name, value in figures.items()
        }
    }
    report["methods"]["dsd"]["figures"]["seconds"] = 12.4
    lines = comparison.table(report).splitlines()
    assert lines[0] == (
        "| method | distance of seeds | over SDS@7.5 | over SDS | of real | prompt accuracy "
        "| seconds |"
    )
    assert lines[2:] == [
        "| dsd | 0.300 | 1.50 | 1.20 | 0.75 | 0.500 | 12 |",
        "| sds | 0.250 | 1.25 | 1.00 | 0.62 | 0.500 |  |",
        "| sds@7.5 | 0.200 | 1.00 | 0.80 | 0.50 | 0.500 |  |",
        "| real | 0.400 | 2.00 | 1.60 | 1.00 | 0.500 |  |",
    ]
    del report["methods"]["sds"]
    assert "over SDS |" not in comparison.table(report)
