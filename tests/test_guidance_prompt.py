"""Text rows and their combination: the tables and laws of mathematics.md 2.1, 2.3, 2.4, 3.4."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsd_fast.guidance import combine, view_embeddings
from dsd_fast.guidance.conditions.text import direction
from dsd_fast.guidance.rows import expand_rows

SIDE, FRONT, BACK, OVERHEAD = range(4)


@pytest.fixture
def views() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    text, uncond = torch.randn(2, 4, 5, 3, generator=generator)
    return text, uncond


@pytest.mark.parametrize(
    ("azimuth", "expected"),
    [
        (0, FRONT), (44.9, FRONT), (45, SIDE), (-45, SIDE), (90, SIDE), (135, SIDE), (-135, SIDE),
        (135.1, BACK), (180, BACK), (-179, BACK), (224.5, BACK), (225, SIDE), (330, FRONT),
        (720, FRONT),
    ],
)  # fmt: skip
def test_direction(azimuth: float, expected: int) -> None:
    elevation = torch.tensor([0.0, 60.0, 60.5])
    index = direction(elevation, torch.full((3,), float(azimuth)))
    assert index.tolist() == [expected, expected, OVERHEAD]


@pytest.mark.parametrize(
    ("azimuth", "front_weight", "side_weight"),
    [
        (0, -0.0001, -1.574),
        (45, -0.689, -0.689),
        (75, -1.254, -0.211),
        (90, -1.5735, -0.0005),
        (135, -1.75, -0.17),
        (180, -1.967, -0.394),
    ],
)
def test_perp_neg_weights(views, azimuth: float, front_weight: float, side_weight: float) -> None:
    """The weight of each negative, whichever of the two places it holds."""
    text, uncond = views
    for signed in (azimuth, -azimuth):
        rows, weights = view_embeddings(text, uncond, 10.0, float(signed))
        by_view = {}
        for row, weight in zip(rows[2:], weights[0].tolist()):
            view = next(i for i in range(4) if torch.equal(row, text[i]))
            by_view[view] = weight
        assert by_view[FRONT] == pytest.approx(front_weight, abs=5e-3)
        assert by_view[SIDE] == pytest.approx(side_weight, abs=5e-3)


def test_perp_neg_positive(views) -> None:
    text, uncond = views
    rows, _ = view_embeddings(text, uncond, torch.zeros(4), torch.tensor([0.0, 45, 90, 180]))
    expected = torch.stack([text[FRONT], (text[FRONT] + text[SIDE]) / 2, text[SIDE], text[BACK]])
    torch.testing.assert_close(rows[:4], expected)
    assert torch.equal(rows[4:8], uncond[[FRONT, SIDE, SIDE, BACK]])


def test_continuous_at_the_side(views) -> None:
    text, uncond = views
    before, w_before = view_embeddings(text, uncond, 0.0, 89.999)
    after, w_after = view_embeddings(text, uncond, 0.0, 90.001)
    torch.testing.assert_close(before[0], after[0], rtol=0, atol=1e-3)
    # The negatives change places there.
    torch.testing.assert_close(w_before.flip(1), w_after, rtol=0, atol=2e-3)


def test_overhead(views) -> None:
    text, uncond = views
    rows, weights = view_embeddings(text, uncond, 80.0, 10.0)
    torch.testing.assert_close(rows[0], text[OVERHEAD])
    assert torch.equal(rows[1:], uncond[[OVERHEAD] * 3])
    assert weights.tolist() == [[0, 0]]


@pytest.mark.parametrize("perp_neg", [True, False])
def test_rows_of_a_batch(views, perp_neg: bool) -> None:
    """A batch of three holds the rows of three single calls, kind by kind."""
    text, uncond = views
    elevation, azimuth = torch.tensor([0.0, 70, 20]), torch.tensor([-30.0, 100, 170])
    rows, weights = view_embeddings(text, uncond, elevation, azimuth, perp_neg)
    singles = [view_embeddings(text, uncond, e, a, perp_neg) for e, a in zip(elevation, azimuth)]
    kinds = [slice(0, 1), slice(1, 2)] + ([slice(2, 4)] if perp_neg else [])
    expected = torch.cat([single[0][kind] for kind in kinds for single in singles])
    assert torch.equal(rows, expected)
    if perp_neg:
        assert torch.equal(weights, torch.cat([single[1] for single in singles]))
    else:
        assert weights is None
    assert expand_rows(torch.arange(3), perp_neg).tolist() == (
        [0, 1, 2, 0, 1, 2] + ([0, 0, 1, 1, 2, 2] if perp_neg else [])
    )


def naive_perp_neg(eps: Tensor, weights: Tensor, scale: float) -> Tensor:
    n = weights.shape[0]
    result = []
    for i in range(n):
        positive, uncond = eps[i], eps[n + i]
        p = positive - uncond
        total = p.clone()
        for j in range(2):
            q = eps[2 * n + 2 * i + j] - uncond
            total += weights[i, j] * (q - (q * p).sum() / (p * p).sum().clamp_min(1e-6) * p)
        result.append(uncond + scale * total)
    return torch.stack(result)


@pytest.mark.parametrize("n_items", [1, 3])
def test_combine_perp_neg(n_items: int) -> None:
    generator = torch.Generator().manual_seed(1)
    eps = torch.randn(4 * n_items, 4, 5, 7, generator=generator, dtype=torch.float64)
    weights = -torch.rand(n_items, 2, generator=generator, dtype=torch.float64)
    for scale in (1.0, 7.5):
        expected = naive_perp_neg(eps, weights, scale)
        torch.testing.assert_close(combine(eps, weights, scale), expected)
        torch.testing.assert_close(
            combine(eps.float(), weights.float(), scale), expected.float(), rtol=1e-4, atol=1e-5
        )
    assert combine(eps.half(), weights.float(), 7.5).dtype == torch.float32


def test_negatives_act_across_the_direction_only() -> None:
    """The perpendicular part never changes the component along e_y - e_0."""
    generator = torch.Generator().manual_seed(2)
    eps = torch.randn(4, 4, 6, 6, generator=generator, dtype=torch.float64)
    p = eps[0] - eps[1]
    guided = combine(eps, torch.tensor([[-1.3, -0.4]]).double(), 7.5)[0] - eps[1]
    assert float((guided * p).sum() / (p * p).sum()) == pytest.approx(7.5)


def test_combine_without_difference() -> None:
    """Equal predictions stay what they are, at any scale and weight."""
    eps = torch.randn(1, 4, 3, 3).expand(4, -1, -1, -1)
    assert torch.equal(combine(eps, torch.tensor([[-2.0, -1.0]]), 7.5), eps[:1])


def test_plain_conventions() -> None:
    generator = torch.Generator().manual_seed(3)
    positive, uncond = eps = torch.randn(2, 4, 3, 3, generator=generator)
    official = combine(eps, None, 7.5)[0]
    torch.testing.assert_close(official, positive + 7.5 * (positive - uncond))
    # One unit of scale apart (deviations.md Q1).
    torch.testing.assert_close(combine(eps, None, 8.5, standard_cfg=True)[0], official)
    assert torch.equal(combine(eps, None, 1.0, pure_conditional=True)[0], positive)


def test_errors(views) -> None:
    text, uncond = views
    with pytest.raises(ValueError, match=r"\[4,L,D\].*\(3, 5, 3\)"):
        view_embeddings(text[:3], uncond, 0.0, 0.0)
    with pytest.raises(ValueError, match="one length"):
        view_embeddings(text, uncond, torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match=r"\[4B,C,h,w\].*\(6, 4, 3, 3\)"):
        combine(torch.zeros(6, 4, 3, 3), torch.zeros(1, 2), 7.5)
    with pytest.raises(ValueError, match=r"\[2,2\].*\(1, 2\)"):
        combine(torch.zeros(8, 4, 3, 3), torch.zeros(1, 2), 7.5)
