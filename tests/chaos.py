"""Runs that are killed at random instants, and whether they lose anything.

    python tests/chaos.py                                  # 20 runs, killed by SIGKILL
    python tests/chaos.py --trials 200 --jobs 12           # a longer look
    python tests/chaos.py --trials 50 --signal TERM HUP INT
    unshare -Urm python tests/chaos.py --signal FULL       # the disk fills up instead, Linux alone
    python tests/chaos.py -- --device cuda --deterministic

Each trial is a small run, of text, of two seeds side by side, of an image, or from one picture. It
is killed, continued with `--resume auto` and killed again, up to three times, and then left to its
end. An instant is a point in time, or the n-th call of the system that changes a file, so that
kills inside a save, between the saves of two seeds and in the midst of pictures come up often.

FULL fills the disk of the runs, a small one in memory, and gives the room back before the run goes
on.

A run must always continue; after SIGKILL it may have lost the steps since its last checkpoint and
no more, after another signal none; and its end must be that of a run that nobody killed, bit for
bit: checkpoints, metrics, picture.

Ends with status 1 if anything was lost.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":
    for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(_name, "1")

from runs import CLOCK, SMALL, picture
from tiny_model import build_tiny_model, build_tiny_view_model

from dsd_fast import train
from dsd_fast.run import checkpoint
from dsd_fast.run.interruption import end_while_loading
from dsd_fast.run.outputs import RunFolder

STEPS, EVERY, MOST_KILLS = 8, 3, 3
FLAGS = f"""
    --max-steps {STEPS} --trainer.checkpoint-every {EVERY} --trainer.keep-checkpoints 1
    --trainer.preview-every 2 --output out --mesh.resolution 16
""".split()
TEXT = ["--prompt", "a chair", *SMALL]
# name -> (model, flags)
KINDS: dict[str, tuple[str, list[str]]] = {
    "text": ("text", TEXT),
    "two seeds": ("text", [*TEXT, "--num-seeds", "2", "--pictures.no-turntable"]),
    "image": ("text", ["--prompt", "a chair", "--task", "image", "--trainer.no-progress"]),
    "single view": ("view", ["--task", "single-view", "--image", "PICTURE", *SMALL]),
}
SIGNALS = {name: getattr(signal, f"SIG{name}") for name in ("KILL", "TERM", "HUP", "INT")}
FULL = "FULL"
DISK_MIB, FILLER = 96, "filler"
# Calls of the system that change a file, at each of which a process may end.
CALLS = ("fsync", "mkdir", "open", "rename", "replace", "rmdir", "unlink")


@dataclass(frozen=True)
class Instant:
    """What happens, and when: after some seconds, or at the n-th call that changes a file."""

    what: str
    seconds: float | None = None
    call: int | None = None
    # Bytes of the disk that a full one has left.
    left: int = 0

    def __str__(self) -> str:
        when = f"call {self.call}" if self.seconds is None else f"{self.seconds:.3f} s"
        return f"{self.what} at {when}" + f", {self.left} bytes left" * (self.what == FULL)

    def strike(self, pid: int, folder: Path) -> None:
        if self.what != FULL:
            os.kill(pid, SIGNALS[self.what])
            return
        with open(folder / FILLER, "wb", buffering=0) as file:
            room = max(shutil.disk_usage(folder).free - self.left, 0)
            with contextlib.suppress(OSError):
                file.write(bytes(room))


@dataclass
class Report:
    kind: str
    instants: list[str] = field(default_factory=list)
    lost_steps: int = 0
    faults: list[str] = field(default_factory=list)


def count_calls(at: Callable[[int], None]) -> None:
    """Have `at` told the number of every call that changes a file."""
    calls = 0

    def counted(call: Callable) -> Callable:
        def wrapped(*arguments, **others):
            nonlocal calls
            calls += 1
            at(calls)
            return call(*arguments, **others)

        return wrapped

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    write = checkpoint.save_file

    def write_in_pieces(tensors, path, metadata=None):
        # A file that is half written, with the time to be killed in.
        write(tensors, path, metadata=metadata)
        whole = Path(path).read_bytes()
        Path(path).write_bytes(whole[: len(whole) // 2])
        nonlocal calls
        calls += 1
        at(calls)
        Path(path).write_bytes(whole)

    checkpoint.save_file = write_in_pieces


class Child:
    """The command in a process of its own, forked from this one, which has loaded everything."""

    def __init__(self, argv: Sequence[str], folder: Path, instant: Instant | None = None) -> None:
        self.words = folder / "words.txt"
        self.begun = time.monotonic()
        self.instant = instant
        self.pid = os.fork()
        if self.pid:
            return
        code = 70
        try:
            code = self._run(argv, folder)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def _run(self, argv: Sequence[str], folder: Path) -> int:
        with open(self.words, "ab", buffering=0) as words:
            for number in (1, 2):
                os.dup2(words.fileno(), number)
        os.chdir(folder)
        end_while_loading()
        n_calls = 0

        def at(call: int) -> None:
            nonlocal n_calls
            n_calls = call
            if self.instant is not None and call == self.instant.call:
                self.instant.strike(os.getpid(), folder)

        count_calls(at)
        code = train.main(list(argv))
        with contextlib.suppress(OSError):
            (folder / "calls").write_text(str(n_calls))
        return code

    def wait(self) -> int:
        """The exit code; minus the signal's number for a process that it ended."""
        if self.instant is not None and self.instant.seconds is not None:
            time.sleep(self.instant.seconds)
            self.instant.strike(self.pid, self.words.parent)  # one that has ended waits as well
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.seconds = time.monotonic() - self.begun
        return code


def runs_below(folder: Path) -> list[RunFolder]:
    configs = sorted((folder / "out").glob("*/*/config.json"))
    return [RunFolder(path.parent) for path in configs]


def steps_done(run: RunFolder) -> int:
    """Up to which step a run has come, as its metrics tell."""
    if not run.metrics.exists():
        return 0
    whole = [line for line in run.metrics.read_text().split("\n")[:-1] if line]
    return max((json.loads(line)["step"] for line in whole), default=0)


def results(folder: Path) -> dict[str, object]:
    """What a finished run has written, as far as two of the same command write the same."""
    found: dict[str, object] = {}
    for run in runs_below(folder):
        name = run.path.name
        for step, path in checkpoint.list_steps(run.checkpoints):
            found[f"{name}, step {step}"] = path.read_bytes()
        found[f"{name}, picture"] = run.preview.read_bytes()
        found[f"{name}, mesh"] = run.mesh.exists()
        found[f"{name}, video"] = run.turntable.exists()
        records = map(json.loads, run.metrics.read_text().splitlines())
        found[f"{name}, metrics"] = [
            {key: value for key, value in record.items() if key not in CLOCK} for record in records
        ]
        left = [path.name for path in run.path.rglob(".*") if path.name != ".lock"]
        found[f"{name}, left over"] = left
    return found


class Trials:
    """The kinds of runs, and how they end when nobody kills them."""

    def __init__(self, folder: Path, flags: Sequence[str]) -> None:
        self.folder = folder
        models = {
            "text": build_tiny_model(folder / "models" / "text"),
            "view": build_tiny_view_model(folder / "models" / "view", clip=False),
        }
        disc = str(picture(folder / "disc.png"))
        self.argv, self.straight, self.n_calls, self.seconds = {}, {}, {}, {}
        for kind, (model, own) in KINDS.items():
            own = [disc if flag == "PICTURE" else flag for flag in own]
            argv = [*own, *FLAGS, "--model", str(models[model]), "--device", "cpu", *flags]
            straight = folder / f"straight {kind}"
            straight.mkdir()
            child = Child(argv, straight)
            if child.wait():
                raise SystemExit(f"{kind}: fails by itself:\n{child.words.read_text()}")
            self.argv[kind], self.straight[kind] = argv, results(straight)
            self.n_calls[kind] = int((straight / "calls").read_text())
            self.seconds[kind] = child.seconds

    def __call__(self, number: int, seed: int, whats: Sequence[str]) -> Report:
        """One trial, the same for the same numbers but for where points in time fall."""
        chance = random.Random(f"{seed} {number}")
        kind = list(KINDS)[number % len(KINDS)]
        report, folder = Report(kind), self.folder / f"trial {number}"
        folder.mkdir()
        if FULL in whats:
            mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(folder)]
            subprocess.run(mount, check=True)
        argv = self.argv[kind]
        for i in range(1 + chance.randrange(MOST_KILLS)):
            what, left = chance.choice(list(whats)), chance.choice([0, chance.randrange(300_000)])
            if chance.random() < 0.5:
                instant = Instant(what, chance.uniform(0, self.seconds[kind]), left=left)
            else:
                instant = Instant(what, None, 1 + chance.randrange(self.n_calls[kind]), left)
            report.instants.append(str(instant))
            before = [steps_done(run) for run in runs_below(folder)]
            child = Child([*argv, *(["--resume", "auto"] * (i > 0))], folder, instant)
            code = child.wait()
            (folder / FILLER).unlink(missing_ok=True)
            self._look(report, folder, what, code, before)
            if code == 0:
                break
        child = Child([*argv, "--resume", "auto"], folder)
        code = child.wait()
        words = child.words.read_text(errors="replace")
        if code:
            report.faults.append(f"does not continue: exit code {code}")
        elif (found := results(folder)) != self.straight[kind]:
            keys = found.keys() | self.straight[kind].keys()
            other = [key for key in keys if found.get(key) != self.straight[kind].get(key)]
            report.faults.append(f"ends otherwise: {', '.join(sorted(other))}")
        if "Traceback" in words:
            report.faults.append("a traceback")
        if report.faults:
            report.faults.append(words)
        if FULL in whats:
            subprocess.run(["umount", str(folder)], check=True)
        shutil.rmtree(folder)
        return report

    def _look(
        self,
        report: Report,
        folder: Path,
        what: str,
        code: int,
        before: list[int],
    ) -> None:
        """What a kill has cost."""
        # 2: the disk was full before anything was begun.
        ends = {"KILL": {-signal.SIGKILL}, FULL: {1, 2}}.get(what, {130})
        if code not in ends | {0}:
            report.faults.append(f"exit code {code} after {report.instants[-1]}")
        for i, run in enumerate(runs_below(folder)):
            done, saved = steps_done(run), run.last_step() or 0
            # A resumed run that ended before its loop has metrics of steps that it has not done.
            done = max(done, before[i] if i < len(before) else 0)
            lost = done - saved
            report.lost_steps = max(report.lost_steps, lost)
            allowed = done - (done - 1) // EVERY * EVERY if what == "KILL" and done else 0
            if what != FULL and lost > allowed:
                report.faults.append(f"{run.path.name}: {done} steps done, {saved} are saved")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=1, help="trials at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signal", nargs="+", choices=[*SIGNALS, FULL], default=["KILL"])
    parser.add_argument("flags", nargs="*", help="after --: flags of every run")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        trials = Trials(Path(temporary), arguments.flags)
        workers = []
        for job in range(arguments.jobs):
            pid = os.fork()
            if pid == 0:
                for number in range(job, arguments.trials, arguments.jobs):
                    report = trials(number, arguments.seed, arguments.signal)
                    told = Path(temporary) / f"report {number}.json"
                    told.write_text(json.dumps(vars(report)))
                os._exit(0)
            workers.append(pid)
        for pid in workers:
            os.waitpid(pid, 0)
        told = sorted(Path(temporary).glob("report *.json"))
        reports = [Report(**json.loads(path.read_text())) for path in told]
    n_kills = sum(len(report.instants) for report in reports)
    faults = [report for report in reports if report.faults]
    lost = max((report.lost_steps for report in reports), default=0)
    for report in faults:
        print(f"{report.kind}, {', '.join(report.instants)}: {'; '.join(report.faults)}")
    print(
        f"{len(reports)} of {arguments.trials} runs, {n_kills} kills "
        f"({' '.join(arguments.signal)}): {len(reports) - len(faults)} ended bit for bit as if "
        f"nobody had killed them; at most {lost} steps had to be done again"
    )
    return int(bool(faults) or len(reports) < arguments.trials)


if __name__ == "__main__":
    sys.exit(main())
