"""Benchmarks: every case runs and proves itself first; a wrong kernel gets no time."""

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import cuda_only

# Last in the path: an installed dsd_fast comes before the source folder's.
sys.path.append(str(Path(__file__).parent.parent))

from benchmarks import guidance, hashgrid, iteration, models, peers, run, timing
from benchmarks.case import CheckFailed, Workload, check, relative_error
from benchmarks.cases import CASES
from benchmarks.model_cases import MODEL_CASES
from dsd_fast._backend import extension
from dsd_fast.scene.field import FieldConfig, GridConfig

CPU = torch.device("cpu")
SIZES = {"points": 500, "numbers": 500, "px": 24, "cells": 8}


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch) -> Iterator[None]:
    """Small tables and copies: it is the time of the tests that they would take."""
    grid = GridConfig(log2_table_size=10)
    monkeypatch.setattr("benchmarks.render.FieldConfig", lambda: FieldConfig(grid=grid))
    monkeypatch.setattr(hashgrid, "SPEC", dataclasses.replace(hashgrid.SPEC, log2_table_size=10))
    monkeypatch.setitem(timing._COPY_BYTES, "cpu", 1 << 20)
    monkeypatch.setitem(timing._GEMM_SIZE, "cpu", 64)
    # The process would keep what it frees for good, which is not for a test to decide.
    monkeypatch.setattr(run, "keep_freed_memory", lambda device: None)
    hashgrid.table.cache_clear()
    yield
    hashgrid.table.cache_clear()


@pytest.fixture
def small_cases(monkeypatch) -> None:
    for name, case in CASES.items():
        small = dataclasses.replace(
            case, sizes={"cpu": (SIZES[case.unit],)}, check_size=min(case.check_size, 1003)
        )
        monkeypatch.setitem(CASES, name, small)


def workload(name: str) -> Workload:
    return CASES[name].prepare(SIZES[CASES[name].unit], CPU, torch.Generator().manual_seed(0))


def test_list_names_every_case(capsys) -> None:
    assert run.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*CASES, *MODEL_CASES]


def test_every_case_runs_and_is_recorded(small_cases, tmp_path, capsys) -> None:
    path = tmp_path / "times.json"
    assert run.main(["--device", "cpu", "--budget", "0.01", "--json", str(path)]) == 0
    written = json.loads(path.read_text())
    assert written["failures"] == []
    assert [result["case"] for result in written["results"]] == list(CASES)
    for result in written["results"]:
        assert 0 < result["ms"]["p20"] <= result["ms"]["median"] <= result["ms"]["p80"]
        assert result["items"] > 0 and result["check_error"] <= CASES[result["case"]].tolerance
        assert (result["gb_per_s"] or result["tflop_per_s"]) > 0
        assert (result["share_of_copy"] or result["share_of_gemm"]) > 0
        assert result["peers"] == []  # other packages' times are those of a GPU
    about = written["about"]
    assert about["device_name"] and about["torch"] == torch.__version__
    assert about["copy_gb_per_s"] > 0 and about["gemm_tflop_per_s"] > 0
    assert about["time"] and about["kernels"]["compiler"]
    printed = capsys.readouterr().out
    assert all(f"\n{name} " in printed for name in CASES)


def test_a_wrong_kernel_is_caught(small_cases, monkeypatch, tmp_path, capsys) -> None:
    """One level too few in the forward kernel: no time for what uses it, status 1, others run."""
    right = extension().hashgrid_fwd

    def wrong(x, table, y, jac, n, n_active, *rest) -> None:
        right(x, table, y, jac, n, n_active - 1, *rest)

    monkeypatch.setattr(extension(), "hashgrid_fwd", wrong)
    path = tmp_path / "times.json"
    names = ["encode/forward", "jacobian/forward", "sh/forward"]
    flags = ["--device", "cpu", "--budget", "0.01", "--json", str(path)]
    assert run.main([*names, *flags]) == 1
    written = json.loads(path.read_text())
    assert [failure["case"] for failure in written["failures"]] == names[:2]
    assert "y differs from the reference: relative error" in written["failures"][0]["error"]
    assert [result["case"] for result in written["results"]] == ["sh/forward"]
    assert "encode/forward                 FAILED: y differs" in capsys.readouterr().out


@pytest.mark.parametrize("name", CASES)
def test_every_output_of_every_case_is_checked(name) -> None:
    right = workload(name)
    outputs = right.compiled()
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    outputs = [output.clone() for output in outputs]
    wanted = [output.clone() for output in outputs]
    same = dataclasses.replace(right, compiled=lambda: outputs, reference=lambda: wanted)
    assert check(same, 0.0) == 0.0
    for label, output in zip(right.outputs, outputs):
        before = output.clone()
        if output.dtype == torch.bool:
            output.view(-1)[0] ^= True
        else:
            output.view(-1)[0] += max(1, output.abs().max())
        with pytest.raises(CheckFailed, match=label):
            check(same, CASES[name].tolerance)
        output.copy_(before)


def test_check_refuses_nan_and_other_shapes() -> None:
    ones = torch.ones(3)
    for wrong, text in [
        (torch.tensor([1.0, 1.0, torch.nan]), "relative error nan"),
        (torch.ones(4), r"is torch.float32 \[4\], the reference's torch.float32 \[3\]"),
        (ones.double(), "is torch.float64"),
    ]:
        with pytest.raises(CheckFailed, match=text):
            check(Workload(lambda wrong=wrong: wrong, lambda: ones, ("y",), 3), 1e-5)
    with pytest.raises(CheckFailed, match="2 outputs, wanted 1"):
        check(Workload(lambda: (ones, ones), lambda: ones, ("y",), 3), 1e-5)
    assert relative_error(ones, torch.zeros(3)) == pytest.approx(3**0.5)


def test_inputs_differ_between_sets_and_are_not_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    for points in (hashgrid.uniform, hashgrid.along_rays):
        first, second = (points(1000, CPU, generator) for _ in range(2))
        assert first.shape == (1000, 3) and bool(((first > 0) & (first < 1)).all())
        assert not torch.equal(first, second)
    # Neighbours on a ray are a step apart.
    steps = (first[1:64] - first[:63]).norm(dim=-1)
    torch.testing.assert_close(steps, torch.full_like(steps, 0.01353125 / 4), rtol=1e-3, atol=0)
    assert float(hashgrid.table(CPU).detach().std()) > 0.5


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["encode/foward"], "unknown case 'encode/foward'; the nearest is 'encode/forward'"),
        (["marsh"], "unknown case 'marsh'; the nearest is 'march'"),
        (["march", "encode", "--size", "64"], "--size means points and px for these cases"),
        (["march", "--size", "many"], "--size"),
        (["march", "--size", "0"], "a size must be at least 1, at most 2^40, got 0"),
        (["iteration/521"], "unknown case 'iteration/521'; the nearest is 'iteration/512'"),
        (["iteration", "--size", "64"], "--size is not for cases with a diffusion model"),
        (["iteration", "--progress", "0,50"], "shares of a run lie between 0 and 1, got 0,50"),
        (["iteration", "--device", "cpu", "--memory-cap", "8"], "--memory-cap is for CUDA"),
        (["march", "--device", "tpu"], "--device"),
    ],
)
def test_usage_errors_name_the_way_out(arguments, words, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        run.main(arguments)
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


def test_the_reference_is_not_compared_with_itself(monkeypatch, capsys) -> None:
    monkeypatch.setenv("DSD_BACKEND", "torch")
    with pytest.raises(SystemExit):
        run.main(["march"])
    assert "DSD_BACKEND=torch leaves nothing to compare" in capsys.readouterr().err


def test_families_and_sizes(small_cases, capsys) -> None:
    assert run.select(["sh", "march"]) == ["sh/forward", "sh/backward", "march"]
    assert run.select([]) == list(CASES)
    assert run.select(["vae", "sh/forward"]) == ["sh/forward", "vae/forward", "vae/encode"]
    flags = ["--device", "cpu", "--budget", "0", "--size", "2^5", "33"]
    assert run.main(["sh/forward", *flags]) == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split()[:2] for row in rows] == [["sh/forward", "32"], ["sh/forward", "33"]]


def test_recorded_times_belong_to_cases() -> None:
    for (name, size), recorded in peers.RECORDED.items():
        sizes = CASES[name].sizes["cuda"]
        assert size in sizes, f"{name} does not run at {size}"
        assert all(time.ms > 0 for time in recorded)


def test_a_row_says_where_a_peer_was_timed(small_cases) -> None:
    record = run.run_case("march", CASES["march"], 24, CPU, budget_s=0.0, peaks=run.Peaks(1e9, 1e9))
    record["peers"] = [
        {"peer": "theirs 1.0", "ms": 1.25, "recorded_on": "H100", "speedup": 2.5},
        {"peer": "theirs 2.0", "ms": 0.5, "speedup": 1.25},
        {"peer": "theirs 3.0", "ms": None, "error": "RuntimeError: no\ncompiler"},
    ]
    row = run._row(record)
    assert row.startswith("march ") and "24² px" in row and " GB/s " in row
    assert row.endswith(
        " 1.25  theirs 1.0 1.25 (recorded on an H100), theirs 2.0 0.5 (here), "
        "theirs 3.0 failed: RuntimeError: no"
    )


def test_nerfacc_has_no_time_on_the_cpu(monkeypatch) -> None:
    monkeypatch.setattr("benchmarks.march.nerfacc", lambda: SimpleNamespace(__version__="0"))
    assert workload("march").peers == {}


def test_a_peer_that_fails_does_not_fail_the_case() -> None:
    def peer() -> None:
        raise RuntimeError("no compiler")

    sets = [Workload(peer, peer, ("y",), 1, peers={"theirs": peer})]
    assert run._time_peer("theirs", sets, CPU, 0.0) == {
        "peer": "theirs",
        "ms": None,
        "error": "RuntimeError: no compiler",
    }


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", CASES)
def test_every_case_runs_on_cuda(name, monkeypatch, tmp_path) -> None:
    """With a device that has no number, as --device cuda gives it."""
    monkeypatch.setitem(timing._COPY_BYTES, "cuda", 1 << 20)
    monkeypatch.setitem(timing._GEMM_SIZE, "cuda", 64)
    path = tmp_path / "times.json"
    flags = ["--device", "cuda", "--budget", "0.01", "--json", str(path)]
    assert run.main([name, *flags, "--size", str(SIZES[CASES[name].unit])]) == 0
    written = json.loads(path.read_text())
    assert [result["case"] for result in written["results"]] == [name]
    assert written["results"][0]["captured"] == CASES[name].captures


def test_times_of_a_known_sleep() -> None:
    import time

    times = timing.measure([lambda: time.sleep(0.002)], CPU, budget_s=0.02)
    assert times.p20 >= 2.0 and 5 <= times.n_repeats <= 10


@cuda_only
def test_passes_of_a_guidance_step_are_three_launches() -> None:
    ours, torchs = {name: counted for name, *counted in guidance.counts()}["passes"]
    assert ours == 3 < torchs


@pytest.fixture
def small_iterations(monkeypatch) -> None:
    """A small field and small pictures, whatever width is asked for; few iterations."""
    configuration = iteration.configuration

    def small(width: int, trajectory: str | None = None):
        cfg = configuration(8, trajectory)
        cfg.field.grid = GridConfig(n_levels=3, start_level=2, log2_table_size=10)
        cfg.renderer.num_samples_per_ray = 48
        cfg.renderer.occupancy.resolution = 16
        cfg.guidance.azimuth_bins = 2
        return cfg

    monkeypatch.setattr(iteration, "configuration", small)
    for name, value in (("WARM_UP", 2), ("MIN_ITERATIONS", 3), ("INSTRUMENTED", 2)):
        monkeypatch.setattr(iteration, name, value)


def test_iterations_and_networks_are_recorded(
    small_cases, small_iterations, tmp_path, capsys
) -> None:
    path = tmp_path / "times.json"
    flags = ["--model", "random-tiny", "--device", "cpu", "--budget", "0.01", "--json", str(path)]
    names = ["iteration/128", "unet", "vae", "sh/forward"]
    flags += ["--progress", "0,1", "--iterations", "1"]
    assert run.main([*names, *flags, "--trajectory", "exact"]) == 0
    written = json.loads(path.read_text())
    assert written["failures"] == []
    assert [result["case"] for result in written["results"]] == ["sh/forward"]
    records = written["model_results"]
    names = ["iteration/128"] * 2 + ["unet/b4", "unet/b8", "vae/forward", "vae/encode"]
    assert [record["case"] for record in records] == names
    for record in records:
        assert 0 < record["ms"]["p20"] <= record["ms"]["median"] <= record["ms"]["p80"]
        assert record["model"] == "random-tiny"
    for record, step in zip(records, (0, 10000)):
        phases = record["phases_ms"]
        # The whole of a median iteration, not the sum of its medians.
        assert phases.pop("whole") == pytest.approx(sum(phases.values()), rel=0.5)
        assert all(ms > 0 for ms in phases.values()) and len(phases) == 9
        assert record["step"] == step and record["kept_samples"] > 0
        assert record["official"] is None  # the network is another, and the device no GPU
    # One node of the trajectory at first and seven at the end, its own noise, and both levels.
    assert [record["unet_rows"] for record in records[:2]] == [4 + 4 + 8, 7 * 4 + 4 + 4]
    assert all(record["tflop_per_s"] > 0 for record in records[2:])
    printed = capsys.readouterr().out
    assert "iteration/128  progress 1    EagerEngine, exact: " in printed
    assert "\nunet/b4 " in printed


def test_caches_are_filled_before_the_window(small_iterations) -> None:
    subject = models.load("random-tiny", CPU)
    record = iteration.measure(subject, 8, 0.5, CPU, iterations=3, trajectory="cached")
    # Two bins, and the views from above; five nodes and the levels around t, four rows each.
    assert record["prepared_rows"] == 3 * 7 * 4
    assert record["unet_rows"] >= 8  # two renderings


def test_the_field_stays_and_the_measured_objects_are_as_before(small_iterations) -> None:
    subject = models.load("random-tiny", CPU)
    loop = iteration.Loop(iteration.configuration(8), subject, CPU, step=16)
    before = [parameter.clone() for parameter in loop.state.scene.parameters()]
    occupied = int(loop.state.scene.renderer.occupancy.binary.sum())
    backward = torch.Tensor.backward
    iteration._phases(loop, CPU)
    assert loop.state.step == 16 + iteration.INSTRUMENTED and occupied > 0
    assert loop.state.optimizer.skipped == 0
    for parameter, value in zip(loop.state.scene.parameters(), before):
        torch.testing.assert_close(parameter.detach(), value.detach(), rtol=0, atol=0)
    assert torch.Tensor.backward is backward
    for owner, method, _ in loop.pieces():
        assert method not in vars(owner)


def test_recorded_iterations_and_networks_belong_to_cases() -> None:
    assert set(peers.NETWORKS) < set(MODEL_CASES)
    assert {f"iteration/{width}" for width, _ in peers.OFFICIAL} < set(MODEL_CASES)
    shares = {progress for _, progress in peers.OFFICIAL}
    assert shares == set(run.Options.progress)


def test_random_sd21_has_as_many_parameters_as_the_original() -> None:
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**models.RANDOM["random-sd21"].unet)
        vae = diffusers.AutoencoderKL(**models.RANDOM["random-sd21"].vae)
    sizes = [sum(p.numel() for p in module.parameters()) for module in (unet, vae)]
    assert sizes == [models._SD21_PARAMETERS, 83_653_863]


def test_an_unknown_random_model_fails_in_words(tmp_path, capsys) -> None:
    path = tmp_path / "times.json"
    flags = ["--model", "random-sd", "--device", "cpu", "--json", str(path)]
    assert run.main(["unet/b4", *flags]) == 1
    text = "there is no model 'random-sd'; did you mean random-sd21?"
    assert json.loads(path.read_text())["failures"] == [{"case": "unet/b4", "error": text}]
    assert text in capsys.readouterr().out


def test_a_row_holds_the_official_loop_beside_ours(small_iterations) -> None:
    subject = models.load("random-tiny", CPU)
    record = iteration.measure(subject, 8, 0.0, CPU, iterations=3)
    official = peers.OFFICIAL[128, 0.0]._asdict()
    record["official"] = official | {"recorded_on": "H100", "ratio": 4.0}
    record |= {"allocated_gib": 3.25, "in_use_gib": 5.5}
    text = iteration.row(record)
    assert "3.25 / 5.50 GiB" in text
    assert "official loop 320 ms: ours is 4.00 times as fast; UNet 4 × 48" in text
