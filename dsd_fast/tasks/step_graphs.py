"""The device's part of training steps on CUDA: held by graphs, where that is possible.

A step then costs the host a copy and a launch, and the host runs ahead.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from dsd_fast.diffusion import DiffusionModel
from dsd_fast.graphs import CannotCapture, GraphCache, Held, give_up_pool, tuned_convolutions
from dsd_fast.guidance import Plan
from dsd_fast.guidance.plan import PlanKind
from dsd_fast.scene.protocol import GraphKey
from dsd_fast.upload import Pack

log = logging.getLogger(__name__)

# Names and shapes of what the host sends.
Sizes = tuple[tuple[str, torch.Size], ...]
# What a step does on the device with what the host sent and planned.
DevicePart = Callable[[Pack, Plan], None]


class StepKey(NamedTuple):
    """What a graph of a step holds for."""

    sizes: Sizes
    scenes: tuple[GraphKey, ...]
    # Names of the step's weights: those of zero are left out.
    weights: tuple[str, ...]
    plan: PlanKind

    def has_less_room(self, sizes: Sizes, scenes: tuple[GraphKey, ...]) -> bool:
        """Whether tensors of its graph are smaller than others, or of other numbers of views."""
        ours, others = (
            [room for scene in of for room in scene.rooms] for of in (self.scenes, scenes)
        )
        return self.sizes != sizes or any(map(operator.lt, ours, others))


class StepGraphs:
    """Runs the device's part of steps.

    Args:
        model: whose engine has graphs in the same pool.
        captures: hold steps in graphs; False from the first one on that no graph can hold.
    """

    def __init__(self, device: torch.device, model: DiffusionModel, captures: bool) -> None:
        self.captures = captures
        self._device, self._model = device, model
        # Where the host's numbers go, by their sizes; plans by kind; and what has run once without
        # a graph.
        self._inputs: dict[Sizes, Pack] = {}
        self._plans: dict[PlanKind, Plan] = {}
        self._warm: set[tuple[Sizes, PlanKind]] = set()
        self._graphs: GraphCache[StepKey, None] = GraphCache()

    def run(
        self,
        part: DevicePart,
        tensors: Mapping[str, Tensor],
        plan: Plan,
        weights: tuple[str, ...],
        scenes: tuple[GraphKey, ...] | None,
    ) -> bool:
        """Do a step; whether it was a replay.

        Args:
            tensors: what the host sends, on the CPU.
            scenes: what a graph of each run's rendering holds for; None asks for no graph.
        """
        sizes = tuple((name, tensor.shape) for name, tensor in tensors.items())
        inputs, own_plan = self._sent(sizes, tensors), self._static(plan)

        def function() -> None:
            with tuned_convolutions():
                part(inputs, own_plan)

        if scenes is None or (sizes, plan.kind) not in self._warm:
            # A first step of its kind loads code and chooses kernels, which a capture cannot. It
            # needs as much memory as a graph holds.
            if self._graphs:
                self.release()
            function()
            self._warm.add((sizes, plan.kind))
            return False
        self._drop_others(sizes, scenes)
        key = StepKey(sizes, scenes, weights, plan.kind)
        held = self._graphs.get(key) or self._captured(key, function)
        if held is None:
            function()
            return False
        held.replay()
        return True

    def release(self) -> None:
        """Drop the graphs of steps and UNet with their memory; the next steps make new ones."""
        torch.cuda.synchronize(self._device)  # one of them may still run
        self._graphs.clear()
        self._model.engine.release_graphs()
        give_up_pool()

    def _sent(self, sizes: Sizes, tensors: Mapping[str, Tensor]) -> Pack:
        """The host's tensors on the device, for the same sizes at the same addresses."""
        pack = Pack(tensors, self._device)
        if sizes in self._inputs:
            self._inputs[sizes].copy_(pack)
        else:
            self._inputs[sizes] = pack.to(self._device)
        return self._inputs[sizes]

    def _static(self, plan: Plan) -> Plan:
        """The plan, for the same kind at the same addresses."""
        if plan.kind in self._plans:
            self._plans[plan.kind].copy_(plan)
        else:
            self._plans[plan.kind] = plan
        return self._plans[plan.kind]

    def _drop_others(self, sizes: Sizes, scenes: tuple[GraphKey, ...]) -> None:
        """Graphs of other sizes, forms or rooms are not asked for again, or seldom."""
        others = [key for key in self._graphs if (key.sizes, key.scenes) != (sizes, scenes)]
        if any(key.has_less_room(sizes, scenes) for key in others):
            # What they leave of the pool is too small for this one's tensors, and stays there.
            self.release()
        elif others:
            torch.cuda.synchronize(self._device)  # one of them may still run
            self._graphs.clear()

    def _captured(self, key: StepKey, function: Callable[[], None]) -> Held[None] | None:
        """`function` as a graph; None, with a warning, where that does not work."""
        try:
            return self._graphs.capture(key, function, self._device)
        except CannotCapture as error:
            log.warning("a step cannot be held by a CUDA graph, running without: %s", error)
            self.captures = False
            self._graphs.clear()
            return None
