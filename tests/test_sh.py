"""Spherical harmonics: fixture of tiny-cuda-nn, reference against kernels, errors."""

import pytest
import torch
from conftest import relative_error

from dsd_fast.ops.sh import spherical_harmonics, spherical_harmonics_reference

FACES = [
    pytest.param(spherical_harmonics, id="compiled"),
    pytest.param(spherical_harmonics_reference, id="reference"),
]


def directions(n: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n)
    dirs = torch.randn(n, 3, generator=generator)
    return torch.nn.functional.normalize(dirs, dim=1).to(device)


@pytest.mark.parametrize("function", FACES)
def test_tiny_cuda_nn_fixture(function, device, golden) -> None:
    data, _ = golden("peer_render")
    assert relative_error(function(data["sh.dirs"].to(device)), data["sh.y"]) <= 1e-5


@pytest.mark.parametrize("n", [1, 257, 9001])
def test_kernels_agree_with_the_reference_in_float64(n, device) -> None:
    dirs = directions(n, device)
    grad_y = torch.randn(n, 9, generator=torch.Generator().manual_seed(1)).to(device)
    results = []
    for function, dtype in (
        (spherical_harmonics, torch.float32),
        (spherical_harmonics_reference, torch.float64),
    ):
        d = dirs.to(dtype).requires_grad_()
        y = function(d)
        results.append((y, torch.autograd.grad(y, d, grad_y.to(dtype))[0]))
    for got, want in zip(*results):
        assert relative_error(got, want) <= 1e-6


def test_orthonormal_on_the_sphere() -> None:
    """Mean of y y^T over the sphere is 1 / (4 pi): a Fibonacci lattice integrates it."""
    n = 20000
    i = torch.arange(n, dtype=torch.float64) + 0.5
    z, angle = 1 - 2 * i / n, torch.pi * (1 + 5**0.5) * i
    r = (1 - z * z).sqrt()
    y = spherical_harmonics_reference(torch.stack([r * angle.cos(), r * angle.sin(), z], dim=1))
    gram = y.T @ y / n * 4 * torch.pi
    torch.testing.assert_close(gram, torch.eye(9, dtype=y.dtype), atol=1e-3, rtol=0)


def test_no_directions(device) -> None:
    dirs = torch.empty(0, 3, device=device, requires_grad=True)
    y = spherical_harmonics(dirs)
    assert y.shape == (0, 9)
    y.sum().backward()
    assert dirs.grad.shape == (0, 3)


def test_opcheck(device) -> None:
    dirs = directions(5, device)
    operators, ones = torch.ops.dsd_fast, torch.ones(5, 9, device=device)
    torch.library.opcheck(operators.spherical_harmonics.default, (dirs.requires_grad_(),))
    torch.library.opcheck(operators.spherical_harmonics_bwd.default, (dirs.detach(), ones))


def test_second_derivative_is_refused() -> None:
    dirs = directions(3, torch.device("cpu")).requires_grad_()
    loss = spherical_harmonics(dirs).square().sum()
    gradient = torch.autograd.grad(loss, dirs, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="only first derivatives"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    "dirs, error, text",
    [
        (torch.zeros(4, 3, dtype=torch.float64), TypeError, "dirs must be float32"),
        (torch.zeros(4, 2), ValueError, r"\[N, 3\], got float32 \[4, 2\] on cpu"),
        (torch.zeros(3, 4).T, ValueError, r"\[N, 3\]|contiguous"),
        (torch.zeros(3, 4).T[:, :3], ValueError, "contiguous"),
        ("up", TypeError, "must be a tensor, got str"),
    ],
)
def test_errors_name_what_was_expected(dirs, error, text) -> None:
    with pytest.raises(error, match=text):
        spherical_harmonics(dirs)
