"""When a step is held by a graph, and when graphs go: with graphs that are only pretended."""

from types import SimpleNamespace

import pytest
import torch

from dsd_fast.graphs import CannotCapture, GraphCache, Held
from dsd_fast.scene.protocol import GraphKey
from dsd_fast.tasks import step_graphs
from dsd_fast.tasks.step_graphs import StepGraphs


class Plan:
    """Enough of one: a kind, and a value that is taken over."""

    def __init__(self, kind: str, value: int) -> None:
        self.kind, self.value = kind, value

    def copy_(self, other: "Plan") -> None:
        self.value = other.value


class Steps:
    """Steps of `StepGraphs`, and what came of them."""

    def __init__(self, monkeypatch) -> None:
        self.log: list[str] = []
        self.seen: list[tuple[float, int]] = []
        self.fails: RuntimeError | None = None
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
        monkeypatch.setattr(step_graphs, "give_up_pool", lambda: self.log.append("pool"))
        monkeypatch.setattr(GraphCache, "capture", lambda cache, *rest: self.capture(cache, *rest))
        engine = SimpleNamespace(release_graphs=lambda: self.log.append("engine"))
        model = SimpleNamespace(engine=engine)
        self.graphs = StepGraphs(torch.device("cpu"), model, captures=True)

    def capture(self, cache, key, function, device) -> Held:
        if self.fails is not None:
            raise self.fails
        self.log.append("captured")
        cache[key] = Held(SimpleNamespace(replay=function), None)
        return cache[key]

    def __call__(self, value=0.0, size=1, rooms=(10,), form=1, kind="a", weights=("dsd",)) -> bool:
        def part(there, plan) -> None:
            self.seen.append((float(there["x"][0]), plan.value))

        tensors = {"x": torch.full((size,), value)}
        scenes = None if rooms is None else (GraphKey(form, rooms),)
        return self.graphs.run(part, tensors, Plan(kind, int(value)), weights, scenes)


@pytest.fixture
def steps(monkeypatch) -> Steps:
    return Steps(monkeypatch)


def test_the_first_step_of_a_kind_runs_and_the_next_is_replayed_with_its_own_numbers(steps) -> None:
    assert [steps(float(i)) for i in range(3)] == [False, True, True]
    assert steps.seen == [(0.0, 0), (1.0, 1), (2.0, 2)] and steps.log == ["captured"]
    # Another kind of plan has a first step too, without whose memory it cannot be.
    assert [steps(3.0, kind="b"), steps(4.0, kind="b")] == [False, True]
    assert steps.log == ["captured", "engine", "pool", "captured"]
    assert [steps(5.0), steps(6.0, kind="b")] == [True, True], "both kinds are held now"
    assert steps.log.count("captured") == 3 and steps.seen[-2:] == [(5.0, 5), (6.0, 6)]


def test_nothing_is_held_before_the_scene_is_settled(steps) -> None:
    assert not any(steps(rooms=None) for _ in range(3))
    assert steps.log == []
    assert steps(), "it has run without a graph"


def test_other_weights_are_another_graph_beside_the_first(steps) -> None:
    for weights in (("dsd",), ("dsd",), ("dsd", "convex"), ("dsd",)):
        steps(weights=weights)
    assert steps.log == ["captured", "captured"] and len(steps.graphs._graphs) == 2


@pytest.mark.parametrize(
    "change, log",
    [
        ({"form": 2}, []),
        ({"rooms": (5,)}, []),
        ({"rooms": (20,)}, ["engine", "pool"]),
    ],
    ids=["form", "less room", "more room"],
)
def test_graphs_of_another_scene_go_and_their_pool_if_it_is_too_small(steps, change, log) -> None:
    steps()
    assert steps()
    assert steps(**change)
    assert steps.log == ["captured", *log, "captured"] and len(steps.graphs._graphs) == 1


def test_graphs_of_another_size_go_with_their_pool(steps) -> None:
    for _ in range(2):
        steps()
    assert not steps(size=2), "a first step"
    assert steps.log == ["captured", "engine", "pool"]
    assert steps(size=2) and steps(size=1), "both have run once"
    assert steps.log[3:] == ["captured", "engine", "pool", "captured"]


def test_a_step_that_no_graph_can_hold_runs_without(steps, caplog) -> None:
    steps.fails = CannotCapture("it waits")
    assert [steps(float(i)) for i in range(2)] == [False, False]
    assert steps.seen == [(0.0, 0), (1.0, 1)] and not steps.graphs.captures
    assert "a step cannot be held by a CUDA graph, running without: it waits" in caplog.text


def test_memory_that_runs_out_is_no_matter_of_graphs(steps) -> None:
    steps()
    steps.fails = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        steps()
    assert steps.graphs.captures
