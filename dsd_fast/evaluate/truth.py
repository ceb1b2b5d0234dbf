"""How near runs from one picture come to true views of the object: figures by run and by view.

python -m dsd_fast.prior render-objects --pack models.pack --out objects
python -m dsd_fast.train --task single-view --image objects/sofa/sofa.png
python -m dsd_fast.evaluate.truth outputs/diverse-score-distillation --truth objects --json t.json
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro

from dsd_fast._backend import keep_freed_memory
from dsd_fast.config import ConfigError, TrainConfig, from_dict, resolve_device
from dsd_fast.evaluate import assets, metrics
from dsd_fast.evaluate.assets import EvaluateError
from dsd_fast.files import write_json
from dsd_fast.run import checkpoint, cli
from dsd_fast.run.checkpoint import CheckpointError
from dsd_fast.run.command import run_command
from dsd_fast.run.pictures import to_uint8, write_png
from dsd_fast.run.state import saved_scene
from dsd_fast.scene.cameras import eval_camera
from dsd_fast.scene.field_scene import FieldScene

log = logging.getLogger("dsd_fast.evaluate")

TRUTH = "truth.npz"
COLUMNS = ("rgba", "elevation", "azimuth", "distance", "fovy")
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


@dataclass(frozen=True)
class Truth:
    """True views of an object: rgba [V,S,S,4] uint8 of straight alpha; elevation, azimuth (the
    picture's being 0), fovy [V] in degrees; distance [V]."""

    rgba: np.ndarray
    elevation: np.ndarray
    azimuth: np.ndarray
    distance: np.ndarray
    fovy: np.ndarray

    def on_white(self) -> np.ndarray:
        """[V,S,S,3] float64 in [0,1]."""
        image = self.rgba.astype(np.float64) / 255
        return image[..., :3] * image[..., 3:] + 1 - image[..., 3:]


def read_truth(folder: Path) -> Truth:
    """The true views in a folder.

    Raises:
        EvaluateError: there are none, or they do not fit together.
    """
    path = folder / TRUTH
    if not path.is_file():
        raise EvaluateError(
            f"{path}: there are no true views; `python -m dsd_fast.prior render-objects` writes "
            "them, in a folder for each object"
        )
    try:
        with np.load(path) as file:
            columns = {name: file[name] for name in COLUMNS}
    except (KeyError, ValueError, OSError) as error:
        raise EvaluateError(f"{path}: expected {', '.join(COLUMNS)}: {error}") from error
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) != 1 or columns["rgba"].ndim != 4:
        raise EvaluateError(f"{path}: expected as many cameras as views, got {lengths}")
    return Truth(**columns)


@torch.no_grad()
def render_as(cfg: TrainConfig, scene: FieldScene, step: int, truth: Truth) -> np.ndarray:
    """A scene seen by the true views' cameras, over white: [V,S,S,3] float64 in [0,1]."""
    size = truth.rgba.shape[1:3]
    images = []
    columns = (truth.elevation, truth.azimuth, truth.distance, truth.fovy)
    for elevation, azimuth, distance, fovy in zip(*(column.tolist() for column in columns)):
        cfg.cameras.eval_camera_distance, cfg.cameras.eval_fovy_deg = distance, fovy
        camera = eval_camera(cfg.cameras, azimuth, elevation, size=size, device=scene.device)
        images.append(scene.view(camera, step).rgb[0].double().cpu().numpy())
    return np.stack(images)


def score(
    images: np.ndarray, truths: np.ndarray, encoder: object | None = None
) -> dict[str, list[float]]:
    """Figures of each view: PSNR in dB, SSIM and, with an encoder, the cosine distance of ImageNet
    features.

    Args:
        images, truths: [V,S,S,3] in [0,1].
        encoder: of `evaluate.eyes.load_encoder`.
    """
    pairs = list(zip(images, truths, strict=True))
    figures = {
        "psnr_db": [metrics.psnr(a, b) for a, b in pairs],
        "ssim": [metrics.ssim(a, b) for a, b in pairs],
    }
    if encoder is not None:
        seen, true = (
            encoder((side * 255).round().astype(np.uint8)).astype(np.float64)
            for side in (images, truths)
        )
        dot = (seen * true).sum(1)
        norms = np.linalg.norm(seen, axis=1) * np.linalg.norm(true, axis=1)
        figures["feature_distance"] = (1 - dot / np.maximum(norms, 1e-12)).tolist()
    return figures


def compare(command: TruthCommand) -> dict:
    """Do what the command says; returns the report.

    Raises:
        EvaluateError, ConfigError: wrong input.
    """
    from dsd_fast.evaluate import eyes

    if not command.runs:
        raise EvaluateError("expected run folders to score, got none")
    device = resolve_device(command.device)
    keep_freed_memory(device)
    runs = [run for path in command.runs for run in assets.find_assets(path)]
    try:
        encoder = eyes.load_encoder(device)
    except EvaluateError as error:
        log.warning("without feature distances: %s", error)
        encoder = None
    entries = []
    for run in runs:
        try:
            path, folder = cli.find_checkpoint(run)
            tree = checkpoint.load(path)
            cfg = from_dict(TrainConfig, tree["config"])
            cfg.background.eval_color = (1.0, 1.0, 1.0)
            scene = saved_scene(cfg, tree["scene"]).to(device)
        except (CheckpointError, ConfigError) as error:
            raise EvaluateError(f"{run}: {error}") from error
        alone = (command.truth / TRUTH).is_file()
        truth = read_truth(command.truth if alone else command.truth / cfg.prompt)
        truths = truth.on_white()
        images = render_as(cfg, scene, tree["step"], truth)
        by_view = score(images, truths, encoder)
        seconds, memory_mib = assets.cost(folder.metrics)
        entry = {
            "run": str(run),
            "object": cfg.prompt,
            "method": assets.method_of(tree["config"]),
            "seed": cfg.seed,
            "step": tree["step"],
            "seconds": seconds,
            "memory_mib": memory_mib,
            **{name: float(np.mean(values)) for name, values in by_view.items()},
            "by_view": {
                "azimuth": truth.azimuth.tolist(),
                "elevation": truth.elevation.tolist(),
                **by_view,
            },
        }
        entries.append(entry)
        shown = "  ".join(f"{name} {entry[name]:.3f}" for name in FIGURES if name in entry)
        log.info("%s, %s, seed %d: %s", entry["object"], entry["method"], cfg.seed, shown)
        if command.sheets is not None:
            command.sheets.mkdir(parents=True, exist_ok=True)
            rows = [np.concatenate(list(side), axis=1) for side in (truths, images)]
            sheet = to_uint8(torch.from_numpy(np.concatenate(rows)))
            name = f"{cfg.prompt}-{entry['method'].replace(' ', '-')}-seed{cfg.seed}.png"
            write_png(sheet, command.sheets / name)
    report = {"runs": entries, "methods": _by_method(entries)}
    for method, figures in report["methods"].items():
        shown = "  ".join(f"{name} {figures[name]:.3f}" for name in FIGURES if name in figures)
        log.info("%s, mean of %d: %s", method, figures["runs"], shown)
    if command.json is not None:
        write_json(command.json, report)
        log.info("wrote %s", command.json)
    return report


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
