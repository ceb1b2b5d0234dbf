"""From a prompt and a seed to a 3D object.

python -m dsd_fast.train --prompt "an armchair" --seed 0
python -m dsd_fast.train --prompt "an armchair" --seed 0 --resume auto
python -m dsd_fast.train --preset dsd --model FOLDER --prompt "a toy robot"
python -m dsd_fast.train --config dsd.yaml system.prompt_processor.prompt="a toy robot"
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from dsd_fast import checkpoint, cli, pictures, versions
from dsd_fast._backend import keep_freed_memory
from dsd_fast.cameras import RandomCameras
from dsd_fast.checkpoint import CheckpointError
from dsd_fast.config import ConfigError, TrainConfig, resolve_device, to_dict
from dsd_fast.diffusion import embed_views, load_model
from dsd_fast.guidance import DSDGuidance, seed_noise
from dsd_fast.interruption import Interruption
from dsd_fast.losses import regularizers
from dsd_fast.mesh import MeshError, make_mesh, write_glb
from dsd_fast.optimizer import Optimizer
from dsd_fast.outputs import OutputError, RunFolder
from dsd_fast.progress import Reporter, memory_mib, set_up_logging
from dsd_fast.rng import RngStreams
from dsd_fast.scene import Scene
from dsd_fast.schedules import Schedule
from dsd_fast.state import TrainState

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
        job = cli.parse(sys.argv[1:] if argv is None else argv)
        train(job.config, job.folder, job.state, overwrite=job.overwrite, stop_at=job.stop_at)
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


def train(
    cfg: TrainConfig,
    run: RunFolder,
    resume: dict | None = None,
    *,
    overwrite: bool = False,
    stop_at: int | None = None,
) -> None:
    """Run a configuration in a run folder, from the start or from a loaded checkpoint ``resume``.

    ``stop_at`` ends the session early, when so many steps are done; the state is saved.
    Raises ConfigError, OutputError or CheckpointError before any work; after that TrainingError or
    Interrupted, with the state saved.
    """
    cfg.validate()
    device = resolve_device(cfg.device)
    if resume is None and not overwrite:
        run.refuse_if_used(cfg.max_steps)
    if resume is not None and resume["step"] >= cfg.max_steps and _is_complete(run, cfg):
        log.info("%s is finished: nothing to do (more steps: --max-steps)", run.path)
        return
    log.info("%s preset, %d steps on %s, in %s", cfg.preset, cfg.max_steps, device, run.path)
    keep_freed_memory(device)

    # Whatever can be wrong is found before the first step, and before an older run is replaced.
    with _errors_of_settings():
        cameras = RandomCameras(cfg.cameras)
        state = _build(cfg, run, device)
    if resume is None:
        run.clear()
    else:
        state.restore(resume)
        if resume["model_hash"] != state.guidance.model.model_hash:
            log.warning("the model is not the one that this run was started with")
        _discard_newer(run, state.step)
    model = state.guidance.model
    run.write_config(to_dict(cfg))
    run.write_versions(
        versions.collect(device) | {"model": str(model.path), "model_sha256": model.model_hash}
    )

    fit(cfg, run, state, cameras, device, stop_at)
    if state.step < cfg.max_steps:
        log.info("stopped at step %d as asked; --resume auto continues", state.step)
        return
    scene, step = state.scene, state.step
    del state, model  # The diffusion model's memory is of more use to the pictures.
    finish(scene, cfg, step, run)


def fit(
    cfg: TrainConfig,
    run: RunFolder,
    state: TrainState,
    cameras: RandomCameras,
    device: torch.device,
    stop_at: int | None = None,
) -> None:
    """The training loop: from ``state.step`` to the end, a stop that was asked for, or Ctrl-C."""
    scene, optimizer, guidance, rng = state.scene, state.optimizer, state.guidance, state.rng
    settings = cfg.trainer
    dsd_weight = Schedule.parse(cfg.loss.lambda_dsd)
    watch = _Watch(cfg, state.step)
    first_step, last_step = state.step, min(cfg.max_steps, stop_at or cfg.max_steps)

    with Interruption() as stop, Reporter(first_step, cfg.max_steps, settings.progress) as report:
        try:
            while state.step < last_step and not stop.requested:
                # The official order of draws and updates: cameras, then the level mask and the
                # occupancy grid (inside render), the rendering, the guidance.
                step = state.step
                views = cameras.sample(step, rng.cameras, device)
                image = scene.render(views, step, rng.sampler)
                guided = guidance(
                    image.rgb, views.elevation_deg, views.azimuth_deg, step, rng.guidance
                )
                terms = {
                    "dsd": (guided.loss, dsd_weight(step)),
                    **regularizers(image, cfg.loss, step),
                }
                loss = sum(weight * value for value, weight in terms.values())
                gradient_norm = optimizer.step(loss, guided.finite)
                state.step = done = step + 1

                if done % settings.log_every == 0 or done == cfg.max_steps:
                    values = _to_host(
                        {
                            "loss": loss,
                            **{name: value for name, (value, _) in terms.items()},
                            "guidance_norm": guided.grad_norm,
                            "gradient_norm": gradient_norm,
                            "opacity": image.opacity.mean(),
                            "loss_scale": optimizer.scale,
                            "skipped": optimizer.skipped,
                            "bad_run": optimizer.bad_run,
                        }
                    )
                    values |= {
                        "t": float(guided.t.float().mean()),
                        "t_delta": float(guided.t_delta.float().mean()),
                        "samples": int(image.n_samples),
                        "dropped_samples": scene.renderer.n_dropped,
                        "size": views.height,
                        "seconds": report.seconds(),
                        "steps_per_second": report.rate(done),
                        "memory_mib": memory_mib(device),
                    }
                    run.append_metrics({"step": done, **_json_values(values)})
                    report(done, values)
                    watch(done, values)
                if settings.preview_every and done % settings.preview_every == 0:
                    _write_preview(scene, cfg, done, run)
                if done % settings.checkpoint_every == 0 and done < last_step:
                    _save_or_warn(cfg, run, state)
        except torch.OutOfMemoryError as error:
            _save(cfg, run, state)
            raise TrainingError(_out_of_memory(error, cfg)) from error
        except TrainingError:
            _save(cfg, run, state)
            raise

    if state.step > first_step:
        _save(cfg, run, state)
    if stop.requested:
        raise Interrupted(
            f"interrupted; step {state.step} of {cfg.max_steps} is saved in {run.checkpoints}: "
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


def _build(cfg: TrainConfig, run: RunFolder, device: torch.device) -> TrainState:
    """The state at step 0, and proof that the run folder can take what the run will write."""
    rng = RngStreams(cfg.seed)
    scene = Scene(cfg, rng.init)
    # A checkpoint has every parameter and two moments of each.
    checkpoint_bytes = 3 * sum(parameter.nbytes for parameter in scene.parameters())
    run.prepare(checkpoint_bytes * (cfg.trainer.keep_checkpoints + 1) + OUTPUT_BYTES)

    dtype = None if cfg.diffusion.dtype == "auto" else getattr(torch, cfg.diffusion.dtype)
    model = load_model(cfg.model, device, dtype, engine=cfg.diffusion.engine)
    prompts = embed_views(
        model,
        cfg.prompt,
        cfg.text.negative,
        prefix=cfg.text.prefix,
        view_dependent=cfg.text.view_dependent,
        overrides=cfg.text.overrides(),
    )
    latent_shape = (1, model.latent_channels, model.latent_size, model.latent_size)
    noise = seed_noise(rng.noise, latent_shape)
    guidance = DSDGuidance(cfg.guidance, model, prompts, noise, cfg.max_steps)
    scene.to(device)
    return TrainState(scene, Optimizer(scene, cfg.optimizer, device), guidance, rng)


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


def _is_complete(run: RunFolder, cfg: TrainConfig) -> bool:
    """Whether `finish` came to its end; its last file is the contact sheet."""
    return run.preview.exists() and (run.turntable.exists() or not cfg.pictures.turntable)


def _discard_newer(run: RunFolder, step: int) -> None:
    """A run that goes on from ``step`` has no later metrics and checkpoints."""
    run.truncate_metrics(step)
    for newer, path in checkpoint.list_steps(run.checkpoints):
        if newer > step:
            log.info("resuming from step %d: the checkpoint of step %d goes", step, newer)
            path.unlink()


def _save(cfg: TrainConfig, run: RunFolder, state: TrainState) -> None:
    checkpoint.save(checkpoint.step_path(run.checkpoints, state.step), state.to_tree(cfg))
    checkpoint.prune(run.checkpoints, cfg.trainer.keep_checkpoints)


def _save_or_warn(cfg: TrainConfig, run: RunFolder, state: TrainState) -> None:
    """A checkpoint in mid-run that fails has cost nothing yet: go on, and try again at the next."""
    try:
        _save(cfg, run, state)
    except CheckpointError as error:
        log.warning("%s", error)


def _to_host(values: dict[str, Tensor]) -> dict[str, float]:
    """All numbers in one transfer: the only wait of the loop for the device."""
    stacked = torch.stack([value.detach().reshape(()).float() for value in values.values()])
    return dict(zip(values, stacked.tolist()))


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
        f"auto and smaller --cameras.width and --cameras.height (now {cfg.cameras.width} and "
        f"{cfg.cameras.height}), fewer --renderer.num-samples-per-ray (now "
        f"{cfg.renderer.num_samples_per_ray}), or --guidance.no-use-perp-neg, which halves the "
        "rows of the UNet."
    )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


if __name__ == "__main__":
    sys.exit(main())
