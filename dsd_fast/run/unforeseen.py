"""Errors that nobody foresaw, in one line; the traceback goes to a file."""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

from dsd_fast.files import write_text

# Why a run ended that nobody stopped.
ERROR_LOG = "error.log"


def in_words(error: BaseException, folders: Sequence[Path] = ()) -> str:
    """An error as a line.

    Args:
        folders: of runs, which keep the traceback; without any that takes it, the system's folder
            for temporary files does.
    """
    if isinstance(error, OSError):
        return f"cannot use {error.filename or 'a file'}: {error.strerror or error}"
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    first_line = (str(error).splitlines() or [type(error).__name__])[0]
    return f"{type(error).__name__}: {first_line}{_kept(text, folders)}"


def _kept(text: str, folders: Sequence[Path]) -> str:
    """Where the traceback is, in words; nothing where no disk takes it."""
    kept = None
    for folder in folders:
        try:
            write_text(path := folder / ERROR_LOG, text)
            kept = kept or path
        except OSError:
            continue
    try:
        if kept is None:
            kept = Path(tempfile.mkdtemp(prefix="dsd_fast-")) / ERROR_LOG
            write_text(kept, text)
    except OSError:
        return ""
    return f" (details in {kept})"
