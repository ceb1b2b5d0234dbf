"""`--deterministic`: the same command gives the same bits on CUDA, as it does on the CPU anyway.

What it takes beside torch's own switch: our sums in one order (`_backend.deterministic`), and no
library that chooses its kernels by their time. Room for samples (`scene.sample_room`) never depends
on time.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dsd_fast.ranges import ConfigError

# Of fixed size, the only ones with which cuBLAS always takes the same kernels.
_WORKSPACES = (":4096:8", ":16:8")


def make_deterministic(device: torch.device) -> None:
    """Have this process give the same bits each time for the same work on `device`.

    It holds for the whole process and is not undone; call it before any work on CUDA. On the CPU
    there is nothing to do.

    Raises:
        ConfigError: CUBLAS_WORKSPACE_CONFIG is set to what is not deterministic.
    """
    if device.type != "cuda":
        return
    # cuBLAS reads it when it starts.
    workspace = os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", _WORKSPACES[0])
    if workspace not in _WORKSPACES:
        raise ConfigError(
            "--deterministic: expected CUBLAS_WORKSPACE_CONFIG to be not set or one of "
            f"{', '.join(_WORKSPACES)}, got {workspace!r}: unset it"
        )
    torch.use_deterministic_algorithms(True)
    # It comes with the switch and writes all fresh memory: that finds mistakes, and is slow.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    # Of the attention kernels it alone has no deterministic backward pass; the others take over.
    torch.backends.cuda.enable_mem_efficient_sdp(False)


@contextmanager
def explained() -> Iterator[None]:
    """Turn torch's error at an operation that is never deterministic into a ConfigError."""
    try:
        yield
    except RuntimeError as error:
        found = re.match(r"(\S+) does not have a deterministic implementation", str(error))
        if found is None:
            raise
        raise ConfigError(
            f"--deterministic: with these settings torch needs {found[1]}, which is not "
            "deterministic on CUDA: drop --deterministic, or run on the CPU (--device cpu)"
        ) from error
