"""Compare what several methods, prompts and seeds have made: figures and pictures on one page.

python -m dsd_fast.evaluate outputs/diverse-score-distillation --html report.html
python -m dsd_fast.evaluate --group ours='outputs/ours/*' --group other='outputs/other/*' \\
    --html report.html --json report.json
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import tyro
from annotated_types import Interval

from dsd_fast._backend import keep_freed_memory
from dsd_fast.config import ConfigError, check, resolve_device
from dsd_fast.evaluate import assets, page
from dsd_fast.evaluate.assets import EvaluateError
from dsd_fast.evaluate.metrics import MIN_FRECHET
from dsd_fast.files import write_json, write_text
from dsd_fast.output_file import check_output
from dsd_fast.ranges import MOST
from dsd_fast.run.command import run_command

if TYPE_CHECKING:
    from dsd_fast.evaluate.report import Eyes

# Not __name__, which is "__main__" when this module is the command.
log = logging.getLogger("dsd_fast.evaluate")


@dataclass
class EvaluateCommand:
    """Compare runs of dsd_fast, and views or meshes by other tools, by method, prompt and seed.

    A run is rendered from its newest checkpoint. An asset of another tool is a mesh
    (METHOD/PROMPT-seedN.glb) or a folder of numbered images (METHOD/PROMPT-seedN/000.png, ...),
    evenly spaced around the object from the front on.
    """

    # Run folders, checkpoints, folders of views, meshes, or folders that hold any of these.
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    # NAME=GLOB [GLOB...]: these belong to the method NAME. May be given several times.
    group: tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]] = ()
    # The page to write.
    html: Path | None = None
    # The figures to write.
    json: Path | None = None
    # Views of each asset: 8, or the one that images of 2D runs and samples are.
    views: Annotated[int, Interval(ge=1, le=360)] | None = None
    # Side of the renders of runs and meshes in pixels.
    size: Annotated[int, Interval(ge=16, le=4096)] = 224
    # Show runs before their own backgrounds, not all before the same grey.
    own_background: bool = False
    # Images that the Fréchet distance is measured to: a folder of them, a folder of views that
    # `python -m dsd_fast.prior render` wrote, or an .npz of features.
    reference: Path | None = None
    # Training models to find the nearest of: as --reference, where each lies in a folder.
    nearest: Path | None = None
    # Of a folder of more reference images than this, so many are taken, evenly over all.
    reference_images: Annotated[int, Interval(ge=MIN_FRECHET, le=MOST)] = 5000
    # Write the features of all views, or those of --nearest (else --reference), as .npz, to be
    # passed as --reference or --nearest another time.
    save_features: Path | None = None
    save_reference: Path | None = None
    # Weights of the judges of noun and view: judge.safetensors of `python -m dsd_fast.prior
    # evaluate`.
    judge: Path | None = None
    # Folder of a transformers CLIP model, for the CLIP score.
    clip: Path | None = None
    # Heading of the page.
    title: str = "Comparison of methods"
    # "auto" (CUDA if there is one), "cpu" or "cuda".
    device: str = "auto"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 done, 2 wrong input."""
    return run_command(
        compare, EvaluateCommand, "dsd_fast.evaluate", argv, (ConfigError, EvaluateError)
    )


def compare(command: EvaluateCommand) -> dict:
    """Do what the command says; returns the report, which is also in the files that were asked.

    Raises:
        EvaluateError, ConfigError: wrong input.
    """
    # Loads scipy and the judges, which --help need not wait for.
    from dsd_fast.evaluate import report

    _check(command)
    device = resolve_device(command.device)
    keep_freed_memory(device)
    sources = assets.gather(
        command.runs, assets.parse_groups([word for words in command.group for word in words])
    )
    views = assets.views_of(sources, command.views)
    # All that may be missing is opened before any work.
    eyes = _open_eyes(command, device)
    loaded = []
    for i, source in enumerate(sources, 1):
        what = source.method, source.prompt, source.seed
        log.info("%d of %d: %s, %s, seed %d", i, len(sources), *what)
        loaded.append(assets.load(source, views, command.size, device, command.own_background))
    features = [eyes.encoder(asset.images) for asset in loaded]
    result = report.evaluate(loaded, eyes, features)
    for note in result["notes"]:
        log.info("%s", note)
    if command.json is not None:
        write_json(command.json, result)
        log.info("wrote %s", command.json)
    if command.html is not None:
        write_text(command.html, page.page(result, loaded, command.title))
        log.info("wrote %s", command.html)
    if command.save_features is not None:
        report.write_features(report.of_assets(loaded, features), command.save_features)
        log.info("wrote %s", command.save_features)
    return result


def _check(command: EvaluateCommand) -> None:
    """ConfigError or EvaluateError for flags that cannot work; links to files become the files."""
    check(command, flags=True)
    if not any((command.html, command.json, command.save_features)):
        raise EvaluateError("nothing to write: pass --html FILE, --json FILE or --save-features")
    for name in ("html", "json", "save_features", "save_reference"):
        if (path := getattr(command, name)) is not None:
            setattr(command, name, check_output(path, flag=f"--{name.replace('_', '-')}"))


def _open_eyes(command: EvaluateCommand, device: torch.device) -> Eyes:
    """What looks at the views; the features of --nearest or --reference are saved where asked."""
    from dsd_fast.evaluate import eyes, report

    encoder = eyes.load_encoder(device)
    judge = eyes.open_judge(command.judge, device) if command.judge else None
    clip = eyes.Clip(command.clip, device) if command.clip else None
    paths = command.reference, command.nearest
    known = {  # a path that serves for both is looked at once
        path: report.reference_features(path, encoder, command.reference_images)
        for path in {path for path in paths if path is not None}
    }
    reference, nearest = (known[path] if path else None for path in paths)
    if command.save_reference is not None:
        kept = nearest or reference
        if kept is None:
            raise EvaluateError("--save-reference: pass --nearest or --reference as well")
        report.write_features(kept, command.save_reference)
        log.info("wrote %s", command.save_reference)
    return report.Eyes(encoder, judge, clip, reference, nearest)


if __name__ == "__main__":
    sys.exit(main())
