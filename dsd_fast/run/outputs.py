"""The run folder: its name, what lies in it, and the checks made before any work.

<output>/<name>/<slug>-seed<seed>/
    config.json       the resolved configuration: this file alone reproduces the run
    versions.json     versions, device, commit, model path and hash
    metrics.jsonl     one JSON object a logged step
    previews/         contact sheets while the run goes on
    checkpoints/      the newest checkpoints
    turntable.mp4     rgb | normal | opacity, once around
    mesh.glb          the mesh with vertex colours
    preview.png       the final contact sheet

Of a 2D run previews/ has images, image.png is the one of the newest checkpoint, and preview.png a
strip of the way there; there is neither mesh nor video.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import unicodedata
from pathlib import Path

from dsd_fast.files import write_json, write_text
from dsd_fast.run import checkpoint

log = logging.getLogger(__name__)

MAX_SLUG = 64


class OutputError(RuntimeError):
    """A run folder that cannot or must not be written."""


def slugify(text: str) -> str:
    """A folder name for ``text``: at most ``MAX_SLUG`` of letters, digits, ``_``, ``-`` and ``.``.

    Single spaces become underscores, as in the official code. When anything else had to be changed
    or cut, a short hash of the text is appended, so that different texts keep different names.
    """
    plain = text.replace(" ", "_")
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    slug = re.sub(r"[^A-Za-z0-9._-]+", "_", ascii_text).strip("._-")
    if slug == plain and len(slug) <= MAX_SLUG:
        return slug
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{slug[: MAX_SLUG - len(digest) - 1].rstrip('._-') or 'prompt'}-{digest}"


class RunFolder:
    """The paths of one run, and the few things done to the folder as a whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.json"
        self.versions = path / "versions.json"
        self.metrics = path / "metrics.jsonl"
        self.previews = path / "previews"
        self.checkpoints = path / "checkpoints"
        self.turntable = path / "turntable.mp4"
        self.mesh = path / "mesh.glb"
        self.preview = path / "preview.png"
        self.image = path / "image.png"
        self._metrics_failed = False

    @classmethod
    def named(cls, output: Path, name: str, tag: str, seed: int) -> RunFolder:
        """The folder of the run with this tag (usually the prompt) and seed under ``output``."""
        return cls(Path(output) / name / f"{slugify(tag)}-seed{seed}")

    def last_step(self) -> int | None:
        """The step of the newest checkpoint, or None when there is none."""
        steps = checkpoint.list_steps(self.checkpoints)
        return steps[-1][0] if steps else None

    def refuse_if_used(self, max_steps: int) -> None:
        """Raise OutputError when the folder holds a run: nothing is ever overwritten silently."""
        step = self.last_step()
        results = (self.mesh, self.turntable, self.image)
        if step is None and not any(path.exists() for path in results):
            return
        if step is None or step >= max_steps:
            state = "a finished run"
            advice = "--resume auto --max-steps N trains it further"
        else:
            state = f"an unfinished run at step {step} of {max_steps}"
            advice = "--resume auto continues it"
        raise OutputError(
            f"{self.path} holds {state}: {advice}, --overwrite starts again and replaces it, "
            "another --seed or --output leaves it alone"
        )

    def prepare(self, need_bytes: int) -> None:
        """Make the folder and check that ``need_bytes`` fit there; OutputError otherwise."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".probe"
            probe.write_bytes(b"dsd_fast")
            probe.unlink()
        except OSError as error:
            raise OutputError(
                f"cannot write to the run folder {self.path}: {error.strerror or error}. "
                "Pass --output with a folder you may write to."
            ) from error
        free = shutil.disk_usage(self.path).free
        if free < need_bytes:
            raise OutputError(
                f"the disk of {self.path} has {free / 2**20:.0f} MiB free and the run needs about "
                f"{need_bytes / 2**20:.0f} MiB. Free some space, pass --output with a folder on "
                "another disk, or keep fewer checkpoints (--trainer.keep-checkpoints 1)."
            )

    def clear(self) -> None:
        """Delete what an earlier run wrote; files that are not ours stay."""
        for folder, pattern in ((self.previews, "step-*.png"), (self.checkpoints, "step-*")):
            for path in folder.glob(pattern):
                path.unlink()
        results = (self.turntable, self.mesh, self.image, self.preview)
        for path in (self.versions, self.metrics, *results):
            path.unlink(missing_ok=True)

    def write_config(self, config: dict) -> None:
        write_json(self.config, config)

    def write_versions(self, versions: dict) -> None:
        write_json(self.versions, versions)

    def append_metrics(self, record: dict) -> None:
        """Add one line to metrics.jsonl. A full disk is reported once and does not end the run."""
        try:
            with open(self.metrics, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            if not self._metrics_failed:
                log.warning(
                    "cannot write %s: %s; training goes on without metrics", self.metrics, error
                )
            self._metrics_failed = True

    def truncate_metrics(self, step: int) -> None:
        """Drop the metrics of steps after ``step``: a run resumed there writes them again."""
        if not self.metrics.exists():
            return
        lines = self.metrics.read_text(encoding="utf-8").splitlines()
        kept = [
            line
            for line in lines
            if (record := _parse(line)) is not None and record["step"] <= step
        ]
        write_text(self.metrics, "".join(line + "\n" for line in kept))


def _parse(line: str) -> dict | None:
    """The record of one metrics line, or None for a line that a crash cut short."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None
