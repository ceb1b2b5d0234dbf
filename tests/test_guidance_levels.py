"""Noise levels of a step: the tables of mathematics.md 3.1, 3.2, 3.3, 3.6."""

from __future__ import annotations

import pytest
import torch

from dsd_fast.guidance import timestep
from dsd_fast.guidance.levels import n_nodes, ode_grid, random_timesteps, shifted_level

LOW, HIGH = 0.32, 0.98


@pytest.mark.parametrize(
    ("step", "t"),
    [
        (0, 980), (1, 973), (100, 913), (151, 898), (500, 832), (753, 798), (1000, 771),
        (1813, 698), (2000, 684), (3333, 598), (5000, 513), (5312, 498), (7500, 408), (7750, 398),
        (9000, 353), (9999, 320), (10000, 320),
    ],
)  # fmt: skip
def test_annealed_timestep(step: int, t: int) -> None:
    assert timestep(step, 10000, LOW, HIGH) == t


def test_linear_annealing_and_horizon() -> None:
    assert timestep(50, 100, 0.25, 0.75, sqrt=False) == 500
    # A run that goes on past its horizon keeps the lowest level.
    assert timestep(20000, 10000, LOW, HIGH) == 320
    assert timestep(0, 10, 0.0, 1.0) == 999
    with pytest.raises(ValueError, match="max_steps"):
        timestep(0, 0, LOW, HIGH)


@pytest.mark.parametrize(
    ("t", "room"), [(980, 19), (937, 61), (800, 48), (600, 28), (400, 8), (330, 1), (320, 0)]
)
def test_room_above_t(t: int, room: int) -> None:
    level = torch.tensor([t, t])
    lowest, highest = shifted_level(level, torch.tensor([0.0, 1 - 1e-9]).double(), LOW).tolist()
    assert lowest == t
    # The upper end itself is not reached: u < 1.
    assert highest in (t + room - 1, t + room) and highest <= 999


def test_level_never_falls_below_t_nor_above_the_last() -> None:
    generator = torch.Generator().manual_seed(0)
    t = torch.randint(0, 1000, (2000,), generator=generator)
    t_delta = shifted_level(t, torch.rand(2000, generator=generator), LOW)
    assert bool((t_delta >= t.clamp_min(1)).all()) and int(t_delta.max()) <= 999
    assert int(shifted_level(torch.tensor([3]), torch.tensor([0.5]), LOW, delta_min=10)) == 10


def test_grid() -> None:
    assert ode_grid(10) == (999, 899, 799, 699, 599, 499, 399, 299, 199, 99, 0)
    assert ode_grid(9)[:3] == (999, 888, 777)
    assert ode_grid(1) == (999, 0)
    with pytest.raises(ValueError, match="n_ddim_steps"):
        ode_grid(0)


@pytest.mark.parametrize(
    ("t_delta", "k"),
    [
        (999, 0), (998, 1), (899, 1), (898, 2), (799, 2), (798, 3), (699, 3), (698, 4), (599, 4),
        (598, 5), (499, 5), (498, 6), (399, 6), (398, 7), (320, 7),
    ],
)  # fmt: skip
def test_calls_of_a_trajectory(t_delta: int, k: int) -> None:
    assert n_nodes(t_delta, ode_grid(10)) == k


def test_random_timesteps() -> None:
    t = random_timesteps(5000, 0.4, 0.41, torch.Generator().manual_seed(0))
    assert t.unique().tolist() == list(range(400, 411))
    with pytest.raises(ValueError, match="min_step_percent"):
        random_timesteps(1, 0.5, 0.4, torch.Generator())
