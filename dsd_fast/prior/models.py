"""The networks of the embedded prior, built from diffusers and transformers classes.

A text-to-image latent diffusion model in Stable Diffusion's own parts (Rombach et al. 2022), small
enough to ship in a wheel and to run on a CPU: 256x256 images, 32x32x4 latents, a UNet of 9.7 M
parameters (2.3 GFLOP a row), a VAE of 2.1 M (3.1 GFLOP an encoding) and a two-layer CLIP text
transformer over a vocabulary of its own captions. diffusers and transformers are imported when a
network is built.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dsd_fast.diffusion import int8

if TYPE_CHECKING:
    from collections.abc import Iterable

    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    from dsd_fast.diffusion.networks.multiview_unet import MultiViewUNet

IMAGE_SIZE = 256
LATENT_SIZE = 32
MAX_TOKENS = 32
TEXT_WIDTH = 128
NORM_GROUPS = 16
HEAD_WIDTH = 32
# Channels at 8x8: of the text model's UNet, and of the other one, which ships beside it.
UNET_WIDTH = 192
VIEW_UNET_WIDTH = 160

# Stable Diffusion's noise schedule (Rombach et al. 2022), DDIM's sampler (Song et al. 2021).
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def build_vae() -> AutoencoderKL:
    """A KL autoencoder of factor 8 with 4 latent channels: float32, on the CPU, random weights.

    Without attention, whose memory and time grow with the square of the image.
    """
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        sample_size=IMAGE_SIZE,
        latent_channels=4,
        block_out_channels=(16, 32, 64, 112),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        mid_block_add_attention=False,
    )


def build_unet() -> UNet2DConditionModel:
    """A UNet over 32x32 latents with cross-attention at 16x16 and 8x8.

    The pooled text joins the embedding of the noise level, which scales and shifts every block:
    noun and view reach all resolutions, at no cost worth counting.

    float32, on the CPU, random weights; predicts the velocity of latents [R,4,32,32] at levels [R]
    with text [R,L,TEXT_WIDTH].
    """
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        block_out_channels=(48, 96, UNET_WIDTH),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
        resnet_time_scale_shift="scale_shift",
        # diffusers' historical name: these are the numbers of heads, 32 channels each
        attention_head_dim=(2, 3, UNET_WIDTH // HEAD_WIDTH),
        norm_num_groups=NORM_GROUPS,
        use_linear_projection=True,
    )


def build_view_unet() -> UNet2DConditionModel:
    """`build_unet` with another picture beside the noisy one, a little narrower at 8x8.

    float32, on the CPU, random weights; predicts the velocity of the first four channels of
    [R,8,32,32], of which the other four are the reference picture's latents, at levels [R] with
    context [R,L,TEXT_WIDTH].
    """
    from diffusers import UNet2DConditionModel

    config = {k: v for k, v in build_unet().config.items() if not k.startswith("_")}
    config |= {
        "in_channels": 8,
        "block_out_channels": (48, 96, VIEW_UNET_WIDTH),
        "attention_head_dim": (2, 3, VIEW_UNET_WIDTH // HEAD_WIDTH),
    }
    return UNet2DConditionModel(**config)


def narrowed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of `build_unet` as a beginning for `build_view_unet`.

    Of the widest level's channels as many of each group of the normalisations are kept, and of the
    heads of its attention the first; the new input channels have no effect yet.
    """
    group = UNET_WIDTH // NORM_GROUPS
    kept = torch.arange(UNET_WIDTH)
    kept = kept[kept % group < VIEW_UNET_WIDTH // NORM_GROUPS]
    inner = torch.arange(4 * VIEW_UNET_WIDTH)  # of a feed-forward layer
    of_size = {
        UNET_WIDTH: kept,
        2 * UNET_WIDTH: torch.cat([kept, UNET_WIDTH + kept]),
        UNET_WIDTH + 96: torch.cat([kept, UNET_WIDTH + torch.arange(96)]),
        4 * UNET_WIDTH: inner,
        8 * UNET_WIDTH: torch.cat([inner, 4 * UNET_WIDTH + inner]),
    }
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in build_view_unet().state_dict().items()}
    out = {}
    for name, values in state.items():
        for dim, (old, new) in enumerate(zip(values.shape, shapes[name], strict=True)):
            if name == "conv_in.weight" and dim == 1:
                values = torch.cat([values, torch.zeros_like(values)], dim=1)
            elif old != new:
                heads = (
                    dim == 0 and name.endswith(("to_q.weight", "to_k.weight", "to_v.weight")),
                    dim == 1 and name.endswith("to_out.0.weight"),
                )
                index = torch.arange(new) if any(heads) else of_size[old]
                values = values.index_select(dim, index)
        out[name] = values
    return out


# `build_unet` as MVDream's configurations have it (Shi et al. 2023): attention at 16x16 and 8x8.
MULTIVIEW = {
    "_class_name": "MultiViewUNetModel",
    "image_size": LATENT_SIZE,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 48,
    "num_res_blocks": 1,
    "attention_resolutions": [2, 4],
    "channel_mult": [1, 2, UNET_WIDTH // 48],
    "num_head_channels": HEAD_WIDTH,
    "transformer_depth": 1,
    "context_dim": TEXT_WIDTH,
    "camera_dim": 16,
    "use_scale_shift_norm": True,
    "norm_num_groups": NORM_GROUPS,
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 4,
}

# Modules of `build_unet` by where they are in a MultiViewUNet of MULTIVIEW.
_PLACES = {
    "input_blocks.0.0": "conv_in",
    "input_blocks.1.0": "down_blocks.0.resnets.0",
    "input_blocks.2.0.op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks.3.0": "down_blocks.1.resnets.0",
    "input_blocks.3.1": "down_blocks.1.attentions.0",
    "input_blocks.4.0.op": "down_blocks.1.downsamplers.0.conv",
    "input_blocks.5.0": "down_blocks.2.resnets.0",
    "input_blocks.5.1": "down_blocks.2.attentions.0",
    "middle_block.0": "mid_block.resnets.0",
    "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1",
    "output_blocks.0.0": "up_blocks.0.resnets.0",
    "output_blocks.0.1": "up_blocks.0.attentions.0",
    "output_blocks.1.0": "up_blocks.0.resnets.1",
    "output_blocks.1.1": "up_blocks.0.attentions.1",
    "output_blocks.1.2.conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks.2.0": "up_blocks.1.resnets.0",
    "output_blocks.2.1": "up_blocks.1.attentions.0",
    "output_blocks.3.0": "up_blocks.1.resnets.1",
    "output_blocks.3.1": "up_blocks.1.attentions.1",
    "output_blocks.3.2.conv": "up_blocks.1.upsamplers.0.conv",
    "output_blocks.4.0": "up_blocks.2.resnets.0",
    "output_blocks.5.0": "up_blocks.2.resnets.1",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "text_embed": "add_embedding",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
# Layers of a residual block, there and here.
_LAYERS = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


def build_multiview_unet() -> MultiViewUNet:
    """`build_unet` for four views of one object at once: float32, on the CPU, random weights."""
    from dsd_fast.diffusion.networks.multiview_unet import MultiViewUNet

    return MultiViewUNet(MULTIVIEW)


def of_multiview(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of `build_unet` as a beginning for `build_multiview_unet`.

    Nothing is said by the cameras yet. Attention over one view's tokens becomes attention over four
    views': the same weights.
    """
    unet = build_multiview_unet()
    out = unet.state_dict()
    for name in out:
        if name.startswith("camera_embed."):
            if name.startswith("camera_embed.2."):
                out[name] = torch.zeros_like(out[name])
            continue
        place = next(place for place in _PLACES if name.startswith(f"{place}."))
        rest = name.removeprefix(f"{place}.")
        for there, here in _LAYERS.items():
            if rest.startswith(f"{there}."):
                rest = rest.replace(there, here, 1)
        out[name] = state[f"{_PLACES[place]}.{rest}"]
    return out


def build_tokenizer(captions: Iterable[str]) -> CLIPTokenizer:
    """A CLIP tokenizer whose byte-pair merges make one token of every word in `captions`.

    Other words still encode, by the pieces they share with these, at worst letter by letter.

    Raises:
        ValueError: no captions.
    """
    texts = sorted(set(captions))
    if not any(texts):
        raise ValueError("build_tokenizer: expected captions, got none that has a word")
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    bpe = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    letters = [chr(c) for c in range(33, 127) if not chr(c).isupper()]
    trainer = trainers.BpeTrainer(
        # the vocabulary is not the limit: merging goes on until every word is whole
        vocab_size=30_000,
        min_frequency=1,
        initial_alphabet=letters,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    state = json.loads(bpe.to_str())["model"]
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in state["merges"]]
    tokens = letters + [f"{c}</w>" for c in letters] + ["".join(m) for m in merges]
    vocab: dict[str, int] = {}
    for token in [*tokens, "<|startoftext|>", "<|endoftext|>"]:
        vocab.setdefault(token, len(vocab))
    # Files are the one constructor that every transformers version has.
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.json").write_text(json.dumps(vocab))
        lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
        (Path(folder) / "merges.txt").write_text("\n".join(lines) + "\n")
        return CLIPTokenizer.from_pretrained(
            folder,
            bos_token="<|startoftext|>",
            eos_token="<|endoftext|>",
            unk_token="<|endoftext|>",
            pad_token="<|endoftext|>",
            model_max_length=MAX_TOKENS,
        )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A two-layer causal CLIP text transformer for `tokenizer`.

    float32, on the CPU, random weights; ids [K,MAX_TOKENS] give [K,MAX_TOKENS,TEXT_WIDTH].
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            hidden_act="quick_gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Token ids [K, MAX_TOKENS] int64 on the CPU, padded with the end token.

    Raises:
        ValueError: a caption has more tokens than fit.
    """
    ids = tokenizer(
        captions, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt"
    ).input_ids
    if ids.shape[1] != MAX_TOKENS:
        raise ValueError(
            f"a caption has {ids.shape[1]} tokens, at most {MAX_TOKENS} fit: shorten the captions"
        )
    return ids


def save_unet(state: dict[str, torch.Tensor], folder: Path, as_int8: bool) -> None:
    """Write a UNet's weights as its folder's only ones, in 8 bits (`diffusion.int8`) or float16.

    Raises:
        OSError: the folder cannot be written.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    files = {
        kind: folder / f"diffusion_pytorch_model{kind and f'.{kind}'}.safetensors"
        for kind in ("", int8.VARIANT)
    }
    halves = {name: value.half().contiguous() for name, value in state.items()}
    save_file(int8.pack(state) if as_int8 else halves, files[int8.VARIANT if as_int8 else ""])
    files["" if as_int8 else int8.VARIANT].unlink(missing_ok=True)


def export_pipeline(
    out: Path,
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
) -> None:
    """Write the parts as a diffusers StableDiffusionPipeline folder, safetensors in float16.

    The modules are converted in place. The scaling factor of the latents is taken from
    `vae.config`.

    Raises:
        OSError: `out` cannot be written.
    """
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from tokenizers import Tokenizer

    parts: dict[str, Any] = {"vae": vae, "unet": unet, "text_encoder": text_encoder}
    pipeline = StableDiffusionPipeline(
        **{name: part.to(torch.float16) for name, part in parts.items()},
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(out, safe_serialization=True)
    # transformers 4 writes and reads the two files of the original CLIP, transformers 5
    # tokenizer.json: where the latter was written, ship the former too.
    tables = out / "tokenizer" / "tokenizer.json"
    if tables.is_file():
        Tokenizer.from_file(str(tables)).model.save(str(tables.parent))
