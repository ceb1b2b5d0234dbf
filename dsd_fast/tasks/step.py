"""One step of a run, or of several runs side by side: chance on the host, the rest on the device.

The host draws cameras, lights, jitter and noise levels and sends them in one piece; the device
renders, encodes, guides, goes back and updates the parameters. On CUDA that second part is held by
CUDA graphs (`StepGraphs`). Numbers are drawn in the same order with and without graphs.

Several runs differ in their seed alone. Each draws as it would alone; their rows share the UNet's
batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, Protocol

import torch
from torch import Tensor

from dsd_fast.config import TrainConfig
from dsd_fast.guidance import Guidance, Plan, distillation_loss
from dsd_fast.run.memory import PhaseMemory
from dsd_fast.run.state import TrainState
from dsd_fast.scene.cameras import CameraBatch
from dsd_fast.scene.protocol import GraphKey, Seen
from dsd_fast.schedules import Schedule
from dsd_fast.tasks.step_graphs import StepGraphs
from dsd_fast.upload import Pack

# Figures of every task: of the gradients, and of the optimizer.
NORMS = ("loss", "guidance_norm", "gradient_norm")
SCALING = ("loss_scale", "skipped", "bad_run")

# By name: of the host, or on the device, where a CUDA graph finds them.
Weights = Mapping[str, float] | Mapping[str, Tensor]


class Cameras(Protocol):
    """Where the views of a step come from."""

    def sample(self, step: int, generator: torch.Generator) -> CameraBatch:
        """On the CPU; the angles are those of the views that are guided."""
        ...


@dataclass(frozen=True)
class StepOutput:
    """What a step tells about one run; reading `values` waits for the device."""

    # float32 on the device, one for each of `names`; the next step writes to it.
    numbers: Tensor
    names: tuple[str, ...]
    # The losses that did not count.
    left_out: frozenset[str]
    # Means of the levels t and t_delta.
    t: float
    t_delta: float
    # Height of the pictures.
    height: int

    def values(self) -> dict[str, float]:
        """The numbers by name, losses of weight zero left out, in one transfer."""
        named = zip(self.names, self.numbers.tolist(), strict=True)
        return {name: v for name, v in named if name not in self.left_out}


@dataclass(frozen=True)
class Drawn:
    """What chance decided for one run, on the CPU."""

    views: CameraBatch
    draws: dict[str, Tensor]  # of the scene
    noise: Tensor | None  # of the posterior
    t: Tensor
    t_delta: Tensor
    chance: dict[str, Tensor]  # of the guidance, beside its levels

    def tensors(self) -> dict[str, Tensor]:
        """What the device needs of it, by name."""
        noise = {} if self.noise is None else {"noise": self.noise}
        return {**self.views.tensors(), **self.draws, **noise}

    def replaced(self, tensors: Mapping[str, Tensor]) -> Drawn:
        """The same with tensors on the device."""
        views = replace(self.views, **{name: tensors[name] for name in self.views.tensors()})
        draws = {name: tensors[name] for name in self.draws}
        return replace(self, views=views, draws=draws, noise=tensors.get("noise"))


class TrainStep:
    """Steps of runs that differ in their seed alone.

    Args:
        states: the runs, all at the same step.
        guidance: of all of them; item i of a batch is of run i. For one run its own.
        cameras: of each.
        capture: hold the device's part in CUDA graphs where that is possible.
        phase: told of each phase of a step that is not replayed.

    A task whose scenes have more to say than the guidance has a class of its own, with `losses` and
    `figures`, and methods for what they are.
    """

    # Names of all losses, the guidance's first.
    losses: tuple[str, ...] = ("dsd",)
    # Beside the losses, what a step tells of a run, in its order.
    figures: tuple[str, ...] = (*NORMS, *SCALING)

    def __init__(
        self,
        cfg: TrainConfig,
        states: Sequence[TrainState],
        guidance: Guidance,
        cameras: Cameras,
        device: torch.device,
        capture: bool = True,
        phase: PhaseMemory | None = None,
    ) -> None:
        self.cfg, self.states, self.guidance = cfg, list(states), guidance
        self.cameras, self.device = cameras, device
        self.names = (*self.losses, *self.figures)
        self._phase = phase or PhaseMemory(device)
        self._dsd_weight = Schedule.parse(cfg.loss.lambda_dsd)
        self._numbers = torch.zeros(len(self.states), len(self.names), device=device)
        can_capture = guidance.can_capture and all(s.scene.can_capture for s in self.states)
        self._graphs = StepGraphs(device, guidance.model, capture and can_capture)

    def __call__(self) -> list[StepOutput]:
        """Do the step that the runs are at, and count it; what it tells, by run."""
        step = self.states[0].step
        drawn = [self._draw(state, step) for state in self.states]
        plan = self._plan(drawn)
        weights = self._weights(step)
        if self.device.type == "cuda":
            self._on_cuda(drawn, plan, weights)
        else:
            self._run(drawn, plan, weights)
        for state in self.states:
            state.step = step + 1
        return [self._told(*pair, weights) for pair in zip(self._numbers, drawn)]

    def release_graphs(self) -> None:
        """Drop the graphs of steps and UNet with their memory; the next steps make new ones."""
        if self.device.type == "cuda":
            self._graphs.release()

    def _draw(self, state: TrainState, step: int) -> Drawn:
        """In the official order: cameras, scene, posterior, levels; then what else the guidance
        draws."""
        views = self.cameras.sample(step, state.rng.cameras)
        draws = state.scene.draw(views, step, state.rng.sampler)
        n_items, generator, noise = len(views.elevation_deg), state.rng.guidance, None
        if self.cfg.guidance.sample_posterior and not state.scene.is_latent:
            noise = self.guidance.model.draw_posterior(n_items, generator)
        t, t_delta = self.guidance.levels(n_items, step, generator)
        chance = self.guidance.draw_noise(n_items, generator)
        return Drawn(views, draws, noise, t, t_delta, chance)

    def _plan(self, drawn: Sequence[Drawn]) -> Plan:
        """What guidance is to do for the views of all runs."""
        chance = {name: torch.cat([d.chance[name] for d in drawn]) for name in drawn[0].chance}
        return self.guidance.plan_levels(
            torch.cat([d.views.elevation_deg for d in drawn]),
            torch.cat([d.views.azimuth_deg for d in drawn]),
            torch.cat([d.t for d in drawn]),
            torch.cat([d.t_delta for d in drawn]),
            chance,
            drawn[0].views.anchored,
        )

    def _run(self, drawn: Sequence[Drawn], plan: Plan, weights: Weights) -> None:
        """The device's part; what it tells of each run goes to `_numbers`."""
        seen, latents = [], []
        for state, d in zip(self.states, drawn):
            with self._phase("render"):
                seen.append(state.scene.render(d.views, d.draws))
            with self._phase("encode"):
                rgb = self._guided(seen[-1])
                is_latent = state.scene.is_latent
                latents.append(rgb if is_latent else self.guidance.encode(rgb, d.noise))
        with self._phase("guidance"):
            if self.guidance.needs_surface:
                plan = self._seeing(plan, drawn, seen)
            guided = self.guidance.at_plan(torch.cat(latents).detach(), plan)
        gradients = guided.grad.split([len(part) for part in latents])
        told = [
            self._update(*of_run, weights)
            for of_run in zip(self.states, drawn, seen, latents, gradients)
        ]
        missing = self._numbers.new_full((), float("nan"))
        columns = [[values.get(name, missing) for name in self.names] for values in told]
        flat = [value.detach().reshape(()).float() for column in columns for value in column]
        self._numbers.copy_(torch.stack(flat).view_as(self._numbers))

    def _update(
        self,
        state: TrainState,
        drawn: Drawn,
        seen: Seen,
        latents: Tensor,
        gradient: Tensor,
        weights: Weights,
    ) -> dict[str, Tensor]:
        """Update a run's parameters by its losses; what there is to tell of it, by name."""
        losses = self._losses(state, drawn, seen, weights)
        losses["dsd"] = distillation_loss(latents, gradient)
        loss = reduce(torch.add, (weights[name] * value for name, value in losses.items()))
        optimizer = state.optimizer
        with self._phase("backward and update"):
            # One run's bad gradient leaves the others' steps alone.
            norm = optimizer.step(loss, gradient.isfinite().all(), weights.get("share"))
        return {
            **losses,
            "loss": loss,
            "guidance_norm": gradient.norm(),
            "gradient_norm": norm,
            "loss_scale": optimizer.scale,
            "skipped": optimizer.skipped,
            "bad_run": optimizer.bad_run,
            **self._figures(seen, weights),
        }

    def _on_cuda(self, drawn: Sequence[Drawn], plan: Plan, weights: dict[str, float]) -> None:
        """`_run` with what the host sends in one piece, by a graph where that is possible."""
        tensors = {"weights": torch.tensor(list(weights.values()))}
        for i, d in enumerate(drawn):
            tensors |= {f"{i}.{name}": tensor for name, tensor in d.tensors().items()}

        def device_part(there: Pack, plan: Plan) -> None:
            on_device = [
                d.replaced({name: there[f"{i}.{name}"] for name in d.tensors()})
                for i, d in enumerate(drawn)
            ]
            self._run(on_device, plan, dict(zip(weights, there["weights"].unbind())))

        if self._graphs.run(device_part, tensors, plan, tuple(weights), self._graph_keys(drawn)):
            for state, d in zip(self.states, drawn):
                state.scene.watch_replay(d.views)

    def _graph_keys(self, drawn: Sequence[Drawn]) -> tuple[GraphKey, ...] | None:
        """Of every run; None where steps shall not be captured (yet)."""
        if not self._graphs.captures:
            return None
        keys = [state.scene.graph_key(d.views) for state, d in zip(self.states, drawn)]
        return None if None in keys else tuple(keys)

    def _told(self, numbers: Tensor, drawn: Drawn, weights: Weights) -> StepOutput:
        left_out = frozenset(self.losses) - weights.keys()
        t, t_delta = (float(levels.float().mean()) for levels in (drawn.t, drawn.t_delta))
        return StepOutput(numbers, self.names, left_out, t, t_delta, drawn.views.height)

    # ---- what a task may say --------------------------------------------------------------------

    def _weights(self, step: int) -> dict[str, float]:
        """The weights of the losses that count, and the "share" of its learning rates that the
        optimizer takes, where that is not all."""
        return {"dsd": self._dsd_weight(step)}

    def _guided(self, seen: Any) -> Tensor:
        """Those of the rendered views that guidance is asked about."""
        return seen.rgb

    def _seeing(self, plan: Plan, drawn: Sequence[Drawn], seen: Sequence[Any]) -> Plan:
        """The plan, told where the guided views of all runs see the object, if there is one."""
        return plan

    def _losses(
        self, state: TrainState, drawn: Drawn, seen: Any, weights: Weights
    ) -> dict[str, Tensor]:
        """The losses that count, but for that of the guidance; 0-dim."""
        return {}

    def _figures(self, seen: Any, weights: Weights) -> dict[str, Tensor]:
        """Figures beside those of every task; 0-dim."""
        return {}
