"""How near runs from one picture come to true views of the object: figures by run and by view.

python -m dsd_fast.prior render-objects --pack models.pack --out objects
python -m dsd_fast.train --task single-view --image objects/sofa/sofa.png
python -m dsd_fast.evaluate.truth outputs/diverse-score-distillation --truth objects --json t.json
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
import tyro

from dsd_fast._backend import keep_freed_memory
from dsd_fast.config import ConfigError, resolve_device
from dsd_fast.evaluate import assets, metrics
from dsd_fast.evaluate.assets import EvaluateError
from dsd_fast.files import write_json
from dsd_fast.judge.similarity import psnr, ssim
from dsd_fast.judge.truth import TRUTH, Truth, read_truth
from dsd_fast.output_file import check_output
from dsd_fast.run.command import run_command
from dsd_fast.run.pictures import to_uint8, write_png
from dsd_fast.run.saved import SavedRun
from dsd_fast.scene.cameras import eval_camera

if TYPE_CHECKING:
    from dsd_fast.evaluate.eyes import Encoder

log = logging.getLogger("dsd_fast.evaluate")

FIGURES = ("psnr_db", "ssim", "feature_distance")


@dataclass
class TruthCommand:
    """Score runs from one picture against true views of its object."""

    # Run folders, checkpoints, or folders that hold them.
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    # Folder of objects that `python -m dsd_fast.prior render-objects` wrote: a run is scored
    # against the object of its name; or the folder of one object, for all runs.
    truth: Path = Path("objects")
    # The figures to write.
    json: Path | None = None
    # A picture of true views above rendered ones to write for each run, in this folder.
    sheets: Path | None = None
    # "auto" (CUDA if there is one), "cpu" or "cuda".
    device: str = "auto"


@torch.no_grad()
def render_as(run: SavedRun, truth: Truth) -> np.ndarray:
    """A run's scene seen by the true views' cameras: [V,S,S,3] float64 in [0,1]."""
    size = truth.rgba.shape[1:3]
    images = []
    columns = (truth.elevation, truth.azimuth, truth.distance, truth.fovy)
    for elevation, azimuth, distance, fovy in zip(*(column.tolist() for column in columns)):
        cameras = replace(run.cfg.cameras, eval_camera_distance=distance, eval_fovy_deg=fovy)
        camera = eval_camera(cameras, azimuth, elevation, size=size, device=run.scene.device)
        images.append(run.scene.view(camera, run.step).rgb[0].double().cpu().numpy())
    return np.stack(images)


def score(
    images: np.ndarray, truths: np.ndarray, encoder: Encoder | None = None
) -> dict[str, list[float]]:
    """Figures of each view: PSNR in dB, SSIM and, with an encoder, the cosine distance of ImageNet
    features.

    Args:
        images, truths: [V,S,S,3] in [0,1].
        encoder: of `evaluate.eyes.load_encoder`.
    """
    pairs = list(zip(images, truths, strict=True))
    figures = {
        "psnr_db": [psnr(a, b) for a, b in pairs],
        "ssim": [ssim(a, b) for a, b in pairs],
    }
    if encoder is not None:
        seen, true = (
            metrics.unit(encoder((side * 255).round().astype(np.uint8)))
            for side in (images, truths)
        )
        figures["feature_distance"] = (1 - (seen * true).sum(1)).tolist()
    return figures


def compare(command: TruthCommand) -> dict:
    """Do what the command says; returns the report.

    Raises:
        EvaluateError, ConfigError: wrong input.
    """
    if not command.runs:
        raise EvaluateError("expected run folders to score, got none")
    if command.json is not None:
        command.json = check_output(command.json, flag="--json")
    if command.sheets is not None:
        check_output(command.sheets / "object.png", flag="--sheets")
    device = resolve_device(command.device)
    keep_freed_memory(device)
    runs = [run for path in command.runs for run in assets.find_assets(path)]
    encoder = _encoder(device)
    entries = [_compare_run(path, command, device, encoder) for path in runs]
    report = {"runs": entries, "methods": _by_method(entries)}
    for method, figures in report["methods"].items():
        log.info("%s, mean of %d: %s", method, figures["runs"], _shown(figures))
    if command.json is not None:
        write_json(command.json, report)
        log.info("wrote %s", command.json)
    return report


def _encoder(device: torch.device) -> Encoder | None:
    """The feature network, None (and a warning) where its weights are not installed."""
    # Loads the judges, which --help need not wait for.
    from dsd_fast.evaluate import eyes

    try:
        return eyes.load_encoder(device)
    except EvaluateError as error:
        log.warning("without feature distances: %s", error)
        return None


def _compare_run(
    path: Path, command: TruthCommand, device: torch.device, encoder: Encoder | None
) -> dict:
    """The report's entry of one run, which is over white as the true views are."""
    run = assets.open_run(path, device, (1.0, 1.0, 1.0))
    cfg = run.cfg
    # A prompt may be anything, an object's folder lies in --truth.
    named = command.truth / re.sub(r"[/\\\0]", "_", cfg.prompt)[:200]
    alone = (command.truth / TRUTH).is_file()
    try:
        truth = read_truth(command.truth if alone else named)
    except ValueError as error:
        raise EvaluateError(str(error)) from error
    truths, images = truth.on_white(), render_as(run, truth)
    by_view = score(images, truths, encoder)
    seconds, memory_mib = assets.cost(run.folder.metrics)
    entry = {
        "run": str(path),
        "object": cfg.prompt,
        "method": assets.method_of(run.config),
        "seed": cfg.seed,
        "step": run.step,
        "seconds": seconds,
        "memory_mib": memory_mib,
        **{name: float(np.mean(values)) for name, values in by_view.items()},
        "by_view": {
            "azimuth": truth.azimuth.tolist(),
            "elevation": truth.elevation.tolist(),
            **by_view,
        },
    }
    log.info("%s, %s, seed %d: %s", cfg.prompt, entry["method"], cfg.seed, _shown(entry))
    if command.sheets is not None:
        rows = [np.hstack(list(side)) for side in (truths, images)]
        sheet = to_uint8(torch.from_numpy(np.vstack(rows)))
        method = entry["method"].replace(" ", "-")
        write_png(sheet, command.sheets / f"{named.name}-{method}-seed{cfg.seed}.png")
    return entry


def _shown(figures: dict) -> str:
    return "  ".join(f"{name} {figures[name]:.3f}" for name in FIGURES if name in figures)


def _by_method(entries: list[dict]) -> dict[str, dict[str, float]]:
    """Means over the runs of each method."""
    methods: dict[str, dict[str, float]] = {}
    for method in dict.fromkeys(entry["method"] for entry in entries):
        mine = [entry for entry in entries if entry["method"] == method]
        methods[method] = {"runs": len(mine)} | {
            name: float(np.mean([entry[name] for entry in mine]))
            for name in (*FIGURES, "seconds")
            if all(entry.get(name) is not None for entry in mine)
        }
    return methods


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 done, 2 wrong input."""
    return run_command(
        compare, TruthCommand, "dsd_fast.evaluate.truth", argv, (ConfigError, EvaluateError)
    )


if __name__ == "__main__":
    sys.exit(main())
