"""From a prompt and a seed to a 3D object, to the texture of a mesh (`--task texture`), or to an
image (`--task image`); from one picture to an object (`--task single-view`).

python -m dsd_fast.train --prompt "an armchair" --seed 0
python -m dsd_fast.train --prompt "an armchair" --seed 0 --resume auto
python -m dsd_fast.train --preset dsd --model FOLDER --prompt "a toy robot"
python -m dsd_fast.train --preset mvdream --model FOLDER --prompt "a toy robot"
python -m dsd_fast.train --config dsd.yaml system.prompt_processor.prompt="a toy robot"
"""

from __future__ import annotations

if __name__ == "__main__":
    from dsd_fast.run.interruption import end_while_loading

    end_while_loading()

import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from dsd_fast import determinism
from dsd_fast._backend import keep_freed_memory
from dsd_fast.config import ConfigError, TrainConfig, check, resolve_device, to_dict
from dsd_fast.diffusion import DiffusionModel
from dsd_fast.guidance import Guidance, seed_noise
from dsd_fast.rng import RngStreams
from dsd_fast.run import checkpoint, cli, closing, interruption, memory, terminal, versions
from dsd_fast.run.checkpoint import CheckpointError
from dsd_fast.run.cli import Job
from dsd_fast.run.interruption import Interruption
from dsd_fast.run.outputs import OutputError
from dsd_fast.run.progress import Reporter, set_up_logging
from dsd_fast.run.saving import Saver, what_is_saved
from dsd_fast.run.state import TrainState
from dsd_fast.run.unforeseen import in_words
from dsd_fast.tasks import TASKS, Task
from dsd_fast.tasks.refine import refinement
from dsd_fast.tasks.step import StepOutput

# Not __name__, which is "__main__" when this module is the command.
log = logging.getLogger("dsd_fast.train")

# Pictures, video and mesh of a run, with room to spare; without the mesh's textures.
OUTPUT_BYTES = 64 * 2**20


class TrainingError(RuntimeError):
    """A run that cannot go on. What it has come to is saved."""


class Interrupted(Exception):
    """Ctrl-C, SIGTERM or SIGHUP. What the run has come to is saved."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 done, 1 failed, 2 wrong input, 130 interrupted."""
    given = sys.argv[1:] if argv is None else argv
    return run(lambda: cli.parse(given), given)


def run(make_jobs: Callable[[], Sequence[Job]], argv: Sequence[str] | None = None) -> int:
    """What a command that trains does with its jobs, from the first signal to the exit code.

    Args:
        make_jobs: raises as `cli.parse` does.
        argv: flags by which others of the kind can be made, for the last line.
    """
    began = time.monotonic()
    terminal.set_up()
    set_up_logging()
    jobs: Sequence[Job] = ()
    with Interruption() as stop:
        try:
            jobs = make_jobs()
            if finished := train(jobs, stop):
                _say_end(finished, began, argv)
                jobs = [*jobs, *(more := _refinements(finished))]
                for job in more:
                    began = time.monotonic()
                    if refined := train([job], stop):
                        _say_end(refined, began, None)
        except (ConfigError, OutputError, CheckpointError) as error:
            if stop.raised:
                return _interrupted(jobs)
            log.error("%s", error)
            return 2
        except TrainingError as error:
            log.error("%s", error)
            return 1
        except Interrupted as error:
            log.warning("%s", error)
            return interruption.EXIT_CODE
        except KeyboardInterrupt:
            return _interrupted(jobs)
        except Exception as error:
            if stop.raised:
                return _interrupted(jobs)
            log.error("failed before the first step: %s", in_words(error))
            return 1
        finally:
            for job in jobs:
                job.folder.release()
    return 0


def _say_end(finished: Sequence[Job], began: float, argv: Sequence[str] | None) -> None:
    closing.say(finished, time.monotonic() - began, argv, TASKS[finished[0].config.task].makes)


def _refinements(finished: Sequence[Job]) -> list[Job]:
    """What --refine asks for when objects are there."""
    return [
        refinement(job.folder, job.config.device)
        for job in finished
        if job.config.task == "text" and job.config.refine.steps
    ]


def _interrupted(jobs: Sequence[Job]) -> int:
    log.warning("interrupted; %s", what_is_saved(jobs))
    return interruption.EXIT_CODE


def train(jobs: Sequence[Job], stop: Interruption | None = None) -> Sequence[Job]:
    """Do jobs that differ in their seed alone, side by side: each from its start or checkpoint.

    Returns:
        The jobs, where all of their files are there now; none where --stop-at came first.

    Raises ConfigError, OutputError or CheckpointError before any work; after that TrainingError or
    Interrupted, with the states saved, and KeyboardInterrupt for a signal (of `stop`) where there
    is nothing to save.
    """
    if stop is None:
        with Interruption() as stop:
            return train(jobs, stop)
    cfg = jobs[0].config
    check(cfg, flags=True)
    device = resolve_device(cfg.device)
    task = TASKS[cfg.task]
    try:
        for job in jobs:
            job.folder.claim()
            if job.state is None and not job.overwrite:
                job.folder.refuse_if_used(cfg)
        every, jobs = jobs, [job for job in jobs if not _is_finished(job)]
        if not jobs:
            return every
        log.info("%s; loading the model", _about(jobs, device))
        keep_freed_memory(device)
        if cfg.deterministic:
            determinism.make_deterministic(device)
        if cfg.vram is not None:
            memory.cap(device, cfg.vram)
        # Whatever can be wrong is found before the first step.
        with _errors_of_settings():
            states, guidance = _build(jobs, device, task)
        _begin(jobs, states, guidance, device)
    except BaseException:
        for job in jobs:
            job.folder.abandon()
        raise
    with Reporter(states[0].step, cfg.max_steps, cfg.trainer.progress) as report:
        fit(jobs, states, guidance, device, stop, report)
        step = states[0].step
        # Pictures of what it began with would look like a result.
        fruitless = [job for job, state in zip(jobs, states) if state.optimizer.skipped >= step > 0]
        if step >= cfg.max_steps:
            fruitful = [pair for pair in zip(jobs, states) if pair[0] not in fruitless]
            results = [(job, task.result(state)) for job, state in fruitful]
            del states, guidance, fruitful  # The model's memory is of more use to the pictures.
            _finish(results, task, step, report)
    if step < cfg.max_steps:
        log.info("stopped at step %d as asked; --resume auto continues", step)
    if fruitless:
        raise TrainingError(
            f"not one of {step} steps was finite, and none changed a parameter, in "
            f"{', '.join(str(job.folder.path) for job in fruitless)}. {_remedies(task)}"
        )
    return every if step >= cfg.max_steps else ()


def _about(jobs: Sequence[Job], device: torch.device) -> str:
    """What is made, on what, and where, in words."""
    cfg, seeds = jobs[0].config, [job.config.seed for job in jobs]
    verb = "making" if jobs[0].state is None else f"going on from step {jobs[0].state['step']} with"
    place = "the CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
    seed, folder = f"seed {seeds[0]}", str(jobs[0].folder.path)
    if len(jobs) > 1:
        seed = f"seeds {seeds[0]} to {seeds[-1]}"
        folder = f"{folder} to {jobs[-1].folder.path.name}"
    return f'{verb} "{cfg.prompt}", {seed}, {cfg.max_steps} steps on {place}, in {folder}'


def _finish(results: Sequence[tuple[Job, Any]], task: Task, step: int, report: Reporter) -> None:
    """Write what runs were for."""
    for number, (job, result) in enumerate(results, 1):

        def say(
            doing: str, of: str = f" ({number} of {len(results)})" * (len(results) > 1)
        ) -> None:
            report.say(f"{doing}{of}")

        try:
            task.finish(result, job.config, step, job.folder, say)
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                f"training is done and saved, but the GPU's memory is too small for the pictures "
                f"({_first_line(error)}): the same command with --resume auto and smaller "
                "--pictures.sheet-size, --cameras.eval-height and --cameras.eval-width makes them"
            ) from error
        except Exception as error:
            raise TrainingError(
                f"training is done and saved, but not all pictures and meshes are written: "
                f"{in_words(error, [job.folder.path])}. When that is mended, the same command with "
                "--resume auto makes them."
            ) from error


def fit(
    jobs: Sequence[Job],
    states: Sequence[TrainState],
    guidance: Guidance,
    device: torch.device,
    stop: Interruption,
    report: Reporter,
) -> None:
    """The training loop: from the states' step to the end, a stop that was asked for, or a signal.

    Whatever ends it, the states are saved: those after the last step that was done.
    """
    cfg, first_step = jobs[0].config, states[0].step
    last_step = min(cfg.max_steps, jobs[0].stop_at or cfg.max_steps)
    settings, done = cfg.trainer, first_step
    phase = memory.PhaseMemory(device)
    task = TASKS[cfg.task]
    train_step = task.step(cfg, states, guidance, device, phase)
    runs = [_Run(job, state) for job, state in zip(jobs, states)]
    saver = Saver(jobs, states, task.beside_checkpoint)
    ended: BaseException | None = None
    chance: list[dict] = []
    with stop.patience():
        try:
            while done < last_step and not stop.requested:
                logs = (done + 1) % settings.log_every == 0 or done + 1 == cfg.max_steps
                phase.begin(settings.log_memory and (logs or done == first_step))
                chance = [state.rng.state_dict() for state in states]
                with determinism.explained():
                    outputs = train_step()
                done, chance = done + 1, []
                phase.report(done)
                if logs:
                    _log(runs, outputs, report, phase)
                if settings.preview_every and done % settings.preview_every == 0:
                    for run in runs:
                        run.write_preview()
                if done % settings.checkpoint_every == 0 and done < last_step:
                    # A checkpoint in mid-run that fails has cost nothing yet: go on, and try
                    # again at the next.
                    try:
                        saver.save()
                    except CheckpointError as error:
                        log.warning("%s; training goes on", error)
        # Whatever it is: hours of work are not lost to a fault in a line of progress.
        except BaseException as error:
            ended = error
            # The step in hand is done again.
            for state, before in zip(states, chance):
                state.rng.load_state_dict(before)
        if done > first_step:
            try:
                saver.save_last()
            except CheckpointError as error:
                raise TrainingError(str(error)) from ended or error
    where = what_is_saved(jobs)
    if ended is not None:
        raise _explained(ended, jobs, where) from ended
    train_step.release_graphs()
    if stop.requested:
        raise Interrupted(f"interrupted; {where}")


def _explained(error: BaseException, jobs: Sequence[Job], where: str) -> BaseException:
    """What ended a loop as what `main` knows, in words."""
    cfg = jobs[0].config
    if isinstance(error, KeyboardInterrupt):
        return Interrupted(f"interrupted; {where}")
    if isinstance(error, torch.OutOfMemoryError):
        return TrainingError(
            f"out of GPU memory ({_first_line(error)}). {where}. What helps most first: "
            f"{'; '.join(memory.savings(cfg))}."
        )
    if isinstance(error, TrainingError):
        return TrainingError(f"{error} {where}")
    if isinstance(error, ConfigError):
        return error
    words = in_words(error, [job.folder.path for job in jobs])
    return TrainingError(f"training was ended by an error: {words}; {where}")


def _build(
    jobs: Sequence[Job], device: torch.device, task: Task
) -> tuple[list[TrainState], Guidance]:
    """The states at step 0, and proof that the run folders can take what the runs will write.

    The guidance is that of all runs: item i of its batches is of run i.
    """
    cfg = jobs[0].config
    task.check(cfg, len(jobs))
    rngs = [RngStreams(job.config.seed) for job in jobs]
    scenes = [task.scene(cfg, rng.init) for rng in rngs]
    # A checkpoint has every parameter and two moments of each.
    checkpoint_bytes = 3 * sum(parameter.nbytes for parameter in scenes[0].parameters())
    # Colours and normals, as they are before they are packed.
    texture_bytes = 6 * cfg.mesh.texture_size**2
    for job in jobs:
        job.folder.ask_for_room(
            checkpoint_bytes * (cfg.trainer.keep_checkpoints + 1) + OUTPUT_BYTES + texture_bytes
        )

    dtype = None if cfg.diffusion.dtype == "auto" else getattr(torch, cfg.diffusion.dtype)
    model, prompts = task.load(cfg, device, dtype)
    size = model.latent_size
    latent_shape = (cfg.cameras.n_view, model.latent_channels, size, size)
    states = []
    for scene, rng in zip(scenes, rngs):
        optimizer = task.optimizer(scene.to(device), cfg, device)
        states.append(TrainState(scene, optimizer, seed_noise(rng.noise, latent_shape), rng, model))
    if all(job.state is None for job in jobs):
        task.begin(cfg, states, model, prompts)
    noise = torch.cat([state.noise for state in states])
    guidance = task.guidance(cfg, model, prompts, noise)
    for state in states:
        state.learned = guidance.learned_state
    return states, guidance


def _begin(
    jobs: Sequence[Job], states: Sequence[TrainState], guidance: Guidance, device: torch.device
) -> None:
    """Bring states and guidance to where the jobs go on, and the run folders to what that is."""
    model = guidance.model
    for job, state in zip(jobs, states):
        if job.state is not None:
            _check_model(job.state, job.config, model)
            state.restore(job.state)
    guidance.load_state_dict({"noise": torch.cat([state.noise for state in states])})
    for job in jobs:
        if job.state is not None:
            with _errors_of_settings():
                guidance.load_learned_state(job.state["guidance"])
    about = versions.collect(device)
    about |= {"model": str(model.path), "model_sha256": model.model_hash}
    try:
        for job, state in zip(jobs, states):
            if job.state is None:
                job.folder.begin()
            else:
                # A run that goes on from a step has no later metrics and checkpoints.
                job.folder.truncate_metrics(state.step)
                checkpoint.set_aside(job.folder.checkpoints, state.step)
                # Killed between a save and this, it may have older ones than it keeps.
                checkpoint.prune(job.folder.checkpoints, job.config.trainer.keep_checkpoints)
            job.folder.write_config(to_dict(job.config))
            job.folder.write_versions(about)
    except OSError as error:
        raise OutputError(
            f"cannot write to the run folder: {error.filename or ''} {error.strerror or error}"
        ) from error


def _check_model(saved: dict, cfg: TrainConfig, model: DiffusionModel) -> None:
    """A run goes on with its model, wherever that is now; ConfigError for another one."""
    if saved["model_hash"] == model.model_hash:
        return
    if saved["config"]["model"] != cfg.model:
        raise ConfigError(
            f"--model {cfg.model} is not the model that this run was started with "
            f"({saved['config']['model']}): expected weights of hash {saved['model_hash'][:12]}, "
            f"got {model.model_hash[:12]}; start a new run instead"
        )
    log.warning("the model is not the one that this run was started with")


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
    """Whether the last of a run's files is there; says so if it is."""
    run, cfg = job.folder, job.config
    if job.state is None or job.state["step"] < cfg.max_steps:
        return False
    finished = TASKS[cfg.task].is_finished(cfg, run)
    if finished:
        log.info("%s is finished: nothing to do (more steps: --max-steps)", run.path)
    return finished


class _Run:
    """A job at work: what is written of it on the way, and a look at whether it goes wrong."""

    def __init__(self, job: Job, state: TrainState) -> None:
        self.job, self.state, self.task = job, state, TASKS[job.config.task]
        self._last_opaque = state.step

    def write_preview(self) -> None:
        try:
            self.task.write_preview(self.state, self.job.config, self.job.folder)
        except OSError as error:
            log.warning("cannot write a preview: %s", error)

    def write_metrics(self, values: dict[str, float]) -> None:
        # JSON has no NaN.
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self.job.folder.append_metrics({"step": self.state.step, **finite})

    def watch(self, values: dict[str, float]) -> None:
        """TrainingError for a run that does not come back from gradients that are not finite."""
        settings, step, bad_run = self.job.config.trainer, self.state.step, int(values["bad_run"])
        if bad_run >= settings.max_bad_steps:
            source = "a gradient" if math.isfinite(values["dsd"]) else "the guidance"
            raise TrainingError(
                f"{source} has not been finite for {bad_run} steps in a row, up to step {step}. "
                f"They changed no parameter. {_remedies(self.task)}"
            )
        if bad_run:
            log.warning("step %d is not finite, left out (%d so far)", step, values["skipped"])
        if values.get("opacity", math.inf) > settings.min_opacity:
            self._last_opaque = step
        elif step - self._last_opaque >= settings.min_opacity_steps:
            log.warning(
                "mean opacity has been under %g for %d steps: the object is vanishing. Lower "
                "--loss.lambda-sparsity or --loss.lambda-opaque, or try another --seed.",
                settings.min_opacity,
                step - self._last_opaque,
            )
            self._last_opaque = step


def _log(
    runs: Sequence[_Run],
    outputs: Sequence[StepOutput],
    report: Reporter,
    phase: memory.PhaseMemory,
) -> None:
    """Write, show and look at the values of a step: the only wait of the loop for the device."""
    for run, output in zip(runs, outputs):
        step = run.state.step
        values = output.values() | {
            "t": output.t,
            "t_delta": output.t_delta,
            **run.task.record(run.state, output),
            "seconds": report.seconds(),
            "steps_per_second": report.rate(step),
            "memory_mib": phase.peak_mib(),
        }
        run.write_metrics(values)
        if run is runs[0]:
            cfg, folder = run.job.config, run.job.folder
            report(step, run.task.doing(cfg, step), folder.newest_preview())
        run.watch(values)


def _remedies(task: Task) -> str:
    """What helps against gradients that are not finite."""
    return (
        "In half precision try --resume auto with --diffusion.dtype float32 (or bfloat16); "
        f"otherwise a new run with a lower --guidance.guidance-scale or {task.lr_flag}."
    )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


if __name__ == "__main__":
    sys.exit(main())
