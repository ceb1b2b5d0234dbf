"""Standard output that ends in a pipe."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# What a shell reports for a command that SIGPIPE ended.
_SIGPIPE_EXIT_CODE = 141


@contextmanager
def reader_may_leave() -> Iterator[None]:
    """End the command without a traceback when the reader of its output (`| head`) has left."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more when it ends: give it a place that takes what is left.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(_SIGPIPE_EXIT_CODE) from None
