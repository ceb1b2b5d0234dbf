"""The pieces of a diffusers StableDiffusionPipeline folder: found, checked, read."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from dsd_fast.diffusion import int8
from dsd_fast.diffusion.networks import multiview_unet
from dsd_fast.diffusion.noise_path import NoisePath

_CONFIGS = {
    "unet": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "tokenizer": "tokenizer_config.json",
    "scheduler": "scheduler_config.json",
}
_WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
_WEIGHTS["text_encoder"] = "model"
# The tokenizer is either one file (transformers 5) or a vocabulary with its merges.
_TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
# What a view model's folder may call its camera projection.
PROJECTIONS = ("camera_projection", "clip_camera_projection", "cc_projection")
# In model_index.json: a folder to take the VAE from, relative to the model's own.
_VAE_FOLDER = "_vae_folder"
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


@dataclass(frozen=True)
class PipelineFolder:
    """A checked folder: configuration and weight files of each piece, nothing loaded yet."""

    path: Path
    configs: dict[str, dict[str, Any]]
    weights: dict[str, list[Path]]
    variants: dict[str, str | None]
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
    if not path.is_dir():
        what = "a file, not a folder" if path.exists() else "nothing"
        raise FileNotFoundError(
            f"model folder {path}: expected a diffusers StableDiffusionPipeline folder, "
            f"found {what}"
        )
    _require(path, "model_index.json", "it is the mark of a diffusers pipeline folder")
    configs = {}
    for piece, name in _CONFIGS.items():
        _require(path, f"{piece}/{name}")
        configs[piece] = _read_json(path / piece / name)
    tokenizer = path / "tokenizer"
    if not any(all((tokenizer / f).is_file() for f in files) for files in _TOKENIZER_FILES):
        raise FileNotFoundError(
            f"{tokenizer}: expected tokenizer.json, or vocab.json and merges.txt; "
            f"found {_listing(tokenizer)}"
        )
    weights, variants = {}, {}
    for piece, stem in _WEIGHTS.items():
        weights[piece], variants[piece] = _find_weights(path / piece, stem)
    _check_configs(path, configs)
    places = {piece: path / piece for piece in _CONFIGS}
    return PipelineFolder(path, configs, weights, variants, places)


def inspect_view_folder(path: Path) -> PipelineFolder:
    """Check that a folder holds every piece of a Zero-1-to-3 model.

    That is unet (8 input channels), vae, scheduler, a camera projection and, unless the projection
    reads latents, image_encoder (CLIPVisionModelWithProjection). The VAE may lie in another folder
    that `_vae_folder` in model_index.json names. The projection's key in `weights` is "projection".

    Raises:
        FileNotFoundError, ValueError: as `inspect_folder`.
    """
    if not path.is_dir():
        what = "a file, not a folder" if path.exists() else "nothing"
        raise FileNotFoundError(
            f"view model {path}: expected a folder with unet, vae, scheduler and a camera "
            f"projection, as diffusers stores Zero-1-to-3; found {what}"
        )
    _require(path, "model_index.json", "it is the mark of a diffusers pipeline folder")
    projections = [name for name in PROJECTIONS if (path / name).is_dir()]
    if not projections:
        raise FileNotFoundError(
            f"view model {path}: expected a folder {' or '.join(PROJECTIONS)}, found "
            f"{_listing(path)}; a text-to-image model cannot say what other views look like"
        )
    places = {name: path / name for name in ("unet", "vae", "scheduler", "image_encoder")}
    places["projection"] = path / projections[0]
    elsewhere = _read_json(path / "model_index.json").get(_VAE_FOLDER)
    if elsewhere is not None:
        places["vae"] = (path / str(elsewhere)).resolve()
    if projections[0] == PROJECTIONS[0]:
        del places["image_encoder"]

    configs, weights, variants = {}, {}, {}
    for piece, place in places.items():
        if piece != "projection":
            name = _CONFIGS.get(piece, "config.json")
            _require(place, name)
            configs[piece] = _read_json(place / name)
        if piece != "scheduler":
            stem = "model" if piece == "image_encoder" else "diffusion_pytorch_model"
            weights[piece], variants[piece] = _find_weights(place, stem)
    _check_classes(path, configs)
    channels = configs["vae"].get("latent_channels", 4)
    found = tuple(configs["unet"].get(key, 4) for key in ("in_channels", "out_channels"))
    if found != (2 * channels, channels):
        raise ValueError(
            f"{path}: the unet has {found[0]} input and {found[1]} output channels; expected "
            f"{2 * channels} and {channels}: noisy latents beside those of the reference picture"
        )
    _check_levels(configs)
    return PipelineFolder(path, configs, weights, variants, places)


def load_component(cls: type, folder: Path, *, variant: str | None = None, **kwargs: Any) -> Any:
    """`cls.from_pretrained` on a local folder, without console output, and complete or refused.

    Raises:
        ValueError: weights that cannot be read, or that leave a parameter without a value (the
            libraries would fill it at random and only warn).
    """
    if variant == int8.VARIANT:
        return _from_int8(cls, folder, **kwargs)
    if variant is not None:
        kwargs["variant"] = variant
    with quiet():
        try:
            module, info = cls.from_pretrained(
                folder, local_files_only=True, output_loading_info=True, **kwargs
            )
        # The readers raise many unrelated types (OSError, SafetensorError, KeyError, ...).
        except Exception as error:
            raise ValueError(f"cannot load {cls.__name__} from {folder}: {error}") from error
    _refuse_missing(folder, info["missing_keys"])
    return module


def _from_int8(cls: type, folder: Path, torch_dtype: torch.dtype) -> Any:
    """The same of a network of diffusers whose weights are kept in 8 bits (`int8`)."""
    (file,) = folder.glob(f"*.{int8.VARIANT}.safetensors")
    try:
        state = {k: v.to(torch_dtype) for k, v in int8.unpack(load_file(file)).items()}
        # No numbers are drawn for weights that are replaced.
        with quiet(), torch.device("meta"):
            module = cls.from_config(cls.load_config(folder, local_files_only=True))
        missing, _ = module.load_state_dict(state, strict=False, assign=True)
    except Exception as error:
        raise ValueError(f"cannot load {cls.__name__} from {folder}: {error}") from error
    _refuse_missing(folder, missing)
    return module


def _refuse_missing(folder: Path, missing: Iterable[str]) -> None:
    """ValueError for weights that leave a parameter without a value."""
    missing = sorted(missing)
    if missing:
        raise ValueError(
            f"{folder}: the weights lack {len(missing)} of the tensors that its config.json asks "
            f"for, first {missing[0]!r}"
        )


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


def latent_size(unet_config: dict[str, Any]) -> int:
    """Side of the latents a UNet was trained on."""
    name = "image_size" if is_multiview(unet_config) else "sample_size"
    size = unet_config.get(name)
    if isinstance(size, list) and len(size) == 2 and size[0] == size[1]:
        size = size[0]
    if not isinstance(size, int):
        raise ValueError(f"unet/config.json: {name} must be one square size, got {size!r}")
    return size


def is_multiview(unet_config: dict[str, Any]) -> bool:
    """Whether a UNet predicts the views of an object together (`multiview_unet`)."""
    return unet_config.get("_class_name") == multiview_unet.CLASS_NAME


def _require(root: Path, name: str, why: str = "") -> None:
    file = root / name
    if not file.is_file():
        reason = f" ({why})" if why else ""
        raise FileNotFoundError(
            f"model folder {root}: expected {name}{reason}, "
            f"found {_listing(file.parent)} in {file.parent}"
        )


def _listing(folder: Path) -> str:
    if not folder.is_dir():
        return "no such folder"
    names = sorted(entry.name for entry in folder.iterdir())
    if len(names) > 8:
        names = [*names[:8], f"and {len(names) - 8} more"]
    return ", ".join(names) if names else "nothing"


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(content).__name__}")
    return content


def _find_weights(folder: Path, stem: str) -> tuple[list[Path], str | None]:
    """Safetensors files of one piece, and the file name variant they carry, if any: "fp16", or that
    of `int8`."""
    for variant in (None, "fp16", int8.VARIANT):
        infix = f".{variant}" if variant else ""
        single = folder / f"{stem}{infix}.safetensors"
        if single.is_file():
            return [single], variant
        index = folder / f"{stem}.safetensors.index{infix}.json"
        if index.is_file():
            shards = [folder / s for s in sorted(set(_read_json(index)["weight_map"].values()))]
            for shard in shards:
                _require(folder, shard.name, f"a shard named in {index.name}")
            return shards, variant
    raise FileNotFoundError(
        f"{folder}: expected {stem}.safetensors, found {_listing(folder)}; weights in another "
        "format can be converted with save_pretrained(..., safe_serialization=True)"
    )


def _check_classes(path: Path, configs: dict[str, dict[str, Any]]) -> None:
    """UNet and VAE of known classes, conditioned on what guidance provides."""
    for piece, allowed in _CLASSES.items():
        name = configs[piece].get("_class_name")
        if name not in allowed:
            raise ValueError(
                f"{path / piece}: {piece} of class {name!r} is not supported, "
                f"expected {' or '.join(allowed)}"
            )
    unet = configs["unet"]
    for key, allowed_values in _FOREIGN_UNET_KEYS.items():
        if unet.get(key) not in allowed_values:
            raise ValueError(
                f"{path / 'unet'}: {key} = {unet[key]!r} is not supported; expected a UNet "
                "conditioned on text embeddings alone, as in Stable Diffusion 1 and 2"
            )
    if is_multiview(unet):
        multiview_unet.check_config(unet, str(path / "unet" / "config.json"))
    latent_size(unet)


def _check_levels(configs: dict[str, dict[str, Any]]) -> None:
    NoisePath.of_scheduler(configs["scheduler"])


def _check_configs(path: Path, configs: dict[str, dict[str, Any]]) -> None:
    _check_classes(path, configs)
    unet, vae = configs["unet"], configs["vae"]
    channels = vae.get("latent_channels", 4)
    for key in ("in_channels", "out_channels"):
        if unet.get(key, 4) != channels:
            raise ValueError(
                f"{path}: the unet has {key} = {unet.get(key, 4)} and the vae {channels} latent "
                "channels; they must be equal (inpainting and depth models are not supported)"
            )
    width = configs["text_encoder"].get("hidden_size")
    wanted = unet.get("context_dim" if is_multiview(unet) else "cross_attention_dim", 1280)
    if width is not None and wanted != width:
        raise ValueError(
            f"{path}: the unet reads text embeddings of width {wanted}, "
            f"the text encoder gives {width}"
        )
    _check_levels(configs)
