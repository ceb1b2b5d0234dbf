"""From a prompt and a seed to a 3D object.

python -m dsd_fast.train --prompt "an armchair" --seed 0
python -m dsd_fast.train --prompt "an armchair" --seed 0 --resume auto
python -m dsd_fast.train --preset dsd --model FOLDER --prompt "a toy robot"
python -m dsd_fast.train --preset mvdream --model FOLDER --prompt "a toy robot"
python -m dsd_fast.train --config dsd.yaml system.prompt_processor.prompt="a toy robot"
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from dsd_fast import checkpoint, cli, memory, pictures, versions
from dsd_fast._backend import keep_freed_memory
from dsd_fast.cameras import Lattice, RandomCameras
from dsd_fast.checkpoint import CheckpointError
from dsd_fast.cli import Job
from dsd_fast.config import ConfigError, TrainConfig, resolve_device, to_dict
from dsd_fast.diffusion import embed_views, load_model
from dsd_fast.guidance import DSDGuidance, seed_noise
from dsd_fast.guidance.multiview import camera_lattice, make_multiview_guidance
from dsd_fast.interruption import Interruption
from dsd_fast.mesh import MeshError, make_mesh, write_glb
from dsd_fast.optimizer import Optimizer
from dsd_fast.outputs import OutputError, RunFolder
from dsd_fast.progress import Reporter, set_up_logging
from dsd_fast.rng import RngStreams
from dsd_fast.scene import Scene
from dsd_fast.state import TrainState
from dsd_fast.step import TrainStep

# Not __name__, which is "__main__" when this module is the command.
log = logging.getLogger("dsd_fast.train")

# Pictures, video and mesh of a run, with room to spare.
OUTPUT_BYTES = 64 * 2**20


class TrainingError(RuntimeError):
    """A run that cannot go on. Its state is saved."""


class Interrupted(Exception):
    """Ctrl-C or SIGTERM. The state is saved."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 done, 1 failed, 2 wrong input, 130 interrupted."""
    set_up_logging()
    try:
        train(cli.parse(sys.argv[1:] if argv is None else argv))
    except (ConfigError, OutputError, CheckpointError) as error:
        log.error("%s", error)
        return 2
    except TrainingError as error:
        log.error("%s", error)
        return 1
    except Interrupted as error:
        log.warning("%s", error)
        return 130
    except KeyboardInterrupt:
        log.warning(
            "interrupted; --resume auto continues from the newest checkpoint, if there is one"
        )
        return 130
    return 0


def train(jobs: Sequence[Job]) -> None:
    """Do jobs that differ in their seed alone, side by side: each from its start or checkpoint.

    Raises ConfigError, OutputError or CheckpointError before any work; after that TrainingError or
    Interrupted, with the states saved.
    """
    cfg = jobs[0].config
    cfg.validate()
    device = resolve_device(cfg.device)
    for job in jobs:
        if job.state is None and not job.overwrite:
            job.folder.refuse_if_used(cfg.max_steps)
    jobs = [job for job in jobs if not _is_finished(job)]
    if not jobs:
        return
    folders = ", ".join(str(job.folder.path) for job in jobs)
    log.info("%s preset, %d steps on %s, in %s", cfg.preset, cfg.max_steps, device, folders)
    keep_freed_memory(device)
    if cfg.vram is not None:
        memory.cap(device, cfg.vram)

    # Whatever can be wrong is found before the first step, and before an older run is replaced.
    with _errors_of_settings():
        states, guidance = _build(jobs, device)
        cameras = RandomCameras(cfg.cameras, _lattice(cfg))
    model = guidance.model
    for job, state in zip(jobs, states):
        if job.state is None:
            job.folder.clear()
        else:
            state.restore(job.state)
            if job.state["model_hash"] != model.model_hash:
                log.warning("the model is not the one that this run was started with")
            _discard_newer(job.folder, state.step)
        job.folder.write_config(to_dict(job.config))
        job.folder.write_versions(
            versions.collect(device) | {"model": str(model.path), "model_sha256": model.model_hash}
        )
    guidance.load_state_dict({"noise": torch.cat([state.noise for state in states])})

    fit(jobs, states, guidance, cameras, device)
    step = states[0].step
    if step < cfg.max_steps:
        log.info("stopped at step %d as asked; --resume auto continues", step)
        return
    scenes = [state.scene for state in states]
    del states, guidance, model  # The diffusion model's memory is of more use to the pictures.
    for job, scene in zip(jobs, scenes):
        finish(scene, job.config, step, job.folder)


def fit(
    jobs: Sequence[Job],
    states: Sequence[TrainState],
    guidance: DSDGuidance,
    cameras: RandomCameras,
    device: torch.device,
) -> None:
    """The training loop: from the states' step to the end, a stop that was asked for, or Ctrl-C."""
    cfg, first_step = jobs[0].config, states[0].step
    last_step = min(cfg.max_steps, jobs[0].stop_at or cfg.max_steps)
    settings, done = cfg.trainer, first_step
    phase = memory.PhaseMemory(device)
    train_step = TrainStep(
        cfg, states, guidance, cameras, device, capture=settings.graphs, phase=phase
    )
    watches = [_Watch(cfg, first_step) for _ in jobs]

    def save() -> None:
        for job, state in zip(jobs, states):
            _save(job, state)

    with Interruption() as stop, Reporter(first_step, cfg.max_steps, settings.progress) as report:
        try:
            while done < last_step and not stop.requested:
                logs = (done + 1) % settings.log_every == 0 or done + 1 == cfg.max_steps
                phase.begin(done == first_step or (settings.log_memory and logs))
                outputs = train_step()
                done += 1
                phase.report(done)
                if logs:
                    for job, state, output, watch in zip(jobs, states, outputs, watches):
                        # The only wait of the loop for the device.
                        values = output.values() | {
                            "t": output.t,
                            "t_delta": output.t_delta,
                            "dropped_samples": state.scene.renderer.n_dropped,
                            "size": output.height,
                            "seconds": report.seconds(),
                            "steps_per_second": report.rate(done),
                            "memory_mib": phase.peak_mib(),
                        }
                        job.folder.append_metrics({"step": done, **_json_values(values)})
                        if job is jobs[0]:
                            report(done, values)
                        watch(done, values)
                if settings.preview_every and done % settings.preview_every == 0:
                    for job, state in zip(jobs, states):
                        _write_preview(state.scene, cfg, done, job.folder)
                if done % settings.checkpoint_every == 0 and done < last_step:
                    # A checkpoint in mid-run that fails has cost nothing yet: go on, and try again
                    # at the next.
                    try:
                        save()
                    except CheckpointError as error:
                        log.warning("%s", error)
        except torch.OutOfMemoryError as error:
            save()
            raise TrainingError(_out_of_memory(error, cfg)) from error
        except TrainingError:
            save()
            raise

    if done > first_step:
        save()
    if stop.requested:
        folders = ", ".join(str(job.folder.checkpoints) for job in jobs)
        raise Interrupted(
            f"interrupted; step {done} of {cfg.max_steps} is saved in {folders}: "
            "the same command with --resume auto continues"
        )


def finish(scene: Scene, cfg: TrainConfig, step: int, run: RunFolder) -> None:
    """Write the mesh, the turntable and the contact sheet of a trained scene."""
    if cfg.pictures.mesh:
        write_mesh(scene, cfg, step, run)
    size = (cfg.cameras.eval_height, cfg.cameras.eval_width)
    if cfg.pictures.turntable:
        log.info("rendering a turntable of %d views", cfg.cameras.n_test_views)
        pictures.write_turntable(
            scene,
            cfg.cameras,
            step,
            run.turntable,
            n_views=cfg.cameras.n_test_views,
            size=size,
            fps=cfg.pictures.fps,
        )
        log.info("wrote %s", run.turntable)
    sheet = pictures.contact_sheet(scene, cfg.cameras, step, cfg.pictures.sheet_views, size)
    pictures.write_png(sheet, run.preview)
    log.info("wrote %s", run.preview)


def write_mesh(scene: Scene, cfg: TrainConfig, step: int, run: RunFolder) -> None:
    """Write the mesh; a scene without a surface is worth a warning, not the loss of the rest."""
    scene.field.set_step(step)
    try:
        mesh = make_mesh(scene.field, cfg.field.radius, cfg.mesh, scene.device)
    except MeshError as error:
        log.warning("no mesh: %s", error)
        return
    write_glb(mesh, run.mesh)
    log.info("wrote %s, %d faces", run.mesh, len(mesh.faces))


def _build(jobs: Sequence[Job], device: torch.device) -> tuple[list[TrainState], DSDGuidance]:
    """The states at step 0, and proof that the run folders can take what the runs will write.

    The guidance is that of all runs: item i of its batches is of run i.
    """
    cfg = jobs[0].config
    n_view = cfg.cameras.n_view
    if len(jobs) > 1 and memory.largest(cfg.cameras.batch_size) > n_view:
        own = "view" if n_view == 1 else f"{n_view} views"
        raise ConfigError(
            f"--num-seeds needs --cameras.batch-size {n_view}: each seed has its own {own}"
        )
    RandomCameras(cfg.cameras, _lattice(cfg))  # ValueError for what they cannot do
    rngs = [RngStreams(job.config.seed) for job in jobs]
    scenes = [Scene(cfg, rng.init) for rng in rngs]
    # A checkpoint has every parameter and two moments of each.
    checkpoint_bytes = 3 * sum(parameter.nbytes for parameter in scenes[0].parameters())
    for job in jobs:
        job.folder.prepare(checkpoint_bytes * (cfg.trainer.keep_checkpoints + 1) + OUTPUT_BYTES)

    dtype = None if cfg.diffusion.dtype == "auto" else getattr(torch, cfg.diffusion.dtype)
    model = load_model(cfg.model, device, dtype, engine=cfg.diffusion.engine, n_views=n_view)
    prompts = embed_views(
        model,
        cfg.prompt,
        cfg.text.negative,
        prefix=cfg.text.prefix,
        view_dependent=cfg.text.view_dependent,
        overrides=cfg.text.overrides(),
    )
    latent_shape = (n_view, model.latent_channels, model.latent_size, model.latent_size)
    states = []
    for scene, rng in zip(scenes, rngs):
        optimizer = Optimizer(scene.to(device), cfg.optimizer, device)
        states.append(TrainState(scene, optimizer, seed_noise(rng.noise, latent_shape), rng, model))
    noise = torch.cat([state.noise for state in states])
    settings = (cfg.guidance, model, prompts, noise, cfg.max_steps)
    if n_view > 1:
        return states, make_multiview_guidance(
            *settings, cfg.multiview, cfg.cameras.elevation_range
        )
    return states, DSDGuidance(*settings)


def _lattice(cfg: TrainConfig) -> int | Lattice | None:
    """Where training cameras are to be, for the guidance to have their trajectories."""
    if cfg.cameras.n_view == 1:
        return cfg.guidance.lattice
    return camera_lattice(
        cfg.guidance, cfg.multiview, cfg.cameras.elevation_range, cfg.cameras.n_view
    )


@contextmanager
def _errors_of_settings() -> Iterator[None]:
    """Turn errors that settings or a model folder cause into ConfigErrors: words, no traceback."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"the diffusion model does not fit the GPU ({_first_line(error)}): close programs that "
            "use its memory, or pass --diffusion.dtype float16 or --device cpu"
        ) from error
    except (ValueError, FileNotFoundError, ConnectionError, ImportError) as error:
        raise ConfigError(str(error)) from error


def _is_finished(job: Job) -> bool:
    """Whether the last of a run's files is there, the contact sheet; says so if it is."""
    run, cfg = job.folder, job.config
    if job.state is None or job.state["step"] < cfg.max_steps:
        return False
    finished = run.preview.exists() and (run.turntable.exists() or not cfg.pictures.turntable)
    if finished:
        log.info("%s is finished: nothing to do (more steps: --max-steps)", run.path)
    return finished


def _discard_newer(run: RunFolder, step: int) -> None:
    """A run that goes on from ``step`` has no later metrics and checkpoints."""
    run.truncate_metrics(step)
    for newer, path in checkpoint.list_steps(run.checkpoints):
        if newer > step:
            log.info("resuming from step %d: the checkpoint of step %d goes", step, newer)
            path.unlink()


def _save(job: Job, state: TrainState) -> None:
    folder = job.folder.checkpoints
    checkpoint.save(checkpoint.step_path(folder, state.step), state.to_tree(job.config))
    checkpoint.prune(folder, job.config.trainer.keep_checkpoints)


def _json_values(values: dict[str, float]) -> dict[str, float | None]:
    """JSON has no NaN."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


class _Watch:
    """Looks at the logged values for a run that goes wrong."""

    def __init__(self, cfg: TrainConfig, step: int) -> None:
        self.settings = cfg.trainer
        self.last_opaque = step

    def __call__(self, step: int, values: dict[str, float]) -> None:
        bad_run = int(values["bad_run"])
        if bad_run >= self.settings.max_bad_steps:
            source = "a gradient" if math.isfinite(values["dsd"]) else "the guidance"
            raise TrainingError(
                f"{source} has not been finite for {bad_run} steps in a row, up to step {step}. "
                "They changed no parameter and the state is saved. In half precision try --resume "
                "auto with --diffusion.dtype float32 (or bfloat16); otherwise a new run with a "
                "lower --guidance.guidance-scale or --optimizer.geometry-lr."
            )
        if bad_run:
            log.warning("step %d is not finite, left out (%d so far)", step, values["skipped"])
        if values["opacity"] > self.settings.min_opacity:
            self.last_opaque = step
        elif step - self.last_opaque >= self.settings.min_opacity_steps:
            log.warning(
                "mean opacity has been under %g for %d steps: the object is vanishing. Lower "
                "--loss.lambda-sparsity or --loss.lambda-opaque, or try another --seed.",
                self.settings.min_opacity,
                step - self.last_opaque,
            )
            self.last_opaque = step


def _write_preview(scene: Scene, cfg: TrainConfig, step: int, run: RunFolder) -> None:
    size = (cfg.pictures.preview_size, cfg.pictures.preview_size)
    sheet = pictures.contact_sheet(scene, cfg.cameras, step, cfg.pictures.preview_views, size)
    try:
        pictures.write_png(sheet, run.previews / f"step-{step:06d}.png")
    except OSError as error:
        log.warning("cannot write a preview: %s", error)


def _out_of_memory(error: torch.OutOfMemoryError, cfg: TrainConfig) -> str:
    return (
        f"out of GPU memory ({_first_line(error)}). The state is saved: continue with --resume "
        f"auto and, what helps most first, {'; '.join(memory.savings(cfg))}."
    )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


if __name__ == "__main__":
    sys.exit(main())
