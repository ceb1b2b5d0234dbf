"""Files that a person names to be written: looked at before the work, and named when it fails."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dsd_fast.files import replacing
from dsd_fast.ranges import ConfigError


def check_output(path: Path, suffixes: Sequence[str] = (), flag: str = "--output") -> Path:
    """The file that can be written at ``path``: new, or a regular one that is replaced.

    A link to a regular file stands for that file. Nothing is left behind, no folder either.

    Args:
        suffixes: what its name may end in, in lower case, if that matters.
        flag: that named it, for messages.
    Raises:
        ConfigError: it cannot be written, or its name ends otherwise.
    """
    if suffixes and path.suffix.lower() not in suffixes:
        raise ConfigError(
            f"{flag} {path}: expected a name that ends in {' or '.join(suffixes)}, which is what "
            f"can be written; got {path.suffix or 'none'}"
        )
    target = path
    try:
        if not path.is_symlink():
            problem = _problem(path)
        elif path.exists():
            target = path.resolve()
            problem = _problem(target)
        else:
            problem = "it is a link to nothing"
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or str(error)
    if problem:
        raise ConfigError(f"{flag} {path}: cannot be written: {problem}. Pass another {flag}")
    return target


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """`replacing`, whose OSErrors name the file that could not be written."""
    try:
        with replacing(path) as temporary:
            yield temporary
    except OSError as error:
        words = error.strerror or str(error) or type(error).__name__
        raise OSError(error.errno or errno.EIO, words, str(path)) from error


def _problem(path: Path) -> str:
    """Why a file cannot be written, or nothing; OSError where it cannot even be looked at."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        pass
    else:
        if stat.S_ISDIR(mode):
            return "it is a folder"
        if not stat.S_ISREG(mode):
            return "it is a pipe, a socket or a device, expected a regular file or a new one"
        if not os.access(path, os.W_OK):
            return "it is read-only"
    folder = path.parent
    while not folder.exists():
        if folder.is_symlink():
            return f"{folder} is a link to nothing"
        folder = folder.parent
    if not folder.is_dir():
        return f"{folder} is not a folder"
    # As long as the name under which it is written first (`replacing`).
    prefix = f".unfinished-{path.name}" if folder == path.parent else None
    with tempfile.NamedTemporaryFile(dir=folder, prefix=prefix) as probe:
        probe.write(b"dsd_fast")
        probe.flush()
    return ""
