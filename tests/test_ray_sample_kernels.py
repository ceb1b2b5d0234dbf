"""Kernels of samples against torch: on CUDA where it is, under Triton's interpreter otherwise."""

import pytest
import torch
from torch.nn.functional import normalize

from dsd_fast.scene.material import MODES, MaterialConfig, Shading, shade

pytest.importorskip("triton")
kernels = pytest.importorskip("dsd_fast.kernels.ray_samples")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIG = MaterialConfig(ambient_light_color=(0.1, 0.2, 0.3), diffuse_light_color=(0.9, 0.7, 0.8))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n", [1, 700])
@pytest.mark.parametrize("light_a_row", [False, True])
def test_shading_and_its_gradients(mode, n, light_a_row):
    generator = torch.Generator().manual_seed(n)
    features, points, normals, grad = (torch.randn(n, 3, generator=generator) for _ in range(4))
    normals = normalize(normals, dim=-1)
    lights = 2 * torch.randn(n if light_a_row else 1, 3, generator=generator)
    shading = Shading(mode, CONFIG.ambient_light_color, CONFIG.diffuse_light_color)
    wanted_inputs = [t.double().requires_grad_() for t in (features, normals)]
    wanted = shade(wanted_inputs[0], points.double(), wanted_inputs[1], lights.double(), shading)
    wanted_grads = torch.autograd.grad(wanted, wanted_inputs, grad.double(), allow_unused=True)

    on_device = [t.to(DEVICE) for t in (features, points, normals, lights, shading.numbers())]
    n_valid = torch.tensor(n - n // 3, device=DEVICE)
    colors = kernels.shade_fwd(*on_device, n_valid).cpu()
    to_features, to_normals = kernels.shade_bwd(*on_device, n_valid, grad.to(DEVICE))
    valid = int(n_valid)
    torch.testing.assert_close(colors[:valid].double(), wanted[:valid], atol=2e-6, rtol=2e-6)
    for got, want in zip((to_features, to_normals), wanted_grads):
        want = torch.zeros_like(got).double().cpu() if want is None else want
        torch.testing.assert_close(got.cpu()[:valid].double(), want[:valid], atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize("mode", MODES)
def test_numbers_of_a_shading_are_the_shading(mode):
    generator = torch.Generator().manual_seed(0)
    features, points, normals = (torch.randn(50, 3, generator=generator) for _ in range(3))
    shading = Shading(mode, CONFIG.ambient_light_color, CONFIG.diffuse_light_color)
    lights = torch.ones(1, 3)
    by_mode = shade(features, points, normals, lights, shading)
    by_numbers = shade(features, points, normals, lights, shading.numbers())
    torch.testing.assert_close(by_numbers, by_mode)


def test_no_rows():
    empty, n_valid = torch.zeros(0, 3, device=DEVICE), torch.tensor(0, device=DEVICE)
    light = torch.ones(1, 3, device=DEVICE)
    numbers = torch.ones(8, device=DEVICE)
    assert kernels.shade_fwd(empty, empty, empty, light, numbers, n_valid).shape == (0, 3)


@pytest.mark.parametrize("n", [0, 1, 900])
def test_points_on_rays(n):
    generator = torch.Generator().manual_seed(n)
    origins, dirs = torch.randn(2, 20, 3, generator=generator)
    rays = torch.randint(20, (n,), generator=generator, dtype=torch.int32)
    starts, lengths = torch.rand(2, n, generator=generator)
    valid = n - n // 4
    # What lies in the room behind is anything.
    rays[valid:] = 2**31 - 1
    tensors = (origins, dirs, rays, starts, starts + lengths, torch.tensor(valid))
    points = kernels.points(*(tensor.to(DEVICE) for tensor in tensors)).cpu()
    assert points.shape == (n, 3)
    middle = (starts + 0.5 * lengths)[:valid, None].double()
    wanted = origins[rays[:valid]].double() + middle * dirs[rays[:valid]].double()
    torch.testing.assert_close(points[:valid].double(), wanted, atol=1e-6, rtol=1e-6)
