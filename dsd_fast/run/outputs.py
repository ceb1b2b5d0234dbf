"""The run folder: its name, what lies in it, its one writer, and the checks made before any work.

<output>/<name>/<slug>-seed<seed>/
    config.json       the resolved configuration: this file alone reproduces the run
    versions.json     versions, device, commit, model path and hash
    metrics.jsonl     one JSON object a logged step
    previews/         contact sheets while the run goes on
    checkpoints/      the newest checkpoints
    turntable.mp4     the object once around
    mesh.glb          the mesh with its texture, or another format
    preview.png       the final contact sheet
    .lock             held by the process that writes here

Of a 2D run previews/ has images, image.png is the one of the newest checkpoint, and preview.png a
strip of the way there; there is neither mesh nor video.

A run that replaces another one writes to .next/ in its folder until it has a checkpoint; the older
run goes then, and not before.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from dsd_fast.asset.formats import FORMATS, files_of
from dsd_fast.config import TrainConfig
from dsd_fast.files import UNFINISHED, write_json, write_text
from dsd_fast.run import checkpoint
from dsd_fast.run.unforeseen import ERROR_LOG

log = logging.getLogger(__name__)

MAX_SLUG = 64


class OutputError(RuntimeError):
    """A run folder that cannot or must not be written."""


def slugify(text: str) -> str:
    """A folder name for ``text``: at most ``MAX_SLUG`` of letters, digits, ``_``, ``-`` and ``.``.

    Single spaces become underscores, as in the official code. When anything else had to be changed
    or cut, or an underscore is no space, a short hash of the text is appended, so that different
    texts have different names.
    """
    plain = text.replace(" ", "_")
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    slug = re.sub(r"[^A-Za-z0-9._-]+", "_", ascii_text).strip("._-")
    if slug == plain and "_" not in text and len(slug) <= MAX_SLUG:
        return slug
    # Lone surrogates stand for bytes of a command line that are not UTF-8.
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:8]
    return f"{slug[: MAX_SLUG - len(digest) - 1].rstrip('._-') or 'prompt'}-{digest}"


class RunFolder:
    """The paths of one run, and the few things done to the folder as a whole.

    Whoever writes claims it first; `release` gives it back.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # Where the run is written: the folder itself, or .next in it.
        self._at = path
        self._next, self._adopting = path / ".next", path / ".adopting"
        self._lock = FileLock(path / ".lock", blocking=False)
        # Folders that were made for this run, outermost first.
        self._made: list[Path] = []
        self._metrics_failed = False

    @property
    def config(self) -> Path:
        return self._at / "config.json"

    @property
    def versions(self) -> Path:
        return self._at / "versions.json"

    @property
    def metrics(self) -> Path:
        return self._at / "metrics.jsonl"

    @property
    def previews(self) -> Path:
        return self._at / "previews"

    @property
    def checkpoints(self) -> Path:
        return self._at / "checkpoints"

    @property
    def turntable(self) -> Path:
        return self._at / "turntable.mp4"

    @property
    def mesh(self) -> Path:
        return self.mesh_as("glb")

    def mesh_as(self, name: str) -> Path:
        """Where the mesh is in one of `asset.formats.FORMATS`."""
        return self._at / f"mesh.{name}"

    def meshes(self) -> list[Path]:
        """The meshes that there are."""
        return [path for path in map(self.mesh_as, FORMATS) if path.exists()]

    @property
    def preview(self) -> Path:
        return self._at / "preview.png"

    @property
    def image(self) -> Path:
        return self._at / "image.png"

    def newest_preview(self) -> Path | None:
        """The newest picture of the run on its way, if there is one."""
        return max(self.previews.glob("step-*.png"), default=None)

    @classmethod
    def named(cls, output: Path, name: str, tag: str, seed: int, kind: str = "") -> RunFolder:
        """The folder of the run with this tag (usually the prompt) and seed under ``output``.

        kind: what sets it apart from others of the same tag and seed, in letters, digits and "-".
        """
        # No slug has a "+".
        return cls(Path(output) / name / f"{slugify(tag)}{'+' * bool(kind)}{kind}-seed{seed}")

    @classmethod
    def of(cls, cfg: TrainConfig, seed: int) -> RunFolder:
        """The folder of a run: other tasks and methods have folders of their own."""
        kind = "+".join(
            name
            for name, usual in ((cfg.task, "text"), (cfg.guidance.method, "dsd"))
            if name != usual
        )
        return cls.named(cfg.output, cfg.name, cfg.tag or cfg.prompt, seed, kind)

    # ---- one writer -----------------------------------------------------------------------------

    def claim(self) -> None:
        """Become the only process that writes here, and finish what a killed one had begun.

        The system lets go of the folder when the process ends, however it does. Claiming it again
        does nothing. OutputError where another process has it, or where nothing can be written.
        """
        if self._lock.is_locked:
            return
        try:
            missing = self.path
            while not missing.exists():
                self._made.insert(0, missing)
                missing = missing.parent
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            self._settle()
            # Not a name that a link could have.
            with tempfile.TemporaryFile(dir=self.path) as probe:
                probe.write(b"dsd_fast")
        except Timeout:
            raise OutputError(
                f"{self.path} is being written by another process: wait until that has ended, or "
                "pass another --seed, --name or --output"
            ) from None
        except (OSError, NotImplementedError, ValueError) as error:
            self.abandon()
            raise OutputError(
                f"cannot write to the run folder {self.path}: "
                f"{getattr(error, 'strerror', None) or error}. "
                "Pass --output with a folder you may write to."
            ) from error

    def release(self) -> None:
        """Let others write here. A run beside an older one that has no checkpoint goes."""
        if self._at == self._next:
            shutil.rmtree(self._next, ignore_errors=True)
            self._at = self.path
        self._lock.release()

    def abandon(self) -> None:
        """Release the folder; of a run that has not begun nothing stays."""
        if self._made and self.path.is_dir() and os.listdir(self.path) in ([".lock"], []):
            (self.path / ".lock").unlink(missing_ok=True)
        self.release()
        for folder in reversed(self._made):
            try:
                folder.rmdir()
            except OSError:  # somebody else has put something there
                break
        self._made = []

    def settle(self) -> None:
        """Finish what a killed process had begun, unless another one works here."""
        if self._next.exists() or self._adopting.exists():
            with contextlib.suppress(OutputError):
                self.claim()
                self.release()

    # ---- a run in the place of another ----------------------------------------------------------

    def has_results(self) -> bool:
        """Whether a run has got somewhere here."""
        results = (self.turntable, self.image)
        found = self.meshes() or any(path.exists() for path in results)
        return self.last_step() is not None or bool(found)

    def is_used(self) -> bool:
        """Whether a run has been begun here."""
        return self.config.exists() or self.has_results()

    def last_step(self) -> int | None:
        """The step of the newest checkpoint, or None when there is none."""
        steps = checkpoint.list_steps(self.checkpoints)
        return steps[-1][0] if steps else None

    def refuse_if_used(self, cfg: TrainConfig) -> None:
        """Raise OutputError when the folder holds a run: nothing is ever overwritten silently."""
        if not self.is_used():
            return
        step = self.last_step()
        if step is None:
            state, resume = "a run without a checkpoint", "--resume auto begins it again"
        elif step < cfg.max_steps:
            state = f"an unfinished run at step {step} of {cfg.max_steps}"
            resume = "--resume auto continues it"
        else:
            state, resume = f"a finished run of {step} steps", "--resume auto makes what it lacks"
            if not cfg.image.exact:  # whose length cannot be changed
                resume = "--resume auto --max-steps N trains it further"
        raise OutputError(
            f"{self.path} holds {state}: {resume}, --overwrite starts again and replaces it, "
            "another --seed, --name or --output leaves it alone"
        )

    def begin(self) -> None:
        """Start a run: beside the one that is here, if there is one, until `take_over`."""
        if self.is_used():
            self._at = self._next
        self._at.mkdir(exist_ok=True)

    def take_over(self) -> None:
        """A run that was begun beside another one takes its place, now that it has a checkpoint."""
        if self._at == self._next:
            self._at = self.path
            self._settle()

    def _settle(self) -> None:
        """Put a run that has a checkpoint in .next in the place of the older one; drop another.

        Whenever it is killed, the next call goes on with it.
        """
        if self._next.exists():
            if not checkpoint.list_steps(self._next / "checkpoints"):
                shutil.rmtree(self._next)
            else:
                self._clear()
                os.replace(self._next, self._adopting)
        if self._adopting.exists():
            files = [path for path in self._adopting.rglob("*") if not path.is_dir()]
            for path in files:
                to = self.path / path.relative_to(self._adopting)
                to.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, to)
            shutil.rmtree(self._adopting)
        for folder in (self.path, self.previews, self.checkpoints):
            for path in folder.glob(f"{UNFINISHED}*"):
                path.unlink()

    def _clear(self) -> None:
        """Delete what an earlier run wrote; files that are not ours stay."""
        for folder, pattern in ((self.previews, "step-*.png"), (self.checkpoints, "step-*")):
            for path in folder.glob(pattern):
                path.unlink()
        checkpoint.clear_aside(self.checkpoints)
        meshes = [file for name in FORMATS for file in files_of(self.mesh_as(name))]
        results = (self.turntable, *meshes, self.image, self.preview, self.path / ERROR_LOG)
        for path in (self.versions, self.metrics, *results):
            path.unlink(missing_ok=True)

    # ---- what is written ------------------------------------------------------------------------

    def ask_for_room(self, need_bytes: int) -> None:
        """OutputError where the file system has less than ``need_bytes`` for the run."""
        free = shutil.disk_usage(self.path).free
        if free < need_bytes:
            raise OutputError(
                f"the disk of {self.path} has {free / 2**20:.0f} MiB free and the run needs about "
                f"{need_bytes / 2**20:.0f} MiB. Free some space, pass --output with a folder on "
                "another disk, or keep fewer checkpoints (--trainer.keep-checkpoints 1)."
            )

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
        """Drop the metrics of steps after ``step``: a run resumed there writes them again.

        Lines that are no metrics, as of a damaged disk, go too, with a line in the log.
        """
        if not os.path.lexists(self.metrics):
            return
        damaged, kept = 0, []
        for line in _lines(self.metrics):
            at = _step_of(line)
            if at is None:
                damaged += 1
            elif at <= step:
                kept.append(line)
        if damaged:
            log.warning("%s: %d damaged lines are dropped", self.metrics, damaged)
        write_text(self.metrics, "".join(line + "\n" for line in kept))


def _lines(path: Path) -> Iterator[str]:
    """The lines of a file; one damaged line in the place of what is none."""
    if not path.is_file() or path.is_symlink():
        return iter([""])
    return iter(path.read_bytes().decode(errors="replace").splitlines())


def _step_of(line: str) -> int | None:
    """The step of one line of metrics, or None for a line that is damaged."""
    if "\ufffd" in line:
        return None
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return step if isinstance(step, int) else None
