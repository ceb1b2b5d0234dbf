"""The numbers of short runs as hashes, to tell whether a change has changed any.

    python tests/fingerprints.py before.json      # on one commit
    python tests/fingerprints.py after.json       # on another
    python tests/fingerprints.py --compare before.json after.json

Every kind of run on a tiny random model, 20 steps on one CPU core: the SHA-256 of all that a
checkpoint holds beside its configuration, and of the metrics. Numbers depend on processor and torch
version, so compare files of one machine alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    # Before anything imports Triton.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from runs import CLOCK, SMALL, picture
from tiny_model import build_tiny_model, build_tiny_multiview, build_tiny_view_model

from dsd_fast import train

STEPS = 20
TEXT = ["--prompt", "a chair"]
IMAGE = ["--task", "image", *TEXT, "--device", "cpu", "--trainer.no-progress"]
VIEW = ["--task", "single-view", "--image", "PICTURE", *SMALL]
MVDREAM = ["--preset", "mvdream", *TEXT, *SMALL, "--cameras.resolution-milestones", "10"]
MVDREAM += ["--cameras.batch-size", "4", "--text.negative", "bad"]
DSD = ["--preset", "dsd", *TEXT, *SMALL, "--cameras.resolution-milestones", "10"]

# name -> (model, flags)
RUNS: dict[str, tuple[str, list[str]]] = {
    "text cached": ("text", [*TEXT, *SMALL]),
    "text cached, no table": ("text", [*TEXT, *SMALL, "--guidance.noise-table-step", "0"]),
    "text exact": ("text", [*TEXT, *SMALL, "--guidance.trajectory", "exact"]),
    "text, preset dsd": ("text", DSD),
    "text, preset dsd, exact": ("text", [*DSD, "--guidance.trajectory", "exact"]),
    "text, ddim weighting": ("text", [*DSD, "--guidance.weighting", "ddim"]),
    "text, v-prediction": ("velocity", DSD),
    "two seeds": ("text", [*TEXT, *SMALL, "--num-seeds", "2"]),
    **{
        f"text {method}": ("text", [*TEXT, *SMALL, "--guidance.method", method])
        for method in (
            "sds",
            "sdi",
            "asd",
            "csd",
            "nfsd",
            "ism",
            "vsd",
            "fsd",
            "cfd",
            "sim",
            "dive3d",
        )
    },
    "single view": ("view", VIEW),
    "single view, exact": ("view", [*VIEW, "--guidance.trajectory", "exact"]),
    "single view, clip": ("clip", VIEW),
    "single view sds": ("view", [*VIEW, "--guidance.method", "sds"]),
    "image latent": ("text", IMAGE),
    "image rgb": ("text", [*IMAGE, "--image.parameter", "rgb"]),
    "image sds": ("text", [*IMAGE, "--guidance.method", "sds"]),
    "image exact": ("text", [*IMAGE, "--image.exact"]),
    "image exact, v-prediction": ("velocity", [*IMAGE, "--image.exact"]),
    **{
        f"mvdream {method}": ("multiview", [*MVDREAM, "--guidance.method", method])
        for method in ("dsd", "sds", "recon")
    },
    "mvdream exact": ("multiview", [*MVDREAM, "--guidance.trajectory", "exact"]),
}


def models(folder: Path) -> dict[str, Path]:
    """The tiny models, written once."""
    return {
        "text": build_tiny_model(folder / "text"),
        "velocity": build_tiny_model(folder / "velocity", prediction_type="v_prediction"),
        "multiview": build_tiny_multiview(folder / "multiview"),
        "view": build_tiny_view_model(folder / "view", clip=False),
        "clip": build_tiny_view_model(folder / "clip"),
    }


def fingerprint(run: Path) -> dict[str, str]:
    """Hashes of the last checkpoint's tensors, by their groups, and of the metrics."""
    from safetensors.numpy import load_file

    digests: dict[str, object] = {}
    tensors = load_file(sorted((run / "checkpoints").glob("*.safetensors"))[-1])
    for name in sorted(tensors):
        digest = digests.setdefault(name.split("/")[0].split(".")[0], hashlib.sha256())
        digest.update(name.encode() + str(tensors[name].dtype).encode() + tensors[name].tobytes())
    lines = (run / "metrics.jsonl").read_text().splitlines()
    records = [{k: v for k, v in json.loads(line).items() if k not in CLOCK} for line in lines]
    found = {name: digest.hexdigest()[:16] for name, digest in digests.items()}
    return found | {"metrics": hashlib.sha256(json.dumps(records).encode()).hexdigest()[:16]}


def measure(only: str) -> dict[str, dict[str, str]]:
    """run (and seed's folder) -> its hashes."""
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        folders = models(folder)
        disc = str(picture(folder / "disc.png"))
        for name, (model, flags) in RUNS.items():
            if only not in name:
                continue
            output = folder / "runs" / name.replace(" ", "_").replace(",", "")
            argv = [disc if flag == "PICTURE" else flag for flag in flags]
            argv += ["--model", str(folders[model]), "--output", str(output)]
            argv += ["--max-steps", str(STEPS), "--pictures.no-turntable", "--pictures.no-mesh"]
            argv += ["--device", "cpu"]
            code = train.main(argv)
            for run in sorted(output.glob("*/*")):
                found[f"{name} / {run.name}"] = fingerprint(run)
            if code:
                found[name] = {"exit code": str(code)}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--only", default="", help="runs whose name contains this")
    arguments = parser.parse_args()
    if not arguments.compare:
        found = measure(arguments.only)
        arguments.files[0].write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        return 0
    before, after = (json.loads(file.read_text()) for file in arguments.files)
    differ = {n for n in before.keys() | after.keys() if before.get(n) != after.get(n)}
    for name in sorted(differ):
        print(f"{name}: {before.get(name)} -> {after.get(name)}")
    same = before.keys() - differ
    print(f"{len(same)} of {len(before)} runs have the same numbers")
    return bool(differ)


if __name__ == "__main__":
    sys.exit(main())
