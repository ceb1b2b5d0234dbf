"""Runs a command of a build and shows how far it is, also where pip hides what a build prints."""

import os
import re
import subprocess
import sys
from types import TracebackType

# Ninja's and make's account of a step.
STEP = re.compile(r"^\[\s*(?:(?P<done>\d+)/(?P<all>\d+)|(?P<percent>\d+)%)\] (?P<what>.*)")
# Of a terminal: save and restore the cursor, do not wrap, clear the rest of the line.
SAVE, RESTORE, NO_WRAP, WRAP, CLEAR = "\x1b7", "\x1b8", "\x1b[?7l", "\x1b[?7h", "\x1b[K"


class Status:
    """One line of words on the terminal, right of where its cursor stands.

    pip takes what a build prints for itself and turns a spinner meanwhile, so the words go to the
    terminal past it, and the cursor back to where the spinner has it. Where there is no terminal,
    or this process is not in its foreground, nothing is shown; no error of it is ever one of the
    build.
    """

    def __init__(self) -> None:
        self._terminal: int | None = None

    def __enter__(self) -> "Status":
        if os.name == "posix" and not shows_itself() and os.environ.get("TERM", "dumb") != "dumb":
            try:
                # No wait for one who has stopped its output.
                flags = os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK
                self._terminal = os.open("/dev/tty", flags)
            except OSError:
                self._terminal = None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.show("")
        if self._terminal is not None:
            os.close(self._terminal)
            self._terminal = None

    @property
    def is_shown(self) -> bool:
        """Whether there is a terminal to show it on."""
        return self._terminal is not None

    def show(self, words: str) -> None:
        """Replaces the words; "" takes them away."""
        if self._terminal is None:
            return
        try:
            if os.tcgetpgrp(self._terminal) == os.getpgrp():
                text = f"{SAVE}{NO_WRAP}{CLEAR}{'  ' if words else ''}{words}{WRAP}{RESTORE}"
                os.write(self._terminal, text.encode())
        except OSError:
            pass


def shows_itself() -> bool:
    """Whether what is printed reaches a terminal without our help."""
    return sys.stdout is not None and sys.stdout.isatty()


def words_of(line: str) -> str | None:
    """A short account of a line of Ninja's or make's output, None for other lines.

    >>> words_of("[3/18] Building CXX object CMakeFiles/dsd_avx2.dir/csrc/field.cpp.o")
    '3 of 18 (field.cpp)'
    """
    found = STEP.match(line)
    if found is None:
        return None
    far = f"{found['done']} of {found['all']}" if found["done"] else f"{found['percent']}%"
    name = re.search(r"([\w.]+?)(\.o|\.obj)?\s*$", found["what"])
    return f"{far} ({name[1]})" if name else far


def run(command: list[str], env: dict[str, str], title: str) -> None:
    """Runs a command to its end, with `title` and its progress shown.

    Raises:
        FileNotFoundError: there is no such command.
        subprocess.CalledProcessError: it failed.
    """
    sys.stdout.flush()
    with Status() as status:
        if not status.is_shown:
            subprocess.run(command, check=True, env=env)
            return
        status.show(title)
        with subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0
        ) as process:
            assert process.stdout is not None
            for raw in iter(process.stdout.readline, b""):
                line = raw.decode(errors="replace")
                print(line, end="", flush=True)
                words = words_of(line)
                if words:
                    status.show(f"{title}: {words}")
        if process.returncode != 0:
            raise subprocess.CalledProcessError(process.returncode, command)
