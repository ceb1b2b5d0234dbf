"""Whether runs with --deterministic are the same bit for bit on a GPU, and what that costs.

python tests/deterministic_cuda.py --out FOLDER [--steps 300] [--kills 20] [--processes 4]

Each kind of run is made twice and compared; runs of text and of several seeds are killed at random
moments too, and resumed until they are done. The cost is the median of lines of metrics, of a plain
and a deterministic run of a prompt, one after the other: at most few of them see a compilation, a
capture or a choice of kernels. Exit code 1 where two runs differ.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
from PIL import Image, ImageDraw

from dsd_fast.run import checkpoint

KINDS = {
    "text": ["--prompt", "an armchair"],
    "seeds": ["--prompt", "an armchair", "--num-seeds", "2"],
    "image": ["--prompt", "an armchair", "--task", "image"],
    "single-view": ["--task", "single-view", "--image", "{picture}"],
}


def command(kind: str, out: Path, args: argparse.Namespace, *flags: str) -> list[str]:
    own = [flag.format(picture=args.out / "picture.png") for flag in KINDS[kind]]
    start = (sys.executable, "-m", "dsd_fast.train", *own)
    return [
        *(*start, "--output", str(out), "--device", args.device),
        *("--max-steps", str(args.steps), "--trainer.checkpoint-every", str(args.every)),
        *("--trainer.no-progress", "--pictures.no-mesh", "--pictures.no-turntable"),
        *(*args.flags, *flags),
    ]


def run(kind: str, out: Path, args: argparse.Namespace, *flags: str) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "log", "a") as log:
        subprocess.run(command(kind, out, args, *flags), stderr=log, check=True)
    return out


def killed(kind: str, out: Path, args: argparse.Namespace, kills: int, seed: int) -> Path:
    """As `run`, with so many SIGKILLs, each at a random moment, and --resume auto after each.

    Every fourth comes wherever the run is, the others after its first checkpoint.
    """
    out.mkdir(parents=True, exist_ok=True)
    rng, flags = random.Random(seed), ("--deterministic", "--resume", "auto")
    with open(out / "log", "a") as log:
        for number in range(kills):
            before = newest(out)
            process = subprocess.Popen(command(kind, out, args, *flags), stderr=log)
            began, anywhere = time.monotonic(), number % 4 == 3
            until = rng.uniform(0.0, args.startup) if anywhere else args.startup
            while process.poll() is None and time.monotonic() - began < until:
                if newest(out) != before and not anywhere:
                    break
                time.sleep(0.02)
            time.sleep(0.0 if anywhere else rng.uniform(0.0, args.window))
            if process.poll() is None:
                print(f"killed at step {newest(out)} or later", file=log, flush=True)
                process.send_signal(signal.SIGKILL)
            process.wait()
    return run(kind, out, args, *flags)


def newest(out: Path) -> int:
    """The newest step that is saved."""
    steps = [checkpoint.list_steps(folder) for folder in out.glob("*/*/checkpoints")]
    return max((step for found in steps for step, _ in found), default=0)


def state_of(out: Path) -> dict:
    """Last checkpoints by run folder: tensors by path, and what else counts."""
    found = {}
    for folder in sorted(out.glob("*/*/checkpoints")):
        step, path = checkpoint.list_steps(folder)[-1]
        tensors: dict = {}
        rest = checkpoint._flatten(checkpoint.load(path), "", tensors)
        rest.pop("config")  # which names the folder
        found[folder.parent.name] = (step, rest, tensors)
    return found


def differences(a: dict, b: dict) -> list[str]:
    """What differs; nothing where two runs are the same."""
    if a.keys() != b.keys() or not a:
        return [f"runs {sorted(a)} and {sorted(b)}"]
    lines = []
    for name in a:
        (step, rest, tensors), (other_step, other_rest, others) = a[name], b[name]
        if step != other_step or rest != other_rest or tensors.keys() != others.keys():
            lines.append(f"{name}: step {step} and {other_step}, {rest} and {other_rest}")
        lines += [
            f"{name}: {key} in {int((tensors[key] != others[key]).sum())} of "
            f"{tensors[key].numel()}, by {(tensors[key] - others[key]).abs().max():.2e}"
            for key in tensors.keys() & others.keys()
            if tensors[key].shape != others[key].shape or not torch.equal(tensors[key], others[key])
        ]
    return lines


def milliseconds(out: Path) -> list[float]:
    """Of a step, for each line of metrics but the first."""
    lines = next(out.glob("*/*/metrics.jsonl")).read_text().splitlines()
    seen = [(record["step"], record["seconds"]) for record in map(json.loads, lines)]
    return [1e3 * (b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(seen)]


def draw_picture(path: Path) -> None:
    picture = Image.new("RGBA", (256, 256))
    ImageDraw.Draw(picture).ellipse((48, 32, 208, 224), fill=(200, 80, 40, 255))
    picture.save(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="an empty folder")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--every", type=int, default=20, help="steps between checkpoints")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=4, help="runs at once on the GPU")
    parser.add_argument("--startup", type=float, default=40.0, help="seconds to a checkpoint")
    parser.add_argument("--window", type=float, default=2.0, help="seconds in which kills come")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("flags", nargs="*", help="further flags of every run, after --")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    draw_picture(args.out / "picture.png")
    failed = False

    def report(what: str, a: Path, b: Path) -> None:
        nonlocal failed
        lines = differences(state_of(a), state_of(b))
        failed |= bool(lines)
        print(f"{what:28s}", "the same" if not lines else "DIFFERENT", flush=True)
        print("".join(f"    {line}\n" for line in lines[:20]), end="", flush=True)

    # Alone on the GPU: the first of each also compiles.
    began = time.monotonic()
    for name, flags in (("plain", ()), ("ordered", ("--deterministic",))):
        run("text", args.out / name, args, *flags)
    plain, ordered = (milliseconds(args.out / name) for name in ("plain", "ordered"))
    cost = 100 * (median(b / a for a, b in zip(plain, ordered, strict=True)) - 1)
    print(
        f"milliseconds a step: {median(plain):.2f}, deterministic {median(ordered):.2f}: "
        f"{cost:+.1f} %; {time.monotonic() - began:.0f} s",
        flush=True,
    )

    with ThreadPoolExecutor(args.processes) as pool:
        first = {"text": args.out / "ordered"}
        pairs = []
        for kind in args.kinds:
            again = [pool.submit(run, kind, args.out / f"{kind}-2", args, "--deterministic")]
            if kind != "text":
                first[kind] = args.out / kind
                again.append(pool.submit(run, kind, first[kind], args, "--deterministic"))
            pairs.append((kind, again))
        killable = [kind for kind in args.kinds if kind in ("text", "seeds")]
        for i in range(args.processes if args.kills and killable else 0):
            kind, kills = killable[i % len(killable)], -(-args.kills // args.processes)
            out = args.out / f"{kind}-killed-{i}"
            pairs.append((kind, [pool.submit(killed, kind, out, args, kills, i)]))
        for kind, runs in pairs:
            out = runs[0].result()
            for other in runs[1:]:
                other.result()
            report(out.name, first[kind], out)
    print(f"{time.monotonic() - began:.0f} s in all")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
