"""From a command line to a configuration.

Settings come from three layers, each winning over the one before: a preset (or an official
configuration file, or the config.json of a run, or the checkpoint that is resumed), overrides in
the official ``a.b.c=value`` form, and flags.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dsd_fast import guidance, ranges
from dsd_fast.config import (
    PRESETS,
    TASK_PRESETS,
    ConfigError,
    TrainConfig,
    check,
    from_dict,
    leaves,
    official,
    preset,
    read_config,
    resolve_device,
    to_dict,
)
from dsd_fast.run import checkpoint, memory
from dsd_fast.run import flags as command_flags
from dsd_fast.run.outputs import RunFolder
from dsd_fast.run.state import load_run

log = logging.getLogger(__name__)

# A resumed run is the same run: what it is of cannot change. Its model and its picture may have
# moved; whether they are the same is seen when they are read.
_FIXED_ON_RESUME = (
    *("prompt", "task", "seed", "guidance.method", "image.exact", "single_view.recenter"),
)
# Where a run lies.
_PLACE = ("output", "name", "tag")


@dataclass
class Command:
    """Make a 3D object, or an image, from a prompt and a seed."""

    # Every setting of the run.
    train: Annotated[TrainConfig, tyro.conf.arg(name="")]
    # Take the settings from an official YAML file (overrides a.b.c=value may follow), or from the
    # config.json of a run.
    config: ranges.AnyPath | None = None
    # Continue a run: "auto" finds it by prompt, seed and output; or a run folder or a checkpoint.
    resume: ranges.AnyPath | None = None
    # Make so many objects at once, from this seed on; they share the diffusion model's batches.
    num_seeds: ranges.Seeds = 1
    # Replace a run of the same prompt and seed.
    overwrite: bool = False
    # End this session when the run has done so many steps, for training in pieces.
    stop_at: ranges.Count | None = None


@dataclass(frozen=True)
class Job:
    """A checked command: what to run, where, and from which checkpoint."""

    config: TrainConfig
    folder: RunFolder
    # The checkpoint to continue from, as read.
    state: dict | None
    # A run that is in the folder goes when this one has its first checkpoint.
    overwrite: bool
    stop_at: int | None


def parse(argv: Sequence[str]) -> list[Job]:
    """The jobs of a command line, one a seed. ConfigError or CheckpointError for what cannot be.

    Unknown flags and --help end in SystemExit, as with any command.
    """
    flags, overrides = _split_overrides(argv)
    early = _early_flags(flags)
    command = _parse_flags(flags, _fitting(_starting_values(early, overrides), early))
    cfg = command.train
    if not cfg.prompt and cfg.single_view.image is not None:
        # The run's name; a prompt is text, which a file's name need not be.
        name = os.fsencode(cfg.single_view.image.stem or "picture")
        cfg.prompt = name.decode("utf-8", "backslashreplace")
    _check_session(command)
    if command.num_seeds > 1 and cfg.tag:
        raise ConfigError("--num-seeds names run folders by prompt and seed: drop --tag")
    seeds = range(cfg.seed, cfg.seed + command.num_seeds)
    if command.resume is None:
        check(cfg, flags=True)
        return [_fresh(cfg, RunFolder.of(cfg, seed), seed, command) for seed in seeds]
    if command.overwrite or command.config is not None:
        raise ConfigError("--resume continues a run as it is: drop --overwrite and --config")

    if command.resume == Path("auto"):
        check(cfg, flags=True)
        return _resume_all(cfg, seeds, flags, early, command)
    if command.num_seeds > 1:
        raise ConfigError("--num-seeds continues its runs with --resume auto alone")
    path, folder = find_checkpoint(command.resume)
    folder.claim()
    try:
        checkpoint.settle_ready([folder.checkpoints])
        named = path == command.resume
        state = load_run(path) if named else _newest_whole([folder])[0]
        return [_resumed(state, folder, flags, early, command)]
    except BaseException:
        folder.release()
        raise


def _check_session(command: Command) -> None:
    """ConfigError for a flag of this call, not of the run, that cannot work."""
    for name in ("config", "resume", "num_seeds", "stop_at"):
        try:
            ranges.convert(Command, name, getattr(command, name), name)
        except ConfigError as error:
            raise ConfigError(f"{error}: pass another --{name.replace('_', '-')}") from None
    last = command.train.seed + command.num_seeds - 1
    if command.num_seeds > 1:
        ranges.convert(TrainConfig, "seed", last, "seed, the last of --num-seeds")


def _fresh(cfg: TrainConfig, folder: RunFolder, seed: int, command: Command) -> Job:
    cfg = dataclasses.replace(cfg, seed=seed)
    # What has come to nothing may be begun again by the command that would have continued it.
    replaces = command.overwrite or (command.resume is not None and not folder.has_results())
    return Job(cfg, folder, None, replaces, command.stop_at)


def _resume_all(
    cfg: TrainConfig,
    seeds: Sequence[int],
    flags: list[str],
    early: argparse.Namespace,
    command: Command,
) -> list[Job]:
    """The runs of seeds, each from the newest checkpoint that all have whole, or from the
    beginning."""
    folders = [RunFolder.of(cfg, seed) for seed in seeds]
    used = [folder for folder in folders if folder.path.is_dir()]
    try:
        for folder in used:
            folder.claim()
        checkpoint.settle_ready([folder.checkpoints for folder in folders])
        if any(folder.last_step() is not None for folder in used):
            return [
                # the last one of a flag counts
                _resumed(state, folder, [*flags, "--seed", str(seed)], early, command)
                for state, folder, seed in zip(_newest_whole(folders), folders, seeds)
            ]
    except BaseException:
        for folder in used:
            folder.release()
        raise
    log.info(
        "--resume auto: no checkpoint in %s, starting from the beginning",
        ", ".join(str(folder.path) for folder in folders),
    )
    return [_fresh(cfg, folder, seed, command) for folder, seed in zip(folders, seeds)]


def _newest_whole(folders: Sequence[RunFolder]) -> list[dict]:
    """The checkpoints of the newest step that all of some runs have whole, as read.

    Says so where newer ones are damaged. CheckpointError where there is no such step.
    """
    saved = [dict(checkpoint.list_steps(folder.checkpoints)) for folder in folders]
    common = sorted(set.intersection(*(set(steps) for steps in saved)), reverse=True)
    errors = []
    for step in common:
        try:
            states = [load_run(steps[step]) for steps in saved]
        except checkpoint.CheckpointError as error:
            errors.append(error)
            continue
        for error in errors:
            log.warning("%s", str(error).partition(";")[0])
        if errors:
            log.warning("continuing from step %d, the newest that is whole", step)
        return states
    if errors:
        raise errors[0]
    some = [str(folder.path) for folder, steps in zip(folders, saved) if steps]
    raise checkpoint.CheckpointError(
        f"--resume auto: the {len(folders)} runs have no step in common that is saved "
        f"(checkpoints are in {', '.join(some)}); continue them one by one, without --num-seeds"
    )


def _resumed(
    state: dict, folder: RunFolder, flags: list[str], early: argparse.Namespace, command: Command
) -> Job:
    try:
        saved = from_dict(TrainConfig, state["config"])
    except ConfigError as error:
        raise ConfigError(f"the checkpoint in {folder.path}: its configuration: {error}") from None
    # The GPU may be another one.
    saved.device, saved.vram = early.device, None
    cfg = _parse_flags(flags, _fitting(from_dict(TrainConfig, to_dict(saved)), early)).train
    _compare(saved, cfg)
    moved = any(getattr(cfg, name) != getattr(saved, name) for name in _PLACE)
    if moved and RunFolder.of(cfg, cfg.seed).path.resolve() != folder.path.resolve():
        raise ConfigError(
            f"--resume continues the run in {folder.path}, and --output, --name or --tag name "
            "another folder: drop them"
        )
    check(cfg, flags=True)
    return Job(cfg, folder, state, False, command.stop_at)


def _split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Flags with their values, and ``a.b.c=value`` overrides, told apart.

    A token that follows a flag is that flag's value, whatever it looks like (--prompt "a=b"),
    unless the flag is a switch.
    """
    switches = {name for name, value in leaves(TrainConfig()).items() if isinstance(value, bool)}
    switches.add("overwrite")
    flags: list[str] = []
    overrides: list[str] = []
    previous = ""
    for token in argv:
        name = previous[2:].replace("-", "_") if previous.startswith("--") else ""
        is_value = name and "=" not in name and name.replace("no_", "") not in switches
        if official.is_override(token) and not is_value:
            overrides.append(token)
        else:
            flags.append(token)
        previous = token
    return flags, overrides


def _early_flags(flags: list[str]) -> argparse.Namespace:
    """The flags that decide the starting values. Wrong values are left for the full parse."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("preset", "config", "device", "resume", "vram", "task", "output", "model"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--guidance.method", dest="method")
    parser.add_argument("--max-steps", "--max_steps")
    parser.add_argument("--image.exact", dest="exact", action="store_true")
    try:
        early, _ = parser.parse_known_args(flags)
    except argparse.ArgumentError:
        early = parser.parse_args([])
    early.device = early.device or "auto"
    return early


def _starting_values(early: argparse.Namespace, overrides: list[str]) -> TrainConfig:
    if early.config is not None and early.preset is not None:
        raise ConfigError("--config and --preset both give all settings: pass one of them")
    if early.config is None:
        if overrides:
            raise ConfigError(
                f"{overrides[0]}: overrides in this form change an official configuration file, "
                "pass it with --config; every setting is a flag as well, see --help"
            )
        # A length that is none is left for the full parse, as are names that are not registered.
        digits = (early.max_steps or "").lstrip("0")
        steps = digits if re.fullmatch("[1-9][0-9]{0,9}", digits) else 0
        return preset(
            early.preset if early.preset in PRESETS else "embedded",
            int(steps) or None,
            resolve_device(early.device).type == "cpu",
            early.task if early.task in TASK_PRESETS else "text",
            early.exact,
            early.method or "dsd",
            early.model,
        )
    path = Path(early.config)
    if path.suffix != ".json":
        cfg = official.load(path, overrides)
    elif overrides:
        raise ConfigError(f"{overrides[0]}: pass flags to change the settings of {path}")
    else:
        cfg = read_config(path)
    if early.output is None:
        _refuse_elsewhere(cfg.output, path)
    return cfg


def _refuse_elsewhere(output: Path, config: Path) -> None:
    """ConfigError for a file that is not of a run in the output folder that it names, and names one
    outside the current folder: another person's, perhaps, and nobody has asked to write there."""
    folder, own = output.absolute(), Path(os.path.normpath(config.absolute()))
    inside = not output.is_absolute() and ".." not in output.parts
    if not inside and Path(os.path.normpath(folder)) not in own.parents:
        raise ConfigError(
            f"{config}: its output folder {output} is not in the current folder: pass --output "
            "with the folder that is to be written"
        )


def _fitting(starting_values: TrainConfig, early: argparse.Namespace) -> TrainConfig:
    """The same values with what --guidance.method and --vram bring along; flags still win."""
    before = starting_values.guidance
    # A configuration of this method has its settings already, and so has a preset for one picture.
    if early.method in guidance.METHODS and early.method != before.method:
        brought = guidance.settings(early.method, starting_values.max_steps)
        starting_values.guidance = dataclasses.replace(before, method=early.method, **brought)
    with contextlib.suppress(ValueError):  # not a number, which the full parse says
        if early.vram:
            memory.choose_settings(starting_values, float(early.vram))
    return starting_values


def _parse_flags(flags: list[str], starting_values: TrainConfig) -> Command:
    return command_flags.parse(
        Command, "dsd_fast.train", flags, default=Command(train=starting_values)
    )


def find_checkpoint(path: Path) -> tuple[Path, RunFolder]:
    """The checkpoint that a run folder or a checkpoint file means, and its run folder.

    A file outside any run folder stands for itself, and its own folder takes what is written.
    """
    if path.is_file():
        in_run = path.parent.name == "checkpoints"
        return path, RunFolder(path.parent.parent if in_run else path.parent)
    if not path.is_dir():
        raise checkpoint.CheckpointError(f"{path}: there is no such run folder or checkpoint")
    folder = RunFolder(path.parent if path.name == "checkpoints" else path)
    folder.settle()
    steps = checkpoint.list_steps(folder.checkpoints)
    if not steps:
        raise checkpoint.CheckpointError(f"{path}: there is no checkpoint in {folder.checkpoints}")
    return steps[-1][1], folder


def _compare(saved: TrainConfig, cfg: TrainConfig) -> None:
    """Refuse flags that make a resumed run another one; mention the others that change it."""
    before, now = leaves(saved), leaves(cfg)
    # In the exact form the number of steps decides the levels of all of them.
    fixed = (*_FIXED_ON_RESUME, "max_steps") if cfg.image.exact else _FIXED_ON_RESUME
    for name, value in now.items():
        if before[name] == value or name in _PLACE:
            continue
        if name in fixed:
            raise ConfigError(
                f"a resumed run keeps its {name} ({before[name]!r}), got {value!r}: "
                "start a new run instead"
            )
        log.info("resuming with %s = %s instead of %s", name, value, before[name])
