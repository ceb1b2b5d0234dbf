import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from dsd_fast.scene import losses
from dsd_fast.scene.losses import LossConfig, regularizers
from dsd_fast.scene.renderer import RenderOutput


def _output(n_samples: int = 300, opacity_scale: float = 1.0) -> RenderOutput:
    generator = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.rand(*shape, dtype=torch.float64, generator=generator)

    image = (2, 9, 11)
    opacity = rand(*image, 1) * opacity_scale
    return RenderOutput(
        rgb=rand(*image, 3),
        opacity=opacity,
        depth=rand(*image, 1),
        normal=rand(*image, 3) * opacity,
        z_variance=rand(*image, 1) * (opacity > 0.5),
        rgb_fg=rand(*image, 3),
        orientation=rand(*image, 1) * (n_samples > 0),
        n_samples=torch.tensor(n_samples),
    )


def test_values_against_plain_loops():
    output = _output()
    opacities = output.opacity.flatten().tolist()
    orient = sum(output.orientation.flatten().tolist()) / sum(o > 0 for o in opacities)
    sparsity = sum(math.sqrt(o * o + 0.01) for o in opacities) / len(opacities)
    clamped = [min(max(o, 1e-3), 1 - 1e-3) for o in opacities]
    opaque = sum(-(o * math.log(o) + (1 - o) * math.log(1 - o)) for o in clamped) / len(clamped)
    variances = [z for z, o in zip(output.z_variance.flatten().tolist(), opacities) if o > 0.5]
    assert float(losses.orientation(output)) == pytest.approx(orient)
    assert float(losses.sparsity(output)) == pytest.approx(sparsity)
    assert float(losses.opaqueness(output)) == pytest.approx(opaque)
    assert float(losses.depth_variance(output)) == pytest.approx(sum(variances) / len(variances))


def test_convexity_against_cross_products():
    output = _output()
    small = F.interpolate(output.normal.permute(0, 3, 1, 2), (8, 8), mode="bilinear")
    n = small.permute(0, 2, 3, 1)
    total = 0.0
    for b in range(2):
        for i in range(8):
            for j in range(7):
                total += float(torch.linalg.cross(n[b, i, j], n[b, i, j + 1])[2]) / (2 * 56)
                total += float(torch.linalg.cross(n[b, j + 1, i], n[b, j, i])[2]) / (2 * 56)
    assert float(losses.convexity(output)) == pytest.approx(-total)


def test_convexity_prefers_a_sphere_over_a_bowl():
    """From the front, camera on +x: normals of a sphere point right (+y) on the right side."""
    rows, columns = torch.meshgrid(
        torch.linspace(0.7, -0.7, 8), torch.linspace(-0.7, 0.7, 8), indexing="ij"
    )
    depth = (1 - rows**2 - columns**2).clamp(min=0).sqrt()
    sphere = torch.stack([depth, columns, rows], -1)[None]
    bowl = torch.stack([depth, -columns, -rows], -1)[None]
    values = [
        float(losses.convexity(dataclasses.replace(_output(), normal=(n + 1) / 2)))
        for n in (sphere, bowl)
    ]
    assert values[0] < values[1]


def test_roughness_against_plain_loops():
    output = _output()
    opacity = output.opacity[..., 0].tolist()
    total, count = 0.0, 0
    for b in range(2):
        for i in range(9):
            for j in range(11):
                for k, m in ((i + 1, j), (i, j + 1)):
                    if k == 9 or m == 11 or min(opacity[b][i][j], opacity[b][k][m]) <= 0.5:
                        continue
                    pair = [
                        F.normalize(2 * output.normal[b, y, x] / opacity[b][y][x] - 1, dim=0)
                        for y, x in ((i, j), (k, m))
                    ]
                    total += float((pair[0] - pair[1]).norm())
                    count += 1
    assert count > 20
    assert float(losses.roughness(output)) == pytest.approx(total / count, abs=1e-3)


def test_gradients_of_roughness():
    """In normals alone, exact, and none from pixels that are not opaque."""
    output = _output()
    normal = output.normal.requires_grad_()

    def value(normal, opacity):
        return losses.roughness(dataclasses.replace(output, normal=normal, opacity=opacity))

    assert torch.autograd.gradcheck(lambda n: value(n, output.opacity), normal)
    (grad,) = torch.autograd.grad(value(normal, output.opacity), normal)
    assert (grad[(output.opacity <= 0.5).expand_as(grad)] == 0).all()
    # What a pixel's opacity is changes nothing while its normal stays.
    share = torch.full_like(output.opacity, 0.9).requires_grad_()
    unit = F.normalize(2 * output.normal.detach() - output.opacity, dim=-1)
    (grad,) = torch.autograd.grad(value((unit + 1) / 2 * share, share), share)
    torch.testing.assert_close(grad, torch.zeros_like(grad), atol=1e-12, rtol=0)


def test_a_plane_is_smooth_and_a_step_between_objects_is_left_alone():
    normal = torch.zeros(1, 6, 7, 3)
    normal[..., 0] = 1.0
    opacity = torch.full((1, 6, 7, 1), 0.8)
    plane = dataclasses.replace(_output(), normal=(normal + 1) / 2 * opacity, opacity=opacity)
    assert float(losses.roughness(plane)) == 0
    normal[:, :, 3:] = torch.tensor([0.0, 1.0, 0.0])
    crease = dataclasses.replace(plane, normal=(normal + 1) / 2 * opacity)
    assert float(losses.roughness(crease)) == pytest.approx(2**0.5 * 6 / (6 * 6 + 5 * 7), rel=1e-3)
    opacity = opacity.clone()
    opacity[:, :, 3] = 0.4
    apart = dataclasses.replace(plane, normal=(normal + 1) / 2 * opacity, opacity=opacity)
    assert float(losses.roughness(apart)) == 0


def test_official_weights():
    weights = {name: w for name, (_, w) in regularizers(_output(), LossConfig(), 0).items()}
    assert weights == {
        "orient": 0.1, "sparsity": 0.15, "opaque": 0.1, "z_variance": 1.0, "convex": 1.0,
    }  # fmt: skip
    late = regularizers(_output(), LossConfig(), 3000)
    assert "sparsity" not in late and late["convex"][1] == 1.0


@pytest.mark.parametrize("n_samples, opacity_scale", [(0, 0.0), (300, 0.0), (300, 0.4)])
def test_nothing_opaque_is_finite(n_samples, opacity_scale):
    output = _output(n_samples, opacity_scale)
    for field in ("opacity", "z_variance", "normal", "orientation"):
        getattr(output, field).requires_grad_()
    terms = regularizers(output, LossConfig(lambda_roughness=1.0), 0)
    sum(value * weight for value, weight in terms.values()).backward()
    assert terms["z_variance"][0].item() == 0.0
    assert all(value.isfinite() for value, _ in terms.values())
    for field in ("opacity", "z_variance", "normal", "orientation"):
        assert getattr(output, field).grad.isfinite().all()
