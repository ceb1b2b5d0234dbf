"""The pieces of a diffusers StableDiffusionPipeline folder: found and checked, not yet loaded."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsd_fast.diffusion import families
from dsd_fast.diffusion.model_files import check_tokenizer, find_weights, listing, read_json
from dsd_fast.diffusion.model_settings import read_settings
from dsd_fast.diffusion.networks import multiview_unet
from dsd_fast.diffusion.noise_path import NoisePath

_CONFIGS = {
    "unet": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "tokenizer": "tokenizer_config.json",
    "scheduler": "scheduler_config.json",
}
# Pieces of transformers, with their classes.
ENCODERS = {"text_encoder": "CLIPTextModel", "image_encoder": "CLIPVisionModelWithProjection"}
# The tokenizer is either one file (transformers 5) or a vocabulary with its merges.
_TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
# What has weights, of a text-to-image model and of a model of views.
TEXT_PIECES = ("unet", "vae", "text_encoder")
# What a view model's folder may call its camera projection.
PROJECTIONS = ("camera_projection", "clip_camera_projection", "cc_projection")
VIEW_PIECES = ("unet", "vae", "image_encoder", *PROJECTIONS)
# Pieces that may lie elsewhere: model_index.json then has their folder, relative to the model's
# own, as `_vae_folder`, `_text_encoder_folder` or `_tokenizer_folder`.
_SHARED = ("vae", "text_encoder", "tokenizer")
_CLASSES = {
    "unet": ("UNet2DConditionModel", multiview_unet.CLASS_NAME),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
}
# Conditioning of other model families, which the text embedding alone does not provide, with the
# values that need nothing else.
_FOREIGN_UNET_KEYS = {
    "addition_embed_type": (None, "text"),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
}
# Pictures of up to 1024 pixels.
_LARGEST_LATENT = 128


@dataclass(frozen=True)
class PipelineFolder:
    """A checked folder: configuration and weight files of each piece, nothing loaded yet."""

    path: Path
    configs: dict[str, dict[str, Any]]
    weights: dict[str, list[Path]]
    # Where each piece lies.
    places: dict[str, Path]

    @property
    def weight_files(self) -> list[Path]:
        return [file for files in self.weights.values() for file in files]


def inspect_folder(path: Path) -> PipelineFolder:
    """Check that a folder holds every piece of a supported pipeline.

    Raises:
        FileNotFoundError: the folder or a piece is missing; says where it was expected and what
            was found there instead.
        ValueError: a configuration is unreadable, or describes a model that is not supported.
    """
    places, configs = inspect_configs(path)
    weights = {piece: find_weights(places[piece], stem_of(piece)).files for piece in TEXT_PIECES}
    return PipelineFolder(path, configs, weights, places)


def inspect_configs(path: Path) -> tuple[dict[str, Path], dict[str, dict[str, Any]]]:
    """What of `inspect_folder` needs no weights: places and configurations by piece, and the
    tokenizer."""
    index = _read_index(path, "StableDiffusionPipeline folder")
    families.refuse_pipeline(path, index)
    if any((path / name).is_dir() for name in PROJECTIONS):
        families.refuse_pipeline(path, {"_class_name": "Zero1to3Pipeline"})
    places = {piece: path / piece for piece in _CONFIGS} | _elsewhere(path, index)
    configs = {}
    for piece, name in _CONFIGS.items():
        if places[piece].parent == path:
            require(path, f"{piece}/{name}")
        else:
            require(places[piece], name)
        configs[piece] = read_settings(places[piece] / name, piece)
    tokenizer = places["tokenizer"]
    if not any(all((tokenizer / f).is_file() for f in files) for files in _TOKENIZER_FILES):
        raise FileNotFoundError(
            f"{tokenizer}: expected tokenizer.json, or vocab.json and merges.txt; "
            f"found {listing(tokenizer)}"
        )
    _check_configs(path, places, configs)
    check_tokenizer(tokenizer, configs["text_encoder"].get("vocab_size", 49408))
    families.warn_of_distilled(path, index, configs["unet"], configs["scheduler"])
    return places, configs


def _elsewhere(path: Path, index: dict[str, Any]) -> dict[str, Path]:
    """Places of the pieces that lie in other folders.

    Anywhere on this computer: what is read there are settings and tensors, as in the model's own.
    """
    named = {piece: index.get(f"_{piece}_folder") for piece in _SHARED}
    return {
        piece: Path(os.path.realpath(path / place))
        for piece, place in named.items()
        if place is not None
    }


def inspect_view_folder(path: Path) -> PipelineFolder:
    """Check that a folder holds every piece of a Zero-1-to-3 model.

    That is unet (8 input channels), vae, scheduler, a camera projection and, unless the projection
    reads latents, image_encoder (CLIPVisionModelWithProjection). The VAE may lie in another folder
    that `_vae_folder` in model_index.json names. The projection's key in `weights` is "projection".

    Raises:
        FileNotFoundError, ValueError: as `inspect_folder`.
    """
    places, configs = inspect_view_configs(path)
    weights = {
        piece: find_weights(place, stem_of(piece)).files
        for piece, place in places.items()
        if piece != "scheduler"
    }
    return PipelineFolder(path, configs, weights, places)


def inspect_view_configs(path: Path) -> tuple[dict[str, Path], dict[str, dict[str, Any]]]:
    """What of `inspect_view_folder` needs no weights: places and configurations by piece."""
    index = _read_index(path, "folder with unet, vae, scheduler and a camera projection")
    projections = [name for name in PROJECTIONS if (path / name).is_dir()]
    if not projections:
        raise FileNotFoundError(
            f"view model {path}: expected a folder {' or '.join(PROJECTIONS)}, found "
            f"{listing(path)}; a text-to-image model cannot say what other views look like"
        )
    places = {name: path / name for name in ("unet", "vae", "scheduler", "image_encoder")}
    places["projection"] = path / projections[0]
    places |= {piece: place for piece, place in _elsewhere(path, index).items() if piece in places}
    if projections[0] == PROJECTIONS[0]:
        del places["image_encoder"]
    configs = {}
    for piece, place in places.items():
        if piece != "projection":
            name = _CONFIGS.get(piece, "config.json")
            require(place, name)
            configs[piece] = read_settings(place / name, piece)
    _check_classes(places, configs)
    channels = configs["vae"].get("latent_channels", 4)
    found = tuple(configs["unet"].get(key, 4) for key in ("in_channels", "out_channels"))
    if found != (2 * channels, channels):
        raise ValueError(
            f"{path}: the unet has {found[0]} input and {found[1]} output channels; expected "
            f"{2 * channels} and {channels}: noisy latents beside those of the reference picture"
        )
    _check_levels(places, configs)
    return places, configs


def _read_index(path: Path, what: str) -> dict[str, Any]:
    """model_index.json of a folder; errors say what it was to be."""
    if not path.is_dir():
        found = "a file, not a folder" if path.exists() else "nothing"
        raise FileNotFoundError(f"model folder {path}: expected a diffusers {what}, found {found}")
    file = path / "model_index.json"
    if not file.is_file() and (path / "config.json").is_file():
        families.refuse_single_piece(path, read_json(path / "config.json"))
    require(path, file.name, "it is the mark of a diffusers pipeline folder")
    return read_settings(file, "index")


def stem_of(piece: str) -> str:
    """Name of a piece's weights, without variant and ending."""
    return "model" if piece in ENCODERS else "diffusion_pytorch_model"


@contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings and loading bars of diffusers and transformers, and restore them after."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers
        import transformers

        loggers = (diffusers.utils.logging, transformers.utils.logging)
        before = [(lib.get_verbosity(), lib.is_progress_bar_enabled()) for lib in loggers]
        for lib in loggers:
            lib.set_verbosity_error()
            lib.disable_progress_bar()
        try:
            yield
        finally:
            for lib, (verbosity, bar) in zip(loggers, before):
                lib.set_verbosity(verbosity)
                if bar:
                    lib.enable_progress_bar()


def latent_size(unet_config: dict[str, Any], where: Path | str = "unet/config.json") -> int:
    """Side of the latents a UNet was trained on; ValueError, naming `where`, for what is none."""
    name = "image_size" if is_multiview(unet_config) else "sample_size"
    size = unet_config.get(name)
    if isinstance(size, list) and len(size) == 2 and size[0] == size[1]:
        size = size[0]
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= _LARGEST_LATENT:
        raise ValueError(
            f"{where}: {name} must be one square size of 1 to {_LARGEST_LATENT}, got {size!r:.80}"
        )
    return size


def is_multiview(unet_config: dict[str, Any]) -> bool:
    """Whether a UNet predicts the views of an object together (`multiview_unet`)."""
    return unet_config.get("_class_name") == multiview_unet.CLASS_NAME


def require(root: Path, name: str, why: str = "") -> None:
    """FileNotFoundError for a file that is not there: what was expected, and what there is."""
    file = root / name
    if not file.is_file():
        reason = f" ({why})" if why else ""
        raise FileNotFoundError(
            f"model folder {root}: expected {name}{reason}, "
            f"found {listing(file.parent)} in {file.parent}"
        )


def _check_classes(places: dict[str, Path], configs: dict[str, dict[str, Any]]) -> None:
    """UNet and VAE of known classes, conditioned on what guidance provides."""
    for piece, allowed in _CLASSES.items():
        name = configs[piece].get("_class_name")
        if name not in allowed:
            raise ValueError(
                f"{places[piece]}: {piece} of class {name!r:.80} is not supported, "
                f"expected {' or '.join(allowed)}"
            )
    unet, where = configs["unet"], places["unet"] / "config.json"
    for key, allowed_values in _FOREIGN_UNET_KEYS.items():
        if unet.get(key) not in allowed_values:
            raise ValueError(
                f"{places['unet']}: {key} = {unet[key]!r} is not supported; expected a UNet "
                "conditioned on text embeddings alone, as in Stable Diffusion 1 and 2"
            )
    if is_multiview(unet):
        multiview_unet.check_config(unet, str(where))
    else:
        families.latents_of_old_folder(where, unet)
    latent_size(unet, where)
    vae_factor(configs["vae"], places["vae"] / "config.json")


def _check_levels(places: dict[str, Path], configs: dict[str, dict[str, Any]]) -> None:
    where = places["scheduler"] / _CONFIGS["scheduler"]
    families.refuse_scheduler(where, configs["scheduler"])
    try:
        NoisePath.of_scheduler(configs["scheduler"])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _check_configs(path: Path, places: dict[str, Path], configs: dict[str, dict[str, Any]]) -> None:
    unet, vae, text = configs["unet"], configs["vae"], configs["text_encoder"]
    channels = vae.get("latent_channels", 4)
    if not is_multiview(unet):
        families.refuse_unet(places["unet"] / "config.json", unet, channels)
    _check_classes(places, configs)
    for key in ("in_channels", "out_channels"):
        if unet.get(key, 4) != channels:
            raise ValueError(
                f"{path}: the unet has {key} = {unet.get(key, 4)} and the vae {channels} latent "
                "channels; they must be equal"
            )
    if (kind := text.get("model_type", "clip_text_model")) not in ("clip_text_model", "clip"):
        raise ValueError(
            f"{places['text_encoder'] / 'config.json'}: model_type: expected clip_text_model, got "
            f"{kind!r:.80}: text encoders other than CLIP's are not supported"
        )
    width = text.get("hidden_size", 512)
    wanted = unet.get("context_dim" if is_multiview(unet) else "cross_attention_dim", 1280)
    if wanted != width:
        raise ValueError(
            f"{path}: the unet reads text embeddings of width {wanted}, "
            f"the text encoder gives {width}"
        )
    _check_levels(places, configs)


def vae_factor(config: dict[str, Any], where: Path) -> int:
    """Image pixels per latent pixel: every encoder block but one halves the image.

    Raises ValueError, naming `where`, for a configuration that lists no blocks.
    """
    tiny = config["_class_name"] == "AutoencoderTiny"
    blocks = config.get("encoder_block_out_channels" if tiny else "block_out_channels")
    if not blocks:
        raise ValueError(f"{where} does not list its encoder blocks")
    return 2 ** (len(blocks) - 1)
