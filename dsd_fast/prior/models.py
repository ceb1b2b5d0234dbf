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

if TYPE_CHECKING:
    from collections.abc import Iterable

    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

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
