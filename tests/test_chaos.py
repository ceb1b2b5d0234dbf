"""A few runs killed at random instants (`chaos.py` does as many as one likes)."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("signals", ["KILL", "TERM HUP INT"])
def test_killed_runs_end_as_if_nobody_had_killed_them(signals):
    here = Path(__file__).parent
    trials = os.environ.get("DSD_CHAOS_TRIALS", "4")
    command = [sys.executable, str(here / "chaos.py"), "--trials", trials, "--seed", "1"]
    done = subprocess.run(
        [*command, "--signal", *signals.split()],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(here.parent), *sys.path])},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(rf"{trials} ended bit for bit", done.stdout)
