"""Models with random weights, small enough for tests.

`build_tiny_model` writes a complete Stable Diffusion folder; `toy_model` is a model in memory whose
UNet is one convolution, for tests of what surrounds it.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from dsd_fast.diffusion import DiffusionModel
from dsd_fast.diffusion.noise_path import NoisePath

SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}
_START, _END = "<|startoftext|>", "<|endoftext|>"


def build_tiny_model(
    folder: Path,
    *,
    prediction_type: str = "epsilon",
    latent_size: int = 8,
    vae: str = "kl",
    scheduler: dict | None = None,
    seed: int = 0,
) -> Path:
    """Write unet, vae, text_encoder, tokenizer, scheduler and model_index.json into `folder`.

    Args:
        latent_size: side of the latents; images are twice as wide.
        vae: "kl" for AutoencoderKL, "tiny" for AutoencoderTiny.
        scheduler: entries that replace those of the scheduler configuration.
    Returns:
        the folder, ready for `load_model`.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    _write_tokenizer(folder / "tokenizer")
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=514,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=77,
            bos_token_id=512,
            eos_token_id=513,
            pad_token_id=513,
        )
    )
    text.save_pretrained(folder / "text_encoder")
    unet = _unet(latent_size)
    unet.save_pretrained(folder / "unet")
    _vae(vae).save_pretrained(folder / "vae")
    config = {
        "_class_name": "DDIMScheduler",
        **SCHEDULER,
        "prediction_type": prediction_type,
        **(scheduler or {}),
    }
    _write_json(folder / "scheduler" / "scheduler_config.json", config)
    _write_json(
        folder / "model_index.json",
        {
            "_class_name": "StableDiffusionPipeline",
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL" if vae == "kl" else "AutoencoderTiny"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "scheduler": ["diffusers", "DDIMScheduler"],
        },
    )
    return folder


def build_tiny_view_model(folder: Path, *, clip: bool = True, seed: int = 0) -> Path:
    """Write a Zero-1-to-3 model into `folder`, ready for `load_view_model`.

    Args:
        clip: with image_encoder and clip_camera_projection, as diffusers stores Zero-1-to-3; else
            with a camera_projection that reads latents, as the small prior's.
    """
    from safetensors.torch import save_file
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    from dsd_fast.diffusion.reference_picture import CameraProjection, latent_feature_width

    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    width, features = 16, 12 if clip else latent_feature_width(4)
    _unet(8, in_channels=8).save_pretrained(folder / "unet")
    _vae("kl").save_pretrained(folder / "vae")
    _write_json(
        folder / "scheduler" / "scheduler_config.json",
        {"_class_name": "DDIMScheduler", **SCHEDULER},
    )
    name = "clip_camera_projection" if clip else "camera_projection"
    projection = CameraProjection(features, width)
    (folder / name).mkdir(exist_ok=True)
    save_file(projection.state_dict(), folder / name / "diffusion_pytorch_model.safetensors")
    if clip:
        encoder = CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                image_size=28,
                patch_size=14,
                projection_dim=features,
            )
        )
        encoder.save_pretrained(folder / "image_encoder")
    _write_json(folder / "model_index.json", {"_class_name": "Zero1to3Pipeline"})
    return folder


TINY_MULTIVIEW = {
    "_class_name": "MultiViewUNetModel",
    "image_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": [2, 1],
    "channel_mult": [1, 2],
    "num_head_channels": 16,
    "transformer_depth": 1,
    "context_dim": 16,
    "camera_dim": 16,
    "use_checkpoint": False,
    "ip_dim": 0,
}


def build_tiny_multiview(folder: Path, *, seed: int = 0, **unet: object) -> Path:
    """The folder of `build_tiny_model` with a UNet of four views in MVDream's layout.

    Args:
        unet: entries that replace those of the UNet's configuration; its weights stay.
    """
    from safetensors.torch import save_file

    from dsd_fast.diffusion.networks.multiview_unet import MultiViewUNet

    build_tiny_model(folder, seed=seed)
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    index |= {"_class_name": "MVDreamPipeline", "unet": ["mv_unet", "MultiViewUNetModel"]}
    index |= {"feature_extractor": [None, None], "image_encoder": [None, None]}
    _write_json(folder / "model_index.json", index)
    torch.manual_seed(seed)
    _write_json(folder / "unet" / "config.json", TINY_MULTIVIEW | unet)
    weights = MultiViewUNet(TINY_MULTIVIEW).state_dict()
    save_file(weights, folder / "unet" / "diffusion_pytorch_model.safetensors")
    return folder


class ToyUNet(nn.Module):
    """A noise predictor that depends on latents, level and text, and counts its calls."""

    def __init__(self, text_width: int = 3, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(4, 4, 3, 3, generator=generator) / 6)
        self.project = nn.Parameter(torch.randn(text_width, 4, generator=generator))
        self.rows: list[int] = []

    def forward(
        self, latents: Tensor, t: Tensor, encoder_hidden_states: Tensor, return_dict: bool
    ) -> tuple[Tensor]:
        assert t.shape == (latents.shape[0],) == (encoder_hidden_states.shape[0],)
        self.rows.append(latents.shape[0])
        text = torch.tanh(encoder_hidden_states @ self.project).mean(1)[:, :, None, None]
        level = (t.to(latents.dtype) / 1000)[:, None, None, None]
        smooth = nn.functional.conv2d(latents, self.weight, padding=1)
        return (torch.tanh(smooth + text) * (0.5 + level),)


def toy_model(
    latent_size: int = 6, prediction: str = "epsilon", **kwargs: object
) -> DiffusionModel:
    """A DiffusionModel around ToyUNet, without VAE or text encoder; `model.unet.rows` counts."""
    return DiffusionModel(
        ToyUNet(),
        nn.Identity(),
        None,
        noise_path=NoisePath.of_scheduler(SCHEDULER | {"prediction_type": prediction}),
        latent_size=latent_size,
        **kwargs,
    )


def _unet(latent_size: int, in_channels: int = 4) -> torch.nn.Module:
    import diffusers

    return diffusers.UNet2DConditionModel(
        sample_size=latent_size,
        in_channels=in_channels,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=16,
    )


def _vae(kind: str) -> torch.nn.Module:
    import diffusers

    if kind == "kl":
        return diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=16,
        )
    return diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=4,
    )


def _write_tokenizer(folder: Path) -> None:
    """A byte-level vocabulary without merges: one token a letter."""
    # The printable stand-ins for the 256 bytes that byte-level BPE (GPT-2) uses.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
    tokens = [*letters, *(letter + "</w>" for letter in letters), _START, _END]
    folder.mkdir(exist_ok=True)
    _write_json(folder / "vocab.json", {token: index for index, token in enumerate(tokens)})
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": 77,
            "bos_token": _START,
            "eos_token": _END,
            "unk_token": _END,
            "pad_token": _END,
        },
    )


def _write_json(file: Path, content: dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content), encoding="utf-8")
