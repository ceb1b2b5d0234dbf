"""Crisper textures: the mesh of a finished object goes on under the guidance, at low noise levels
and in full size. A run of its own beside the object's; what was ended goes on.

python -m dsd_fast.refine outputs/diverse-score-distillation/an_armchair-seed0
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dsd_fast import train
from dsd_fast.ranges import Count, check
from dsd_fast.run import cli
from dsd_fast.run import flags as command_flags
from dsd_fast.run.cli import Job
from dsd_fast.scene.texture import TextureSize
from dsd_fast.tasks.refine import refinement


@dataclass
class RefineCommand:
    """Refine the texture of a trained object on its mesh."""

    # The run folder of an object from a prompt (its newest checkpoint is taken).
    run: Annotated[Path, tyro.conf.Positional]
    # Steps; by default 120 on a CPU, 300 on a GPU.
    steps: Count | None = None
    # Triangles that the mesh is decimated to; by default what the run was configured with, 20000.
    max_faces: Count | None = None
    # Rows and columns of the texture; by default what the run was configured with, 1024.
    texture_size: TextureSize | None = None
    # Begin again where an earlier refinement is.
    overwrite: bool = False
    # "auto" (CUDA if there is one), "cpu" or "cuda".
    device: str = "auto"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 done, 1 failed, 2 wrong input, 130 interrupted."""

    def jobs() -> list[Job]:
        command = command_flags.parse(RefineCommand, "dsd_fast.refine", argv)
        check(command, flags=True)
        _, folder = cli.find_checkpoint(command.run)
        return [
            refinement(
                folder,
                command.device,
                command.steps,
                command.max_faces,
                command.texture_size,
                command.overwrite,
            )
        ]

    return train.run(jobs)


if __name__ == "__main__":
    sys.exit(main())
