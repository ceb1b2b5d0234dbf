"""2D optimisation: the exact form against diffusers, runs, resume, samples, comparisons."""

import json
import signal
from itertools import pairwise

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from conftest import relative_error
from runs import CLOCK, equal
from tiny_model import build_tiny_model

from dsd_fast import sample as sample_command
from dsd_fast import train
from dsd_fast.config import ConfigError, TrainConfig, check, from_dict, preset
from dsd_fast.diffusion import load_model
from dsd_fast.diffusion.condition import Condition
from dsd_fast.diffusion.ddim import ddim_levels, ddim_scheduler
from dsd_fast.evaluate import __main__ as evaluate_command
from dsd_fast.evaluate import assets, eyes, page, report
from dsd_fast.evaluate.assets import EvaluateError
from dsd_fast.guidance import DSDGuidance, GuidanceConfig, GuidanceOutput, seed_noise
from dsd_fast.guidance.exact import ExactForm
from dsd_fast.rng import RngStreams
from dsd_fast.run import checkpoint, outputs
from dsd_fast.scene.image import ImageConfig
from dsd_fast.tasks import base
from dsd_fast.tasks import image as image_task
from dsd_fast.tasks.base import Task
from dsd_fast.tasks.step import TrainStep

CPU = torch.device("cpu")
NAME = "diverse-score-distillation-2d"


class Runner:
    """Runs the command for images in a folder of its own."""

    def __init__(self, folder, model, name=NAME) -> None:
        self.folder, self.model, self.name = folder, model, name

    def __call__(self, *flags: str, steps: int | None = 4, prompt: str | None = "a chair") -> int:
        argv = ["--task", "image", "--device", "cpu", "--output", str(self.folder)]
        argv += ["--model", str(self.model), "--trainer.log-every", "1", "--trainer.no-progress"]
        argv += [] if prompt is None else ["--prompt", prompt]
        argv += [] if steps is None else ["--max-steps", str(steps)]
        return train.main([*argv, *flags])

    def run(self, seed: int = 0, prompt: str = "a chair") -> outputs.RunFolder:
        return outputs.RunFolder.named(self.folder, self.name, prompt, seed, "image")

    def metrics(self, seed: int = 0) -> list[dict]:
        lines = self.run(seed).metrics.read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k not in CLOCK} for line in lines]

    def tensors(self, step: int, seed: int = 0, prompt: str = "a chair") -> dict:
        flat: dict = {}
        path = checkpoint.step_path(self.run(seed, prompt).checkpoints, step)
        checkpoint._flatten(checkpoint.load(path), "", flat)
        return flat


@pytest.fixture
def runner(tmp_path, tiny_model) -> Runner:
    return Runner(tmp_path / "out", tiny_model)


def noise_of(seed: int, size: int) -> torch.Tensor:
    return seed_noise(RngStreams(seed).noise, (1, 4, size, size))


# The exact form


@pytest.mark.parametrize("n_steps", [10, 50])
def test_exact_form_is_ddim_of_diffusers(tmp_path, n_steps):
    """The run's latent, and diffusers' own pipeline with the same noise, text and scale.

    The scheduler's last step stops at level 0 of its table, the optimisation at the clean image:
    `set_alpha_to_one` has the scheduler go there too. The shipped setting is then a matter of one
    step, and is checked as well.
    """
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    exact = Runner(tmp_path, "embedded", f"{NAME}-exact")
    assert exact("--image.exact", "--guidance.guidance-scale", "4", steps=n_steps) == 0
    state = exact.tensors(n_steps)
    latent, link = state["scene/latent"], state["scene/link"]

    model = load_model("embedded", CPU, engine="eager")
    # Its 8-bit weights are not for diffusers to read.
    pipeline = StableDiffusionPipeline.from_pretrained(
        model.path, unet=model.unet, torch_dtype=torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)

    def ddim(**setting: bool) -> torch.Tensor:
        pipeline.scheduler = DDIMScheduler.from_pretrained(
            model.path, subfolder="scheduler", **setting
        )
        return pipeline(
            "a chair",
            num_inference_steps=n_steps,
            guidance_scale=4.0,
            latents=noise_of(0, model.latent_size),
            output_type="latent",
        ).images

    clean = ddim(set_alpha_to_one=True)
    assert (latent - clean).abs().max() < 1e-3 and relative_error(latent, clean) < 1e-3
    if n_steps == 10:
        abar = model.noise_path.alpha.square()[0]
        at_level_0 = abar.sqrt() * latent + (1 - abar).sqrt() * link
        assert (at_level_0 - ddim()).abs().max() < 1e-3
        assert (latent - ddim()).abs().max() > 1e-2, "levels 0 and clean are told apart"
        shown = imageio.imread(exact.run().image).astype(float) / 255
        picture = model.decode_latents(clean)[0].permute(1, 2, 0).numpy()
        assert np.abs(shown - picture).max() < 0.01


def exact_form(model, prompts=None, n_seeds=1, steps=5, **settings) -> ExactForm:
    from dsd_fast.diffusion import embed_views

    cfg = GuidanceConfig(standard_cfg=True, **settings)
    prompts = prompts or embed_views(model, "a chair", release=False)
    noise = torch.cat([noise_of(seed, model.latent_size) for seed in range(n_seeds)])
    return ExactForm(cfg, model, prompts, noise, steps)


def optimised(guidance: ExactForm, azimuths: torch.Tensor) -> torch.Tensor:
    x = torch.zeros_like(guidance.noise)
    for step in range(guidance.max_steps):
        plan = guidance.plan(torch.zeros_like(azimuths), azimuths, step, torch.Generator())
        x = guidance.at_plan(x, plan).target
    return x


def test_exact_form_of_a_view_is_ddim_with_its_perp_neg_prediction(tiny_model):
    """Against the sampler written out, in float64 but for the UNet, with Perp-Neg's combination."""
    from dsd_fast.diffusion import embed_views
    from dsd_fast.guidance import combine, view_embeddings

    model = load_model(tiny_model, CPU, engine="eager")
    prompts = embed_views(model, "a chair", release=False)
    guidance = exact_form(model, prompts, n_seeds=2, guidance_scale=3.0)
    azimuths = torch.tensor([30.0, -120.0])
    got = optimised(guidance, azimuths)
    text, weights = view_embeddings(
        prompts.text_vd, prompts.uncond_vd, torch.zeros(2), azimuths, True
    )
    levels = ddim_levels(model, 5)
    z = guidance.noise.double()
    for level, lower in zip(levels, (*levels[1:], None)):
        rows = torch.cat([z, z, z.repeat_interleave(2, 0)]).float()
        eps = model.predict_noise(rows, torch.full((8,), level), Condition(text))
        eps = combine(eps.double(), weights.double(), 3.0)
        abar = model.noise_path.alpha.square()[level].double()
        clean = (z - (1 - abar).sqrt() * eps) / abar.sqrt()
        if lower is not None:
            abar = model.noise_path.alpha.square()[lower].double()
            z = abar.sqrt() * clean + (1 - abar).sqrt() * eps
    assert relative_error(got, clean) < 1e-4
    assert relative_error(got[:1], clean[1:]) > 0.1


def test_exact_form_refuses_what_is_no_sampling(tiny_model):
    model = load_model(tiny_model, CPU, engine="eager")
    guidance = exact_form(model, use_perp_neg=False)
    one = torch.zeros(1)
    with pytest.raises(ValueError, match="expected a step below 5, got 5"):
        guidance.plan(one, one, 5, torch.Generator())
    with pytest.raises(ValueError, match="a view for each of the 1 seeds, got 2"):
        guidance.plan(torch.zeros(2), torch.zeros(2), 0, torch.Generator())
    with pytest.raises(ValueError, match="expected latents"):
        guidance.at_plan(torch.zeros(1, 4, 4, 4), guidance.plan(one, one, 0, torch.Generator()))
    with pytest.raises(ValueError, match="optimises latents"):
        guidance.encode(torch.zeros(1, 16, 16, 3), None)
    with pytest.raises(ValueError, match="expected seed noise"):
        guidance.load_state_dict({"noise": torch.zeros(1, 4, 4, 4)})
    with pytest.raises(ValueError, match="expected 1 to 999 steps, got 1000"):
        ddim_levels(model, 1000)


def test_a_step_that_is_not_finite_leaves_the_link_of_its_item(tiny_model, monkeypatch):
    model = load_model(tiny_model, CPU, engine="eager")
    guidance = exact_form(model, n_seeds=2, use_perp_neg=False)
    azimuths, x = torch.zeros(2), torch.zeros_like(guidance.noise)
    x = guidance.at_plan(x, guidance.plan(azimuths, azimuths, 0, torch.Generator())).target
    before = guidance.link.clone()
    x[0, 0, 0, 0] = float("nan")
    output = guidance.at_plan(x, guidance.plan(azimuths, azimuths, 1, torch.Generator()))
    assert not output.finite
    assert torch.equal(guidance.link[0], before[0])
    assert guidance.link[1].isfinite().all() and not torch.equal(guidance.link[1], before[1])


# The practical form


def test_practical_form_comes_near_the_ddim_image_of_its_seed(tmp_path):
    """Mean absolute distance of colours at 32x32: under half of that to another seed's sample."""
    run = Runner(tmp_path, "embedded")
    assert run("--num-seeds", "2", "--image.lr", "0.6", prompt="a red car", steps=30) == 0
    argv = ["--like", str(tmp_path), "--output", str(tmp_path), "--steps", "15"]
    assert sample_command.main([*argv, "--device", "cpu"]) == 0

    def small(path) -> np.ndarray:
        pixels = imageio.imread(path).astype(float) / 255
        return pixels.reshape(32, 8, 32, 8, 3).mean((1, 3))

    ours = [small(run.run(seed, "a red car").image) for seed in (0, 1)]
    samples = [
        small(tmp_path / "ddim" / f"a_red_car-seed{seed}" / sample_command.IMAGE) for seed in (0, 1)
    ]
    apart = np.array([[np.abs(a - b).mean() for b in samples] for a in ours])
    assert apart[0, 0] < apart[0, 1] / 2 and apart[1, 1] < apart[1, 0] / 2, apart
    assert np.abs(ours[0] - ours[1]).mean() > 0.1, "two seeds are two images"
    for image in ours:
        car = image[8:24, 8:24].reshape(-1, 3)
        redness = car[:, 0] - car[:, 1:].max(1)
        assert redness.max() > 0.5, "the car is red"


# Runs


def test_a_run_writes_its_image_and_the_way_there(runner):
    assert runner("--trainer.preview-every", "1", "--trainer.checkpoint-every", "2") == 0
    run = runner.run()
    files = {str(p.relative_to(run.path)) for p in run.path.rglob("*") if p.is_file()}
    assert files == {
        ".lock",
        "config.json",
        "versions.json",
        "metrics.jsonl",
        *(f"previews/step-{step:06d}.png" for step in (1, 2, 3, 4)),
        *(f"checkpoints/step-{step:06d}.safetensors" for step in (2, 4)),
        "image.png",
        "preview.png",
    }
    cfg = from_dict(TrainConfig, json.loads(run.config.read_text()))
    assert cfg.task == "image" and not cfg.guidance.use_perp_neg
    metrics = runner.metrics()
    assert [record["step"] for record in metrics] == [1, 2, 3, 4]
    assert metrics[0]["t"] == 999 and metrics[3]["t"] < 300
    assert metrics[0].keys() >= {"dsd", "loss", "lr", "t_delta", "guidance_norm", "skipped"}
    assert not {"opacity", "size", "samples"} & metrics[0].keys()
    image = imageio.imread(run.image)
    model = load_model(runner.model, CPU, engine="eager")
    shown = model.decode_latents(runner.tensors(4)["scene/latent"])[0].permute(1, 2, 0)
    assert np.abs(shown.numpy() * 255 - image).max() <= 0.5001
    strip = imageio.imread(run.preview)
    assert strip.shape == (16, 4 * 16, 3), "three previews and the image"
    assert (strip[:, -16:] == image).all()
    assert (strip[:, :16] == imageio.imread(run.previews / "step-000001.png")).all()


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--image.parameter", "rgb", "--image.size", "24"],
        ["--image.azimuth", "-100", "--guidance.use-perp-neg", "--image.start", "noise"],
        ["--image.exact"],
    ],
    ids=["latent", "rgb", "view", "exact"],
)
def test_n_plus_n_steps_equal_2n_steps(tmp_path, tiny_model, flags):
    name = f"{NAME}-exact" if "--image.exact" in flags else NAME
    straight, pieces = (Runner(tmp_path / n, tiny_model, name) for n in ("straight", "pieces"))
    flags = [*flags, "--image.cosine-length", "1.5", "--image.warm-up", "0.3"]
    assert straight(*flags, steps=8) == 0
    assert pieces(*flags, "--stop-at", "5", steps=8) == 0
    assert pieces.run().last_step() == 5
    assert pieces.run().image.exists() and not pieces.run().preview.exists()
    assert pieces(*flags, "--resume", "auto", steps=8) == 0
    assert equal(pieces.tensors(8), straight.tensors(8))
    assert pieces.metrics() == straight.metrics()
    assert (imageio.imread(pieces.run().image) == imageio.imread(straight.run().image)).all()
    value = straight.tensors(8)["scene/rgb" if "rgb" in flags else "scene/latent"]
    assert value.shape == ((1, 24, 24, 3) if "rgb" in flags else (1, 4, 8, 8))


@pytest.mark.parametrize("flags", [[], ["--image.exact"]], ids=["practical", "exact"])
def test_seeds_side_by_side_are_the_runs_of_each(tmp_path, tiny_model, flags):
    name = f"{NAME}-exact" if flags else NAME
    alone, together = (Runner(tmp_path / n, tiny_model, name) for n in ("alone", "together"))
    assert together(*flags, "--seed", "3", "--num-seeds", "2", "--stop-at", "2") == 0
    assert together(*flags, "--seed", "3", "--num-seeds", "2", "--resume", "auto") == 0
    for seed in (3, 4):
        assert alone(*flags, "--seed", str(seed)) == 0
        kind = "scene/latent"
        got, want = together.tensors(4, seed)[kind], alone.tensors(4, seed)[kind]
        # The UNet's batches are larger: equal up to rounding.
        assert relative_error(got, want) < 1e-3
        assert together.run(seed).preview.exists()
    assert relative_error(together.tensors(4, 3)[kind], together.tensors(4, 4)[kind]) > 0.1


def test_where_an_image_starts(tmp_path, tiny_model):
    """mathematics.md 11.1: noise, or the clean image seen in the seed noise at the last level."""
    still = ["--image.lr", "1e-12", "--image.eps", "1"]
    latent, rgb, seen, seen_rgb = (Runner(tmp_path / str(i), tiny_model) for i in range(4))
    assert latent(*still, "--image.start", "noise", steps=1) == 0
    start = latent.tensors(1)["scene/latent"]
    assert start.shape == (1, 4, 8, 8)
    assert abs(start.mean()) < 0.2 and abs(start.std() - 1) < 0.2
    flags = ["--image.parameter", "rgb", "--image.size", "40"]
    assert rgb(*still, *flags, "--image.start", "noise", steps=1) == 0
    start = rgb.tensors(1)["scene/rgb"]
    assert start.shape == (1, 40, 40, 3) and start.min() >= 0 and start.max() <= 1
    assert abs(start.mean() - 0.5) < 0.02 and abs(start.var() - 1 / 12) < 0.01

    scale = ["--guidance.guidance-scale", "2"]
    assert seen(*still, *scale, steps=1) == 0
    model = load_model(tiny_model, CPU, engine="eager")
    noise, level = noise_of(0, 8), torch.full((2,), 999)
    both = model.encode_prompt(["a chair", ""])
    cond, empty = model.predict_noise(torch.cat([noise, noise]), level, Condition(both)).double()
    abar = model.noise_path.alpha.square()[999].double()
    want = (noise - (1 - abar).sqrt() * (empty + 2 * (cond - empty))) / abar.sqrt()
    got = seen.tensors(1)["scene/latent"]
    assert relative_error(got, want) < 1e-5
    assert seen_rgb(*still, *scale, "--image.parameter", "rgb", steps=1) == 0
    decoded = model.decode_latents(got).permute(0, 2, 3, 1)
    assert relative_error(seen_rgb.tensors(1)["scene/rgb"], decoded) < 1e-5


def test_rates_rise_then_fall():
    flat, notebook = ImageConfig(), ImageConfig(warm_up=0.1, cosine_length=1.5)
    assert {flat.share_of_lr(step, 10) for step in range(10)} == {1.0}
    assert (flat.rate, ImageConfig(parameter="rgb").rate, ImageConfig(lr=2).rate) == (0.3, 1.0, 2)
    shares = [notebook.share_of_lr(step, 1000) for step in range(1000)]
    assert shares[0] < 0.02 and shares[50] == pytest.approx(0.5, abs=0.01)
    assert shares[100] == 1.0 and all(a > b for a, b in pairwise(shares[100:]))
    assert shares[800] == pytest.approx(0.5, abs=1e-9), "half of the way from 100 to 1500"


def test_one_step_is_adam_with_the_share_of_its_rate(runner):
    """Against torch's Adam on the gradients that the guidance gave, with the cosine's shares."""
    gradients, call = [], DSDGuidance.at_plan

    def watched(self, latents, plan):
        output = call(self, latents, plan)
        gradients.append(output.grad.clone())
        return output

    flags = ["--image.betas", "0.9", "0.99", "--image.eps", "1e-3", "--image.lr", "0.2"]
    flags += ["--image.cosine-length", "1", "--image.warm-up", "0.5", "--image.start", "noise"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DSDGuidance, "at_plan", watched)
        assert runner(*flags, steps=6) == 0
    assert len(gradients) == 6
    x = torch.randn(1, 4, 8, 8, generator=RngStreams(0).init).requires_grad_()
    adam = torch.optim.Adam([x], betas=(0.9, 0.99), eps=1e-3)
    for record, gradient in zip(runner.metrics(), gradients):
        adam.param_groups[0]["lr"] = record["lr"]
        x.grad = gradient
        adam.step()
    assert relative_error(runner.tensors(6)["scene/latent"], x) < 1e-5
    rates = [record["lr"] for record in runner.metrics()]
    assert max(rates) == pytest.approx(0.2) and rates[0] < 0.1 and rates[-1] < 0.1


def test_the_view_decides_the_text(tmp_path, tiny_model, monkeypatch):
    asked = []
    embed = base.embed_views

    def watched(model, prompt, *rest, **kwargs):
        embeddings = embed(model, prompt, *rest, **kwargs)
        asked.append((kwargs["view_dependent"], embeddings.text_vd))
        return embeddings

    monkeypatch.setattr(base, "embed_views", watched)
    latents = []
    views = ([], ["--image.azimuth", "0"], ["--image.azimuth", "180"], ["--image.azimuth", "5"])
    for i, flags in enumerate(views):
        run = Runner(tmp_path / str(i), tiny_model)
        assert run(*flags, "--image.start", "noise") == 0
        latents.append(run.tensors(4)["scene/latent"])
    assert [view_dependent for view_dependent, _ in asked] == [False, True, True, True]
    assert (asked[0][1] == asked[0][1][:1]).all(), "one text for all views"
    assert not torch.equal(latents[0], latents[1])
    assert not torch.equal(latents[1], latents[2])
    assert torch.equal(latents[1], latents[3]), "both are fronts"


class Constant:
    """A guidance of another kind, with the calls of one: it pulls towards a colour."""

    def __init__(self, inner: DSDGuidance) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    def at_plan(self, latents, plan):
        grad = latents - 0.25
        return GuidanceOutput(
            loss=torch.zeros(()),
            grad_norm=grad.norm(),
            t=plan.t,
            t_delta=plan.t_delta,
            latents=latents,
            target=latents - grad,
            grad=grad,
            latents_noisy=latents,
            finite=grad.isfinite().all(),
        )


def test_any_guidance_with_these_calls_will_do(runner, monkeypatch):
    make = Task.guidance
    monkeypatch.setattr(Task, "guidance", lambda self, *rest: Constant(make(self, *rest)))
    flags = ["--image.lr", "0.5", "--image.betas", "0", "0", "--image.eps", "1e-8"]
    assert runner(*flags, "--image.start", "noise", "--image.cosine-length", "1", steps=40) == 0
    assert (runner.tensors(40)["scene/latent"] - 0.25).abs().max() < 0.1


# Stop, trouble, bad input


def test_interruption_saves_the_image_too(runner, monkeypatch, caplog):
    call = TrainStep.__call__

    def interrupt(self):
        if self.states[0].step == 1:
            signal.raise_signal(signal.SIGINT)
        return call(self)

    monkeypatch.setattr(TrainStep, "__call__", interrupt)
    assert runner() == 130
    monkeypatch.undo()
    assert runner.run().last_step() == 2 and runner.run().image.exists()
    assert runner() == 2 and "unfinished run at step 2 of 4" in caplog.text
    assert train.main(["--resume", str(runner.run().path), "--device", "cpu"]) == 0
    assert runner.run().last_step() == 4 and runner.run().preview.exists()
    assert runner("--resume", "auto") == 0 and "nothing to do" in caplog.text


def test_steps_of_nan_are_left_out(tmp_path, tiny_model, monkeypatch, caplog):
    call = DSDGuidance.at_plan

    def second_is_nan(self, latents, plan):
        output = call(self, latents, plan)
        output.grad[1] *= float("nan")
        return output

    monkeypatch.setattr(DSDGuidance, "at_plan", second_is_nan)
    run = Runner(tmp_path, tiny_model)
    assert run("--num-seeds", "2", "--trainer.max-bad-steps", "3", steps=9) == 1
    assert "not been finite for 3 steps" in caplog.text and "--image.lr" in caplog.text
    assert [record["skipped"] for record in run.metrics(1)] == [1, 2, 3]
    assert [record["skipped"] for record in run.metrics(0)][:2] == [0, 0]
    assert run.tensors(3, 1)["scene/latent"].isfinite().all()


def test_a_picture_that_cannot_be_written_costs_no_checkpoint(runner, monkeypatch, caplog):
    def full(self, state, run):
        raise OSError("No space left on device")

    monkeypatch.setattr(image_task.ImageTask, "beside_checkpoint", full)
    assert runner() == 0
    assert "its picture is not: No space left" in caplog.text
    assert runner.run().last_step() == 4 and runner.run().image.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--guidance.use-perp-neg"], "--image.azimuth 0"),
        (["--text.front", "a face"], "--text.front is the prompt of one view"),
        (["--image.azimuth", "0", "--text.no-view-dependent"], "drop one of them"),
        (["--image.exact", "--image.parameter", "rgb"], "DDIM leaves a latent"),
        (["--image.exact", "--loss.lambda-dsd", "2"], "lambda_dsd must be 1"),
        (["--image.exact", "--max-steps", "1000"], "expected 1 to 999 steps, got 1000"),
        (["--image.size", "64"], "for --image.parameter rgb alone"),
        (["--image.parameter", "rgb", "--image.size", "4"], "image.size: expected 8 or more"),
        (["--image.lr", "0"], "image.lr: expected more than 0"),
        (["--image.warm-up", "1"], "less than 1"),
        (["--image.cosine-length", "0.5"], "0, or 1 or more"),
    ],
)
def test_settings_that_do_not_fit(runner, caplog, flags, message):
    assert runner(*flags) == 2
    assert message in caplog.text
    assert not list(runner.folder.rglob("*.safetensors"))


def test_a_resumed_run_stays_the_same_task(runner, caplog):
    exact = Runner(runner.folder, runner.model, f"{NAME}-exact")
    assert exact("--image.exact", "--stop-at", "2") == 0
    assert exact("--image.exact", "--resume", "auto", steps=6) == 2
    assert "keeps its max_steps (4), got 6" in caplog.text
    path = str(exact.run().path)
    assert train.main(["--resume", path, "--device", "cpu", "--task", "text"]) == 2
    assert "keeps its task ('image')" in caplog.text
    assert runner("--stop-at", "2") == 0
    assert runner("--resume", "auto", "--image.parameter", "rgb") == 2
    assert "does not fit this configuration" in caplog.text


def test_a_model_of_another_size_is_refused(runner, caplog, tmp_path):
    assert runner("--stop-at", "2") == 0
    path = checkpoint.step_path(runner.run().checkpoints, 2)
    tree = checkpoint.load(path)
    tree["config"]["model"] = str(build_tiny_model(tmp_path / "larger", latent_size=16))
    checkpoint.save(path, tree)
    assert train.main(["--resume", str(runner.run().path), "--device", "cpu"]) == 2
    assert "does not fit" in caplog.text


def test_presets_of_images():
    practical, exact = preset("embedded", task="image"), preset("dsd", task="image", exact=True)
    assert (practical.task, practical.max_steps, practical.image.exact) == ("image", 100, False)
    assert (exact.max_steps, exact.image.exact, exact.model) == (50, True, preset("dsd").model)
    assert len({practical.name, exact.name, preset("embedded").name}) == 3
    assert preset("embedded", max_steps=7, task="image").max_steps == 7
    practical.prompt = "a chair"
    check(practical)
    practical.image.azimuth, practical.guidance.use_perp_neg = 0.0, True
    check(practical)
    practical.image.azimuth = float("nan")
    with pytest.raises(ConfigError, match=r"image\.azimuth"):
        check(practical)


# Samples and comparisons


def fake_encoder(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1)[:, :48].astype(np.float32) + 1


def test_samples_like_runs_are_compared_with_them(runner, tmp_path, monkeypatch, caplog):
    exact = Runner(runner.folder, runner.model, f"{NAME}-exact")
    assert runner("--num-seeds", "2") == 0
    assert exact("--image.exact", "--num-seeds", "2") == 0
    like = ["--like", str(runner.folder), "--output", str(tmp_path), "--device", "cpu"]
    assert sample_command.main([*like, "--steps", "4", "--guidance-scale", "4"]) == 0
    assert sample_command.main([*like, "--steps", "4"]) == 2
    assert "holds a sample" in caplog.text
    about = json.loads((tmp_path / "ddim" / "a_chair-seed1" / "asset.json").read_text())
    assert (about["prompt"], about["text"], about["seed"]) == ("a chair", "a chair", 1)

    # The exact form with the same seed, scale and steps, at the level where the sampler stops.
    state, model = exact.tensors(4, 1), load_model(runner.model, CPU, engine="eager")
    abar = ddim_scheduler(model, 4).final_alpha_cumprod
    latent = abar.sqrt() * state["scene/latent"] + (1 - abar).sqrt() * state["scene/link"]
    ours = model.decode_latents(latent)[0].permute(1, 2, 0).numpy() * 255
    theirs = imageio.imread(tmp_path / "ddim" / "a_chair-seed1" / "000.png")
    assert np.abs(ours - theirs).max() < 0.6

    monkeypatch.setattr(eyes, "load_encoder", lambda device: fake_encoder)
    html, figures = tmp_path / "r.html", tmp_path / "r.json"
    argv = [str(runner.folder), str(tmp_path / "ddim"), "--html", str(html), "--json", str(figures)]
    assert evaluate_command.main([*argv, "--device", "cpu"]) == 0
    got = json.loads(figures.read_text())
    assert list(got["methods"]) == ["2D dsd cached", "2D dsd*", "ddim"] and got["views"] == 1
    for method in got["methods"].values():
        assert method["prompts"]["a chair"]["seeds"] == [0, 1]
        assert method["figures"].keys() >= {"cosine", "euclidean", "vendi", "seconds"}
        assert not {"view", "janus"} & method["figures"].keys()
    assert not any("azimuths" in entry for entry in got["assets"])
    text = html.read_text()
    assert text.count("<img ") == 6 and text.count("<figcaption>1</figcaption>") == 3
    assert "one image of each" in text and "columns are views" not in text


def source(path, is_picture: bool) -> assets.Source:
    return assets.Source("m", "p", 0, path, False, is_picture)


def test_pictures_and_objects_are_compared_by_one_view(tmp_path):
    picture, thing = source(tmp_path, True), source(tmp_path, False)
    assert assets.views_of([picture], None) == assets.views_of([picture], 1) == 1
    assert assets.views_of([thing], None) == 8 and assets.views_of([thing], 3) == 3
    assert assets.views_of([picture, thing], 1) == 1
    for sources, views in (([picture, thing], None), ([picture], 4), ([thing, picture], 2)):
        with pytest.raises(EvaluateError, match="--views 1"):
            assets.views_of(sources, views)


def test_a_picture_without_its_image_is_refused(runner, tmp_path):
    assert runner("--trainer.checkpoint-every", "2") == 0
    older = checkpoint.step_path(runner.run().checkpoints, 2)
    (described,) = assets.gather([older], {})
    assert described.is_picture
    with pytest.raises(EvaluateError, match="newest checkpoint"):
        assets.load(described, 1, 16, CPU)
    (described,) = assets.gather([runner.run().path], {})
    assert assets.load(described, 1, 16, CPU).images.shape == (1, 16, 16, 3)
    runner.run().image.unlink()
    with pytest.raises(EvaluateError, match="newest checkpoint"):
        assets.load(described, 1, 16, CPU)
    folder = tmp_path / "made" / "a_chair-seed0"
    folder.mkdir(parents=True)
    (folder / "asset.json").write_text('{"azimuths": null, "seconds": 2}')
    for name in ("000.png", "001.png"):
        imageio.imwrite(folder / name, np.zeros((4, 4, 3), np.uint8))
    (described,) = assets.gather([folder], {})
    with pytest.raises(EvaluateError, match=r"one picture .* 2 images"):
        assets.load(described, 1, 16, CPU)
    (folder / "001.png").unlink()
    assert assets.load(described, 1, 16, CPU).seconds == 2


def test_the_judge_says_no_side_of_a_picture(tmp_path):
    class Judge(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def say(self, x, noun):
            return noun, torch.ones(len(x), dtype=torch.long)

    def asset(is_picture: bool, seed: int) -> assets.Asset:
        what = assets.Source("m", "an armchair", seed, tmp_path, False, is_picture)
        pixels = np.full((1, 4, 4, 3), 40 * seed, np.uint8)
        return assets.Asset(what, pixels, np.zeros(1), 0.0)

    looks = report.Eyes(fake_encoder, judge=Judge())
    pictures = [asset(True, seed) for seed in (0, 1)]
    figures = report.evaluate(pictures, looks)["methods"]["m"]["figures"]
    assert figures["noun"] == 1.0 and not {"view", "janus"} & figures.keys()
    seen = report.evaluate([asset(False, seed) for seed in (0, 1)], looks)
    assert {"view", "janus"} <= seen["methods"]["m"]["figures"].keys()
    assert "seed 1" in page.page(report.evaluate(pictures, looks), pictures)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "either --prompt"),
        (["--prompt", "a", "--like", "."], "either --prompt"),
        (["--prompt", " "], "prompt is empty"),
        (["--prompt", "a", "--num-seeds", "0"], "expected 1 or more"),
        (["--prompt", "a", "--steps", "0"], "steps: expected 1 or more, got 0"),
        (["--prompt", "a", "--model", "/nowhere"], "/nowhere"),
        (["--like", "/nowhere"], "expected a run folder"),
        (["--like", "."], "found none"),
    ],
)
def test_samples_that_cannot_be(tmp_path, monkeypatch, caplog, flags, message):
    monkeypatch.chdir(tmp_path)
    assert sample_command.main([*flags, "--device", "cpu"]) == 2
    assert message in caplog.text
    assert not list(tmp_path.rglob("*.png"))


def test_samples_of_prompts_and_views(tmp_path, tiny_model):
    flags = ["--model", str(tiny_model), "--output", str(tmp_path), "--device", "cpu"]
    flags += ["--prompt", "a chair", "a cup", "--num-seeds", "2", "--seed", "5", "--steps", "2"]
    assert sample_command.main([*flags, "--view", "back", "--name", "backs"]) == 0
    assert sample_command.main(flags) == 0
    folders = sorted(p.name for p in (tmp_path / "backs").iterdir())
    assert folders == ["a_chair-seed5", "a_chair-seed6", "a_cup-seed5", "a_cup-seed6"]
    about = json.loads((tmp_path / "backs" / "a_cup-seed6" / "asset.json").read_text())
    assert about["text"] == "a cup, back view" and about["azimuths"] is None
    pixels = [
        imageio.imread(tmp_path / name / "a_cup-seed6" / "000.png") for name in ("backs", "ddim")
    ]
    assert not (pixels[0] == pixels[1]).all()
