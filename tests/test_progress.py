"""What a person is told while a run goes on, and at its end."""

import io
import logging
import shlex
import sys
from pathlib import Path

import pytest
from rich.console import Console

from dsd_fast.config import TrainConfig
from dsd_fast.run import closing, progress
from dsd_fast.run.cli import Job
from dsd_fast.run.outputs import RunFolder
from dsd_fast.run.progress import Reporter


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when a test says so."""

    class Clock:
        now = 0.0

    monkeypatch.setattr(progress.time, "monotonic", lambda: Clock.now)
    return Clock


@pytest.fixture
def terminal(monkeypatch):
    """A terminal of 80 columns, and what is written to it."""
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80, color_system=None)
    monkeypatch.setattr(progress, "console", console)
    return screen


# ---- on the way ---------------------------------------------------------------------------------


def told(clock, capsys, seconds_a_step, steps, total=1000, picture=None):
    with Reporter(0, total) as report:
        for step in steps:
            clock.now = step * seconds_a_step
            report(step, "shaping" if step < 500 else "adding detail", picture)
    return capsys.readouterr().err.splitlines()


def test_a_log_has_a_line_now_and_then(clock, capsys):
    lines = told(clock, capsys, 1.0, range(10, 1001, 10), picture=Path("run/previews/step-1.png"))
    assert lines[0] == "shaping, 1 %, newest picture: run/previews/step-1.png"
    assert lines[1] == "shaping, 6 %, about 16 min left, newest picture: run/previews/step-1.png"
    assert len(lines) == 1000 / 50 + 1
    assert lines[10].startswith("adding detail, 50 %, about 9 min left, newest")


def test_a_log_of_a_short_run_is_short(clock, capsys):
    lines = told(clock, capsys, 0.01, range(10, 1001, 10))
    assert lines == ["shaping, 1 %", "adding detail, 50 %, about 10 s left"]


def test_a_log_of_a_long_run_is_not_silent(clock, capsys):
    lines = told(clock, capsys, 31.0, range(10, 101, 10), total=100_000)
    assert len(lines) == 10 and lines[-1] == "shaping, 0 %, about 861 h left"


def test_the_first_steps_are_no_measure_of_the_rest(clock, capsys):
    with Reporter(0, 100) as report:
        clock.now = 300.0  # kernels were compiled
        report(1, "shaping")
        clock.now += 20.0
        report(11, "shaping")
    assert "left" not in (lines := capsys.readouterr().err.splitlines())[0]
    assert lines[1] == "shaping, 11 %, about 3 min left"


def test_a_resumed_run_counts_its_own_pace(clock, capsys):
    with Reporter(500, 1000) as report:
        for step, clock.now in ((510, 10.0), (560, 60.0)):
            report(step, "shaping")
        assert report.rate(560) == 1.0
    assert capsys.readouterr().err.splitlines()[1] == "shaping, 56 %, about 8 min left"


def test_work_that_is_not_in_steps_has_a_line(clock, capsys):
    with Reporter(0, 10) as report:
        report.say("finishing: the mesh")
    assert capsys.readouterr().err == "finishing: the mesh\n"


def test_no_progress_is_silent_and_keeps_the_time(clock, capsys):
    with Reporter(0, 10, enabled=False) as report:
        clock.now = 2.0
        report(4, "shaping")
        report.say("finishing")
        assert (report.seconds(), report.rate(4)) == (2.0, 2.0)
    assert capsys.readouterr().err == ""


def test_a_terminal_has_one_line(clock, terminal):
    picture = Path("outputs/a name/[bold]/previews/step-000120.png")
    with Reporter(0, 600) as report:
        for step in (110, 120):
            clock.now = float(step)
            report(step, "shaping", picture)
        report._bar.refresh()
        shown = terminal.getvalue()
    line = "shaping ━━━━━━━━━━━━━━━━━━━━ 20 % about 8 min left  previews/step-000120.png"
    assert line[-30:] in shown and " 20 % about 8 min left" in shown
    assert all(
        len(row) <= 80 for row in shown.replace("\r", "\n").splitlines() if "\x1b" not in row
    )


def test_messages_on_a_terminal_can_be_copied(terminal):
    logger = logging.getLogger("dsd_fast")
    before, level = logger.handlers, logger.level
    try:
        progress.set_up_logging()
        logger.info("%s", "python " + "-m x " * 30 + "[red]")
        logger.warning("careful")
    finally:
        logger.handlers = before
        logger.setLevel(level)
    assert terminal.getvalue() == "python " + "-m x " * 30 + "[red]\nwarning: careful\n"


@pytest.mark.parametrize(
    ("seconds", "words", "left"),
    [
        (0.2, "0 s", "about 10 s"),
        (31, "31 s", "about 40 s"),
        (59.7, "1 min 0 s", "about 60 s"),
        (192, "3 min 12 s", "about 4 min"),
        (3599.9, "1 h 0 min", "about 1 h 0 min"),
        (7500, "2 h 5 min", "about 2 h 5 min"),
        (float("inf"), "99999 h 59 min", "about 100000 h"),
    ],
)
def test_durations_in_words(seconds, words, left):
    assert progress.in_words(seconds) == words
    assert progress.left_in_words(seconds) == left


# ---- at the end ---------------------------------------------------------------------------------


def jobs_of(folder: Path, seeds=(3,), **settings) -> list[Job]:
    """Runs that have a mesh and pictures."""
    jobs = []
    for seed in seeds:
        cfg = TrainConfig(prompt="an armchair", seed=seed, output=folder, **settings)
        run = RunFolder.of(cfg, seed)
        run.path.mkdir(parents=True)
        for path in (run.config, run.preview, run.turntable, run.mesh):
            path.touch()
        jobs.append(Job(cfg, run, None, False, None))
    return jobs


def another(jobs: list[Job], *argv: str) -> list[str]:
    """The words of the command for another one, behind the name of the module."""
    words = shlex.split(closing.command_for_another(jobs, argv))
    assert words[1:3] == ["-m", "dsd_fast.train"]
    return words[3:]


PROMPT = ["--prompt", "an armchair"]


@pytest.mark.parametrize(
    "given",
    [
        ["--seed", "3"],
        ["--seed=3", "--overwrite"],
        ["--resume", "auto"],
        ["--stop-at", "10", "--resume=auto"],
        ["--stop_at=10", "--no-overwrite"],
    ],
)
def test_flags_of_one_call_are_left_out(tmp_path, given):
    jobs = jobs_of(tmp_path)
    assert another(jobs, *PROMPT, *given) == [*PROMPT, "--seed", "4"]
    assert another(jobs, *given, *PROMPT, "--max-steps", "9") == [
        *PROMPT,
        *("--max-steps", "9"),
        *("--seed", "4"),
    ]


def test_a_seed_that_is_used_is_not_proposed(tmp_path):
    first = jobs_of(tmp_path, seeds=(3,))
    jobs_of(tmp_path, seeds=(4, 6))
    assert another(first, *PROMPT)[-1] == "5"
    several = jobs_of(tmp_path, seeds=(0, 1))
    assert another(several, *PROMPT, "--num-seeds", "2")[2:] == ["--num-seeds", "2", "--seed", "7"]
    last = jobs_of(tmp_path, seeds=(2**63 - 1,))
    assert another(last, *PROMPT)[-1] == "0"


def test_a_run_that_was_resumed_by_its_folder_is_told_by_its_settings(tmp_path):
    job = jobs_of(tmp_path)[0]
    words = another([job], "--resume", str(job.folder.path), "--max-steps", "9")
    assert words == ["--config", str(job.folder.config), "--max-steps", "9", "--seed", "4"]


@pytest.mark.parametrize("word", ["an armchair", "it's", 'a "b"', "$HOME", "a\nb", "!x", "", "ü"])
def test_a_shell_reads_the_words(word):
    assert shlex.split(closing.shell(["python", "--prompt", word])) == ["python", "--prompt", word]


def test_quotes_are_those_of_any_shell():
    assert closing.shell(["--prompt", "an armchair", "--seed", "4"]) == (
        '--prompt "an armchair" --seed 4'
    )


def test_the_python_that_runs_is_named_as_it_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = tmp_path / ".venv" / "bin" / "python"
    own.parent.mkdir(parents=True)
    own.symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(own))
    monkeypatch.setenv("PATH", "")
    assert closing._python() == [".venv/bin/python"]
    monkeypatch.setenv("PATH", str(own.parent))
    assert closing._python() == ["python"]
    monkeypatch.setattr(sys, "executable", "/usr/bin/other")
    assert closing._python() == ["/usr/bin/other"]


def test_the_end_names_what_there_is(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    jobs = jobs_of(tmp_path)
    run = jobs[0].folder
    closing.say(jobs, 192.0, PROMPT)
    assert caplog.messages[-1].splitlines() == [
        "Done in 3 min 12 s. Look at:",
        *(f"  {path}" for path in (run.preview, run.turntable, run.mesh)),
        f"Another object: {closing.command_for_another(jobs, PROMPT)}",
    ]
    run.mesh.unlink()
    closing.say(jobs, 192.0, None)
    lines = caplog.messages[-1].splitlines()
    assert len(lines) == 4 and "no mesh" in lines[-1] and "dsd_fast.export" in lines[-1]


def test_the_end_of_several_runs_has_a_line_each(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    closing.say(jobs_of(tmp_path, seeds=(0, 1)), 60.0, [*PROMPT, "--num-seeds", "2"])
    lines = caplog.messages[-1].splitlines()
    assert len(lines) == 4
    assert lines[1].endswith("an_armchair-seed0: preview.png, turntable.mp4, mesh.glb")
    assert lines[-1].startswith("2 other objects: ") and lines[-1].endswith("--seed 2")
