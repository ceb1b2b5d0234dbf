"""What the commands beside training share: flags in, one line for what went wrong, an exit code."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from dsd_fast.ranges import ConfigError, check
from dsd_fast.run import flags as command_flags
from dsd_fast.run import interruption, terminal
from dsd_fast.run.interruption import Interruption
from dsd_fast.run.progress import set_up_logging
from dsd_fast.run.unforeseen import in_words

# Not below "dsd_fast.run.command": the lines are those of the command that runs.
log = logging.getLogger("dsd_fast")

# Errors that other input would not mend: a disk that is full, over its quota or broken.
_OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

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
        flags: the dataclass of its flags with their ranges (`ranges.check`), which `do` gets.
        module: what follows `python -m`.
        argv: the flags, by default those of the process.
        wrong_input: errors that a person's input explains, as does every ConfigError and OSError;
            their message is logged in place of a traceback.
        failed: the like of errors that no other input would mend.
    """
    terminal.set_up()
    set_up_logging()
    try:
        command = command_flags.parse(flags, module, argv)
        check(command, flags=True)
        with Interruption():
            do(command)
    except KeyboardInterrupt:
        log.warning("interrupted; files that were being written are left out")
        return interruption.EXIT_CODE
    except failed as error:
        log.error("%s", error)
        return 1
    except (ConfigError, *wrong_input) as error:
        log.error("%s", error)
        return 2
    except OSError as error:
        log.error("%s", in_words(error))
        return 1 if error.errno in _OF_DISKS else 2
    except Exception as error:
        log.error("failed: %s", in_words(error))
        return 1
    return 0
