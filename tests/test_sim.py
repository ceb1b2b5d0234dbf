"""Score implicit matching where all scores are known: its gradient, its theorem, what it does."""

import math

import pytest
import torch
from tiny_model import SCHEDULER

from dsd_fast.diffusion.noise_path import NoisePath, alphas_cumprod
from dsd_fast.guidance.sim import HUBER, matching_gradient, slope

PATH = NoisePath.diffusion(alphas_cumprod(SCHEDULER).double())
MEAN, SPREAD = 0.7, 0.5  # of what renderings should look like


def gaussian(mean, spread, t):
    """e(z) of N(mean, spread^2): sigma (z - alpha mean) / (alpha^2 spread^2 + sigma^2)."""
    alpha, sigma = PATH.at(t)
    return lambda z: sigma * (z - alpha * mean) / (alpha**2 * spread**2 + sigma**2)


def drawn(n, size=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, n, 2, size, size, generator=generator, dtype=torch.float64).unbind()


@pytest.mark.parametrize("c", [HUBER, 1.0, 100.0])
def test_the_gradient_is_that_of_the_formula(c):
    """Both predictions are linear in x_t, so that the way through them is a number each."""
    x, eps = drawn(3)
    t = torch.tensor([900, 500, 100])
    (alpha, sigma), n = PATH.at(t), x[0].numel()
    own = 0.3 * torch.ones_like(x)
    teacher, student = gaussian(MEAN, SPREAD, t), gaussian(own, 0.2, t)
    got = matching_gradient(x, eps, t, PATH, lambda z: (teacher(z), student(z)), c)
    k_q, k_p = (sigma / (alpha**2 * s**2 + sigma**2) for s in (SPREAD, 0.2))
    z = alpha * x + sigma * eps
    y, r = teacher(z) - student(z), student(z) - eps
    image = (1, 2, 3)
    length = (y.square().sum(image, keepdim=True) + n * c**2).sqrt()
    along = (y * r).sum(image, keepdim=True)
    want = sigma * math.sqrt(n) * ((k_q - k_p) * (r - y * along / length**2) + k_p * y) / length
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_with_the_rendering_for_the_student_it_is_sds_at_one_length():
    """What `sim` is, and `dive3d` of a student that knows the one rendering."""
    x, eps = drawn(3)
    t = torch.tensor([900, 500, 100])
    alpha, sigma = PATH.at(t)
    teacher = gaussian(MEAN, SPREAD, t)
    got = matching_gradient(x, eps, t, PATH, lambda z: (teacher(z), (z - alpha * x) / sigma))
    sds = teacher(alpha * x + sigma * eps) - eps
    torch.testing.assert_close(got, slope(sds))
    lengths = got.square().mean((1, 2, 3)).sqrt()
    torch.testing.assert_close(lengths, torch.ones(3, dtype=torch.float64), rtol=1e-4, atol=0)


def test_the_slope_is_short_near_rest_and_never_long():
    y = torch.tensor([1e-9, 1e-3, 1.0, 1e6], dtype=torch.float64).view(4, 1)
    torch.testing.assert_close(slope(y, 1.0)[:2], y[:2], rtol=1e-6, atol=0)
    assert (slope(y, 1.0) < 1).all() and slope(y, 1.0)[3] == pytest.approx(1)
    assert torch.equal(slope(torch.zeros(2, 3)), torch.zeros(2, 3))


@pytest.mark.parametrize("c", [0.1, 2.0])
@pytest.mark.parametrize("t", [800, 300])
def test_it_is_the_gradient_of_the_divergence(t, c):
    """Theorem 3.1: of w E d(s_p(z) - s_q(z)) by the mean of p = N(m, s^2), at fixed places z ~ p_t.

    Numbers of one image are alike, so that the derivative is one by m for all of them; both sides
    are averages, the left over x and eps, the right over z.
    """
    m, s, n = 0.1, 0.3, 400_000
    level = torch.tensor([t])
    alpha, sigma = (float(v) for v in PATH.at(level))
    generator = torch.Generator().manual_seed(0)
    x, eps, place = (
        torch.randn(n, 3, 1, 1, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    teacher, student = gaussian(MEAN, SPREAD, level), gaussian(m, s, level)
    by_x = matching_gradient(
        m + s * x, eps, level.expand(n), PATH, lambda z: (teacher(z), student(z)), c
    )
    got = by_x.sum((1, 2, 3)).mean()

    mean = torch.tensor(m, dtype=torch.float64, requires_grad=True)
    z = alpha * m + math.sqrt(alpha**2 * s**2 + sigma**2) * place
    y = (teacher(z) - gaussian(mean, s, level)(z)) / sigma  # s_p - s_q
    distance = (y.square().sum((1, 2, 3)) + 3 * (c / sigma) ** 2).sqrt()
    divergence = sigma**2 / alpha * math.sqrt(3) * distance.mean()
    divergence.backward()
    assert float(got) == pytest.approx(float(mean.grad), rel=0.02)


def test_the_divergence_falls_to_nothing():
    """A cloud of points, with its mean and spread for the student, becomes what it is to be."""
    generator = torch.Generator().manual_seed(0)
    x = -1 + 0.05 * torch.randn(512, 1, 2, 2, generator=generator, dtype=torch.float64)

    def divergence():
        levels = torch.arange(20, 980, 40)
        mean, spread = x.mean(), x.std()
        total = 0.0
        for t in levels:
            at = t.view(1)
            alpha, sigma = PATH.at(at)
            z = alpha * x + sigma * torch.randn(x.shape, generator=generator, dtype=x.dtype)
            y = gaussian(MEAN, SPREAD, at)(z) - gaussian(mean, spread, at)(z)
            total += float(y.square().flatten(1).mean(1).sqrt().mean())
        return total / len(levels)

    start = divergence()
    for step in range(600):
        t = torch.randint(20, 981, (len(x),), generator=generator)
        eps = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        teacher, student = gaussian(MEAN, SPREAD, t), gaussian(x.mean(), x.std(), t)
        rate = 0.03 if step < 400 else 0.005
        x = x - rate * matching_gradient(
            x, eps, t, PATH, lambda z, a=teacher, b=student: (a(z), b(z))
        )
    assert divergence() < 0.1 * start
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.03)
    assert float(x.std()) == pytest.approx(SPREAD, rel=0.15)
