"""The pieces of a diffusers StableDiffusionPipeline folder: found, checked, read."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from dsd_fast.diffusion import families, int8
from dsd_fast.diffusion.model_files import (
    FLOATS,
    Weights,
    brief,
    find_weights,
    headers,
    listing,
    read_json,
)
from dsd_fast.diffusion.model_settings import known, read_settings
from dsd_fast.diffusion.networks import Network, multiview_unet
from dsd_fast.diffusion.noise_path import NoisePath

_CONFIGS = {
    "unet": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "tokenizer": "tokenizer_config.json",
    "scheduler": "scheduler_config.json",
}
# Names of weights without their endings, by piece; and of those that are not here.
WEIGHTS = {"text_encoder": "model", "image_encoder": "model"}
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model"
# The tokenizer is either one file (transformers 5) or a vocabulary with its merges.
_TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
# What has weights, of a text-to-image model and of a model of views.
TEXT_PIECES = ("unet", "vae", "text_encoder")
# What a view model's folder may call its camera projection.
PROJECTIONS = ("camera_projection", "clip_camera_projection", "cc_projection")
VIEW_PIECES = ("unet", "vae", "image_encoder", *PROJECTIONS)
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
    configs = inspect_configs(path)
    weights = {piece: find_weights(path / piece, stem_of(piece)).files for piece in TEXT_PIECES}
    return PipelineFolder(path, configs, weights, {piece: path / piece for piece in configs})


def inspect_configs(path: Path) -> dict[str, dict[str, Any]]:
    """What of `inspect_folder` needs no weights: configurations by piece, and the tokenizer."""
    index = _read_index(path, "StableDiffusionPipeline folder")
    families.refuse_pipeline(path, index)
    if any((path / name).is_dir() for name in PROJECTIONS):
        families.refuse_pipeline(path, {"_class_name": "Zero1to3Pipeline"})
    configs = {}
    for piece, name in _CONFIGS.items():
        _require(path, f"{piece}/{name}")
        configs[piece] = read_settings(path / piece / name, piece)
    tokenizer = path / "tokenizer"
    if not any(all((tokenizer / f).is_file() for f in files) for files in _TOKENIZER_FILES):
        raise FileNotFoundError(
            f"{tokenizer}: expected tokenizer.json, or vocab.json and merges.txt; "
            f"found {listing(tokenizer)}"
        )
    _check_configs(path, configs)
    check_tokenizer(tokenizer, configs["text_encoder"].get("vocab_size", 49408))
    families.warn_of_distilled(path, index, configs["unet"], configs["scheduler"])
    return configs


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
    if (elsewhere := index.get(_VAE_FOLDER)) is not None:
        places["vae"] = (path / elsewhere).resolve()
        if not places["vae"].is_relative_to(path.resolve().parent):
            raise ValueError(
                f"{path / 'model_index.json'}: {_VAE_FOLDER}: expected a folder in this model's or "
                f"beside it, got {elsewhere!r:.80}"
            )
    if projections[0] == PROJECTIONS[0]:
        del places["image_encoder"]
    configs = {}
    for piece, place in places.items():
        if piece != "projection":
            name = _CONFIGS.get(piece, "config.json")
            _require(place, name)
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
    _require(path, file.name, "it is the mark of a diffusers pipeline folder")
    return read_settings(file, "index")


def stem_of(piece: str) -> str:
    """Name of a piece's weights, without variant and ending."""
    return WEIGHTS.get(piece, DIFFUSERS_WEIGHTS)


def load_component(cls: type, folder: Path, dtype: torch.dtype, *, outlined: bool = False) -> Any:
    """A network from its folder: on the CPU, without console output, and complete or refused.

    Args:
        cls: a class of diffusers, CLIPTextModel or CLIPVisionModelWithProjection. Those of
            transformers attend by torch's own function, whatever their configuration names.
        outlined: whether `outline` has found nothing wrong before.
    Raises:
        ValueError: a configuration that describes no network, or weights that cannot be read, do
            not fit it, leave a parameter without a value (the libraries would fill it at random
            and only warn) or are not finite.
        FileNotFoundError: a missing file.
    """
    config, weights = _read_piece(cls, folder)
    if not outlined:
        _outline(cls, folder, config, weights)
    if weights.variant == int8.VARIANT:
        module, missing, others = _from_int8(cls, folder, config, weights, dtype)
    else:
        module, missing, others = _from_pretrained(cls, folder, config, weights, dtype)
    _refuse_missing(folder, missing)
    others = sorted(name for name in others if not name.endswith("position_ids"))
    if others:
        families.say_once(
            f"{folder}: its weights hold {len(others)} tensors that its config.json does not ask "
            f"for, first {others[0]!r}: they are left out"
        )
    for name, parameter in module.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise ValueError(f"{folder}: {name} is not finite in {dtype}: the weights are damaged")
    return module


def outline(cls: type, folder: Path) -> Network:
    """`load_component` without weights, on the meta device: what of the errors needs none."""
    return _outline(cls, folder, *_read_piece(cls, folder))


def _read_piece(cls: type, folder: Path) -> tuple[dict[str, Any], Weights]:
    """What a network of a class is made from, of its configuration, and its weights' files."""
    piece = {"CLIPTextModel": "text_encoder", "CLIPVisionModelWithProjection": "image_encoder"}
    name = piece.get(cls.__name__, "network")
    _require(folder, "config.json")
    config = known(read_settings(folder / "config.json", name), name)
    return config, find_weights(folder, stem_of(name))


def _build(cls: type, config: dict[str, Any]) -> Network:
    """The network of a configuration; only what its class knows by name is passed."""
    names = {name for name in config if not name.startswith("_")}
    if config_class := getattr(cls, "config_class", None):
        chosen = config_class(**{name: config[name] for name in names})
        return cls._from_config(chosen, attn_implementation=_ATTENTION)
    names &= set(inspect.signature(cls.__init__).parameters)
    return cls(**{name: config[name] for name in names})


# Named, for by itself transformers takes what a configuration names, if need be from the hub.
_ATTENTION = "sdpa"


def _outline(cls: type, folder: Path, config: dict[str, Any], weights: Weights) -> Network:
    is_int8 = weights.variant == int8.VARIANT
    try:
        shapes = headers(weights.files, FLOATS | {"I8"} if is_int8 else FLOATS)
    except ValueError as error:
        raise ValueError(f"cannot load {cls.__name__} from {error}") from error
    file = folder / "config.json"
    _refuse_layers(file, config, shapes)
    try:
        with quiet(), torch.device("meta"):
            network = _build(cls, config)
    # The libraries raise many unrelated types (TypeError, KeyError, ZeroDivisionError, ...).
    except Exception as error:
        raise ValueError(f"{file} describes no {cls.__name__}: {brief(error)}") from error
    for name, tensor in network.state_dict().items():
        # transformers 5 names its text model's tensors without the model.
        found = next((shapes[n] for n in (name, f"text_model.{name}") if n in shapes), None)
        if found is not None and found != tuple(tensor.shape):
            raise ValueError(
                f"{folder}: {name} has shape {list(found)} in its weights, its config.json asks "
                f"for {list(tensor.shape)}"
            )
    return network


# Settings that say how often something is repeated, and the tensors that count it.
_REPEATED = {
    "layers_per_block": r"(?:encoder\.)?(down_blocks\.\d+\.resnets\.\d+)\.conv1\.weight",
    "transformer_layers_per_block": r".*\.transformer_blocks\.(\d+)\..*",
    "reverse_transformer_layers_per_block": r".*\.transformer_blocks\.(\d+)\..*",
    "num_encoder_blocks": r"encoder\.layers\.(\d+)\..*",
    "num_decoder_blocks": r"decoder\.layers\.(\d+)\..*",
    "num_hidden_layers": r".*\blayers\.(\d+)\..*",
}


def _refuse_layers(file: Path, config: dict[str, Any], names: Iterable[str]) -> None:
    """ValueError for more layers than there are weights for: nobody waits for them to be built."""
    for key, pattern in _REPEATED.items():
        value = config.get(key)
        if value is None:
            continue
        counted = {m[1] for name in names if (m := re.fullmatch(pattern, name))}
        if "transformer" in key:
            asked = max(_flat(value), default=0)
        elif key == "layers_per_block" and isinstance(value, int):
            asked = value * len(config.get("block_out_channels", ()))
        else:
            asked = sum(_flat(value))
        # A UNet may have no transformer at all, and the default of one layer.
        if asked > len(counted) and (counted or "transformer" not in key):
            raise ValueError(
                f"{file}: {key} = {value!r:.80} asks for {asked} layers, the weights hold "
                f"{len(counted)}"
            )


def _flat(value: Any) -> list[int]:
    return [n for item in value for n in _flat(item)] if isinstance(value, list) else [value]


def _from_pretrained(
    cls: type, folder: Path, config: dict[str, Any], weights: Weights, dtype: torch.dtype
) -> tuple[Any, list[str], list[str]]:
    """The network, what its weights lack, and what they have beside.

    It is read from a folder of links, in which there is nothing but what was checked, under the
    names that the libraries know.
    """
    is_clip = hasattr(cls, "config_class") and cls.config_class is not None
    options = {"attn_implementation": _ATTENTION} if is_clip else {}
    stem = "model" if is_clip else DIFFUSERS_WEIGHTS
    with tempfile.TemporaryDirectory(prefix="dsd_fast-") as temporary, quiet():
        staged = Path(temporary)
        (staged / "config.json").write_text(json.dumps(config), encoding="utf-8")
        names = [f"{stem}.safetensors"]
        if len(weights.files) > 1:
            count = len(weights.files)
            names = [f"{stem}-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
            tensors = {t: name for name, file in zip(names, weights.files) for t in headers([file])}
            index = {"metadata": {"total_size": 0}, "weight_map": tensors}
            (staged / f"{stem}.safetensors.index.json").write_text(json.dumps(index), "utf-8")
        for name, file in zip(names, weights.files):
            _link(staged / name, file.resolve())
        try:
            module, info = cls.from_pretrained(
                staged,
                local_files_only=True,
                output_loading_info=True,
                use_safetensors=True,
                torch_dtype=dtype,
                **options,
            )
        except Exception as error:
            raise ValueError(f"cannot load {cls.__name__} from {folder}: {brief(error)}") from error
    return module, info["missing_keys"], info["unexpected_keys"]


def _link(place: Path, file: Path) -> None:
    """A link to a file, or a copy where the system gives no links."""
    try:
        place.symlink_to(file)
    except OSError:
        shutil.copyfile(file, place)


def _from_int8(
    cls: type, folder: Path, config: dict[str, Any], weights: Weights, dtype: torch.dtype
) -> tuple[Any, list[str], list[str]]:
    """The same of a network of diffusers whose weights are kept in 8 bits (`int8`)."""
    try:
        packed = {k: v for file in weights.files for k, v in load_file(file).items()}
        state = {k: v.to(dtype) for k, v in int8.unpack(packed).items()}
        # No numbers are drawn for weights that are replaced.
        with quiet(), torch.device("meta"):
            module = _build(cls, config)
        missing, others = module.load_state_dict(state, strict=False, assign=True)
    except Exception as error:
        raise ValueError(f"cannot load {cls.__name__} from {folder}: {brief(error)}") from error
    return module, missing, others


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


def check_tokenizer(folder: Path, vocabulary: int) -> None:
    """ValueError for a CLIP tokenizer's files that are damaged, naming file and place.

    Args:
        vocabulary: tokens that the text encoder has embeddings of.
    """
    whole, vocab, merges = (folder / n for n in ("tokenizer.json", "vocab.json", "merges.txt"))
    for name in ("special_tokens_map.json", "added_tokens.json"):
        if (folder / name).is_file():
            read_json(folder / name)
    if whole.is_file():
        model = read_json(whole).get("model")
        tokens = model.get("vocab") if isinstance(model, dict) else None
        _check_vocabulary(whole, "model.vocab: ", tokens, vocabulary)
    if not vocab.is_file():
        return
    tokens = read_json(vocab)
    _check_vocabulary(vocab, "", tokens, vocabulary)
    if not merges.is_file():
        return
    try:
        lines = merges.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{merges} is not readable text: {brief(error)}") from error
    for number, line in enumerate(lines, 1):
        line = line.rstrip("\r")
        if line.startswith("#version") or not line:
            continue
        pair = line.split(" ")
        if len(pair) != 2 or not {*pair, "".join(pair)} <= tokens.keys():
            raise ValueError(
                f"{merges}: line {number}: expected two tokens that {vocab.name} has, and their "
                f"joint, got {line!r:.80}: the files are damaged or of different tokenizers"
            )


def _check_vocabulary(file: Path, key: str, tokens: Any, vocabulary: int) -> None:
    if not isinstance(tokens, dict) or not tokens:
        raise ValueError(
            f"{file}: {key}expected an object of tokens and numbers, got {tokens!r:.80}"
        )
    for token, number in tokens.items():
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < vocabulary:
            raise ValueError(
                f"{file}: {key}{token!r:.80}: expected a number under {vocabulary}, the text "
                f"encoder's vocab_size, got {number!r:.80}"
            )
    if len(set(tokens.values())) < len(tokens):
        raise ValueError(f"{file}: {key or 'it '}gives several tokens one number")


def _require(root: Path, name: str, why: str = "") -> None:
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


def _check_configs(path: Path, configs: dict[str, dict[str, Any]]) -> None:
    places = {piece: path / piece for piece in configs}
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
