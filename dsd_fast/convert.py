"""A checkpoint of Stable Diffusion in one file, to a folder that every command takes."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dsd_fast.diffusion import single_file
from dsd_fast.run.command import run_command

# Not __name__, which is "__main__" when this module is the command.
log = logging.getLogger("dsd_fast.convert")


@dataclass
class ConvertCommand:
    """Write a checkpoint of one safetensors file as a folder in diffusers' format.

    --model FILE does the same, once, into a cache. Nothing is fetched.
    """

    # The checkpoint: UNet, VAE and text encoder under their original names.
    file: Path
    # The folder to write, where there is nothing yet.
    output: Path
    # A folder of the same kind of model, whose configurations and tokenizer are taken; by default
    # those of Stable Diffusion 1 or 2, whichever the file is.
    like: Path | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 done, 2 wrong input."""
    return run_command(convert, ConvertCommand, "dsd_fast.convert", argv, (ValueError,))


def convert(command: ConvertCommand) -> Path:
    """Do what the command says; returns the folder. Errors: `single_file.convert`."""
    try:
        folder = single_file.convert(command.file, command.output, command.like)
    except FileNotFoundError as error:
        raise ValueError(str(error)) from error
    log.info("wrote %s: pass --model %s", folder, folder)
    return folder


if __name__ == "__main__":
    sys.exit(main())
