import dataclasses

import pytest
import tyro

from dsd_fast.scene.losses import LossConfig
from dsd_fast.schedules import Schedule, ScheduleValue


@pytest.mark.parametrize("value", [1, 0.1, -2.5])
def test_constant(value):
    schedule = Schedule.parse(value)
    assert schedule(0) == schedule(10**6, epoch=9) == schedule.maximum == value


@pytest.mark.parametrize(("step", "expected"), [(0, 0.15), (1500, 0.075), (3000, 0.0), (9999, 0.0)])
def test_official_sparsity(step, expected):
    assert Schedule.parse([0, 0.15, 0.0, 3000])(step) == pytest.approx(expected)


def test_three_numbers_start_at_zero():
    assert Schedule.parse((2.0, 4.0, 100)) == Schedule.parse((0, 2.0, 4.0, 100))


def test_float_end_counts_epochs():
    by_epoch, by_step = Schedule.parse([0, 1.0, 3.0, 10.0]), Schedule.parse([0, 1.0, 3.0, 10])
    assert by_epoch(1000, epoch=5) == 2.0
    assert by_step(5, epoch=1000) == 2.0


def test_segments():
    schedule = Schedule.parse([10, 0.0, 1.0, 20, 5.0, 30, 5.0, 40])
    values = [schedule(step) for step in (0, 10, 15, 20, 25, 30, 35, 100)]
    assert values == [0.0, 0.0, 0.5, 1.0, 3.0, 5.0, 5.0, 5.0]
    assert schedule.maximum == 5.0


def test_segment_is_chosen_by_step_even_where_epochs_count():
    schedule = Schedule.parse([0, 0.0, 1.0, 10, 2.0, 20.0])
    assert schedule(10, epoch=15) == 1.5
    assert schedule(9, epoch=15) == pytest.approx(0.9)


@pytest.mark.parametrize("value", [[1], [1, 2], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6], []])
def test_wrong_length(value):
    with pytest.raises(ValueError, match="numbers"):
        Schedule.parse(value)


@pytest.mark.parametrize("value", [[5, 0.0, 1.0, 5], [0, 0.0, 1.0, 9, 2.0, 3]])
def test_steps_must_grow(value):
    with pytest.raises(ValueError, match="steps must grow"):
        Schedule.parse(value)


@pytest.mark.parametrize("value", ["1000", [0, "a", 1, 2], None, True])
def test_wrong_type(value):
    with pytest.raises(TypeError, match="expected"):
        Schedule.parse(value)


@dataclasses.dataclass
class _Config:
    # A schedule.
    weight: ScheduleValue = (0, 0.15, 0.0, 3000)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], (0, 0.15, 0.0, 3000)),
        (["--weight", "2"], 2),
        (["--weight", "0.5"], 0.5),
        (["--weight", "0", "1.0", "0.5", "100"], (0, 1.0, 0.5, 100)),
        (["--weight", "0", "1.0", "0.5", "100."], (0, 1.0, 0.5, 100.0)),
    ],
)
def test_flags_keep_the_type_of_numbers(arguments, expected):
    value = tyro.cli(_Config, args=arguments).weight
    assert value == expected
    if isinstance(value, tuple):
        assert [type(number) for number in value] == [type(number) for number in expected]


def test_official_weights_parse():
    weights = [Schedule.parse(value)(0) for value in dataclasses.astuple(LossConfig())]
    assert weights == [1.0, 0.1, 0.15, 0.1, 1.0, 1.0, 0.0]
