"""What the commands beside training share: flags in, one line for what went wrong, an exit code."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import tyro

from dsd_fast.run import interruption, terminal
from dsd_fast.run.closed_pipes import reader_may_leave
from dsd_fast.run.interruption import Interruption
from dsd_fast.run.progress import set_up_logging

# Not below "dsd_fast.run.command": the lines are those of the command that runs.
log = logging.getLogger("dsd_fast")

Command = TypeVar("Command")
Errors = tuple[type[Exception], ...]


def run_command(
    do: Callable[[Command], object],
    flags: type[Command],
    module: str,
    argv: Sequence[str] | None,
    wrong_input: Errors,
    failed: Errors = (),
) -> int:
    """Run a command; returns its exit code: 0 done, 1 failed, 2 wrong input, 130 interrupted.

    Args:
        do: the command's work.
        flags: the dataclass of its flags, which `do` gets.
        module: what follows `python -m`.
        argv: the flags, by default those of the process.
        wrong_input: errors that a person's input explains, as does every OSError; their message
            is logged in place of a traceback.
        failed: the like of errors that no other input would mend.
    """
    terminal.set_up()
    set_up_logging()
    with reader_may_leave():
        command = tyro.cli(flags, prog=f"python -m {module}", args=argv)
    try:
        with Interruption():
            do(command)
    except KeyboardInterrupt:
        log.warning("interrupted; files that were being written are left out")
        return interruption.EXIT_CODE
    except failed as error:
        log.error("%s", error)
        return 1
    except wrong_input as error:
        log.error("%s", error)
        return 2
    except OSError as error:
        log.error("cannot use %s: %s", error.filename or "a file", error.strerror or error)
        return 2
    return 0
