"""Token passes of the fused UNet: Triton kernels against their torch twins.

Without a GPU the kernels run in Triton's interpreter (TRITON_INTERPRET, set by conftest).
"""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import cuda_only, relative_error
from torch import Tensor

from dsd_fast.diffusion.networks import token_ops

pytest.importorskip("triton", reason="needs Triton")
from dsd_fast.kernels import group_norm as norm_kernels
from dsd_fast.kernels import linear_geglu as geglu_kernels
from dsd_fast.kernels import tokens as token_kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3}
# NumPy, which the interpreter computes with, warns where exp runs to infinity.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def both(monkeypatch: pytest.MonkeyPatch, function, *args, **kwargs) -> tuple[Tensor, Tensor]:
    """The kernel's result and the twin's, each on its own copies."""
    results = []
    for on_kernels in (True, False):
        monkeypatch.setattr(token_ops, "_on_kernels", lambda x, on=on_kernels: on)
        results.append(function(*args, **kwargs))
    return results[0], results[1]


@pytest.fixture(params=["one launch", "two launches"])
def launches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm_kernels, "TILE", 256)
    monkeypatch.setattr(
        norm_kernels, "ONE_LAUNCH_ROWS", 1000 if request.param == "one launch" else 0
    )


@pytest.mark.parametrize(
    ("shape", "groups", "terms"),
    [
        ((2, 37, 20), 4, ""),
        ((2, 37, 20), 4, "half silu add"),
        ((1, 64, 48), 16, "half silu rows scale"),
        ((3, 9, 40), 2, "silu add residual sum"),
        ((2, 50, 32), 32, "half residual sum scale"),
        ((2, 37, 36), 12, "silu concat rows"),
        ((1, 1, 300), 3, "add concat"),
    ],
    ids=lambda value: value or "plain" if isinstance(value, str) else None,
)
def test_group_norm(shape, groups, terms, launches, monkeypatch) -> None:
    batch, n, channels = shape
    terms = terms.split()
    dtype = torch.float16 if "half" in terms else torch.float32
    first = channels // 3 if "concat" in terms else channels
    add = None
    if "add" in terms or "rows" in terms:
        # rows are a slice of a wider matrix, as the time projections of one block are
        wide = randn(batch, 3 * channels, seed=3, dtype=dtype)
        add = randn(channels, seed=3) if "add" in terms else wide[:, channels : 2 * channels]
    sums = [torch.full(shape, torch.nan, dtype=dtype, device=DEVICE) for _ in range(2)]
    totals = iter(sums)

    def run() -> Tensor:
        return token_ops.group_norm(
            randn(batch, n, first, dtype=dtype) + 3,
            randn(channels, seed=1, dtype=dtype),
            randn(channels, seed=2, dtype=dtype),
            groups,
            1e-5,
            "silu" in terms,
            x2=randn(batch, n, channels - first, seed=4, dtype=dtype) if first < channels else None,
            add=add,
            residual=randn(*shape, seed=5, dtype=dtype) if "residual" in terms else None,
            scale_shift=randn(batch, 2 * channels, seed=6, dtype=dtype)
            if "scale" in terms
            else None,
            out_sum=next(totals) if "sum" in terms else None,
        )

    got, want = both(monkeypatch, run)
    assert got.dtype == dtype
    assert relative_error(got, want) < TOLERANCE[dtype]
    if "sum" in terms:
        assert relative_error(*sums) < TOLERANCE[dtype]


def test_group_norm_of_values_far_from_zero(launches) -> None:
    x = randn(2, 50, 24) + 1000
    y, stats = norm_kernels.group_norm_fwd(
        x, torch.ones(24, device=DEVICE), torch.zeros(24, device=DEVICE), 6, 1e-6, False
    )
    expected = F.group_norm(x.double().transpose(1, 2), 6, eps=1e-6).transpose(1, 2)
    assert relative_error(y, expected) < 1e-4  # float32 has 4 digits left there
    grouped = x.double().view(2, 50, 6, 4)
    assert relative_error(stats[..., 0], grouped.mean((1, 3))) < 1e-7
    rstd = grouped.var((1, 3), correction=0).add(1e-6).rsqrt()
    assert relative_error(stats[..., 1], rstd) < 1e-5


def test_group_norm_of_nothing() -> None:
    one = torch.ones(8, device=DEVICE)
    for shape in ((0, 4, 8), (2, 0, 8)):
        y, stats = norm_kernels.group_norm_fwd(randn(*shape), one, one, 2, 1e-5, True)
        assert y.shape == shape and stats.shape == (shape[0], 2, 2)


@pytest.mark.parametrize("channels,groups", [(320, 32), (960, 32), (2560, 32), (48, 16), (300, 3)])
def test_chunks_are_whole_groups(channels: int, groups: int) -> None:
    chunk, block = norm_kernels.chunk_of(channels, groups)
    assert chunk % (channels // groups) == 0 and chunk <= block
    assert block & (block - 1) == 0
    if channels != 300:
        assert chunk % 16 == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("update", [False, True], ids=["", "update"])
@pytest.mark.parametrize("channels", [48, 130])
def test_layer_norm(channels, update, dtype, monkeypatch) -> None:
    monkeypatch.setattr(token_kernels, "NORM_TILE", 256)
    inputs = [randn(3, 7, channels, dtype=dtype) + 2 for _ in range(2)]
    rows = iter(inputs)

    def run() -> Tensor:
        return token_ops.layer_norm(
            next(rows),
            randn(channels, seed=1, dtype=dtype),
            randn(channels, seed=2, dtype=dtype),
            1e-5,
            add=randn(channels, seed=3),
            update=randn(3, 7, channels, seed=4, dtype=dtype) if update else None,
        )

    got, want = both(monkeypatch, run)
    assert relative_error(got, want) < TOLERANCE[dtype]
    assert relative_error(*inputs) < TOLERANCE[dtype]


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_geglu(bias, monkeypatch) -> None:
    monkeypatch.setattr(token_kernels, "GEGLU_COLUMNS", 16)
    got, want = both(
        monkeypatch, token_ops.geglu, 3 * randn(2, 9, 84), randn(84, seed=1) if bias else None
    )
    assert relative_error(got, want) < 1e-6


@pytest.mark.parametrize(("rows", "depth", "width"), [(70, 48, 50), (1, 20, 16)])
def test_linear_geglu(rows, depth, width, monkeypatch) -> None:
    for name, size in (("BLOCK_M", 32), ("BLOCK_N", 32), ("BLOCK_K", 16), ("GROUP_M", 2)):
        monkeypatch.setattr(geglu_kernels, name, size)
    monkeypatch.setattr(token_ops, "FUSED_GEGLU_ROWS", 1)
    x, weight, bias = (
        randn(*shape, seed=seed, dtype=torch.float16)
        for seed, shape in enumerate([(rows, depth), (2 * width, depth), (2 * width,)])
    )
    got = geglu_kernels.linear_geglu_fwd(x, weight, bias)
    monkeypatch.setattr(token_ops, "_on_kernels", lambda x: False)
    want = token_ops.linear_geglu(x.float(), weight.float(), bias.float())
    assert relative_error(got, want) < 1e-3


@pytest.mark.parametrize("channels", [12, 144])
def test_upsample(channels, monkeypatch) -> None:
    monkeypatch.setattr(token_kernels, "UPSAMPLE_TILE", 512)
    x, add = randn(2, 15, channels), randn(channels, seed=1)
    got, want = both(monkeypatch, token_ops.upsample, x, 3, 5, add)
    assert torch.equal(got, want)
    image = (x + add).view(2, 3, 5, channels).permute(0, 3, 1, 2)
    expected = F.interpolate(image, scale_factor=2).permute(0, 2, 3, 1).flatten(1, 2)
    assert torch.equal(want, expected)


@pytest.mark.parametrize("channels", [12, 144])
def test_interleave(channels, monkeypatch) -> None:
    x = randn(2, 4 * 6, 4 * channels)
    got, want = both(monkeypatch, token_ops.interleave, x, 3, 5)
    assert torch.equal(got, want)
    frame, image = x.view(2, 4, 6, 2, 2, channels), want.view(2, 6, 10, channels)
    assert torch.equal(image[:, 5, 2], frame[:, 3, 1, 1, 0])


def test_errors_name_shapes() -> None:
    one = torch.ones(8)
    with pytest.raises(ValueError, match="multiple of 3 groups"):
        token_ops.group_norm(torch.zeros(1, 4, 8), one, one, 3, 1e-5)
    with pytest.raises(ValueError, match=r"residual \[1, 4, 8\]"):
        token_ops.group_norm(torch.zeros(1, 4, 8), one, one, 2, 1e-5, residual=torch.zeros(1, 4, 7))
    with pytest.raises(ValueError, match="upsample"):
        token_ops.upsample(torch.zeros(1, 4, 8), 3, 2)
    with pytest.raises(ValueError, match=r"x \[B,4·3,4C\]"):
        token_ops.interleave(torch.zeros(1, 4, 8), 3, 2)


_COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dsd_fast.kernels import group_norm, linear_geglu, tokens

product = dict(GROUP_M=4, BLOCK_M=32, BLOCK_N=32, BLOCK_K=32)
flags = dict(ADD=True, RESIDUAL=False, CONCAT=True)
tile = dict(GROUPS=4, BLOCK_R=16, BLOCK_C=64)
cases = [
    (group_norm.stats_kernel, dict(**flags, **tile, SUM=True)),
    (group_norm.apply_kernel, dict(**flags, **tile, SCALE=True, SILU=True)),
    (group_norm.whole_kernel, dict(**flags, **tile, SCALE=False, SILU=True, SUM=True)),
    (tokens.layer_norm_kernel, dict(ADD=True, UPDATE=True, BLOCK_R=4, BLOCK_C=64)),
    (tokens.geglu_kernel, dict(BIAS=True, BLOCK_R=4, BLOCK_C=64)),
    (tokens.upsample_kernel, dict(ADD=True, BLOCK_R=4, BLOCK_C=64)),
    (tokens.interleave_kernel, dict(BLOCK_R=4, BLOCK_C=64)),
    (linear_geglu.linear_geglu_kernel, dict(**product, EVEN_K=False)),
]
for kernel, constants in cases:
    types = {}
    for name in kernel.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif name.startswith("p_"):
            types[name] = "*fp32" if name in ("p_partial", "p_stats") else "*fp16"
        else:
            types[name] = "fp32" if name == "eps" else "i32"
    for capability in (80, 90):
        source = ASTSource(kernel, types, constants)
        triton.compile(source, target=GPUTarget("cuda", capability, 32))
print("compiled")
"""


def test_kernels_compile_without_a_gpu(tmp_path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", _COMPILE],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.stdout.endswith("compiled\n"), result.stderr[-2000:]


@cuda_only
@pytest.mark.parametrize("shape", [(8, 4096, 320), (4, 1024, 1920), (8, 64, 2560), (2, 256, 1280)])
def test_group_norm_at_full_size(shape) -> None:
    x = randn(*shape, dtype=torch.float16)
    weight, bias = (randn(shape[2], seed=s, dtype=torch.float16) for s in (1, 2))
    got = token_ops.group_norm(x, weight, bias, 32, 1e-5, True)
    normal = F.group_norm(x.float().transpose(1, 2), 32, weight.float(), bias.float())
    assert relative_error(got, F.silu(normal.transpose(1, 2))) < 1e-3
