"""The legal range of every setting in a model folder's JSON that shapes what is loaded.

Keys that are not here decide nothing: `known` leaves them out of what the libraries are given, so
that a stranger's file cannot name code, kernels or quantisation for them to fetch.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Interval, Len

from dsd_fast.diffusion.model_files import brief, read_json
from dsd_fast.diffusion.networks import multiview_unet
from dsd_fast.ranges import ConfigError, Number, Positive, convert

Width = Annotated[int, Interval(ge=1, le=2**16)]
Blocks = Annotated[int, Interval(ge=1, le=64)]
Heads = Annotated[int, Interval(ge=1, le=2**12)]
Kernel = Annotated[int, Interval(ge=1, le=15)]
Tokens = Annotated[int, Interval(ge=3, le=4096)]
Vocabulary = Annotated[int, Interval(ge=3, le=2**21)]
Id = Annotated[int, Interval(ge=-1, le=2**21)]
Name = Annotated[str, Len(max_length=100)]
Text = Annotated[str, Len(max_length=4096)]
Tiny = Annotated[float, Interval(gt=0, le=1)]
Chance = Annotated[float, Interval(ge=0, le=1)]
Beta = Annotated[float, Interval(gt=0, lt=1)]


# One for each level.
Widths = Annotated[tuple[Width, ...], Len(0, 16)]
Names = Annotated[tuple[Name, ...], Len(0, 16)]
Counts = Annotated[tuple[Blocks, ...], Len(0, 16)]
Choices = Annotated[tuple[bool, ...], Len(0, 16)]
LevelHeads = Annotated[tuple[Heads, ...], Len(0, 16)]
EachLevel = Blocks | Counts
EachLayer = Annotated[tuple[EachLevel, ...], Len(0, 16)]


@dataclass
class UNet:
    """UNet2DConditionModel's."""

    _class_name: Name | None = None
    _diffusers_version: Name | None = None
    _name_or_path: Text | None = None
    # `latent_size` knows what it may be.
    sample_size: Any = None
    in_channels: Width = 4
    out_channels: Width = 4
    center_input_sample: bool = False
    flip_sin_to_cos: bool = True
    freq_shift: Annotated[int, Interval(ge=0, le=1)] = 0
    down_block_types: Names = ()
    mid_block_type: Name | None = None
    up_block_types: Names = ()
    only_cross_attention: bool | Choices = False
    block_out_channels: Widths = ()
    layers_per_block: EachLevel = 2
    downsample_padding: Annotated[int, Interval(ge=0, le=1)] = 1
    mid_block_scale_factor: Positive = 1.0
    dropout: Chance = 0.0
    act_fn: Name = "silu"
    norm_num_groups: Width | None = 32
    norm_eps: Tiny = 1e-5
    cross_attention_dim: Width = 1280
    transformer_layers_per_block: EachLevel | EachLayer = 1
    reverse_transformer_layers_per_block: EachLayer | None = None
    encoder_hid_dim: None = None
    encoder_hid_dim_type: None = None
    attention_head_dim: Heads | LevelHeads = 8
    num_attention_heads: Heads | LevelHeads | None = None
    dual_cross_attention: bool = False
    use_linear_projection: bool = False
    class_embed_type: Name | None = None
    addition_embed_type: Name | None = None
    addition_time_embed_dim: Width | None = None
    num_class_embeds: Width | None = None
    upcast_attention: bool | None = False
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    resnet_skip_time_act: bool = False
    resnet_out_scale_factor: Positive = 1.0
    time_embedding_type: Literal["positional", "fourier"] = "positional"
    time_embedding_dim: Width | None = None
    time_embedding_act_fn: Name | None = None
    timestep_post_act: Name | None = None
    time_cond_proj_dim: Width | None = None
    conv_in_kernel: Kernel = 3
    conv_out_kernel: Kernel = 3
    projection_class_embeddings_input_dim: Width | None = None
    attention_type: Name = "default"
    class_embeddings_concat: bool = False
    mid_block_only_cross_attention: bool | None = None
    cross_attention_norm: Name | None = None
    addition_embed_type_num_heads: Heads = 64


@dataclass
class MultiView:
    """MultiViewUNet's; which of them must be there, and be what, `check_config` knows."""

    _class_name: Name | None = None
    image_size: Any = None
    in_channels: Width | None = None
    out_channels: Width | None = None
    model_channels: Width | None = None
    num_res_blocks: EachLevel | None = None
    attention_resolutions: Widths | None = None
    channel_mult: Counts | None = None
    num_head_channels: Width | Literal[-1] = -1
    num_heads: Heads | Literal[-1] = -1
    transformer_depth: Blocks = 1
    context_dim: Width | None = None
    use_scale_shift_norm: bool = False
    norm_num_groups: Width = 32
    addition_embed_type: Name | None = None
    addition_embed_type_num_heads: Heads = 64


@dataclass
class Autoencoder:
    """AutoencoderKL's."""

    _class_name: Name | None = None
    in_channels: Literal[3] = 3
    out_channels: Literal[3] = 3
    down_block_types: Names = ()
    up_block_types: Names = ()
    block_out_channels: Widths = ()
    layers_per_block: Blocks = 1
    act_fn: Name = "silu"
    latent_channels: Width = 4
    norm_num_groups: Width = 32
    sample_size: Width | tuple[Width, Width] | None = 32
    scaling_factor: Positive = 0.18215
    shift_factor: Number | None = None
    # Latents that are shifted and scaled channel by channel, which guidance does not do.
    latents_mean: None = None
    latents_std: None = None
    force_upcast: bool | Literal[0, 1] = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True


@dataclass
class TinyAutoencoder:
    """AutoencoderTiny's."""

    _class_name: Name | None = None
    in_channels: Literal[3] = 3
    out_channels: Literal[3] = 3
    encoder_block_out_channels: Widths = ()
    decoder_block_out_channels: Widths = ()
    act_fn: Name = "relu"
    upsample_fn: Name = "nearest"
    latent_channels: Width = 4
    upsampling_scaling_factor: Literal[2] = 2
    num_encoder_blocks: Counts = ()
    num_decoder_blocks: Counts = ()
    latent_magnitude: Number = 3
    latent_shift: Number = 0.5
    force_upcast: bool = False
    scaling_factor: Positive = 1.0
    shift_factor: Number | None = 0.0


@dataclass
class TextEncoder:
    """CLIPTextConfig's."""

    vocab_size: Vocabulary = 49408
    hidden_size: Width = 512
    intermediate_size: Width = 2048
    projection_dim: Width | None = 512
    num_hidden_layers: Blocks = 12
    num_attention_heads: Heads = 8
    max_position_embeddings: Tokens = 77
    hidden_act: Name = "quick_gelu"
    layer_norm_eps: Tiny = 1e-5
    attention_dropout: Chance = 0.0
    pad_token_id: Id | None = 1
    bos_token_id: Id | None = 49406
    eos_token_id: Id | None = 49407


@dataclass
class ImageEncoder:
    """CLIPVisionConfig's."""

    hidden_size: Width = 768
    intermediate_size: Width = 3072
    projection_dim: Width = 512
    num_hidden_layers: Blocks = 12
    num_attention_heads: Heads = 12
    num_channels: Literal[3] = 3
    image_size: Annotated[int, Interval(ge=1, le=1024)] = 224
    patch_size: Annotated[int, Interval(ge=1, le=1024)] = 32
    hidden_act: Name = "quick_gelu"
    layer_norm_eps: Tiny = 1e-5
    attention_dropout: Chance = 0.0


@dataclass
class Scheduler:
    """What a noise path takes from a scheduler's."""

    _class_name: Name | None = None
    num_train_timesteps: int = 1000
    beta_start: Beta = 0.0001
    beta_end: Beta = 0.02
    beta_schedule: Name = "linear"
    trained_betas: tuple[float, ...] | None = None
    prediction_type: Name = "epsilon"
    rescale_betas_zero_snr: bool | None = False
    timestep_spacing: Name | None = None


@dataclass
class Tokenizer:
    """tokenizer_config.json's."""

    tokenizer_class: Literal["CLIPTokenizer", "CLIPTokenizerFast"] | None = None
    # transformers has 10^30 for no limit.
    model_max_length: Annotated[int | float, Interval(ge=3, le=1e31)] | None = None


@dataclass
class Index:
    """model_index.json's."""

    _class_name: Name | None = None
    _name_or_path: Text | None = None
    _vae_folder: Text | None = None
    _text_encoder_folder: Text | None = None
    _tokenizer_folder: Text | None = None


# Lists with a value for each level.
_OF_LEVELS = (
    "down_block_types",
    "up_block_types",
    "layers_per_block",
    "attention_head_dim",
    "transformer_layers_per_block",
    "only_cross_attention",
)
_OF_CLASS = {
    "UNet2DConditionModel": UNet,
    multiview_unet.CLASS_NAME: MultiView,
    "AutoencoderKL": Autoencoder,
    "AutoencoderTiny": TinyAutoencoder,
}
_OF_PIECE = {
    "text_encoder": TextEncoder,
    "image_encoder": ImageEncoder,
    "scheduler": Scheduler,
    "tokenizer": Tokenizer,
    "index": Index,
}


def read_settings(file: Path, piece: str) -> dict[str, Any]:
    """A JSON file of a model folder, each setting in its range.

    Args:
        piece: "unet", "vae", "text_encoder", "image_encoder", "scheduler", "tokenizer" or "index".
    Raises:
        ValueError: no readable JSON, or a value that cannot be; names file and key. A class of UNet
            or VAE that is not known is for the caller to refuse.
    """
    config = read_json(file)
    # A whole CLIP's configuration has those of its encoders as sections.
    section = {"text_encoder": "text_config", "image_encoder": "vision_config"}.get(piece)
    if config.get("model_type") == "clip" and section in config:
        if not isinstance(config[section], dict):
            raise ValueError(f"{file}: {section}: expected an object, got {config[section]!r:.80}")
        config = config[section]
    kind = _kind(config, piece)
    if kind is None:
        return config
    for name in known(config, piece):
        try:
            convert(kind, name, config[name], f"{file}: {name}")
        except ConfigError as error:
            raise ValueError(brief(error)) from None
    levels = len(config.get("block_out_channels", ()))
    for name in _OF_LEVELS if levels else ():
        value = config.get(name)
        if isinstance(value, list) and len(value) != levels:
            raise ValueError(
                f"{file}: {name}: expected {levels} values, as many as block_out_channels has, "
                f"got {len(value)}"
            )
    return config


def known(config: dict[str, Any], piece: str) -> dict[str, Any]:
    """The settings of a configuration that are checked here."""
    kind = _kind(config, piece)
    names = {field.name for field in fields(kind)} if kind else set()
    return {name: value for name, value in config.items() if name in names}


def _kind(config: dict[str, Any], piece: str) -> type | None:
    name = config.get("_class_name")
    return _OF_PIECE.get(piece) or (_OF_CLASS.get(name) if isinstance(name, str) else None)
