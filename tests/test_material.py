import pytest
import torch
from torch.nn.functional import normalize

from dsd_fast.scene.material import MaterialConfig, Shading, albedo_color, choose_shading, shade


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _samples(n: int = 37):
    generator = _generator()
    features, points, normals = (
        torch.randn(n, 3, dtype=torch.float64, generator=generator) for _ in range(3)
    )
    return features, points, normalize(normals, dim=-1)


@pytest.mark.parametrize("n_lights", [1, 37])
def test_shading_formula(n_lights):
    features, points, normals = _samples()
    lights = torch.randn(n_lights, 3, dtype=torch.float64, generator=_generator()) * 2
    config = MaterialConfig()

    def colors(mode):
        shading = Shading(mode, config.ambient_light_color, config.diffuse_light_color)
        return shade(features, points, normals, lights, shading)

    albedo = 1 / (1 + torch.exp(-features))
    light = torch.empty(37, 1, dtype=torch.float64)
    for i in range(37):
        to_light = lights[i % n_lights] - points[i]
        light[i] = 0.9 * max(0.0, float(normals[i] @ to_light / to_light.norm())) + 0.1
    torch.testing.assert_close(colors("albedo"), albedo)
    torch.testing.assert_close(colors("textureless"), light.expand(37, 3))
    torch.testing.assert_close(colors("diffuse"), albedo * light)
    torch.testing.assert_close(albedo_color(features), albedo)


def test_light_colors_are_per_channel():
    features, points, normals = _samples()
    shading = Shading("textureless", (0.1, 0.2, 0.3), (0.0, 0.0, 0.0))
    colors = shade(features, points, normals, torch.ones(1, 3, dtype=torch.float64), shading)
    expected = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    torch.testing.assert_close(colors, expected.expand(37, 3))


def test_textureless_gives_features_zero_gradients():
    features, points, normals = _samples()
    features.requires_grad_()
    shading = Shading("textureless", (0.1,) * 3, (0.9,) * 3)
    shade(features, points, normals, torch.ones(1, 3), shading).sum().backward()
    assert features.grad is not None and not features.grad.any()


def test_training_modes_have_the_official_shares():
    generator, n = _generator(), 20000
    config = MaterialConfig()
    modes = [choose_shading(config, 1000, True, generator).mode for _ in range(n)]
    for mode, share in (("albedo", 0.7), ("textureless", 0.225), ("diffuse", 0.075)):
        assert modes.count(mode) / n == pytest.approx(share, abs=0.012)
    early = {choose_shading(config, 999, True, generator).mode for _ in range(200)}
    assert early == {"albedo"}


@pytest.mark.parametrize(
    ("step", "ambient_only", "mode"),
    [(999, False, "albedo"), (1000, False, "diffuse"), (1000, True, "albedo")],
)
def test_evaluation_mode(step, ambient_only, mode):
    config = MaterialConfig(ambient_only_on_test=ambient_only)
    assert choose_shading(config, step, training=False).mode == mode


def test_soft_shading_splits_the_light():
    shading = choose_shading(MaterialConfig(soft_shading=True), 0, True, _generator())
    assert shading.ambient[0] + shading.diffuse[0] == pytest.approx(1.0)
    assert 0 < shading.diffuse[0] < 1


def test_training_needs_a_generator():
    with pytest.raises(ValueError, match="generator"):
        choose_shading(MaterialConfig(), 0, training=True)
