"""The one gate: ``DSD_BACKEND=torch`` wins wherever kernels could run, CUDA or not.

The CUDA tensors here are fake ones, which need no GPU: the gate only looks at them.
"""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dsd_fast import _backend, info, ops
from dsd_fast._backend import backend
from dsd_fast.diffusion import model
from dsd_fast.diffusion.engines import fused
from dsd_fast.diffusion.networks import token_ops, vae_ops
from dsd_fast.guidance import passes
from dsd_fast.scene import material, renderer
from dsd_fast.scene.field import Field, FieldConfig, GridConfig

PACKAGE = Path(_backend.__file__).parent
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def triton_is_installed(monkeypatch) -> None:
    monkeypatch.delenv("DSD_BACKEND", raising=False)
    monkeypatch.setattr(_backend, "_HAS_TRITON", True)


def fake(*shape: int, device: str = "cuda", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    with FakeTensorMode():
        return torch.empty(shape, device=device, dtype=dtype)


def test_the_gate(monkeypatch) -> None:
    assert [backend(CPU), backend(CUDA)] == ["compiled", "triton"]
    assert [backend(fake(2, device="cpu")), backend(fake(2))] == ["compiled", "triton"]
    assert backend(fake(2, dtype=torch.float64)) == "compiled"
    monkeypatch.setattr(_backend, "_HAS_TRITON", False)
    assert backend(CUDA) == "compiled"
    monkeypatch.setenv("DSD_BACKEND", "torch")
    assert {backend(CPU), backend(CUDA), backend(fake(2))} == {"torch"}
    monkeypatch.setenv("DSD_BACKEND", "numpy")
    with pytest.raises(ValueError, match="DSD_BACKEND must be one of compiled, torch, got 'numpy'"):
        backend(CUDA)


def half_unet() -> torch.nn.Module:
    """What the fused engine takes, but for its device."""
    unet = torch.nn.Module()
    unet.dtype, unet.device = torch.float16, CUDA
    return unet


def small_field() -> Field:
    return Field(FieldConfig(grid=GridConfig(log2_table_size=8)))


# Who asks for kernels, by name: whether it would take them for CUDA.
ASKERS: dict[str, Callable[[], bool]] = {
    "passes of guidance": lambda: passes._on_kernels(fake(2)),
    "passes over tokens": lambda: token_ops._on_kernels(fake(2)),
    "passes of the VAE": lambda: vae_ops.on_kernels(fake(2)),
    "fused UNet": lambda: fused.cannot_fuse(half_unet()) is None,
    "fused VAE": lambda: (
        model._own_encoder(torch.nn.Module(), CUDA, torch.float16, None) is not None
    ),
    "fused field": lambda: small_field().skips_rows(CUDA),
}


@pytest.mark.parametrize("asker", ASKERS)
def test_torch_wins_for_every_asker(asker, monkeypatch) -> None:
    monkeypatch.setattr(fused, "unsupported", lambda unet: None)
    monkeypatch.setattr(model, "unsupported", lambda config: None)
    monkeypatch.setattr(model, "FusedEncoder", lambda vae: object())
    assert ASKERS[asker]()
    monkeypatch.setenv("DSD_BACKEND", "torch")
    assert not ASKERS[asker]()
    assert fused.cannot_fuse(half_unet()) == "DSD_BACKEND=torch asks for the pure-torch reference"


def midpoints() -> torch.Tensor:
    ends, index = torch.ones(4), torch.zeros(4, dtype=torch.int64)
    rays = torch.zeros(2, 3)
    return renderer._Samples(rays, rays, index, 0 * ends, ends, torch.tensor([4])).points(
        skips=True
    )


def shade() -> torch.Tensor:
    x = torch.ones(4, 3)
    return material.shade(x, x, x, x[:1], torch.ones(8), n_valid=torch.tensor(4))


@pytest.mark.parametrize("call", [midpoints, shade])
def test_torch_wins_for_samples(call, monkeypatch) -> None:
    """Askers in the middle of a function, of tensors that are taken for CUDA's."""

    def taken(*_: object) -> None:
        raise RuntimeError("Triton was taken")

    pytest.importorskip("triton", reason="needs Triton")
    monkeypatch.setattr("dsd_fast.kernels.ray_samples.points", taken)
    monkeypatch.setattr(material._FusedShade, "apply", taken)
    for module in (renderer, material):
        monkeypatch.setattr(module, "backend", lambda where: backend(CUDA))
    with pytest.raises(RuntimeError, match="Triton was taken"):
        call()
    monkeypatch.setenv("DSD_BACKEND", "torch")
    assert call().shape == (4, 3)


def test_every_operator_asks_the_gate() -> None:
    """Each by a test of its own calls its reference; here none is forgotten."""
    for name in ops.__all__:
        if not name[0].isupper():
            assert "backend" in getattr(ops, name).__code__.co_names, name


def test_nobody_else_decides() -> None:
    """Neither the variable nor Triton is looked for anywhere but in the gate."""
    decides = re.compile(r"environ.*DSD_BACKEND|find_spec\(\"triton|_HAS_TRITON")
    askers = {p.name for p in PACKAGE.rglob("*.py") if decides.search(p.read_text("utf-8"))}
    assert askers == {"_backend.py", "info.py"}  # the report quotes the variable


def test_the_report_tells_the_choice(monkeypatch) -> None:
    assert dict(info.report())["backend"].startswith("compiled kernels")
    monkeypatch.setenv("DSD_BACKEND", "torch")
    assert dict(info.report())["backend"].startswith("pure-torch reference")
