"""When checkpoints of runs side by side are written, and which older ones go."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from dsd_fast.run import checkpoint
from dsd_fast.run.checkpoint import CheckpointError
from dsd_fast.run.cli import Job
from dsd_fast.run.outputs import RunFolder
from dsd_fast.run.state import TrainState

log = logging.getLogger("dsd_fast.train")


class Saver:
    """Saves runs that are all at one step.

    An older checkpoint goes when all runs have the new one: killed at any moment, they have a step
    in common, or none of them has any.

    Args:
        beside: writes what goes with a checkpoint.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        states: Sequence[TrainState],
        beside: Callable[[TrainState, RunFolder], None],
    ) -> None:
        self._jobs, self._states, self._beside = jobs, states, beside
        self._folders = [job.folder for job in jobs]

    def save(self) -> None:
        """Checkpoints of all runs; CheckpointError where one cannot be written, older ones intact.

        On a disk that is full all but the newest common one give way.
        """
        try:
            self._write()
        except CheckpointError as error:
            if not self._make_room():
                raise
            log.warning("%s; older checkpoints have given way, trying again", error)
            self._write()
        try:
            for job in self._jobs:
                job.folder.take_over()
                checkpoint.prune(job.folder.checkpoints, job.config.trainer.keep_checkpoints)
        except OSError as error:
            raise CheckpointError(f"cannot delete older files: {error}") from error
        for state, folder in zip(self._states, self._folders):
            try:
                self._beside(state, folder)
            except (OSError, torch.OutOfMemoryError) as error:
                log.warning("the checkpoint is saved, but its picture is not: %s", error)

    def save_last(self) -> None:
        """`save` for states that would be lost: elsewhere, where the run folder takes nothing.

        Raises:
            CheckpointError: it is not in the run folder, and where it is or that it is lost.
        """
        try:
            self.save()
        except CheckpointError as error:
            raise CheckpointError(f"{error}. {self._rescue()}") from error
        except Exception as error:  # a device that has failed gives nothing back
            words = f"{type(error).__name__}: {error}"
            raise CheckpointError(
                f"the state cannot be saved ({words}). {what_is_saved(self._jobs)}"
            ) from error

    def _write(self) -> None:
        runs = list(zip(self._jobs, self._states))
        paths = [checkpoint.step_path(job.folder.checkpoints, state.step) for job, state in runs]
        trees = (state.to_tree(job.config) for job, state in runs)
        if len(runs) == 1:
            checkpoint.save(paths[0], next(trees))
        else:
            checkpoint.save_together(paths, trees)

    def _make_room(self) -> bool:
        """Delete checkpoints older than the newest that all runs have; whether there were any."""
        saved = [dict(checkpoint.list_steps(folder.checkpoints)) for folder in self._folders]
        newest = max(set.intersection(*(set(steps) for steps in saved)), default=0)
        older = [path for steps in saved for step, path in steps.items() if step < newest]
        for path in older:
            path.unlink(missing_ok=True)
        return bool(older)

    def _rescue(self) -> str:
        """The states in the folder for temporary files, if they go there, in words."""
        moves = []
        try:
            folder = Path(tempfile.mkdtemp(prefix="dsd_fast-"))
            for i, (job, state) in enumerate(zip(self._jobs, self._states)):
                name = checkpoint.step_path(job.folder.checkpoints, state.step).name
                checkpoint.save(folder / str(i) / name, state.to_tree(job.config))
                moves.append(f"{folder / str(i) / name} to {job.folder.path / 'checkpoints'}")
        except (OSError, CheckpointError):
            return f"What was done since is lost; {what_is_saved(self._jobs)}"
        return (
            f"The state is saved elsewhere: free some space, move {' and '.join(moves)}, and the "
            "same command with --resume auto continues"
        )


def what_is_saved(jobs: Sequence[Job]) -> str:
    """How far the run folders have come, in words."""
    steps = [step for job in jobs if (step := job.folder.last_step()) is not None]
    if not jobs or len(steps) < len(jobs):
        return "no step of it is saved, and nothing older is lost"
    return (
        f"step {min(steps)} of {jobs[0].config.max_steps} is saved in "
        f"{', '.join(str(job.folder.checkpoints) for job in jobs)}: the same command with "
        "--resume auto continues"
    )
