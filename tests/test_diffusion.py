"""Loading a diffusion model, its arithmetic, its prompts, and what happens to bad folders."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import cuda_only
from safetensors.torch import load_file, save_file
from tiny_model import SCHEDULER, build_tiny_model, toy_model

from dsd_fast.diffusion import embed_views, int8, load_model, noise_path, view_prompts
from dsd_fast.diffusion.condition import Condition
from dsd_fast.diffusion.engines import make_engine
from dsd_fast.diffusion.engines.base import EagerEngine, GraphEngine
from dsd_fast.diffusion.loader import resolve
from dsd_fast.diffusion.networks.fused_vae import FusedEncoder
from dsd_fast.diffusion.noise_path import NoisePath
from dsd_fast.diffusion.text import ClipText


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def folder(pristine, tmp_path) -> Path:
    """A copy that a test may spoil."""
    return shutil.copytree(pristine, tmp_path / "tiny")


def edit(file: Path, **entries: object) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, **entries}))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TestNoiseSchedule:
    def test_reference_values(self) -> None:
        abar = noise_path.alphas_cumprod(SCHEDULER)
        expected = {0: 0.999150, 320: 0.556828, 499: 0.277670, 980: 0.005844, 999: 0.004660}
        for t, value in expected.items():
            assert abs(float(abar[t]) - value) < 1e-6
        assert abar.dtype == torch.float32 and abar.shape == (1000,)

    @pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
    def test_same_as_diffusers(self, schedule: str) -> None:
        from diffusers import DDIMScheduler

        config = {"beta_start": 0.001, "beta_end": 0.015, "beta_schedule": schedule}
        theirs = DDIMScheduler(**config).alphas_cumprod
        torch.testing.assert_close(noise_path.alphas_cumprod(config), theirs, rtol=1e-4, atol=1e-9)

    def test_trained_betas(self) -> None:
        betas = [0.001 + 1e-6 * i for i in range(1000)]
        abar = noise_path.alphas_cumprod({"trained_betas": betas})
        assert float(abar[1]) == pytest.approx((1 - betas[0]) * (1 - betas[1]), rel=1e-6)

    @pytest.mark.parametrize(
        ("entries", "message"),
        [
            ({"beta_schedule": "sigmoid"}, "beta_schedule 'sigmoid'"),
            ({"num_train_timesteps": 500}, "must be 1000, got 500"),
            ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
            ({"trained_betas": [0.1, 0.2]}, "1000 numbers"),
            ({"beta_end": 1.5}, r"in \(0, 1\)"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_refused(self, entries: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            noise_path.alphas_cumprod({**SCHEDULER, **entries})

    def test_unknown_prediction_type(self) -> None:
        with pytest.raises(ValueError, match="prediction_type 'sample'"):
            NoisePath.of_scheduler({"prediction_type": "sample"})


class TestLoad:
    @pytest.mark.parametrize("vae", ["kl", "tiny"])
    def test_complete_path(self, tmp_path: Path, vae: str) -> None:
        """Folder to latents, embeddings, noise and image, with a latent size of its own."""
        path = build_tiny_model(tmp_path, vae=vae, latent_size=12, prediction_type="v_prediction")
        model = load_model(path)
        assert (model.latent_size, model.image_size, model.latent_channels) == (12, 24, 4)
        assert model.noise_path.prediction == "v_prediction"
        assert model.scaling_factor == (0.18215 if vae == "kl" else 1.0)
        rgb = torch.rand(2, 3, 24, 24, generator=generator(), requires_grad=True)
        latents = model.encode_images(rgb, generator())
        latents.square().sum().backward()
        assert latents.shape == (2, 4, 12, 12) and rgb.grad.abs().sum() > 0
        prompts = embed_views(model, "an armchair")
        assert prompts.text_vd.shape == prompts.uncond_vd.shape == (4, 77, 16)
        eps = model.predict_noise(
            latents.detach(), torch.tensor([3, 700]), Condition(prompts.text_vd[:2])
        )
        assert eps.shape == latents.shape and eps.isfinite().all()
        image = model.decode_latents(latents)
        assert image.shape == rgb.shape and image.min() >= 0 and image.max() <= 1
        assert not any(p.requires_grad for m in (model.unet, model.vae) for p in m.parameters())

    def test_posterior_is_sampled_from_the_generator(self, pristine: Path) -> None:
        model = load_model(pristine)
        rgb = torch.rand(1, 3, 16, 16, generator=generator())
        first, again, other = (model.encode_images(rgb, generator(s)) for s in (1, 1, 2))
        assert torch.equal(first, again) and not torch.equal(first, other)
        posterior = model.vae.encode(rgb * 2 - 1).latent_dist
        noise = torch.randn(first.shape, generator=generator(1))
        expected = (posterior.mean + posterior.std * noise) * 0.18215
        torch.testing.assert_close(first, expected)

    def test_noise_from_the_caller(self, pristine: Path) -> None:
        model = load_model(pristine)
        rgb = torch.rand(1, 3, 16, 16, generator=generator())
        mean = model.encode_with_noise(rgb, None)
        assert torch.equal(model.encode_images(rgb, generator(), sample_posterior=False), mean)
        noise = torch.randn(mean.shape, generator=generator(1))
        sampled = model.encode_with_noise(rgb, noise)
        assert torch.equal(sampled, model.encode_images(rgb, generator(1)))

    def test_fused_encoder_gives_the_same_latents(self, pristine: Path) -> None:
        model = load_model(pristine)
        rgb = torch.rand(1, 3, 16, 16, generator=generator())
        expected = model.encode_images(rgb, generator())
        model._encoder = FusedEncoder(model.vae)
        torch.testing.assert_close(model.encode_images(rgb, generator()), expected)

    def test_released_decoder_comes_back(self, pristine: Path) -> None:
        model = load_model(pristine)
        latents = torch.randn(1, 4, 8, 8, generator=generator())
        expected = model.decode_latents(latents)
        model.release_decoder()
        assert torch.equal(model.decode_latents(latents), expected)

    def test_shift_factor(self, folder: Path) -> None:
        plain = load_model(folder)
        edit(folder / "vae" / "config.json", shift_factor=0.5)
        shifted = load_model(folder)
        rgb = torch.rand(1, 3, 16, 16, generator=generator())
        a, b = (m.encode_images(rgb, generator()) for m in (plain, shifted))
        torch.testing.assert_close(b, a - 0.5 * 0.18215)
        torch.testing.assert_close(shifted.decode_latents(b), plain.decode_latents(a))

    def test_half_precision_variant(self, folder: Path) -> None:
        for piece, stem in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
            (folder / piece / f"{stem}.safetensors").rename(
                folder / piece / f"{stem}.fp16.safetensors"
            )
        model = load_model(folder)
        assert model.encode_prompt(["a chair"]).shape == (1, 77, 16)

    def test_bfloat16_unet(self, pristine: Path) -> None:
        latents = torch.randn(2, 4, 8, 8, generator=generator())
        text = torch.randn(2, 77, 16, generator=generator())
        t = torch.tensor([10, 900])
        half = load_model(pristine, dtype=torch.bfloat16)
        full = load_model(pristine)
        ours, reference = (m.predict_noise(latents, t, Condition(text)) for m in (half, full))
        assert half.dtype == torch.bfloat16 and ours.dtype == torch.float32
        assert (ours - reference).norm() / reference.norm() < 0.05
        assert next(half.vae.parameters()).dtype == torch.float32

    def test_float16_on_cpu_is_refused(self, pristine: Path) -> None:
        with pytest.raises(ValueError, match="bfloat16"):
            load_model(pristine, dtype=torch.float16)

    def test_hash(self, folder: Path) -> None:
        digest = hashlib.sha256()
        for piece, stem in (
            ("text_encoder", "model"),
            ("unet", "diffusion_pytorch_model"),
            ("vae", "diffusion_pytorch_model"),
        ):
            digest.update((folder / piece / f"{stem}.safetensors").read_bytes())
        assert load_model(folder).model_hash == digest.hexdigest()

    def test_silent(self, pristine: Path, capfd) -> None:
        embed_views(load_model(pristine), "an armchair")
        assert capfd.readouterr() == ("", "")

    def test_v_prediction(self) -> None:
        model = toy_model(prediction="v_prediction")
        latents = torch.randn(2, 4, 6, 6, generator=generator())
        t, text = torch.tensor([20, 950]), torch.randn(2, 5, 3, generator=generator())
        v = model.unet(latents, t, text, False)[0]
        alpha = model.noise_path.alpha.square()[t].sqrt().view(-1, 1, 1, 1)
        sigma = (1 - alpha**2).sqrt()
        eps = model.predict_noise(latents, t, Condition(text))
        # Both forms describe the same clean image.
        torch.testing.assert_close((latents - sigma * eps) / alpha, alpha * latents - sigma * v)


class TestBadFolders:
    @pytest.fixture(autouse=True)
    def nothing_is_loaded(self, monkeypatch) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise AssertionError("a component was loaded before the folder was checked")

        monkeypatch.setattr("dsd_fast.diffusion.loader.load_component", refuse)

    def test_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"nowhere.*StableDiffusionPipeline.*nothing"):
            load_model(tmp_path / "nowhere")

    def test_not_a_pipeline(self, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("")
        with pytest.raises(FileNotFoundError, match=r"model_index.json.*notes.txt"):
            load_model(tmp_path)

    @pytest.mark.parametrize(
        "piece",
        [
            "unet/config.json",
            "unet/diffusion_pytorch_model.safetensors",
            "vae/config.json",
            "vae/diffusion_pytorch_model.safetensors",
            "text_encoder/model.safetensors",
            "tokenizer/tokenizer_config.json",
            "tokenizer/merges.txt",
            "scheduler/scheduler_config.json",
        ],
    )
    def test_missing_piece(self, folder: Path, piece: str) -> None:
        (folder / piece).unlink()
        with pytest.raises(FileNotFoundError, match="expected") as error:
            load_model(folder)
        assert Path(piece).name in str(error.value) and Path(piece).parent.name in str(error.value)

    @pytest.mark.parametrize(
        ("file", "entries", "message"),
        [
            ("vae/config.json", {"_class_name": "VQModel"}, "'VQModel' is not supported"),
            ("unet/config.json", {"_class_name": "UNet2DModel"}, "UNet2DConditionModel"),
            ("unet/config.json", {"in_channels": 9}, "in_channels = 9"),
            ("unet/config.json", {"cross_attention_dim": 32}, "width 32.*gives 16"),
            ("unet/config.json", {"addition_embed_type": "text_time"}, "addition_embed_type"),
            ("unet/config.json", {"sample_size": [8, 16]}, "sample_size"),
            ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "prediction_type"),
        ],
        ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
    )
    def test_unsupported(self, folder: Path, file: str, entries: dict, message: str) -> None:
        edit(folder / file, **entries)
        with pytest.raises(ValueError, match=message):
            load_model(folder)

    def test_broken_json(self, folder: Path) -> None:
        (folder / "unet" / "config.json").write_text("{")
        with pytest.raises(ValueError, match=r"config\.json is not readable JSON"):
            load_model(folder)

    def test_hub_failure(self, monkeypatch) -> None:
        import huggingface_hub

        def offline(*_: object, **__: object) -> None:
            raise OSError("no connection")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
        with pytest.raises(ConnectionError, match=r"'owner/name'.*no connection.*local"):
            load_model("owner/name")
        # What can only be a path never asks the hub.
        with pytest.raises(FileNotFoundError):
            load_model("./owner/name")


class TestBadWeights:
    @pytest.mark.parametrize("piece", ["unet", "vae"])
    def test_truncated(self, folder: Path, piece: str) -> None:
        file = folder / piece / "diffusion_pytorch_model.safetensors"
        file.write_bytes(file.read_bytes()[:-1000])
        with pytest.raises(ValueError, match=f"cannot load .*{piece}"):
            load_model(folder)

    def test_missing_tensor(self, folder: Path) -> None:
        file = folder / "unet" / "diffusion_pytorch_model.safetensors"
        tensors = load_file(file)
        del tensors["conv_in.weight"]
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"lack 1 .*conv_in.weight"):
            load_model(folder)


class TestPrompts:
    def test_views(self) -> None:
        assert view_prompts("a chair") == [
            "a chair, side view",
            "a chair, front view",
            "a chair, back view",
            "a chair, overhead view",
        ]
        assert view_prompts("a chair", prefix=True)[2] == "backside view of a chair"
        assert view_prompts("a chair", view_dependent=False) == ["a chair"] * 4
        assert view_prompts("a chair", overrides={"back": "its back"})[2] == "its back"

    def test_bad_prompts(self) -> None:
        with pytest.raises(ValueError, match="empty"):
            view_prompts("  ")
        with pytest.raises(ValueError, match="'top'"):
            view_prompts("a chair", overrides={"top": "x"})

    def test_length_limit_counts_the_view_suffix(self, pristine: Path) -> None:
        model = load_model(pristine)
        # One token a letter or comma, two for the ends: ", overhead view" adds 13.
        embed_views(model, "a" * 62)
        with pytest.raises(ValueError, match="78 tokens, the model reads 77"):
            embed_views(model, "a" * 63)

    def test_same_as_the_encoder_itself(self, pristine: Path) -> None:
        from transformers import CLIPTextModel, CLIPTokenizer

        tokenizer = CLIPTokenizer.from_pretrained(pristine / "tokenizer")
        encoder = CLIPTextModel.from_pretrained(pristine / "text_encoder").float()
        tokens = tokenizer(["a chair, side view", "blurry"], padding="max_length", max_length=77)
        with torch.no_grad():
            expected = encoder(torch.tensor(tokens["input_ids"])).last_hidden_state
        prompts = embed_views(load_model(pristine), "a chair", "blurry")
        torch.testing.assert_close(prompts.text_vd[0], expected[0])
        torch.testing.assert_close(prompts.uncond_vd, expected[1:].expand(4, -1, -1))

    def test_release(self, pristine: Path) -> None:
        model = load_model(pristine)
        first = embed_views(model, "a chair")
        assert model._text_encoder._loaded is None
        assert torch.equal(embed_views(model, "a chair").text_vd, first.text_vd)


class TestEngine:
    def test_choice(self) -> None:
        unet = toy_model().unet
        assert isinstance(make_engine(unet, torch.device("cpu")), EagerEngine)
        with pytest.raises(ValueError, match="CUDA"):
            make_engine(unet, torch.device("cpu"), "graph")
        with pytest.raises(ValueError, match="'fast'"):
            make_engine(unet, torch.device("cpu"), "fast")

    @cuda_only
    @pytest.mark.filterwarnings("ignore:.*[Dd]eterministic")
    def test_graph_replays_the_forward(self, pristine: Path) -> None:
        eager = load_model(pristine, "cuda", engine="eager")
        graph = load_model(pristine, "cuda", engine="graph")
        assert isinstance(graph.engine, GraphEngine)
        kept = []
        for rows, seed in ((4, 0), (8, 1), (4, 2)):
            latents = torch.randn(rows, 4, 8, 8, generator=generator(seed)).cuda()
            text = torch.randn(rows, 77, 16, generator=generator(seed)).cuda()
            t = torch.randint(0, 1000, (rows,), generator=generator(seed))
            expected = eager.predict_noise(latents, t, Condition(text))
            kept.append((graph.predict_noise(latents, t, Condition(text)), expected))
        # Compared at the end: a later replay must not write into an earlier result.
        for result, expected in kept:
            torch.testing.assert_close(result, expected, rtol=1e-2, atol=1e-2)


def test_imports_stay_lean() -> None:
    code = (
        "import sys, dsd_fast.diffusion, dsd_fast.guidance; "
        "print([m for m in ('diffusers', 'transformers', 'triton', 'huggingface_hub') "
        "if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


def test_spelled_words_are_named(caplog: pytest.LogCaptureFixture) -> None:
    """The embedded model's vocabulary is small; a prompt beyond it works, and says so."""
    folder = resolve("embedded")
    encode = ClipText(folder / "tokenizer", folder / "text_encoder", torch.device("cpu"))
    with caplog.at_level("WARNING"):
        encode(["a red armchair, front view"])
        assert not caplog.records
        encode(["a red zombie, front view"])
    assert "'zombie'" in caplog.text
    assert "'red'" not in caplog.text


# Weights in 8 bits


def test_weights_in_8_bits_are_off_by_half_a_step():
    generator = torch.Generator().manual_seed(0)
    state = {
        "conv.weight": torch.randn(6, 4, 3, 3, generator=generator),
        "norm.weight": torch.randn(6, generator=generator),
    }
    state["conv.weight"][2] = 0
    state["conv.weight"][3] *= 1e-4
    packed = int8.pack(state)
    assert packed["conv.weight"].dtype == torch.int8 and packed["norm.weight"].dtype == torch.half
    again = int8.unpack(packed)
    assert again.keys() == state.keys()
    torch.testing.assert_close(again["norm.weight"], state["norm.weight"].half().float())
    error = (again["conv.weight"] - state["conv.weight"]).abs().flatten(1).amax(1)
    step = state["conv.weight"].abs().flatten(1).amax(1) / 127
    assert (error <= 0.505 * step + 2**-24).all() and error[2] == 0
    with pytest.raises(ValueError, match=r"conv.weight: expected finite"):
        int8.pack({"conv.weight": torch.full((2, 2), float("nan"))})
    del packed["conv.weight.scale"]
    with pytest.raises(ValueError, match=r"conv.weight: expected scales \[6\]"):
        int8.unpack(packed)


def test_a_folder_of_8_bits_is_loaded(tmp_path):
    folder = build_tiny_model(tmp_path / "tiny")
    plain = load_model(folder)
    source = folder / "unet" / "diffusion_pytorch_model.safetensors"
    packed = folder / "unet" / "diffusion_pytorch_model.int8.safetensors"
    save_file(int8.pack(load_file(source)), packed)
    source.unlink()
    drawn = torch.random.get_rng_state()
    model = load_model(folder)
    assert torch.equal(drawn, torch.random.get_rng_state())
    for (name, p), q in zip(plain.unet.named_parameters(), model.unet.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=float(p.abs().max()) / 250, rtol=0, msg=name)
    save_file({k: v for k, v in load_file(packed).items() if "conv_in" not in k}, packed)
    with pytest.raises(ValueError, match=r"the weights lack 2 of the tensors.*conv_in.bias"):
        load_model(folder)
    packed.write_bytes(packed.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot load UNet2DConditionModel"):
        load_model(folder)
