"""One step of a run, or of several runs side by side: chance on the host, the rest on the device.

The host draws cameras, lights, jitter and noise levels and sends them in one piece; the device
renders, encodes, guides, goes back and updates the parameters. On CUDA that second part is held by
CUDA graphs: a step costs the host a copy and a launch, and the host runs ahead. A graph holds for
one picture size, number of active levels, room for samples and kind of guidance. Numbers are drawn
in the same order with and without graphs.

Several runs differ in their seed alone. Each draws as it would alone; their rows share the UNet's
batches.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dsd_fast.config import TrainConfig
from dsd_fast.graphs import give_up_pool, shared_pool, side_stream, tuned_convolutions
from dsd_fast.guidance import Guidance, Plan, distillation_loss
from dsd_fast.run.memory import PhaseMemory
from dsd_fast.run.state import TrainState
from dsd_fast.scene.cameras import CameraBatch, RandomCameras
from dsd_fast.scene.losses import REGULARIZERS, regularizer_weights
from dsd_fast.scene.renderer import Draws, RenderOutput
from dsd_fast.schedules import Schedule
from dsd_fast.upload import Pack

log = logging.getLogger(__name__)

LOSSES = ("dsd", *REGULARIZERS)
# Beside the losses, what a step tells of a run, in its order.
FIGURES = (
    "loss",
    "guidance_norm",
    "gradient_norm",
    "opacity",
    "loss_scale",
    "skipped",
    "bad_run",
    "samples",
)


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
    draws: Draws
    noise: Tensor | None  # of the posterior
    t: Tensor
    t_delta: Tensor
    chance: dict[str, Tensor]  # of the guidance, beside its levels

    def tensors(self) -> dict[str, Tensor]:
        """What the device needs of it, by name."""
        named = {
            "c2w": self.views.c2w,
            "fovy": self.views.fovy,
            "lights": self.views.light_positions,
            "shading": self.draws.shading.numbers(),
            "jitter": self.draws.jitter,
            "paint": self.draws.paint,
            "noise": self.noise,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def replaced(self, tensors: dict[str, Tensor]) -> Drawn:
        """The same with tensors on the device."""
        views = replace(
            self.views,
            c2w=tensors["c2w"],
            fovy=tensors["fovy"],
            light_positions=tensors["lights"],
        )
        draws = Draws(tensors.get("jitter"), tensors["shading"], tensors.get("paint"))
        return replace(self, views=views, draws=draws, noise=tensors.get("noise"))


class TrainStep:
    """Steps of runs that differ in their seed alone.

    Args:
        states: the runs, all at the same step.
        guidance: of all of them; item i of a batch is of run i. For one run its own.
        capture: hold the device's part in CUDA graphs where that is possible.
        phase: told of each phase of a step that is not replayed.

    Another task has a class of its own for what it draws (`_draw`), for the losses that it has
    beside that of the guidance (`_losses`), or for all that it does (`_run`).
    """

    # Names of all losses, the guidance's first.
    losses: tuple[str, ...] = LOSSES

    @property
    def names(self) -> tuple[str, ...]:
        """Of a run's numbers, in their order."""
        return (*self.losses, *FIGURES)

    def __init__(
        self,
        cfg: TrainConfig,
        states: Sequence[TrainState],
        guidance: Guidance,
        cameras: RandomCameras | None,
        device: torch.device,
        capture: bool = True,
        phase: PhaseMemory | None = None,
    ) -> None:
        self.cfg, self.states, self.guidance = cfg, list(states), guidance
        self.cameras, self.device = cameras, device
        self._phase = phase or PhaseMemory(device)
        self._dsd_weight = Schedule.parse(cfg.loss.lambda_dsd)
        self._captures = capture and self._can_capture() and guidance.can_capture
        self._numbers = torch.zeros(len(self.states), len(self.names), device=device)
        # On CUDA: where the host's numbers go, by their sizes; plans by kind; graphs by what they
        # hold for; and what has run once without a graph.
        self._inputs: dict[Hashable, Pack] = {}
        self._plans: dict[Hashable, Plan] = {}
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._warm: set[Hashable] = set()

    def __call__(self) -> list[StepOutput]:
        """Do the step that the runs are at, and count it; what it tells, by run."""
        step = self.states[0].step
        drawn = [self._draw(state, step) for state in self.states]
        plan = self.guidance.plan_levels(
            *(torch.cat(column) for column in zip(*(_of_guidance(d) for d in drawn))),
            {name: torch.cat([d.chance[name] for d in drawn]) for name in drawn[0].chance},
        )
        weights = self._weights(step)
        if self.device.type == "cuda":
            self._on_cuda(drawn, plan, weights)
        else:
            self._numbers = self._run(drawn, plan, weights)
        for state in self.states:
            state.step = step + 1
        return [
            StepOutput(
                numbers,
                self.names,
                frozenset(self.losses) - weights.keys(),
                float(d.t.float().mean()),
                float(d.t_delta.float().mean()),
                d.views.height,
            )
            for numbers, d in zip(self._numbers, drawn)
        ]

    def release_graphs(self) -> None:
        """Drop the graphs of steps and UNet with their memory; the next steps make new ones."""
        if self.device.type != "cuda":
            return
        torch.cuda.synchronize(self.device)  # one of them may still run
        self._graphs.clear()
        self.guidance.model.engine.release_graphs()
        give_up_pool()

    def _weights(self, step: int) -> dict[str, float]:
        """What a step multiplies by, by name: the weights of the losses."""
        return {"dsd": self._dsd_weight(step), **regularizer_weights(self.cfg.loss, step)}

    def _draw(self, state: TrainState, step: int) -> Drawn:
        """In the official order: cameras, level mask, occupancy, rendering, posterior, levels; then
        what else the guidance draws."""
        scene, rng = state.scene, state.rng
        views = self._views(step, rng.cameras)
        n_items = len(views.elevation_deg)
        scene.field.set_step(step)
        scene.renderer.update_occupancy(scene.field, step, rng.sampler)
        draws = scene.renderer.draw(scene.background, views, step, rng.sampler)
        noise = None
        if self.cfg.guidance.sample_posterior:
            noise = self.guidance.model.draw_posterior(n_items, rng.guidance)
        t, t_delta = self.guidance.levels(n_items, step, rng.guidance)
        chance = self.guidance.draw_noise(n_items, rng.guidance)
        return Drawn(views, draws, noise, t, t_delta, chance)

    def _views(self, step: int, generator: torch.Generator) -> CameraBatch:
        """The cameras of a step; their angles are those of the views that are guided."""
        return self.cameras.sample(step, generator)

    def _run(
        self,
        drawn: Sequence[Drawn],
        plan: Plan,
        weights: dict[str, float] | dict[str, Tensor],
    ) -> Tensor:
        """The device's part; the numbers [runs, len(names)]."""
        images, latents = [], []
        for state, d in zip(self.states, drawn):
            scene = state.scene
            with self._phase("render"):
                images.append(
                    scene.renderer.render(scene.field, scene.background, d.views, d.draws, True)
                )
            with self._phase("encode"):
                latents.append(self.guidance.encode(self._guided(images[-1].rgb), d.noise))
        with self._phase("guidance"):
            guided = self.guidance.at_plan(torch.cat(latents).detach(), plan)
        gradients = guided.grad.split([len(part) for part in latents])
        rows = []
        for state, d, image, x, gradient in zip(self.states, drawn, images, latents, gradients):
            losses = self._losses(state, d, image, weights)
            losses["dsd"] = distillation_loss(x, gradient)
            loss = sum(weights[name] * value for name, value in losses.items())
            # One run's bad gradient leaves the others' steps alone.
            with self._phase("backward and update"):
                norm = state.optimizer.step(loss, gradient.isfinite().all())
            missing = loss.new_full((), float("nan"))
            values = [losses.get(name, missing) for name in self.losses]
            values += [loss, gradient.norm(), norm, image.opacity.mean(), state.optimizer.scale]
            values += [state.optimizer.skipped, state.optimizer.bad_run, image.n_samples]
            rows.append(torch.stack([value.detach().reshape(()).float() for value in values]))
        return torch.stack(rows)

    def _guided(self, rgb: Tensor) -> Tensor:
        """Those of the rendered views [B,H,W,3] that guidance is asked about."""
        return rgb

    def _losses(
        self,
        state: TrainState,
        drawn: Drawn,
        image: RenderOutput,
        weights: Mapping[str, float | Tensor],
    ) -> dict[str, Tensor]:
        """The losses that count, but for that of the guidance."""
        return {name: REGULARIZERS[name](image) for name in weights if name != "dsd"}

    # ---- CUDA -----------------------------------------------------------------------------------

    def _on_cuda(self, drawn: list[Drawn], plan: Plan, weights: dict[str, float]) -> None:
        tensors = {"weights": torch.tensor(list(weights.values()))}
        for i, d in enumerate(drawn):
            tensors |= {f"{i}.{name}": tensor for name, tensor in d.tensors().items()}
        sizes = tuple((name, tensor.shape) for name, tensor in tensors.items())
        pack = Pack(tensors, self.device)
        if sizes in self._inputs:
            self._inputs[sizes].copy_(pack)
        else:
            self._inputs[sizes] = pack.to(self.device)
        there = self._inputs[sizes]
        if plan.kind in self._plans:
            self._plans[plan.kind].copy_(plan)
        else:
            self._plans[plan.kind] = plan
        static_plan = self._plans[plan.kind]
        on_device = [
            d.replaced({name: there[f"{i}.{name}"] for name in d.tensors()})
            for i, d in enumerate(drawn)
        ]

        def device_part() -> None:
            weights_there = dict(zip(weights, there["weights"].unbind()))
            with tuned_convolutions():
                self._numbers.copy_(self._run(on_device, static_plan, weights_there))

        rooms = self._rooms(drawn)
        warm = (sizes, plan.kind)
        if rooms is None or warm not in self._warm:
            # A first step of its kind loads code and chooses kernels, which a capture cannot. It
            # needs as much memory as a graph holds.
            if self._graphs:
                self.release_graphs()
            device_part()
            self._warm.add(warm)
            return
        levels = self._levels()
        # Graphs of other sizes, levels or rooms are not asked for again, or seldom.
        others = [key for key in self._graphs if key[:3] != (sizes, levels, rooms)]
        if any(key[0] != sizes or any(map(operator.lt, key[2], rooms)) for key in others):
            # What they leave of the pool is too small for this one's tensors, and stays there.
            self.release_graphs()
        elif others:
            torch.cuda.synchronize(self.device)  # one of them may still run
            self._graphs.clear()
        key = (sizes, levels, rooms, tuple(weights), plan.kind)
        if key not in self._graphs:
            graph = self._captured(device_part)
            if graph is None:
                device_part()
                return
            self._graphs[key] = graph
        self._graphs[key].replay()
        self._watch_replay(drawn)

    def _can_capture(self) -> bool:
        """Whether a CUDA graph can hold what the runs do, the guidance aside."""
        return all(state.scene.field.skips_rows(self.device) for state in self.states)

    def _levels(self) -> tuple[int, ...]:
        """Active levels of every run."""
        return tuple(state.scene.field.grid.n_active_levels for state in self.states)

    def _watch_replay(self, drawn: Sequence[Drawn]) -> None:
        """A graph has rendered: have its counts looked at."""
        for state, d in zip(self.states, drawn):
            state.scene.renderer.watch_replay(_n_rays(d))

    def _rooms(self, drawn: Sequence[Drawn]) -> tuple[int, ...] | None:
        """Room for the samples of every run; None where steps shall not be captured (yet)."""
        if not self._captures:
            return None
        pairs = [state.scene.renderer.rooms(_n_rays(d)) for state, d in zip(self.states, drawn)]
        rooms = tuple(room for pair in pairs for room in pair)
        return None if None in rooms else rooms

    def _captured(self, function: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
        """`function` as a graph; None, with a warning, where that does not work."""
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: a background thread (image writer, viewer) may use CUDA meanwhile.
            with torch.cuda.graph(
                graph,
                pool=shared_pool(),
                stream=side_stream(self._numbers.device.index),
                capture_error_mode="thread_local",
            ):
                function()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            log.warning("a step cannot be held by a CUDA graph, running without: %s", error)
            self._captures = False
            self._graphs.clear()
            return None
        return graph


def _n_rays(drawn: Drawn) -> int:
    return len(drawn.views) * drawn.views.height * drawn.views.width


def _of_guidance(drawn: Drawn) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return drawn.views.elevation_deg, drawn.views.azimuth_deg, drawn.t, drawn.t_delta
