"""The command from end to end, on a tiny random model: outputs, resume, interruption, bad input."""

import itertools
import json
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import trimesh
from runs import Runner, equal
from tiny_model import build_tiny_model

from dsd_fast import export
from dsd_fast import train as module
from dsd_fast.config import TrainConfig, from_dict
from dsd_fast.guidance import DSDGuidance
from dsd_fast.run import checkpoint, cli, outputs
from dsd_fast.tasks.step import TrainStep

imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")

DATA = Path(__file__).parent / "data"


def decoded_size(video: Path) -> int:
    """Bytes of all frames of a video as 24-bit pixels."""
    ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
    decode = [ffmpeg, "-i", str(video), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    return len(subprocess.run(decode, capture_output=True, check=True).stdout)


# Outputs


def test_a_run_writes_everything(runner, caplog):
    assert runner("--trainer.preview-every", "3") == 0
    assert runner.files() == {
        "config.json",
        "versions.json",
        "metrics.jsonl",
        "previews/step-000003.png",
        "checkpoints/step-000003.safetensors",
        "checkpoints/step-000004.safetensors",
        "mesh.glb",
        "turntable.mp4",
        "preview.png",
    }
    cfg = from_dict(TrainConfig, json.loads(runner.run.config.read_text()))
    assert (cfg.prompt, cfg.max_steps, cfg.cameras.width) == ("a chair", 4, (8, 12))

    versions = json.loads(runner.run.versions.read_text())
    assert {"dsd_fast", "torch", "diffusers", "device", "commit"} <= versions.keys()
    assert re.fullmatch("[0-9a-f]{64}", versions["model_sha256"])

    metrics = runner.metrics()
    assert [record["step"] for record in metrics] == [1, 2, 3, 4]
    assert [record["size"] for record in metrics] == [8, 8, 12, 12]
    assert metrics[0]["t"] == 980 and metrics[3]["t"] < 500
    terms = {"loss", "dsd", "orient", "opaque", "z_variance", "convex", "opacity"}
    assert terms <= metrics[0].keys()
    assert len(trimesh.load(runner.run.mesh, force="mesh").faces) > 0
    assert decoded_size(runner.run.turntable) == 3 * (16 * 16 * 3)
    said = caplog.messages[-1]
    assert said.startswith("Done in ")
    for path in (runner.run.preview, runner.run.turntable, runner.run.mesh):
        assert f"\n  {path}\n" in said
    # The command that it ends with makes another.
    command = shlex.split(said.splitlines()[-1].removeprefix("Another object: "))
    assert command[1:3] == ["-m", "dsd_fast.train"] and command[-2:] == ["--seed", "1"]
    assert module.main(command[3:]) == 0
    assert runner.folder_of(1).preview.exists()


def test_a_run_without_a_surface_says_so_at_its_end(runner, caplog):
    assert runner("--mesh.iso", "1e9", "--pictures.no-turntable", steps=1) == 0
    *_, missing, another = caplog.messages[-1].splitlines()
    assert f"no mesh of {runner.run.path}" in missing and "dsd_fast.export" in missing
    assert another.startswith("Another object: ") and "no mesh: " in caplog.text


def test_what_was_resumed_by_its_folder_ends_with_a_command_that_works(runner, caplog):
    flags = ["--pictures.no-turntable", "--pictures.no-mesh"]
    assert runner(*flags, "--stop-at", "1", steps=2) == 0
    assert "Done in" not in caplog.text
    assert module.main(["--device", "cpu", "--resume", str(runner.run.path)]) == 0
    command = caplog.messages[-1].splitlines()[-1].removeprefix("Another object: ")
    (job,) = cli.parse(shlex.split(command)[3:])
    assert (job.config.seed, job.config.prompt, job.config.max_steps) == (1, "a chair", 2)
    assert job.folder.path == runner.folder_of(1).path and not job.config.pictures.mesh


def test_a_video_of_all_that_is_seen_and_one_that_is_enlarged(runner):
    assert runner("--pictures.panels", "all", "--pictures.enlarge", "3", steps=1) == 0
    # Three frames of colours | normals | opacity, 16 pixels high.
    assert decoded_size(runner.run.turntable) == 3 * (16 * 48 * 3)
    video = ["--turntable", "--device", "cpu", "--views", "2"]
    assert export.main([str(runner.run.path), *video, "--panels", "color", "--size", "8"]) == 0
    assert decoded_size(runner.run.turntable) == 2 * (8 * 8 * 3)


def test_a_used_folder_is_never_overwritten_silently(runner, caplog):
    flags = ["--pictures.no-turntable", "--pictures.no-mesh"]
    assert runner(*flags) == 0
    before = runner.run.metrics.stat().st_mtime_ns
    assert runner(*flags) == 2
    assert "holds a finished run" in caplog.text and "--overwrite" in caplog.text
    assert runner(*flags, "--resume", "auto") == 0
    assert "nothing to do" in caplog.text
    assert runner.run.metrics.stat().st_mtime_ns == before
    assert runner(*flags, "--overwrite", steps=2) == 0
    assert [record["step"] for record in runner.metrics()] == [1, 2]
    assert "checkpoints/step-000004.safetensors" not in runner.files()


def test_a_failed_overwrite_leaves_the_old_run(runner, caplog):
    assert runner("--pictures.no-turntable", steps=2) == 0
    files = runner.files()
    assert runner("--overwrite", "--model", str(runner.folder / "nowhere"), steps=2) == 2
    assert "nowhere" in caplog.text
    assert runner.files() == files


def test_seeds_differ_and_one_seed_repeats(tmp_path, tiny_model):
    flags = ["--pictures.no-turntable", "--pictures.no-mesh"]
    losses = []
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        runner = Runner(tmp_path / folder, tiny_model)
        runner.run = outputs.RunFolder.named(
            tmp_path / folder, "diverse-score-distillation", "a chair", seed
        )
        assert runner(*flags, "--seed", str(seed), steps=3) == 0
        losses.append([record["loss"] for record in runner.metrics()])
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


@pytest.mark.parametrize("bins", [None, 7])
def test_views_stand_where_trajectories_are_cached(runner, monkeypatch, bins):
    seen = []
    plan = DSDGuidance.plan_levels

    def watched(self, elevation_deg, azimuth_deg, *rest):
        seen.append(azimuth_deg)
        return plan(self, elevation_deg, azimuth_deg, *rest)

    monkeypatch.setattr(DSDGuidance, "plan_levels", watched)
    flags = ["--pictures.no-turntable", "--pictures.no-mesh"]
    flags += ["--guidance.azimuth-bins", str(bins)] if bins else ["--guidance.trajectory", "exact"]
    assert runner(*flags) == 0
    part = torch.cat(seen).abs() * (bins or 48) / 180 % 1
    assert torch.allclose(part, torch.full_like(part, 0.5), atol=1e-4) == (bins is not None)


# Several seeds


def test_seeds_side_by_side_are_the_runs_of_each(tmp_path, tiny_model, caplog):
    flags = ["--pictures.no-turntable", "--pictures.no-mesh", "--seed", "3"]
    alone, together = (Runner(tmp_path / name, tiny_model) for name in ("alone", "together"))
    assert together(*flags, "--num-seeds", "2", "--stop-at", "2") == 0
    assert together(*flags, "--num-seeds", "2", "--resume", "auto") == 0
    for seed in (3, 4):
        assert alone(*flags[:2], "--seed", str(seed)) == 0
        single, shared = (
            outputs.RunFolder.named(tmp_path / name, "diverse-score-distillation", "a chair", seed)
            for name in ("alone", "together")
        )
        assert shared.preview.exists() and shared.last_step() == 4
        losses = [
            [json.loads(line)["loss"] for line in run.metrics.read_text().splitlines()]
            for run in (single, shared)
        ]
        # The UNet's batches are larger: equal up to rounding.
        assert losses[1] == pytest.approx(losses[0], rel=1e-3) and len(losses[0]) == 4
        config = json.loads(shared.config.read_text())
        assert config["seed"] == seed


def test_seeds_side_by_side_need_a_step_in_common(runner, caplog):
    flags = ["--pictures.no-turntable", "--pictures.no-mesh"]
    assert runner(*flags) == 0
    assert runner(*flags, "--num-seeds", "2", "--resume", "auto") == 2
    assert "no step in common" in caplog.text
    assert runner(*flags, "--num-seeds", "2", "--tag", "x") == 2
    assert "drop --tag" in caplog.text
    assert runner(*flags, "--num-seeds", "0") == 2
    assert "expected 1 or more" in caplog.text


# Stop and resume


@pytest.mark.parametrize("table_step", [None, 0, 25], ids=["exact", "cached", "tabulated"])
def test_n_plus_n_steps_equal_2n_steps(tmp_path, tiny_model, table_step):
    """Bit for bit, over a change of resolution, an occupancy update and unlocked levels."""
    flags = ["--guidance.trajectory", "exact"]
    if table_step is not None:
        flags = ["--guidance.noise-table-step", str(table_step)]
    flags += ["--pictures.no-turntable", "--pictures.no-mesh"]
    flags += ["--cameras.resolution-milestones", "11", "--renderer.occupancy.update-interval", "4"]
    straight, pieces = (Runner(tmp_path / name, tiny_model) for name in ("straight", "pieces"))
    assert straight(*flags, steps=18) == 0
    assert pieces(*flags, "--stop-at", "9", steps=18) == 0
    assert pieces.run.last_step() == 9 and not pieces.run.preview.exists()
    assert pieces("--resume", "auto", steps=18) == 0
    assert pieces.run.preview.exists()
    assert equal(pieces.tensors(18), straight.tensors(18))
    assert pieces.metrics() == straight.metrics()
    assert {record["size"] for record in straight.metrics()} == {8, 12}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interruption_saves_and_resumes(runner, tmp_path, monkeypatch, caplog, number):
    call = TrainStep.__call__

    def interrupt(self):
        if self.states[0].step == 1:
            signal.raise_signal(number)
        return call(self)

    flags = ["--pictures.no-turntable", "--pictures.no-mesh"]
    before = signal.getsignal(signal.SIGINT)  # a shell ignores it for what runs in the background
    monkeypatch.setattr(TrainStep, "__call__", interrupt)
    assert runner(*flags) == 130
    monkeypatch.undo()
    assert runner.run.last_step() == 2, "the step in hand is finished and saved"
    assert "step 2 of 4 is saved" in caplog.text and "--resume auto" in caplog.text
    assert signal.getsignal(signal.SIGINT) is before

    assert runner(*flags) == 2
    assert "unfinished run at step 2 of 4" in caplog.text
    # By the path of the run folder: prompt, seed, model and settings come from the checkpoint.
    assert module.main(["--resume", str(runner.run.path), "--device", "cpu"]) == 0
    assert [record["step"] for record in runner.metrics()] == [1, 2, 3, 4]
    reference = Runner(tmp_path / "reference", runner.model)
    assert reference(*flags) == 0
    assert equal(runner.tensors(4), reference.tensors(4))


def test_a_finished_run_can_go_on(runner, caplog):
    flags = ["--pictures.no-turntable", "--pictures.no-mesh"]
    assert runner(*flags, steps=3) == 0
    assert runner(*flags, "--resume", "auto", steps=5) == 0
    assert runner.run.last_step() == 5
    assert "resuming with max_steps = 5 instead of 3" in caplog.text


def test_missing_outputs_of_a_finished_run_are_made_again(runner):
    assert runner("--pictures.no-turntable", steps=2) == 0
    runner.run.preview.unlink()
    assert runner("--resume", "auto", "--pictures.no-turntable", steps=2) == 0
    assert runner.run.preview.exists()
    assert len(runner.metrics()) == 2


def test_resume_from_an_older_checkpoint_discards_the_newer(runner, caplog):
    flags = ["--pictures.no-turntable", "--pictures.no-mesh"]
    assert runner(*flags, "--trainer.checkpoint-every", "2", steps=4) == 0
    finished = runner.tensors(4)
    older = checkpoint.step_path(runner.run.checkpoints, 2)
    newest = checkpoint.step_path(runner.run.checkpoints, 4)
    newest.write_bytes(newest.read_bytes()[:-100])
    assert module.main(["--resume", str(newest), "--device", "cpu"]) == 2
    assert "cannot be read" in caplog.text and f"--resume {older}" in caplog.text
    assert module.main(["--resume", str(older), "--device", "cpu"]) == 0
    assert equal(runner.tensors(4), finished)
    assert [record["step"] for record in runner.metrics()] == [1, 2, 3, 4]


def test_resume_auto_starts_where_nothing_is(runner, caplog):
    assert runner("--resume", "auto", "--pictures.no-turntable", steps=1) == 0
    assert "starting from the beginning" in caplog.text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", "a table"], "keeps its prompt"),
        (["--seed", "5"], "keeps its seed"),
        (["--field.grid.n-levels", "4"], "does not fit this configuration"),
        (["--overwrite"], "drop --overwrite"),
    ],
)
def test_a_resumed_run_stays_the_same_run(runner, caplog, flags, message):
    assert runner("--pictures.no-turntable", "--pictures.no-mesh", steps=2) == 0
    files = runner.files()
    argv = ["--resume", str(runner.run.path), "--device", "cpu", "--max-steps", "4", *flags]
    assert module.main(argv) == 2
    assert message in caplog.text
    assert runner.files() == files


def test_a_resumed_run_needs_a_model_of_the_same_size(runner, caplog, tmp_path):
    runner.model = build_tiny_model(tmp_path / "model")
    assert runner("--pictures.no-turntable", "--pictures.no-mesh", steps=1) == 0
    build_tiny_model(runner.model, latent_size=4)
    assert runner("--resume", "auto", steps=2) == 2
    assert "the checkpoint does not fit this run: expected seed noise" in caplog.text
    assert runner.run.last_step() == 1


# Trouble in the loop


def not_finite(monkeypatch, when) -> None:
    """Make the guidance's gradient NaN at the steps for which `when(step)` is true."""
    call, steps = DSDGuidance.at_plan, itertools.count()

    def guide(self, latents, plan):
        guided = call(self, latents, plan)
        return guided._replace(grad=guided.grad * float("nan")) if when(next(steps)) else guided

    monkeypatch.setattr(DSDGuidance, "at_plan", guide)


def test_a_step_with_nan_is_skipped_counted_and_logged(runner, monkeypatch, caplog):
    not_finite(monkeypatch, lambda step: step in (1, 2))
    flags = ["--pictures.no-turntable", "--trainer.checkpoint-every", "1"]
    assert runner(*flags, "--trainer.keep-checkpoints", "9") == 0
    assert [record["skipped"] for record in runner.metrics()] == [0, 1, 2, 2]
    assert [record["loss"] is None for record in runner.metrics()] == [False, True, True, False]
    assert "step 3 is not finite, left out (2 so far)" in caplog.text
    table = [runner.tensors(step)["scene/field.grid.table"] for step in (1, 2, 3, 4)]
    assert torch.equal(table[0], table[1]) and torch.equal(table[1], table[2])
    assert not torch.equal(table[2], table[3]) and table[3].isfinite().all()


def test_a_run_of_nan_stops_with_the_state_saved(runner, monkeypatch, caplog):
    not_finite(monkeypatch, lambda step: step >= 1)
    assert runner("--trainer.max-bad-steps", "3", steps=50) == 1
    assert "the guidance has not been finite for 3 steps in a row" in caplog.text
    assert "--diffusion.dtype" in caplog.text
    assert runner.run.last_step() == 4
    state = runner.tensors(4)
    assert all(t.isfinite().all() for name, t in state.items() if name.startswith("scene/field"))


def test_out_of_memory_names_the_flags_that_help(runner, monkeypatch, caplog):
    call = TrainStep.__call__

    def run_out(self):
        if self.states[0].step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return call(self)

    monkeypatch.setattr(TrainStep, "__call__", run_out)
    assert runner() == 1
    for word in ("--cameras.width", "--renderer.num-samples-per-ray", "--resume auto"):
        assert word in caplog.text
    assert runner.run.last_step() == 2


def test_vram_is_for_a_gpu(runner, caplog):
    assert runner("--vram", "8") == 2
    assert "--vram is for a CUDA GPU, and this run is on the cpu" in caplog.text


def test_rates_may_fall_over_a_run(runner):
    """To nothing: what the first step made stays, rough or not."""
    flags = ["--optimizer.lr-share", "0", "1.0", "0.0", "1", "--loss.lambda-roughness", "1"]
    keep = ["--trainer.checkpoint-every", "1", "--trainer.keep-checkpoints", "9"]
    assert runner(*flags, *keep) == 0
    first, last = runner.tensors(1), runner.tensors(4)
    names = [name for name in first if name.startswith(("scene/field", "scene/background"))]
    assert len(names) > 4 and all(torch.equal(first[name], last[name]) for name in names)
    assert all(record["roughness"] >= 0 for record in runner.metrics())


def test_a_vanishing_object_is_mentioned(runner, caplog):
    flags = ["--trainer.min-opacity", "2", "--trainer.min-opacity-steps", "2"]
    assert runner(*flags, "--pictures.no-turntable") == 0
    assert caplog.text.count("the object is vanishing") == 2
    assert "--loss.lambda-sparsity" in caplog.text


def test_a_disk_that_fills_up_in_mid_run_costs_only_that_checkpoint(runner, monkeypatch, caplog):
    save = checkpoint.save

    def full_at_two(path, tree):
        if tree["step"] == 2:
            raise checkpoint.CheckpointError("cannot write the checkpoint: No space left")
        save(path, tree)

    monkeypatch.setattr(checkpoint, "save", full_at_two)
    assert runner("--trainer.checkpoint-every", "1", "--pictures.no-turntable") == 0
    assert "No space left" in caplog.text
    assert runner.run.last_step() == 4


def test_an_empty_field_gives_a_warning_and_the_other_outputs(runner, caplog):
    assert runner("--mesh.iso", "1e6") == 0
    assert "no mesh: no surface" in caplog.text
    assert {"turntable.mp4", "preview.png"} <= runner.files()
    assert "mesh.glb" not in runner.files()


# Bad input: exit code 2, words, nothing written or lost


def refused(runner: Runner, caplog, message: str, *flags: str, **kwargs) -> None:
    assert runner(*flags, **kwargs) == 2
    assert re.search(message, caplog.text), caplog.text
    assert not any(name.startswith("checkpoints") for name in runner.files())


def test_empty_prompt(runner, caplog):
    refused(runner, caplog, "the prompt is empty", prompt=None)
    refused(runner, caplog, "the prompt is empty", prompt="  ")


def test_over_long_prompt(runner, caplog):
    prompt = "very " * 100 + "long"
    runner.run = outputs.RunFolder.named(runner.folder, "diverse-score-distillation", prompt, 0)
    refused(runner, caplog, r"the prompt has \d+ tokens, the model reads 77", prompt=prompt)


def test_unknown_model_folder(runner, caplog):
    refused(runner, caplog, "/no/such/model", "--model", "/no/such/model")


def test_model_folder_with_a_missing_piece(runner, caplog, tmp_path):
    broken = build_tiny_model(tmp_path / "broken")
    (broken / "vae" / "config.json").unlink()
    refused(runner, caplog, "vae", "--model", str(broken))


def test_cuda_asked_for_and_absent(runner, caplog, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(runner, caplog, r"no CUDA GPU.*--device cpu", "--device", "cuda")


def test_unwritable_output(runner, caplog, tmp_path):
    (tmp_path / "file").touch()
    flags = ["--output", str(tmp_path / "file" / "below")]
    refused(runner, caplog, "cannot write to the run folder", *flags)


def test_full_output(runner, caplog, monkeypatch):
    monkeypatch.setattr(outputs.shutil, "disk_usage", lambda _: type("usage", (), {"free": 2**20}))
    refused(runner, caplog, "has 1 MiB free and the run needs about")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--cameras.resolution-milestones", "1", "2"], "expected one number or 3 numbers"),
        (["--loss.lambda-sparsity", "1", "2"], "loss.lambda_sparsity: schedule"),
        (
            ["--cameras.n-test-views", "0"],
            "got 0: pass another --cameras.n-test-views",
        ),
    ],
)
def test_settings_that_do_not_fit(runner, caplog, flags, message):
    refused(runner, caplog, message, *flags)


def test_unknown_flag_names_the_nearest(runner, capsys):
    with pytest.raises(SystemExit) as exit_info:
        runner("--guidance.guidance-scal", "3")
    assert exit_info.value.code == 2
    assert "--guidance.guidance-scale" in capsys.readouterr().err


def test_official_file_and_overrides(runner, caplog):
    override = "system.prompt_processor.prompt=a chair"
    flags = ["--config", str(DATA / "dsd.yaml"), override, "--model", str(runner.model)]
    flags += ["--seed", "0", "--pictures.no-turntable", "--pictures.no-mesh"]
    assert runner(*flags, "system.guidance.guidance_scale=5", prompt=None, steps=2) == 0
    cfg = from_dict(TrainConfig, json.loads(runner.run.config.read_text()))
    assert cfg.guidance.guidance_scale == 5
    assert cfg.cameras.width == (8, 12), "flags win over the file"
    assert cfg.cameras.resolution_milestones == (5000,), "the file wins over the default"

    assert runner(*flags, "system.guidance.guidance_scal=5", prompt=None) == 2
    assert "did you mean system.guidance.guidance_scale?" in caplog.text
    assert runner("system.guidance.guidance_scale=5") == 2
    assert "pass it with --config" in caplog.text
    assert runner(*flags, "--preset", "dsd", prompt=None) == 2
    assert "pass one of them" in caplog.text


def test_the_config_of_a_run_reproduces_it(runner, tmp_path):
    flags = ["--pictures.no-turntable", "--pictures.no-mesh"]
    assert runner(*flags, steps=3) == 0
    again = Runner(tmp_path / "again", runner.model)
    argv = ["--config", str(runner.run.config), "--output", str(again.folder), "--device", "cpu"]
    assert module.main(argv) == 0
    assert again.metrics() == runner.metrics()


def test_a_prompt_may_look_like_an_override(runner):
    runner.run = outputs.RunFolder.named(runner.folder, "diverse-score-distillation", "a=b", 0)
    assert runner("--pictures.no-turntable", "--pictures.no-mesh", prompt="a=b", steps=1) == 0
    assert runner.run.config.exists()


# Export


def test_export_needs_no_diffusion_model(runner, tmp_path, monkeypatch, caplog):
    assert runner("--pictures.no-turntable", steps=2) == 0
    trained = runner.run.mesh.read_bytes()
    runner.run.mesh.unlink()

    def refuse(*_, **__):
        raise AssertionError("the diffusion model was loaded")

    monkeypatch.setattr("dsd_fast.tasks.base.load_model", refuse)
    run = str(runner.run.path)
    assert export.main([run, "--device", "cpu"]) == 0
    assert runner.run.mesh.read_bytes() == trained
    flags = ["--iso", "0.5", "--resolution", "16", "--output", str(tmp_path / "other.glb")]
    assert export.main([run, "--device", "cpu", *flags]) == 0
    assert (tmp_path / "other.glb").exists()
    assert export.main([run, "--device", "cpu", "--turntable", "--views", "2", "--size", "8"]) == 0
    assert runner.run.turntable.exists()

    assert export.main([run, "--iso", "1e6", "--device", "cpu"]) == 1
    assert "Pass a lower iso" in caplog.text
    assert export.main([str(tmp_path / "nowhere")]) == 2
    assert "no such run folder or checkpoint" in caplog.text
    newest = checkpoint.step_path(runner.run.checkpoints, 2)
    newest.write_bytes(b"no checkpoint")
    assert export.main([run]) == 2
    assert "cannot be read" in caplog.text


def test_importing_the_commands_is_lean():
    code = (
        "import sys, dsd_fast.export, dsd_fast.train\n"
        "heavy = {'diffusers', 'transformers', 'triton', 'skimage', 'scipy', 'imageio'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
