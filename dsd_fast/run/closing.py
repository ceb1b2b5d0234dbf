"""The last thing that a run says: how long it took, where to look, and the command for another."""

from __future__ import annotations

import logging
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from dsd_fast import ranges
from dsd_fast.config import TrainConfig
from dsd_fast.run.cli import Job
from dsd_fast.run.outputs import RunFolder
from dsd_fast.run.progress import in_words

log = logging.getLogger("dsd_fast.train")

# Flags that are of one call, with the number of values that follow them.
_OF_A_CALL = {"seed": 1, "resume": 1, "stop-at": 1, "overwrite": 0, "no-overwrite": 0}
# Words that a shell takes as they are, and those that do between double quotes, in any shell.
_BARE = re.compile(r"[A-Za-z0-9_./:=,+%@-]+")
_QUOTED = re.compile(r"[A-Za-z0-9_./:=,+%@ ';()-]*")


def say(
    jobs: Sequence[Job], seconds: float, argv: Sequence[str] | None, makes: str = "object"
) -> None:
    """Log the end of jobs that are finished: time, files, and a command to paste for other seeds.

    Args:
        seconds: since the command began; files of runs that were finished before need none.
        argv: the flags that made the jobs; None for jobs that no command line made.
        makes: what one job makes, "object" or "image".
    """
    took = f"Done in {in_words(seconds)}. Look at:"
    lines = [took, *(line for job in jobs for line in _files(job, len(jobs)))]
    if argv is not None:
        others = f"Another {makes}" if len(jobs) == 1 else f"{len(jobs)} other {makes}s"
        lines.append(f"{others}: {command_for_another(jobs, argv)}")
    log.info("%s", "\n".join(lines))


def _files(job: Job, n_jobs: int) -> list[str]:
    """Lines that name a run's files, the one to look at first first."""
    run, cfg = job.folder, job.config
    pictures = [path for path in (run.image, run.preview, run.turntable) if path.exists()]
    found = pictures + run.meshes()
    if n_jobs == 1:
        lines = [f"  {path}" for path in found]
    else:
        lines = [f"  {run.path}: {', '.join(path.name for path in found)}"]
    if cfg.task != "image" and cfg.pictures.mesh and not run.meshes():
        export = shell([*_python(), "-m", "dsd_fast.export", str(run.path)])
        lines.append(f"  no mesh of {run.path}: {export} tells why")
    return lines


def command_for_another(jobs: Sequence[Job], argv: Sequence[str]) -> str:
    """The command line that makes as many again, with seeds whose folders are not used yet.

    Args:
        argv: the flags that made `jobs`, which are of seeds one after the other.
    """
    flags = _without_flags_of_a_call(argv)
    if not any(_name(flag) in ("prompt", "image", "config") for flag in flags):
        # --resume FOLDER: the run's own settings say what it is of.
        flags = ["--config", str(jobs[0].folder.config), *flags]
    seed = _free_seed(jobs[0].config, jobs[-1].config.seed + 1, len(jobs))
    return shell([*_python(), "-m", "dsd_fast.train", *flags, "--seed", str(seed)])


def _without_flags_of_a_call(argv: Sequence[str]) -> list[str]:
    kept, skip = [], 0
    for token in argv:
        values = _OF_A_CALL.get(_name(token))
        if skip:
            skip -= 1
        elif values is None:
            kept.append(token)
        elif "=" not in token:
            skip = values
    return kept


def _name(token: str) -> str:
    """The flag that a token of a command line is, without dashes in front; "" for none."""
    if not token.startswith("--"):
        return ""
    return token[2:].partition("=")[0].replace("_", "-")


def _free_seed(cfg: TrainConfig, seed: int, n: int) -> int:
    """The first of n seeds from `seed` on that no run of these settings has; 0 behind the last."""
    free = 0
    while free < n:
        try:
            last = ranges.convert(TrainConfig, "seed", seed + free, "seed")
        except ranges.ConfigError:
            return 0
        if RunFolder.of(cfg, last).is_used():
            seed, free = seed + free + 1, 0
        else:
            free += 1
    return seed


def _python() -> list[str]:
    """What starts this Python from the current folder, as short as it can be."""
    own = Path(sys.executable or "python")
    found = shutil.which("python")
    # Not resolved: an environment's is a link to the one that it was made with.
    if found and Path(found).absolute() == own.absolute():
        return ["python"]
    try:
        return [str(own.absolute().relative_to(Path.cwd()))]
    except ValueError:
        return [str(own)]


def shell(words: Sequence[str]) -> str:
    """A command line that a shell splits into these words."""
    return " ".join(
        word
        if _BARE.fullmatch(word)
        else f'"{word}"'
        if _QUOTED.fullmatch(word)
        else shlex.quote(word)
        for word in words
    )
