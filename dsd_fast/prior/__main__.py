"""Remake or replace the embedded prior, from 3D models to a diffusers folder.

    python -m dsd_fast.prior pack --source sweethome3d-furniture_1.8-1_all.deb --out models.pack
    python -m dsd_fast.prior render --pack models.pack --out views --views-per-model 200
    torchrun --nproc-per-node gpu -m dsd_fast.prior train-vae --views views --out state
    torchrun --nproc-per-node gpu -m dsd_fast.prior train-unet --views views --vae state --out state
    python -m dsd_fast.prior export --state state --out dsd_fast/assets/prior --int8
    torchrun --nproc-per-node gpu -m dsd_fast.prior train-unet --views views \\
        --vae dsd_fast/assets/prior --resume dsd_fast/assets/prior --out state   # another piece
    python -m dsd_fast.prior evaluate --views views --out report
    python -m dsd_fast.prior sheet --out report
    python -m dsd_fast.prior turntables --pack models.pack --out real --prompts "an armchair"

The pose-conditioned prior beside it, for the reconstruction of one picture:

    python -m dsd_fast.prior render --pack models.pack --out orbits --views-per-model 120 \\
        --views-per-orbit 12
    torchrun --nproc-per-node gpu -m dsd_fast.prior train-views --views orbits --out state
    python -m dsd_fast.prior export-views --state state --out dsd_fast/assets/view_prior \\
        --share-vae --int8
    python -m dsd_fast.prior evaluate-views --views orbits --out report
    torchrun --nproc-per-node gpu -m dsd_fast.prior train-views --views orbits --out state \\
        --resume dsd_fast/assets/view_prior                                        # another piece
    python -m dsd_fast.prior render-objects --pack models.pack --out objects   # of held-out models

The multi-view prior, four views of one object at once:

    python -m dsd_fast.prior render --pack models.pack --out quarters --views-per-model 160 \\
        --quarter-turns
    torchrun --nproc-per-node gpu -m dsd_fast.prior train-multiview --views quarters --out state
    python -m dsd_fast.prior export-multiview --state state \\
        --out dsd_fast/assets/multiview_prior --int8
    python -m dsd_fast.prior multiview-sheet --out report
    python -m dsd_fast.prior evaluate-multiview --views quarters --out report
"""

from __future__ import annotations

import functools
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsd_fast.prior import catalogue, mesh
from dsd_fast.ranges import AnyPath, Workers
from dsd_fast.run.command import run_command
from dsd_fast.run.terminal import reader_may_leave


@dataclass
class PackConfig:
    """From the furniture libraries to one compact file of models."""

    # The .deb package, or a folder with the .sh3f libraries (anywhere below it).
    source: AnyPath
    # File to write.
    out: AnyPath
    # Processes.
    workers: Workers = field(default_factory=lambda: os.cpu_count() or 1)


@dataclass
class ExportConfig:
    """From trained states to the folder that ships."""

    # Folder that `train-unet` wrote: vae.safetensors, unet.safetensors, text_encoder.safetensors,
    # tokenizer/ and scaling_factor.
    state: AnyPath
    # Folder to write.
    out: AnyPath
    # Keep the UNet's weights in 8 bits, half the size: for the folder that ships.
    int8: bool = False


def pack(cfg: PackConfig) -> None:
    """Load, clean and pack every usable model."""
    with tempfile.TemporaryDirectory() as folder:
        entries = catalogue.load(catalogue.unpack(cfg.source, Path(folder)))
        mesh.write_pack(entries, cfg.out, cfg.workers, report("packed"))


def report(verb: str) -> Callable[..., None]:
    """A progress callback that prints now and then."""

    def progress(done: int, total: int, *detail: str) -> None:
        if done % 50 == 0 or done == total:
            print(f"{verb} {done} of {total} models", *detail, flush=True)

    return progress


def export(cfg: ExportConfig) -> None:
    """Write the diffusers StableDiffusionPipeline folder with its credits.

    Raises:
        FileNotFoundError: the state lacks a piece.
        ValueError: weights of other networks.
    """
    from dsd_fast.prior import models
    from dsd_fast.prior.credits import credits
    from dsd_fast.prior.train import load_weights

    scale = cfg.state / "scaling_factor"
    missing = [path for path in (scale, cfg.state / "tokenizer") if not path.exists()]
    if missing:
        raise FileNotFoundError(
            f"state: expected a folder that train-unet wrote, with {missing[0]}"
        )
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(cfg.state / "tokenizer")
    parts = {
        "vae": models.build_vae(),
        "unet": models.build_unet(),
        "text_encoder": models.build_text_encoder(tokenizer),
    }
    for name, part in parts.items():
        load_weights(part, cfg.state, name)
    parts["vae"].register_to_config(scaling_factor=float(scale.read_text(encoding="ascii")))
    unet = {k: v.clone() for k, v in parts["unet"].state_dict().items()}
    models.export_pipeline(cfg.out, tokenizer=tokenizer, **parts)
    models.save_unet(unet, cfg.out / "unet", cfg.int8)
    (cfg.out / "CREDITS.md").write_text(credits(), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command named by the first argument, with the rest as its flags.

    Returns:
        the exit code: 0 done, 1 failed, 2 wrong input.
    """
    from torch import OutOfMemoryError

    from dsd_fast.prior import (
        evaluate,
        evaluate_multiview,
        evaluate_views,
        objects,
        render,
        sheet,
        train,
        train_multiview,
        train_views,
        turntables,
    )

    commands = {
        "pack": (PackConfig, pack),
        "render": (
            render.RenderConfig,
            functools.partial(render.render_views, progress=report("rendered")),
        ),
        "train-vae": (train.VaeConfig, train.train_vae),
        "train-unet": (train.UnetConfig, train.train_unet),
        "export": (ExportConfig, export),
        "evaluate": (evaluate.EvaluateConfig, evaluate.evaluate),
        "train-views": (train_views.ViewTrainConfig, train_views.train_views),
        "export-views": (train_views.ViewExportConfig, train_views.export_views),
        "evaluate-views": (evaluate_views.ViewEvaluateConfig, evaluate_views.evaluate_views),
        "train-multiview": (
            train_multiview.MultiviewTrainConfig,
            train_multiview.train_multiview,
        ),
        "export-multiview": (
            train_multiview.MultiviewExportConfig,
            train_multiview.export_multiview,
        ),
        "evaluate-multiview": (
            evaluate_multiview.MultiviewEvaluateConfig,
            evaluate_multiview.evaluate_multiview,
        ),
        "multiview-sheet": (evaluate.SampleConfig, sheet.multiview_sheet),
        "render-objects": (objects.ObjectsConfig, objects.render_objects),
        "sheet": (evaluate.SampleConfig, sheet.sample_sheet),
        "turntables": (turntables.TurntableConfig, turntables.write_turntables),
    }
    name, *flags = [*(sys.argv[1:] if argv is None else argv), ""]
    if name not in commands:
        with reader_may_leave():
            print(__doc__)
        print(f"expected one of: {', '.join(commands)}", file=sys.stderr)
        return 0 if name in ("-h", "--help") else 2
    config, function = commands[name]

    def do(cfg: Any) -> None:
        result = function(cfg)
        if result is not None:
            print(result)

    return run_command(
        do,
        config,
        f"dsd_fast.prior {name}",
        flags[:-1],
        # Views, states, packs and models that are not what they should be.
        wrong_input=(ValueError, ImportError, ConnectionError),
        failed=(render.ContextError, OutOfMemoryError),
    )


if __name__ == "__main__":
    sys.exit(main())
