"""Check and time cases: ``python -m benchmarks.run encode march --device cpu --json times.json``.

A case is named in full or by what stands before its slash; none means all. Every case first proves
itself at a small size: the compiled backend must agree with the pure-torch reference on the device,
or no time is given and the command ends with status 1. Then it is timed with several input sets in
turn, on CUDA as a CUDA graph where it can be captured.

Columns: times of a call in milliseconds (median, 20th and 80th percentile); GB/s by the least
traffic that the task needs (or TFLOP/s by its least arithmetic); that as a share of the bandwidth
of a plain copy (or of the rate of a large float32 matrix product) in the same run; how many times
faster than the reference on the same device ("-" where the reference would take too long); how many
times faster than the fastest other package; other packages' times, on CUDA alone: recorded ones of
an H100, those of nerfacc, run eagerly, where it is installed, and those of torch's fused Adam.

Cases with a diffusion model (`iteration`, `unet`, `vae`) run only when they are named. They have no
reference twin and rows of their own:

python -m benchmarks.run iteration/128 --model random-sd21 --progress 0,0.5,1 --memory-cap 8
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from benchmarks.case import Case, Workload, check
from benchmarks.cases import CASES
from benchmarks.model_cases import MODEL_CASES, Options
from benchmarks.models import load
from benchmarks.peers import RECORDED, RECORDED_ON, nerfacc
from benchmarks.timing import Times, copy_bandwidth, gemm_rate, measure, peak_bytes
from dsd_fast._backend import backend, extension, keep_freed_memory
from dsd_fast.config import ConfigError, resolve_device
from dsd_fast.diffusion.engines import ENGINES
from dsd_fast.guidance.config import TRAJECTORIES
from dsd_fast.ranges import shown
from dsd_fast.run import versions
from dsd_fast.run.memory import cap_allocations
from dsd_fast.run.terminal import reader_may_leave

# Input sets that a case is timed with, in turn.
N_SETS = 3
LARGEST_SIZE = 2**40
# The reference may take so many budgets for one call; it is not timed where it would take more.
REFERENCE_BUDGETS = 10.0

_UNITS = {"points": "", "numbers": "", "px": "² px", "cells": "³ cells"}
_HEAD = f"{'case':<30} {'size':>10} {'items':>10} {'median':>9} {'p20':>9} {'p80':>9}"
_HEAD += f"  {'rate':>13} {'of peak':>7} {'vs torch':>8} {'vs peer':>7}  peers, ms"


@dataclass(frozen=True)
class Peaks:
    """What the device reached in the same run."""

    copy: float  # bytes per second
    gemm: float  # float32 operations per second


class UsageError(ValueError):
    """A command line that cannot be run; the text says how to mend it."""


def select(names: Sequence[str]) -> list[str]:
    """The cases that names or families ask for, in the order of the list.

    None ask for all that need no diffusion model.

    Raises:
        UsageError: a name is neither, with the nearest one.
    """
    every = [*CASES, *MODEL_CASES]
    families = {name.split("/")[0] for name in every}
    for name in names:
        if name not in every and name not in families:
            near = difflib.get_close_matches(name, [*every, *families], n=1, cutoff=0.0)[0]
            raise UsageError(f"unknown case {name!r}; the nearest is {near!r}. --list shows all")
    asked = set(names)
    return [name for name in every if asked & {name, name.split("/")[0]}] or list(CASES)


def check_sizes(names: Sequence[str], sizes: Sequence[int]) -> None:
    """Raises UsageError for sizes of cases that count different things, or have their own size."""
    if sizes and MODEL_CASES.keys() & set(names):
        raise UsageError("--size is not for cases with a diffusion model: their names have it")
    units = {CASES[name].unit for name in names if name in CASES}
    if sizes and len(units) > 1:
        raise UsageError(
            f"--size means {' and '.join(sorted(units))} for these cases; choose cases of one unit "
            "(--list shows it)"
        )


def run_case(
    name: str, case: Case, size: int, device: torch.device, budget_s: float, peaks: Peaks
) -> dict[str, Any]:
    """Check and time a case at one size; the record that goes to JSON.

    Raises:
        CheckFailed: the compiled backend does not agree with the reference; nothing was timed.
    """
    generator = torch.Generator().manual_seed(0)
    small = case.prepare(case.check_size, device, generator)
    error = check(small, case.tolerance)
    sets = [case.prepare(size, device, generator) for _ in range(N_SETS)]
    times = measure([w.compiled for w in sets], device, budget_s, capture=case.captures)
    first = sets[0]
    reference = _time_reference(small, first, device, budget_s)
    seconds = 1e-3 * times.median
    bytes_per_s = first.n_bytes / seconds if first.n_bytes else None
    flops_per_s = first.n_flops / seconds if first.n_flops else None
    peers = [_time_peer(peer, sets, device, budget_s) for peer in first.peers]
    if device.type == "cuda":
        peers += [
            {"peer": peer, "ms": ms, "recorded_on": RECORDED_ON}
            for peer, ms in RECORDED.get((name, size), ())
        ]
    for peer in peers:
        peer["speedup"] = peer["ms"] and peer["ms"] / times.median
    return {
        "case": name,
        "size": size,
        "unit": case.unit,
        "items": first.n_items,
        "device": str(device),
        "check_error": error,
        "ms": asdict(times),
        "captured": device.type == "cuda" and case.captures,
        "min_bytes": first.n_bytes,
        "min_flops": first.n_flops,
        "gb_per_s": bytes_per_s and 1e-9 * bytes_per_s,
        "tflop_per_s": flops_per_s and 1e-12 * flops_per_s,
        "share_of_copy": bytes_per_s and bytes_per_s / peaks.copy,
        "share_of_gemm": flops_per_s and flops_per_s / peaks.gemm,
        "peak_bytes": peak_bytes(first.compiled, device),
        "reference_ms": reference and asdict(reference),
        "speedup": reference and reference.median / times.median,
        "peers": peers,
    }


def _time_peer(
    peer: str, sets: Sequence[Workload], device: torch.device, budget_s: float
) -> dict[str, Any]:
    """The peer's time; where it fails, None and why, for it is not the case that failed."""
    calls = [workload.peers[peer] for workload in sets]
    try:
        times = measure(calls, device, budget_s, capture=sets[0].capture_peers)
    except Exception as error:
        return {"peer": peer, "ms": None, "error": f"{type(error).__name__}: {error}"}
    return {"peer": peer, "ms": times.median, "captured": sets[0].capture_peers}


def _time_reference(
    small: Workload, full: Workload, device: torch.device, budget_s: float
) -> Times | None:
    """The reference's times, or None where it would take too long or too much memory."""
    estimate = measure([small.reference], device, 0.0, min_repeats=1).median
    if 1e-3 * estimate * full.n_items > REFERENCE_BUDGETS * budget_s * small.n_items:
        return None
    try:
        return measure([full.reference], device, budget_s, min_repeats=1)
    except torch.OutOfMemoryError:
        return None


def measure_peaks(device: torch.device, budget_s: float) -> Peaks:
    """The rates of a plain copy and of a float32 matrix product."""
    return Peaks(copy_bandwidth(device, budget_s), gemm_rate(device, budget_s, torch.float32))


def environment(device: torch.device, peaks: Peaks) -> dict[str, Any]:
    """What the times hold for: versions, device, threads, date."""
    peer = nerfacc()
    return {
        **versions.collect(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "kernels": extension().build_info(),
        "nerfacc": peer and peer.__version__,
        "copy_gb_per_s": 1e-9 * peaks.copy,
        "gemm_tflop_per_s": 1e-12 * peaks.gemm,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _row(record: dict[str, Any]) -> str:
    ms = record["ms"]
    if record["gb_per_s"]:
        rate, share = f"{record['gb_per_s']:.1f} GB/s", f"{100 * record['share_of_copy']:.0f} %"
    else:
        rate = f"{record['tflop_per_s']:.3f} TFLOP/s"
        share = f"{100 * record['share_of_gemm']:.0f} %"
    speedup = f"{record['speedup']:.1f}" if record["speedup"] else "-"
    timed = [peer for peer in record["peers"] if peer["ms"]]
    fastest = min(timed, key=lambda peer: peer["ms"], default=None)
    ratio = f"{fastest['speedup']:.2f}" if fastest else "-"
    peers = ", ".join(_peer(peer) for peer in record["peers"])
    return (
        f"{record['case']:<30} {_size(record):>10} {record['items']:>10} {ms['median']:>9.3f} "
        f"{ms['p20']:>9.3f} {ms['p80']:>9.3f}  {rate:>13} {share:>7} {speedup:>8} {ratio:>7}  "
        f"{peers}"
    ).rstrip()


def _peer(peer: dict[str, Any]) -> str:
    if peer["ms"] is None:
        return f"{peer['peer']} failed: {peer['error'].splitlines()[0]}"
    where = f"recorded on an {peer['recorded_on']}" if "recorded_on" in peer else "here"
    return f"{peer['peer']} {peer['ms']:.3g} ({where})"


def _size(record: dict[str, Any]) -> str:
    return f"{record['size']}{_UNITS[record['unit']]}"


def _list() -> None:
    for name, case in CASES.items():
        sizes = "; ".join(
            f"{device} {', '.join(map(str, sizes))}" for device, sizes in case.sizes.items()
        )
        function = getattr(case.prepare, "func", case.prepare)
        summary = function.__doc__.splitlines()[0]
        on_rays = " Points along rays." if name.endswith("-rays") else ""
        print(f"{name:<30} {case.unit:<6}  {sizes:<28} {summary}{on_rays}")
    for name, case in MODEL_CASES.items():
        print(f"{name:<30} {'model':<6}  {'--model':<28} {case.description}")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("cases", nargs="*", help="names or families of cases; none for all")
    parser.add_argument("--list", action="store_true", help="list the cases and their sizes")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    parser.add_argument(
        "--size", type=_integer, nargs="+", default=[], help="sizes to run, such as 2^22 or 512"
    )
    parser.add_argument(
        "--budget", type=_seconds, default=1.0, help="seconds of timing a case (default 1)"
    )
    models = parser.add_argument_group("cases with a diffusion model")
    models.add_argument(
        "--model",
        default="random-sd21",
        help="random-sd21 (default), random-tiny, embedded, a Stable Diffusion folder or a hub id",
    )
    models.add_argument("--engine", choices=ENGINES, default="auto", help="how the UNet is run")
    models.add_argument(
        "--progress",
        type=_shares,
        default=Options.progress,
        help="shares of a run at which to time iterations, such as 0,0.5,1 (default)",
    )
    models.add_argument(
        "--iterations", type=_integer, default=Options.iterations, help="in a window (at least 20)"
    )
    models.add_argument("--trajectory", choices=TRAJECTORIES, help="in place of the preset's")
    models.add_argument(
        "--memory-cap",
        type=_positive,
        metavar="GIB",
        help="CUDA memory that torch may take; a case that needs more fails",
    )
    chosen = parser.parse_args(arguments)
    try:
        if backend(torch.device("cpu")) == "torch":
            raise UsageError("DSD_BACKEND=torch leaves nothing to compare; unset it")
        chosen.names = select(chosen.cases)
        chosen.device = resolve_device(chosen.device)
        check_sizes(chosen.names, chosen.size)
        if chosen.json is not None and (chosen.json.is_dir() or not chosen.json.parent.is_dir()):
            raise UsageError(f"--json {chosen.json}: expected a file in a folder that is there")
        if chosen.memory_cap is not None and chosen.device.type != "cuda":
            raise UsageError("--memory-cap is for CUDA devices")
    except (UsageError, ConfigError) as error:
        parser.error(str(error))
    return chosen


def _integer(text: str) -> int:
    base, _, power = text.partition("^")
    # The largest size has 10 digits, and 9^999999999 takes hours.
    if len(text) > 20 or len(power) > 2:
        raise argparse.ArgumentTypeError(f"a size has at most 20 digits, got {shown(text)}")
    value = int(base) ** int(power or 1)
    if not 1 <= value <= LARGEST_SIZE:
        raise argparse.ArgumentTypeError(f"a size must be at least 1, at most 2^40, got {text}")
    return value


def _shares(text: str) -> tuple[float, ...]:
    shares = tuple(float(part) for part in text.split(","))
    if not all(0 <= share <= 1 for share in shares):
        raise argparse.ArgumentTypeError(f"shares of a run lie between 0 and 1, got {text}")
    return shares


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1e6:  # nor is NaN
        raise argparse.ArgumentTypeError(f"expected seconds of 0 to 1e6, got {text}")
    return value


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1e6:  # nor is NaN
        raise argparse.ArgumentTypeError(f"expected a number above 0, at most 1e6, got {text}")
    return value


def _run_model_cases(
    chosen: argparse.Namespace, device: torch.device, failures: list[dict[str, str]]
) -> list[dict[str, Any]]:
    """Run those that were asked for and print their rows; adds to `failures`."""
    records: list[dict[str, Any]] = []
    names = [name for name in chosen.names if name in MODEL_CASES]
    if not names:
        return records
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what the copy and the product took
    try:
        subject = load(chosen.model, device, chosen.engine)
    except (ValueError, OSError, RuntimeError) as error:
        failures.extend({"case": name, "error": str(error)} for name in names)
        print(f"{chosen.model} FAILED: {error}", flush=True)
        return records
    options = Options(device, chosen.progress, chosen.iterations, chosen.trajectory, chosen.budget)
    for name in names:
        case = MODEL_CASES[name]
        try:
            for record in case.run(subject, options):
                records.append(record)
                print(case.row(record), flush=True)
        except RuntimeError as error:  # no memory, a kernel that did not start
            failures.append({"case": name, "error": str(error)})
            print(f"{name:<30} FAILED: {error}", flush=True)
    return records


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    chosen = _parse(arguments)
    if chosen.list:
        _list()
        return 0
    device = chosen.device
    if device.type == "cuda":
        # With its number, as set_device wants it and the tensors' devices have it.
        number = torch.cuda.current_device() if device.index is None else device.index
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
    keep_freed_memory(device)
    peaks = measure_peaks(device, min(chosen.budget, 1.0))
    about = environment(device, peaks)
    if device.type == "cuda" and chosen.memory_cap is not None:
        # Now, since the copy and the product may take more.
        torch.cuda.empty_cache()
        cap_allocations(device, chosen.memory_cap)
    print(
        f"{about['device_name']}, {about['threads']} threads; torch {about['torch']}, "
        f"dsd_fast {about['dsd_fast']} {(about['commit'] or '')[:10]}; "
        f"copy {about['copy_gb_per_s']:.1f} GB/s; "
        f"float32 GEMM {about['gemm_tflop_per_s']:.3g} TFLOP/s; "
        f"nerfacc {about['nerfacc'] or 'not installed'}"
    )
    results: list[dict[str, Any]] = []
    failures: list[dict[str, str]] = []
    names = [name for name in chosen.names if name in CASES]
    if names:
        print(_HEAD)
    for name in names:
        case = CASES[name]
        try:
            for size in chosen.size or case.sizes[device.type]:
                results.append(run_case(name, case, size, device, chosen.budget, peaks))
                print(_row(results[-1]), flush=True)
        except RuntimeError as error:  # a failed check, no memory, a kernel that did not start
            failures.append({"case": name, "error": str(error)})
            print(f"{name:<30} FAILED: {error}", flush=True)
    model_results = _run_model_cases(chosen, device, failures)
    if chosen.json:
        written = {
            "about": about | {"memory_cap_gib": chosen.memory_cap},
            "results": results,
            "model_results": model_results,
            "failures": failures,
        }
        text = json.dumps(written, indent=2)
        chosen.json.write_text(text + "\n")
    return 1 if failures else 0


if __name__ == "__main__":
    with reader_may_leave():
        sys.exit(main())
