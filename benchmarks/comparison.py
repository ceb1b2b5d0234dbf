"""The tables of docs/results/comparison.md, each from one command: train, evaluate, write.

python -m benchmarks.comparison text --out runs/text --real real --judge judge.safetensors
python -m benchmarks.comparison image --out runs/image --real real --judge judge.safetensors
python -m benchmarks.comparison single-view --out runs/views --objects objects

Every prompt and method is a job of its own, its seeds side by side where a process can make several
at once; jobs run on all GPUs, several at once on each, and those that an earlier call has finished
are not done again. Every method has its paper's settings, the same steps and the same engine;
`sds@7.5` is SDS at DSD's official scale, since at its paper's 100 the small model's pictures burst,
and `cfd@7.5` is CFD at that scale, whose own is 70.
`--real` are the turntables of real models (`python -m dsd_fast.prior turntables`), which the
diversity is held against; `--judge` is what `python -m dsd_fast.prior evaluate` writes. Of single
views `--prompts` are names of `--objects` (`python -m dsd_fast.prior render-objects`), whose true
views they are held against.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty
from typing import Any

PROMPTS = (
    "an armchair",
    "a red car",
    "a potted plant",
    "a table lamp",
    "a wooden table",
    "a vase",
)
# Of the models that the model of views was never trained on, one of a kind.
OBJECTS = (
    "beach_chair",
    "cafe-table",
    "filing-cabinet",
    "largefridge",
    "leather_sofa",
    "peachblossom",
    "piano",
    "seat_leon",
    "speaker2",
    "van",
)
# Task -> methods, those that all are compared with last.
METHODS = {
    "text": ("dsd", "cfd@7.5", "sim", "sdi", "asd", "vsd", "csd", "sds", "sds@7.5"),
    "image": ("ddim", "dsd", "cfd@7.5", "sim", "sdi", "asd", "vsd", "csd", "sds", "sds@7.5"),
    "single-view": ("dsd", "sds"),
}
RIVAL = "sds@7.5"
PAPER_RIVAL = "sds"
# A process makes these one seed at a time: they have adapters, or several views a step.
ALONE = {"vsd", "dive3d", "single-view"}
SEEDS = {"text": 8, "image": 8, "single-view": 1}
REAL = "real"
# Flags of every run of a task.
FLAGS = {
    "text": ("--pictures.no-turntable", "--pictures.no-mesh"),
    # The small model was trained on captions that name the view.
    "image": ("--task", "image", "--image.azimuth", "0"),
    "single-view": ("--task", "single-view", "--pictures.no-turntable", "--pictures.no-mesh"),
}
# The samples that 2D optimisation is held against, from DSD's seeds, prompts and scale.
SAMPLED = "ddim"
# Columns of the table: key, heading, decimals.
COLUMNS = (
    ("cosine", "distance of seeds", 3),
    ("ratio", "over SDS@7.5", 2),
    ("paper_ratio", "over SDS", 2),
    ("share", "of real", 2),
    ("silhouette", "silhouettes apart", 3),
    ("vendi", "Vendi score", 2),
    ("noun", "prompt accuracy", 3),
    ("frechet", "Fréchet distance", 1),
    ("view", "view accuracy", 3),
    ("janus", "false fronts", 2),
    ("seconds", "seconds", 0),
)
# The same of single views.
VIEW_COLUMNS = (
    ("psnr_db", "PSNR in dB", 2),
    ("ssim", "SSIM", 3),
    ("feature_distance", "feature distance", 3),
    ("seconds", "seconds", 0),
)

log = logging.getLogger("benchmarks.comparison")


@dataclass(frozen=True)
class Job:
    """One method and prompt: the arguments of `dsd_fast.train`."""

    name: str
    argv: tuple[str, ...]


def method_flags(method: str) -> list[str]:
    """Flags of a method's name: "sds" has its paper's scale, "sds@7.5" one of its own, and
    "dsd+0" is DSD of the official form (`GuidanceConfig.trajectory_share`)."""
    name, _, share = method.partition("+")
    name, _, scale = name.partition("@")
    flags = ["--guidance.method", name]
    flags += ["--guidance.guidance-scale", scale] if scale else []
    return flags + (["--guidance.trajectory-share", share] if share else [])


def shown(arguments: argparse.Namespace, prompt: str) -> tuple[str, str]:
    """The flag that says what to make: a prompt, or of single views an object's picture."""
    if arguments.task != "single-view":
        return "--prompt", prompt
    return "--image", str(arguments.objects / prompt / f"{prompt}.png")


def jobs_of(arguments: argparse.Namespace) -> list[Job]:
    """The runs of a comparison, the methods of a prompt one after the other."""
    jobs = []
    for prompt in arguments.prompts:
        for method in arguments.methods:
            if method == SAMPLED:
                continue
            argv = [
                *FLAGS[arguments.task],
                *shown(arguments, prompt),
                *method_flags(method),
                *("--output", str(arguments.out / method)),
                *("--device", arguments.device, "--resume", "auto"),
                *("--trainer.preview-every", "0", "--trainer.no-progress"),
                # One at the end, for the evaluation; and on Ctrl-C.
                *("--trainer.checkpoint-every", "1000000"),
                *arguments.flags,
            ]
            if arguments.steps is not None:
                argv += ["--max-steps", str(arguments.steps)]
            name = f"{method}, {prompt}"
            if {method.partition("@")[0], arguments.task} & ALONE:
                jobs += [
                    Job(f"{name}, seed {seed}", (*argv, "--seed", str(seed)))
                    for seed in range(arguments.seeds)
                ]
            else:
                jobs.append(Job(name, (*argv, "--num-seeds", str(arguments.seeds))))
    return jobs


def work(gpu: int | None, log_file: Path, jobs: Any, done: Any) -> None:
    """Do jobs from a queue until there is none left; a process's main function."""
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)
    with (
        open(log_file, "a", encoding="utf-8") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        # After the device is chosen, which torch looks at once.
        from dsd_fast import train

        while True:
            try:
                job = jobs.get(timeout=1.0)
            except Empty:
                return
            began = time.monotonic()
            try:
                code = train.main(job.argv)
            except SystemExit as error:  # wrong flags
                code = error.code
            except Exception:
                logging.exception("%s", job.name)
                code = 1
            file.flush()
            done.put((job, code, time.monotonic() - began))


def run_all(jobs: Sequence[Job], gpus: Sequence[int | None], each: int, logs: Path) -> list[str]:
    """Do all jobs, `each` at once on every GPU; the names of those that failed."""
    logs.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    queue, done = context.Queue(), context.Queue()
    for job in jobs:
        queue.put(job)
    workers = [
        context.Process(target=work, args=(gpu, logs / f"worker-{i}.log", queue, done))
        for i, gpu in enumerate(gpu for _ in range(each) for gpu in gpus)
    ]
    for worker in workers:
        worker.start()
    failed, left = [], len(jobs)
    while left:
        try:
            job, code, seconds = done.get(timeout=5.0)
        except Empty:
            if not any(worker.is_alive() for worker in workers):
                failed.append(f"{left} jobs whose process died: see {logs}")
                break
            continue
        left -= 1
        if code:
            failed.append(f"{job.name} (exit code {code}): see {logs}")
        log.info("%d left: %s took %.0f s%s", left, job.name, seconds, " and failed" * bool(code))
    for worker in workers:
        worker.join()
    return failed


def sample(arguments: argparse.Namespace) -> list[str]:
    """DDIM's images for the seeds of DSD's runs; the name of what failed, if it did."""
    from dsd_fast import sample as command

    code = command.main(
        [
            *("--like", str(arguments.out / "dsd"), "--output", str(arguments.out / SAMPLED)),
            *("--device", arguments.device, "--overwrite"),
        ]
    )
    return [f"{SAMPLED} (exit code {code})"] if code else []


def table(result: dict) -> str:
    """The figures of a report as Markdown, each method's diversity over its rivals' and real's."""
    methods = {name: dict(entry["figures"]) for name, entry in result["methods"].items()}

    def distance(name: str) -> float | None:
        entry = methods.get(name)
        return None if entry is None else entry.get("cosine")

    for figures in methods.values():
        for key, other in (("ratio", RIVAL), ("paper_ratio", PAPER_RIVAL), ("share", REAL)):
            if (there := distance(other)) and "cosine" in figures:
                figures[key] = figures["cosine"] / there
    return markdown(methods, COLUMNS)


def markdown(methods: dict[str, dict[str, float]], columns: Sequence[tuple[str, str, int]]) -> str:
    """A table of methods by those of the columns that any of them has a figure for."""
    columns = [c for c in columns if any(c[0] in figures for figures in methods.values())]
    lines = [
        "| method | " + " | ".join(title for _, title, _ in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name, figures in methods.items():
        cells = [
            f"{figures[key]:.{decimals}f}" if key in figures else "" for key, _, decimals in columns
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def evaluate_views(arguments: argparse.Namespace) -> str:
    """Scores of single views against the true ones, and their table."""
    from dsd_fast.evaluate.truth import TruthCommand, compare

    methods = {}
    for method in arguments.methods:
        report = compare(
            TruthCommand(
                runs=(arguments.out / method,),
                truth=arguments.objects,
                json=arguments.out / f"{method}.json",
                sheets=arguments.out / "sheets" / method,
                device=arguments.device,
            )
        )
        (methods[method],) = report["methods"].values()
    return markdown(methods, VIEW_COLUMNS)


def evaluate(arguments: argparse.Namespace) -> dict:
    """Figures and page of what the runs have made."""
    from dsd_fast.evaluate.__main__ import EvaluateCommand, compare

    groups = [(f"{method}={arguments.out / method}",) for method in arguments.methods]
    if arguments.real is not None:
        from dsd_fast.run.outputs import slugify

        globs = [str(arguments.real / f"{slugify(prompt)}-seed*") for prompt in arguments.prompts]
        groups.append((f"{REAL}={globs[0]}", *globs[1:]))
    return compare(
        EvaluateCommand(
            group=tuple(groups),
            html=arguments.out / "report.html",
            json=arguments.out / "report.json",
            save_features=arguments.out / "features.npz",
            # 2D runs are pictures: one view, of real models the front.
            views=1 if arguments.task == "image" else arguments.views,
            judge=arguments.judge,
            reference=arguments.reference,
            nearest=arguments.nearest,
            device=arguments.device,
            title=f"Formulations compared: {arguments.task}",
        )
    )


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    description, details = __doc__.split("\n", 1)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.comparison",
        description=description,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("task", choices=METHODS)
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs")
    parser.add_argument("--prompts", nargs="+", help="of single views names of --objects")
    parser.add_argument(
        "--methods",
        nargs="+",
        help="such as dsd sds@7.5 dsd+0; default: all that the task compares",
    )
    parser.add_argument("--seeds", type=int, help="of every prompt (default: 8, single views 1)")
    parser.add_argument("--steps", type=int, help="steps of every run (default: the preset's)")
    parser.add_argument("--views", type=int, default=8, help="views of each object")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--processes", type=int, default=3, help="jobs at once on every GPU")
    parser.add_argument("--objects", type=Path, help="objects with true views, of single views")
    parser.add_argument("--real", type=Path, help="turntables of real models")
    parser.add_argument("--judge", type=Path, help="judge.safetensors")
    parser.add_argument("--reference", type=Path, help="as of dsd_fast.evaluate")
    parser.add_argument("--nearest", type=Path, help="as of dsd_fast.evaluate")
    parser.add_argument("--only-evaluate", action="store_true", help="train nothing")
    parser.usage = f"{parser.format_usage().removeprefix('usage: ').rstrip()} [-- FLAGS OF TRAIN]"
    # What follows "--" argparse would look for before the first option alone.
    words = list(sys.argv[1:] if argv is None else argv)
    end = words.index("--") if "--" in words else len(words)
    arguments = parser.parse_args(words[:end])
    arguments.flags = words[end + 1 :]
    if arguments.seeds is None:
        arguments.seeds = SEEDS[arguments.task]
    if arguments.prompts is None:
        arguments.prompts = list(OBJECTS if arguments.task == "single-view" else PROMPTS)
    if (arguments.task == "single-view") != (arguments.objects is not None):
        parser.error("single-view needs --objects FOLDER, and the other tasks have no use for it")
    for name, most in (("seeds", 1024), ("processes", 64), ("views", 720), ("steps", 2**31 - 1)):
        value = getattr(arguments, name)
        if value is not None and not 1 <= value <= most:
            parser.error(f"--{name}: expected 1 to {most}, got {value}")
    arguments.methods = arguments.methods or list(METHODS[arguments.task])
    if SAMPLED in arguments.methods and not {"dsd"} <= {*arguments.methods}:
        parser.error(f"{SAMPLED} samples for the seeds of dsd: name dsd among --methods too")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code: 0 done, 1 where a run failed."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = parse(argv)
    import torch

    on_cpu = arguments.device == "cpu" or not torch.cuda.is_available()
    gpus = [None] if on_cpu else list(range(torch.cuda.device_count()))
    arguments.device = "cpu" if on_cpu else "cuda"
    arguments.out.mkdir(parents=True, exist_ok=True)
    failed = []
    if not arguments.only_evaluate:
        each = 1 if on_cpu else arguments.processes
        failed = run_all(jobs_of(arguments), gpus, each, arguments.out / "logs")
        if SAMPLED in arguments.methods:
            failed += sample(arguments)
    if failed:
        log.error("failed, left out: %s", "; ".join(failed))
        arguments.methods = [m for m in arguments.methods if (arguments.out / m).is_dir()]
    if arguments.task == "single-view":
        text = evaluate_views(arguments)
    else:
        text = table(evaluate(arguments))
    (arguments.out / "table.md").write_text(text, encoding="utf-8")
    (arguments.out / "arguments.json").write_text(
        json.dumps({k: str(v) for k, v in vars(arguments).items()}, indent=1), encoding="utf-8"
    )
    print(text)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
