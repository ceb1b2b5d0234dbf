import torch
from torch.nn.functional import normalize

from dsd_fast.scene.background import Background, BackgroundConfig


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _dirs(b: int = 2, h: int = 3, w: int = 5) -> torch.Tensor:
    return normalize(torch.randn(b, h, w, 3, generator=_generator(1)), dim=-1)


def _background(**changes) -> Background:
    return Background(BackgroundConfig(**changes), _generator())


def test_network_has_the_official_shape():
    weights = dict(_background().named_parameters())
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    assert shapes == {
        "network.layers.0.weight": (16, 9),
        "network.layers.2.weight": (16, 16),
        "network.layers.4.weight": (3, 16),
    }
    assert all(float(w.detach().abs().max()) <= w.shape[1] ** -0.5 for w in weights.values())


def test_learned_map(device):
    background = _background(random_aug=False).to(device)
    dirs = _dirs().to(device)
    colors = background(dirs, training=True)
    x, y, z = dirs.double().unbind(-1)
    one = torch.ones_like(x)
    harmonics = torch.stack(
        [
            0.28209479177387814 * one,
            -0.48860251190291987 * y,
            0.48860251190291987 * z,
            -0.48860251190291987 * x,
            1.0925484305920792 * x * y,
            -1.0925484305920792 * y * z,
            0.94617469575755997 * z * z - 0.31539156525251999,
            -1.0925484305920792 * x * z,
            0.54627421529603959 * (x * x - y * y),
        ],
        dim=-1,
    )
    hidden = harmonics
    first, second, third = (w.double() for w in background.parameters())
    hidden = (hidden @ first.T).relu()
    hidden = (hidden @ second.T).relu()
    expected = torch.sigmoid(hidden @ third.T).float()
    torch.testing.assert_close(colors, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(colors, background(dirs, training=False))
    colors.sum().backward()
    assert all(w.grad.isfinite().all() and w.grad.any() for w in background.parameters())


def test_random_color_is_one_per_view_and_half_of_the_time():
    background, generator = _background(), _generator()
    n_random = 0
    for _ in range(200):
        colors = background(_dirs(), True, background.draw(2, generator))
        flat = colors.reshape(2, -1, 3)
        if bool((flat == flat[:, :1]).all()):
            n_random += 1
            assert not torch.equal(flat[0, 0], flat[1, 0])
    assert 75 <= n_random <= 125


def test_random_color_gives_zero_gradients_not_none():
    background = _background(random_aug_prob=1.0)
    background(_dirs(), True, background.draw(2, _generator())).sum().backward()
    assert all(w.grad is not None and not w.grad.any() for w in background.parameters())


def test_evaluation_color():
    background = _background(eval_color=(1.0, 0.5, 0.0))
    colors = background(_dirs(), training=False)
    assert torch.equal(colors, torch.tensor([1.0, 0.5, 0.0]).expand(2, 3, 5, 3))
