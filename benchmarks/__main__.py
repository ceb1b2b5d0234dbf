"""``python -m benchmarks``: the list of cases; with arguments the same as `benchmarks.run`."""

import sys

from benchmarks.run import main
from dsd_fast.run.terminal import reader_may_leave

if __name__ == "__main__":
    with reader_may_leave():
        sys.exit(main(sys.argv[1:] or ["--list"]))
