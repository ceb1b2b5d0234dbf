"""Runs of the command `dsd_fast.train` for tests: the smallest ones, and what came of them."""

import json
from pathlib import Path

import numpy as np
import torch

from dsd_fast import train as module
from dsd_fast.run import checkpoint, outputs

# The smallest run that still goes through every phase.
SMALL = """
    --device cpu --cameras.width 8 12 --cameras.height 8 12 --cameras.eval-height 16
    --cameras.eval-width 16 --cameras.n-test-views 3 --field.grid.n-levels 3
    --field.grid.start-level 2 --field.grid.log2-table-size 10 --renderer.num-samples-per-ray 48
    --renderer.occupancy.resolution 16 --mesh.resolution 24 --mesh.iso 0.5 --mesh.texture-size 0
    --pictures.preview-size 16
    --pictures.sheet-views 2 --pictures.sheet-size 16 --trainer.log-every 1 --trainer.no-progress
""".split()  # noqa: SIM905

# Metrics that a second run of the same steps need not repeat.
CLOCK = {"seconds", "steps_per_second", "memory_mib"}


class Runner:
    """Runs the command in a folder of its own."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.model = model
        self.run = outputs.RunFolder.named(folder, "diverse-score-distillation", "a chair", 0)

    def folder_of(self, seed: int = 0, method: str = "dsd") -> outputs.RunFolder:
        """Of a run of "a chair"."""
        kind = "" if method == "dsd" else method
        name = "diverse-score-distillation"
        return outputs.RunFolder.named(self.folder, name, "a chair", seed, kind)

    def __call__(self, *flags: str, prompt: str | None = "a chair", steps: int | None = 4) -> int:
        argv = [*SMALL, "--output", str(self.folder), *flags]
        if "--guidance.method" in flags:
            self.run = self.folder_of(method=flags[flags.index("--guidance.method") + 1])
        if "--model" not in flags and "--config" not in flags:
            argv += ["--model", str(self.model)]
        if prompt is not None:
            argv += ["--prompt", prompt]
        if steps is not None:
            argv += ["--max-steps", str(steps)]
        return module.main(argv)

    def metrics(self) -> list[dict]:
        records = [json.loads(line) for line in self.run.metrics.read_text().splitlines()]
        return [{k: v for k, v in r.items() if k not in CLOCK} for r in records]

    def tensors(self, step: int) -> dict:
        flat: dict = {}
        checkpoint._flatten(
            checkpoint.load(checkpoint.step_path(self.run.checkpoints, step)), "", flat
        )
        return flat

    def files(self) -> set[str]:
        """Names of the run's files, but for that of the lock, which stays."""
        if not self.run.path.exists():
            return set()
        files = {str(p.relative_to(self.run.path)) for p in self.run.path.rglob("*") if p.is_file()}
        return files - {".lock"}


def picture(path: Path) -> Path:
    """A disc of two colours."""
    import imageio.v3 as imageio

    y, x = np.mgrid[-1:1:32j, -1:1:32j]
    inside = x**2 + y**2 < 0.6
    rgba = np.zeros((32, 32, 4), np.uint8)
    rgba[inside] = (200, 60, 30, 255)
    rgba[inside & (x > 0)] = (30, 60, 200, 255)
    imageio.imwrite(path, rgba)
    return path


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
