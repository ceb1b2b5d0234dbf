"""Networks of a model folder: built without numbers first, then with their weights."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from dsd_fast.diffusion import families, int8
from dsd_fast.diffusion.components import ENCODERS, quiet, require, stem_of
from dsd_fast.diffusion.model_files import FLOATS, Weights, brief, find_weights, headers
from dsd_fast.diffusion.model_settings import known, read_settings
from dsd_fast.diffusion.networks import Network

# Named, for by itself transformers takes what a configuration names, if need be from the hub.
_ATTENTION = "sdpa"
# Settings that say how often something is repeated, and the tensors that count it.
_REPEATED = {
    "layers_per_block": r"(?:encoder\.)?(down_blocks\.\d+\.resnets\.\d+)\.conv1\.weight",
    "transformer_layers_per_block": r".*\.transformer_blocks\.(\d+)\..*",
    "reverse_transformer_layers_per_block": r".*\.transformer_blocks\.(\d+)\..*",
    "num_encoder_blocks": r"encoder\.layers\.(\d+)\..*",
    "num_decoder_blocks": r"decoder\.layers\.(\d+)\..*",
    "num_hidden_layers": r".*\blayers\.(\d+)\..*",
}


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
    piece = _piece_of(cls)
    require(folder, "config.json")
    config = known(read_settings(folder / "config.json", piece), piece)
    return config, find_weights(folder, stem_of(piece))


def _piece_of(cls: type) -> str:
    return next((piece for piece, name in ENCODERS.items() if name == cls.__name__), "network")


def _build(cls: Any, config: dict[str, Any]) -> Network:
    """The network of a configuration; only what its class knows by name is passed."""
    names = {name for name in config if not name.startswith("_")}
    if _piece_of(cls) in ENCODERS:
        chosen = cls.config_class(**{name: config[name] for name in names})
        return cls._from_config(chosen, attn_implementation=_ATTENTION)
    names &= set(inspect.signature(cls.__init__).parameters)
    return cls(**{name: config[name] for name in names})


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
    piece = _piece_of(cls)
    options = {"attn_implementation": _ATTENTION} if piece in ENCODERS else {}
    stem = stem_of(piece)
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
