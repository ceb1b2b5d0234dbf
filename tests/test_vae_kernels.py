"""Passes of the fused VAE encoder: Triton kernels against their torch twins.

Without a GPU the kernels run in Triton's interpreter (TRITON_INTERPRET, set by conftest).
"""

import os
import subprocess
import sys

import pytest
import torch
from conftest import relative_error

from dsd_fast.diffusion.networks import vae_ops

pytest.importorskip("triton", reason="needs Triton")
from dsd_fast.kernels import group_norm, group_norm_bwd, vae

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = pytest.mark.parametrize(
    ("batch", "n", "channels", "groups"), [(2, 150, 40, 4), (1, 257, 64, 32), (2, 5, 28, 2)]
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
TOLERANCE = {torch.float16: 1e-3, torch.float32: 2e-6}


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles a program, several programs and, of the backward, few splits."""
    for module in (group_norm, group_norm_bwd):
        monkeypatch.setattr(module, "TILE", 1024)
        monkeypatch.setattr(module, "MAX_SPLITS", 3)
    monkeypatch.setattr(vae, "TILE", 512)


def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vae_ops, "on_kernels", lambda x: True)


@SHAPES
@DTYPES
@pytest.mark.parametrize("skip", [False, True])
def test_group_norm_and_its_gradient(batch, n, channels, groups, dtype, skip, monkeypatch) -> None:
    x = (randn(batch, n, channels) * 2 + 3).to(dtype)
    residual = randn(batch, n, channels, seed=1).to(dtype) if skip else None
    add = randn(channels, seed=2) if skip else randn(batch, channels, seed=2)
    weight, bias = randn(channels, seed=3), randn(channels, seed=4)
    dy, dresidual = (randn(batch, n, channels, seed=s).to(dtype) for s in (5, 6))

    def run(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        total = torch.empty_like(x) if skip else None
        y, stats = vae_ops.group_norm_fwd(
            x, weight, bias, groups, 1e-6, True, add=add, residual=residual, out_sum=total
        )
        s, term = (total, None) if skip else (x, add)
        other = dresidual if skip else None
        ds = vae_ops.group_norm_bwd(
            dy, s, weight, bias, stats, groups, True, add=term, dresidual=other
        )
        return y, stats, s, ds

    twin = run(dtype)
    kernels(monkeypatch)
    for name, got, want in zip(("y", "stats", "s", "ds"), run(dtype), twin):
        assert got.dtype == want.dtype
        tolerance = 2e-6 if name == "stats" else TOLERANCE[dtype]
        assert relative_error(got, want) < tolerance, name


def test_group_norm_of_many_splits_and_means_far_from_zero(monkeypatch) -> None:
    monkeypatch.setattr(group_norm, "MAX_SPLITS", 256)
    x = randn(1, 600, 64) + 3000 + 50 * randn(64, seed=1)
    weight, bias = randn(64, seed=3), randn(64, seed=4)
    exact, want = vae_ops.group_norm_fwd(x.double(), weight, bias, 16, 1e-6, False)
    kernels(monkeypatch)
    got, stats = vae_ops.group_norm_fwd(x, weight, bias, 16, 1e-6, False)
    assert relative_error(stats, want) < 1e-6
    assert relative_error(got, exact) < 1e-5


def test_group_norm_gradient_is_autograds() -> None:
    s = randn(2, 30, 12).double().requires_grad_()
    weight, bias = randn(12, seed=1).double(), randn(12, seed=2).double()
    dy = randn(2, 30, 12, seed=3).double()
    y = torch.nn.functional.silu(
        torch.nn.functional.group_norm(s.transpose(1, 2), 3, weight, bias, 1e-6)
    ).transpose(1, 2)
    (want,) = torch.autograd.grad(y, s, dy)
    got, stats = vae_ops.group_norm_fwd(s.detach(), weight, bias, 3, 1e-6, True)
    assert relative_error(got, y) < 1e-12
    ds = vae_ops.group_norm_bwd(dy, s.detach(), weight, bias, stats, 3, True)
    assert relative_error(ds, want) < 1e-12


@DTYPES
def test_skip_sum(dtype, monkeypatch) -> None:
    x, residual = (randn(2, 6 * 10, 24, seed=s).to(dtype) for s in (0, 1))
    add = randn(24, seed=2)
    want = vae_ops.skip_sum(x, residual, add, 6, 10)
    kernels(monkeypatch)
    got = vae_ops.skip_sum(x, residual, add, 6, 10)
    assert got.shape == (2, 7 * 11, 24)
    assert relative_error(got, want) < TOLERANCE[dtype]
    image = got.unflatten(1, (7, 11))
    assert not image[:, -1].any() and not image[:, :, -1].any()


@DTYPES
def test_softmax(dtype, monkeypatch) -> None:
    logits, dp = randn(2, 5, 37) * 4, randn(2, 5, 37, seed=1).to(dtype)
    assert (vae.SHARE_SCALE, vae.GRADIENT_SCALE) == (vae_ops.SHARE_SCALE, vae_ops.GRADIENT_SCALE)
    shares = vae_ops.softmax_fwd(logits, dtype)
    twin = vae_ops.softmax_bwd(shares, dp.clone())
    kernels(monkeypatch)
    assert relative_error(vae_ops.softmax_fwd(logits, dtype), shares) < TOLERANCE[dtype]
    assert relative_error(vae_ops.softmax_bwd(shares, dp.clone()), twin) < TOLERANCE[dtype]


COMPILE = """
import sys
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dsd_fast.kernels import group_norm, group_norm_bwd, vae

tile = {"BLOCK_R": 8, "BLOCK_C": 128}
norm = {"ADD": True, "GROUPS": 32, **tile}
flags = {"RESIDUAL": True, "CONCAT": False}
cases = [
    (group_norm.stats_kernel, {**norm, **flags, "SUM": True}),
    (group_norm.apply_kernel, {**norm, **flags, "SCALE": False, "SILU": True}),
    (group_norm_bwd.sums_kernel, {**norm, "SILU": True}),
    (group_norm_bwd.apply_kernel, {**norm, "SILU": True, "DRESIDUAL": True}),
    (vae.skip_sum_kernel, tile),
    (vae.softmax_kernel, {"BLOCK": 1024}),
    (vae.softmax_bwd_kernel, {"BLOCK": 1024}),
]
wide = ("p_weight", "p_bias", "p_add", "p_stats", "p_partial", "p_logits")
for kernel, constants in cases:
    names = kernel.arg_names
    kinds = {n: "*fp32" if n in wide else "*fp16" if n[:2] == "p_" else "i32" for n in names}
    kinds |= {"eps": "fp32"} if "eps" in names else {}
    kinds |= dict.fromkeys(constants, "constexpr")
    fixed = {(names.index(n),): v for n, v in constants.items()}
    source = ASTSource(kernel, {n: kinds[n] for n in names}, fixed)
    for capability in (80, 90):
        made = compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})
        assert made.asm["cubin"], kernel
"""


def test_compiles_for_gpus_that_are_not_here(tmp_path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
