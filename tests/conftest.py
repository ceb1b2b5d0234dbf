"""Shared fixtures: devices, golden numbers, and memory that shows who forgot to write it."""

import json
import logging
import os
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

# As `import dsd_fast` does where it comes before torch, which here it does not.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# cuBLAS is deterministic only with a workspace of fixed size, chosen before CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

if "PYTEST_XDIST_WORKER" in os.environ:
    # Each worker has a core of its own.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from safetensors.torch import load_file

DATA = Path(__file__).parent / "data"

if not torch.cuda.is_available():
    # Triton reads this when it is imported, which other tests may do first.
    os.environ.setdefault("TRITON_INTERPRET", "1")

cuda_only = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """||got - want|| / ||want|| in float64, on the CPU; inf when a NaN is among them."""
    got, want = got.detach().cpu().double(), want.detach().cpu().double()
    assert got.shape == want.shape, f"shape {list(got.shape)}, wanted {list(want.shape)}"
    error = ((got - want).norm() / want.norm().clamp(min=1e-30)).item()
    return error if error == error else float("inf")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, Any]:
    """Reports as text that workers can send: paths may hold bytes that are none."""
    report = yield
    report.sections = [
        (name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections
    ]
    return report


@pytest.fixture(autouse=True)
def poisoned_empty() -> Iterator[None]:
    """torch.empty and its kin return NaN (floats) or the largest value (integers).

    An op that leaves a part of its output unwritten then fails loudly instead of by chance.
    """
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    # Filling happens in deterministic mode only; warn_only keeps ops without such a mode usable.
    mode = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(mode, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=cuda_only)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device the compiled backend can run on here."""
    return torch.device(request.param)


@pytest.fixture(scope="session")
def golden() -> Callable[[str], tuple[dict[str, torch.Tensor], dict]]:
    """golden(name): tensors and settings of tests/data/<name>, numbers made by the peers' code."""

    def load(name: str) -> tuple[dict[str, torch.Tensor], dict]:
        settings = json.loads((DATA / f"{name}.json").read_text())
        return load_file(DATA / f"{name}.safetensors"), settings

    return load


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random model."""
    from tiny_model import build_tiny_model

    return build_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def runner(tmp_path: Path, tiny_model: Path) -> object:
    """The command on that model: a `runs.Runner`."""
    from runs import Runner

    return Runner(tmp_path / "out", tiny_model)


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """The command installs a log handler on the standard error of the test that runs it."""
    yield
    logging.getLogger("dsd_fast").handlers = []
