"""Whole iterations of training, at the official sizes and at any point of a run.

Measured is what `dsd_fast.train` repeats: cameras, rendering, VAE encoding, guidance, backward pass
and update, by the settings of the `dsd` preset at one width. The field stays the initial blob
(learning rates are zero, updates are computed all the same), so that sample counts stay comparable;
the occupancy grid is that of the blob, and is updated as often as in a run. Logging, previews and
checkpoints are left out.

A run spends UNet rows once on each trajectory that it keeps. Here that is done before the window,
as a run that came this far has done it: `prepared_rows` counts it. `fill_rows` are those spent
within the window: there, time is that of a steady state only if they are few.
"""

from __future__ import annotations

import copy
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.models import CountingEngine, Subject
from benchmarks.peers import OFFICIAL, RECORDED_ON, OfficialIteration
from benchmarks.timing import Times
from dsd_fast.config import TrainConfig, preset
from dsd_fast.guidance import DSDGuidance, seed_noise
from dsd_fast.rng import RngStreams
from dsd_fast.run.optimizer import Adam
from dsd_fast.run.state import TrainState
from dsd_fast.scene.cameras import RandomCameras
from dsd_fast.scene.field_scene import FieldScene
from dsd_fast.tasks.text import FieldStep

WIDTHS = (128, 512)
# Iterations before any is timed: the renderer learns its room from the first ones, engines capture.
WARM_UP = 32
MIN_ITERATIONS = 20
# Iterations of the pass that looks inside, with a wait after every phase.
INSTRUMENTED = 10
# Refreshes of the occupancy grid before the first step: a stored value is that of a random point,
# and grows to that of the densest one seen lately.
OCCUPANCY_UPDATES = 16


def configuration(width: int, trajectory: str | None = None) -> TrainConfig:
    """The `dsd` preset with pictures of one width and a field that stays as it is."""
    cfg = preset("dsd")
    cfg.prompt = "an armchair"
    cfg.cameras.width = cfg.cameras.height = width
    cfg.cameras.batch_size = 1
    cfg.cameras.resolution_milestones = ()
    cfg.optimizer.geometry_lr = cfg.optimizer.background_lr = 0.0
    if trajectory is not None:
        cfg.guidance.trajectory = trajectory
    return cfg


class Loop:
    """Iterations of a run, from `step` on. This is the place that knows what an iteration is.

    Call it for one; it does not wait for the device.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        subject: Subject,
        device: torch.device,
        step: int = 0,
        capture: bool = True,
    ) -> None:
        rng = RngStreams(cfg.seed)
        scene = FieldScene(cfg, rng.init).to(device)
        model = subject.model
        noise = seed_noise(rng.noise, (1, model.latent_channels, *[model.latent_size] * 2))
        optimizer = Adam(scene.trainables(), cfg.optimizer.betas, cfg.optimizer.eps, device)
        self.cfg, self.device = cfg, device
        self.guidance = DSDGuidance(cfg.guidance, model, subject.prompts, noise, cfg.max_steps)
        self.state = TrainState(scene, optimizer, noise, rng, model, step)
        self.cameras = RandomCameras(cfg.cameras, cfg.guidance.lattice)
        self._step = FieldStep(
            cfg, [self.state], self.guidance, self.cameras, device, capture=capture
        )
        scene.field.set_step(step)
        for _ in range(OCCUPANCY_UPDATES):
            # Step 0 refreshes every cell.
            scene.renderer.update_occupancy(scene.field, 0, rng.sampler)

    def __call__(self) -> Tensor:
        """One iteration; the number of samples that it kept, 0-dim on the device."""
        (output,) = self._step()
        # The next iteration writes to the numbers.
        return output.numbers[output.names.index("samples")].clone()

    def without_graphs(self) -> Loop:
        """The same iterations in plain calls, which can be looked into; the graphs go."""
        self._step.release_graphs()
        other = copy.copy(self)
        other._step = FieldStep(
            self.cfg, [self.state], self.guidance, self.cameras, self.device, capture=False
        )
        return other

    def prepare_trajectories(self) -> None:
        """Fill the guidance's cache of trajectories, if it has one, as far as the next step's t."""
        cfg, guidance, model = self.cfg.guidance, self.guidance, self.guidance.model
        if cfg.trajectory == "exact":
            return
        x = torch.zeros(1, model.latent_channels, *[model.latent_size] * 2, device=model.device)
        t, _ = guidance.levels(1, self.state.step, torch.Generator().manual_seed(0))
        # The bins' middles with Perp-Neg; without, front and back are bins of their own.
        width = 180 / cfg.azimuth_bins
        azimuths = [0.0, *((i + 0.5) * width for i in range(cfg.azimuth_bins)), 180.0]
        for elevation, azimuth in [*((0.0, azimuth) for azimuth in azimuths), (90.0, 0.0)]:
            guidance.at_levels(x, torch.tensor([elevation]), torch.tensor([azimuth]), t, t)

    @contextmanager
    def counting_fills(self, counter: CountingEngine) -> Iterator[None]:
        """Within it the rows that the cache of trajectories asks for count as `fill_rows`."""

        def within(function: Callable) -> Callable:
            def call(*args: Any, **kwargs: Any) -> Any:
                with counter.filling():
                    return function(*args, **kwargs)

            return call

        with _replaced(self.guidance, "_predict_bin", within):
            yield

    def pieces(self) -> list[tuple[object, str, str]]:
        """(object, method, phase) of what an iteration calls, none within another of its phase."""
        state = self.state
        return [
            (self.cameras, "sample", "cameras"),
            (state.scene.renderer, "render", "render"),
            (self.guidance, "encode", "encode"),
            (self.guidance, "plan_levels", "plan"),
            (self.guidance, "at_plan", "guidance"),
            (state.optimizer, "step", "update"),
        ]


def measure(
    subject: Subject,
    width: int,
    progress: float,
    device: torch.device,
    *,
    iterations: int = 40,
    trajectory: str | None = None,
) -> dict[str, Any]:
    """Time iterations at a width and at a share of the run; the record that goes to JSON.

    On CUDA nothing waits for the device within the window; an iteration's time is that between two
    events in the stream, and `wall_ms` is the window's wall time a piece, device idle at both ends.
    `phases_ms` and the UNet's calls and rows are of a second pass that waits after every phase, so
    their sum exceeds an iteration's time. `in_use_gib` is what the whole GPU has in use, CUDA's own
    memory and other programs' included.
    """
    cfg = configuration(width, trajectory)
    counter = subject.counter
    _free(device)
    step = round(progress * cfg.max_steps)
    loop = Loop(cfg, subject, device, step)
    with loop.counting_fills(counter):
        counter.reset()
        loop.prepare_trajectories()
        prepared_rows = counter.fill_rows
        for _ in range(WARM_UP):
            loop()
        # The window is where it was asked for.
        loop.state.step = step
        _reset_peak(device)
        counter.reset()
        times, wall_ms, samples = _time(loop, device, max(iterations, MIN_ITERATIONS))
        fill_rows, memory = counter.fill_rows, _memory(device)
        counter.reset()
        phases = _phases(loop.without_graphs(), device)
    return {
        "case": f"iteration/{width}",
        "width": width,
        "progress": progress,
        "step": step,
        "model": subject.name,
        "engine": subject.engine_name,
        "trajectory": cfg.guidance.trajectory,
        "device": str(device),
        "ms": asdict(times),
        "wall_ms": wall_ms,
        "unet_calls": counter.calls / INSTRUMENTED,
        "unet_rows": counter.rows / INSTRUMENTED,
        "fill_rows": fill_rows,
        "prepared_rows": prepared_rows,
        "phases_ms": phases,
        "kept_samples": samples,
        "dropped_samples": loop.state.scene.renderer.n_dropped,
        "skipped_updates": int(loop.state.optimizer.skipped),
        **memory,
        "official": _official(subject, width, progress, times.median, device),
    }


def row(record: dict[str, Any]) -> str:
    """Two lines for a person: ours, and the official loop's."""
    ms, phases = record["ms"], record["phases_ms"]
    named = "  ".join(f"{name} {value:.3g}" for name, value in phases.items())
    memory = ""
    if record["allocated_gib"] is not None:
        memory = f"; {record['allocated_gib']:.2f} / {record['in_use_gib']:.2f} GiB"
    lines = [
        f"{record['case']:<14} progress {record['progress']:<4g} {record['engine']}, "
        f"{record['trajectory']}: {ms['median']:.2f} ms "
        f"({ms['p20']:.2f} to {ms['p80']:.2f}; wall {record['wall_ms']:.2f}), "
        f"UNet {record['unet_calls']:.1f} calls, {record['unet_rows']:.1f} rows "
        f"(fills {record['fill_rows']} in the window, {record['prepared_rows']} before), "
        f"{1e-6 * record['kept_samples']:.2f} M samples{memory}",
        f"    phases, ms: {named}",
    ]
    official = record["official"]
    if official:
        lines.append(
            f"    official loop {official['ms']:.0f} ms: ours is {official['ratio']:.2f} times as "
            f"fast; UNet {official['unet_calls']} × {official['unet_ms']:.0f}, render "
            f"{official['render_ms']:.0f}, VAE {official['encode_ms']:.0f} + "
            f"{official['encode_backward_ms']:.0f}, field and march backward "
            f"{official['render_backward_ms']:.0f}; {official['samples_m']:.2f} M samples; "
            f"{official['allocated_gib']} / {official['in_use_gib']} GiB "
            f"(recorded on an {official['recorded_on']})"
        )
    return "\n".join(lines)


def _official(
    subject: Subject, width: int, progress: float, median: float, device: torch.device
) -> dict[str, Any] | None:
    recorded: OfficialIteration | None = OFFICIAL.get((width, progress))
    if recorded is None or device.type != "cuda" or not subject.is_sd21:
        return None
    return {
        **recorded._asdict(),
        "recorded_on": RECORDED_ON,
        "ratio": recorded.ms / median,
    }


def _time(loop: Loop, device: torch.device, n: int) -> tuple[Times, float, float]:
    """Times of n iterations, wall milliseconds of one, and the median of kept samples."""
    _wait(device)
    marks = [_mark(device)]
    samples = []
    started = time.perf_counter()
    for _ in range(n):
        samples.append(loop())
        marks.append(_mark(device))
    _wait(device)
    wall_ms = 1e3 * (time.perf_counter() - started) / n
    if device.type == "cuda":
        ms = [before.elapsed_time(after) for before, after in pairwise(marks)]
    else:
        ms = [1e3 * (after - before) for before, after in pairwise(marks)]
    p20, median, p80 = np.percentile(ms, [20, 50, 80]).tolist()
    return Times(median, p20, p80, n), wall_ms, float(torch.stack(samples).double().median())


def _mark(device: torch.device) -> torch.cuda.Event | float:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _phases(loop: Loop, device: torch.device) -> dict[str, float]:
    """Median milliseconds of an iteration's phases and of the whole, waiting after each.

    The backward pass is "encode_backward" until the rendering has its gradient, then
    "render_backward"; "update" is what the optimizer does besides, "other" is outside all phases.
    """
    totals: dict[str, list[float]] = defaultdict(list)
    current: dict[str, float] = defaultdict(float)
    reached: list[float] = []  # when the backward pass had reached the rendering

    def now() -> float:
        _wait(device)
        return 1e3 * time.perf_counter()

    def timed(phase: str) -> Callable[[Callable], Callable]:
        def wrap(function: Callable) -> Callable:
            def call(*args: Any, **kwargs: Any) -> Any:
                if phase == "encode" and args[0].requires_grad:
                    args[0].register_hook(lambda grad: reached.append(now()))
                start = now()
                result = function(*args, **kwargs)
                current[phase] += now() - start
                return result

            return call

        return wrap

    def timed_backward(function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> None:
            start = now()
            function(*args, **kwargs)
            end = now()
            middle = reached.pop() if reached else start
            current["encode_backward"] += middle - start
            current["render_backward"] += end - middle
            current["update"] -= end - start  # the optimizer's method, around this one, adds it

        return call

    with ExitStack() as stack:
        for owner, method, phase in loop.pieces():
            stack.enter_context(_replaced(owner, method, timed(phase)))
        stack.enter_context(_replaced(Tensor, "backward", timed_backward))
        for _ in range(INSTRUMENTED):
            current.clear()
            start = now()
            loop()
            whole = now() - start
            current["other"] = whole - sum(current.values())
            current["whole"] = whole
            for phase, ms in current.items():
                totals[phase].append(ms)
    order = ("cameras", "plan", "render", "encode", "guidance")
    order += ("encode_backward", "render_backward")
    order += ("update", "other", "whole")
    return {name: float(np.median(totals[name])) for name in order if name in totals}


@contextmanager
def _replaced(owner: Any, name: str, wrap: Callable[[Callable], Callable]) -> Iterator[None]:
    """Within it a method of an object (or of a class) is the wrapped one."""
    own = vars(owner).get(name)
    setattr(owner, name, wrap(getattr(owner, name)))
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _free(device: torch.device) -> None:
    """Hand back what earlier measurements left: the GPU's memory in use shall be this one's."""
    if device.type == "cuda":
        import gc

        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)


def _memory(device: torch.device) -> dict[str, float | None]:
    """Peaks of the window that torch allocated and reserved, and what the GPU has in use now."""
    if device.type != "cuda":
        return {"allocated_gib": None, "reserved_gib": None, "in_use_gib": None}
    free, total = torch.cuda.mem_get_info(device)
    return {
        "allocated_gib": torch.cuda.max_memory_allocated(device) / 2**30,
        "reserved_gib": torch.cuda.max_memory_reserved(device) / 2**30,
        "in_use_gib": (total - free) / 2**30,
    }
