"""What an asset tells of how it was made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import dsd_fast
from dsd_fast.config import TrainConfig
from dsd_fast.diffusion.loader import EMBEDDED
from dsd_fast.run.outputs import RunFolder

# Of models in the package; of others it is not known here.
OWN_LICENCE = "MIT; the model was trained on CC-BY and CC0 works, named in the package's CREDITS.md"


def about(cfg: TrainConfig, step: int, run: RunFolder) -> dict[str, Any]:
    """For an asset of a run at a step, in values of JSON: what to say, and with which model.

    Of a model that is a folder or a file the name alone: paths are nobody's business.
    """
    embedded = cfg.model == EMBEDDED
    licence = OWN_LICENCE if embedded else f"as the licence of the model {_name(cfg.model)} says"
    return {
        "prompt": cfg.prompt,
        "seed": cfg.seed,
        "method": cfg.guidance.method,
        "steps": step,
        "model": _name(cfg.model),
        "model_sha256": _hash(run),
        "licence": licence,
        "dsd_fast": dsd_fast.__version__,
    }


def _name(model: str) -> str:
    return Path(model).name if Path(model).exists() else model


def _hash(run: RunFolder) -> str | None:
    """Of the model's weights, as the run has noted it."""
    try:
        found = json.loads(run.versions.read_text(encoding="utf-8")).get("model_sha256")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return found if isinstance(found, str) else None
