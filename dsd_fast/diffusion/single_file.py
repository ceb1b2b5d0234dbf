"""Checkpoints of Stable Diffusion 1 and 2 in one file, made into a folder once.

Weights are renamed by diffusers' own converter. What the file does not hold, configurations and the
tokenizer, is of the package or of a folder that is given; nothing is fetched.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import os
import shlex
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsd_fast.diffusion.components import inspect_configs, quiet, stem_of
from dsd_fast.diffusion.families import refuse_unet
from dsd_fast.diffusion.model_files import brief, headers, read_json
from dsd_fast.diffusion.network_loading import load_component, outline
from dsd_fast.diffusion.networks import Network

log = logging.getLogger(__name__)

_MERGES = Path(__file__).resolve().parent.parent / "assets" / "clip" / "merges.txt.gz"
_UNET, _VAE = "model.diffusion_model.", "first_stage_model."
_CLIP, _OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
_FIRST = f"{_UNET}input_blocks.0.0.weight"
_KEYS = f"{_UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
# Parts of tensor names that tell what else a file may be, the first that is found.
_OTHERS = (
    ("lora_", "a LoRA, which changes another model; merge it into one and pass that"),
    ("lora.", "a LoRA, which changes another model; merge it into one and pass that"),
    ("emb_params", "a textual inversion, which is a word and no model"),
    (
        "cc_projection.",
        "Zero-1-to-3: pass its folder in diffusers' format, with --task single-view",
    ),
    ("control_model.", "a ControlNet, which needs a control picture"),
    ("conditioner.embedders.", "Stable Diffusion XL"),
    ("joint_blocks.", "Stable Diffusion 3"),
    ("double_blocks.", "Flux, or another transformer"),
    ("transformer_blocks.0.norm1.linear", "a transformer in place of a UNet"),
    ("down_blocks.", "one piece of a folder in diffusers' format: pass the folder"),
    ("decoder.conv_in.weight", "a VAE alone"),
)

_TEXT = {"vocab_size": 49408, "max_position_embeddings": 77, "bos_token_id": 49406}
_TEXT |= {"eos_token_id": 49407, "model_type": "clip_text_model"}
# diffusers' names: these are numbers of heads in both.
_CONFIGS: dict[str, dict[str, dict[str, Any]]] = {
    "Stable Diffusion 1": {
        "unet": {"cross_attention_dim": 768, "attention_head_dim": 8},
        "text_encoder": _TEXT
        | {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
        | {"num_attention_heads": 12, "hidden_act": "quick_gelu", "pad_token_id": 1},
    },
    "Stable Diffusion 2": {
        "unet": {
            "cross_attention_dim": 1024,
            "attention_head_dim": [5, 10, 20, 20],
            "use_linear_projection": True,
        },
        "text_encoder": _TEXT
        | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23}
        | {"num_attention_heads": 16, "hidden_act": "gelu", "pad_token_id": 0},
    },
}
_UNET_CONFIG = {
    "_class_name": "UNet2DConditionModel",
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
    "layers_per_block": 2,
}
_VAE_CONFIG = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
}
_SCHEDULER_CONFIG = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}
_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def folder_of(file: Path) -> Path:
    """The folder that a file is converted to: below DSD_CACHE/models, or ~/.cache/dsd_fast/models.

    It is made where there is none of this file, by place, length and date. Errors: `convert`.
    """
    about = file.stat()
    text = f"{file.resolve()} {about.st_size} {about.st_mtime_ns}"
    given = os.environ.get("DSD_CACHE")
    cache = Path(given).expanduser() if given else Path.home() / ".cache" / "dsd_fast"
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    folder = cache / "models" / f"{file.stem}-{digest}"
    return folder if folder.is_dir() else convert(file, folder)


def convert(file: Path, folder: Path, like: Path | None = None) -> Path:
    """Write a checkpoint of one file as a folder in diffusers' format; returns it.

    Args:
        file: safetensors with UNet, VAE and text encoder under their original names.
        folder: where there is nothing yet.
        like: a folder of which configurations and tokenizer are taken, for a file whose network is
            neither Stable Diffusion 1's nor 2's; its weights are not read.
    Raises:
        ValueError: a pickle, another kind of model, damage, or a disk that is too small.
        FileNotFoundError: no such file, or a piece that `like` lacks.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: expected a safetensors file, found nothing")
    if folder.exists():
        raise ValueError(f"{folder}: expected nothing there yet; name another folder, or delete it")
    _refuse_pickle(file)
    kind = _kind(file, headers([file], kinds=None), known=like is not None)
    folder.parent.mkdir(parents=True, exist_ok=True)
    size, free = file.stat().st_size, shutil.disk_usage(folder.parent).free
    if free < size:
        raise ValueError(
            f"{folder}: {size / 2**30:.2f} GiB are to be written, and the disk has "
            f"{free / 2**30:.2f} GiB free: make room, or set DSD_CACHE to a folder on another disk"
        )
    log.info("converting %s (%s, %.2f GiB) to %s, once", file, kind, size / 2**30, folder)
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=folder.parent) as temporary:
        made = Path(temporary) / folder.name
        if like is None:
            _write_settings(made, kind)
        else:
            _copy_settings(like, made)
        _write_weights(file, made)
        if like is None and kind == "Stable Diffusion 2":
            _settle_prediction(made)
        _check(file, made)
        try:
            made.rename(folder)
        except OSError:
            # Another process was faster; what it made is the same.
            if not folder.is_dir():
                raise
    return folder


def _refuse_pickle(file: Path) -> None:
    """ValueError for a file of torch.save, with the line that makes safetensors of it."""
    with open(file, "rb") as stream:
        start = stream.read(2)
    if start != b"PK" and start[:1] != b"\x80":
        return
    new = file.with_suffix(".safetensors")
    code = (
        "import torch; from safetensors.torch import save_file; "
        f"s = torch.load({str(file)!r}, map_location='cpu', weights_only=True); "
        "s = s.get('state_dict', s); "
        f"save_file({{k: v.clone() for k, v in s.items() if torch.is_tensor(v)}}, {str(new)!r})"
    )
    raise ValueError(
        f"{file} is a pickle, which can run anything when it is opened, and never is here. Convert "
        f"its weights once, which opens nothing else, and pass --model {shlex.quote(str(new))}:\n"
        f"python -c {shlex.quote(code)}"
    )


def _kind(file: Path, shapes: dict[str, tuple[int, ...]], known: bool) -> str:
    """What a file is, by its tensors; ValueError for what cannot be converted.

    Args:
        known: whether the configurations are given.
    """
    missing = [p for p in (_UNET, _VAE) if not any(name.startswith(p) for name in shapes)]
    if not any(name.startswith((_CLIP, _OPEN_CLIP)) for name in shapes):
        missing.append("cond_stage_model.")
    other = next((what for part, what in _OTHERS if any(part in name for name in shapes)), None)
    if (
        missing
        or _FIRST not in shapes
        or (other and "diffusers" not in other and "VAE" not in other)
    ):
        raise ValueError(
            f"{file}: expected a whole checkpoint of Stable Diffusion 1 or 2"
            + (f", found no tensors {', '.join(f'{p}*' for p in missing)}" if missing else "")
            + (f": this seems to be {other}" if other else "")
        )
    first = shapes[_FIRST]
    refuse_unet(file, {"in_channels": first[1] if len(first) == 4 else 4}, 4)
    if known:
        return "configurations given"
    width = shapes.get(_KEYS, (0, 0))[-1]
    for kind, configs in _CONFIGS.items():
        if configs["unet"]["cross_attention_dim"] == width and first[0] == 320:
            return kind
    raise ValueError(
        f"{file}: expected a UNet of Stable Diffusion 1 or 2, of 320 channels and a context of 768 "
        f"or 1024; found {first[0]} and {width}. Convert it with the configurations of its own "
        "kind: python -m dsd_fast.convert --file FILE --output FOLDER --like FOLDER-OF-ITS-KIND"
    )


def _write_settings(folder: Path, kind: str) -> None:
    """Configurations and tokenizer of Stable Diffusion 1, or 2-base, into a folder."""
    configs = _CONFIGS[kind]
    size = {"sample_size": 64}
    _write_json(folder / "unet" / "config.json", _UNET_CONFIG | size | configs["unet"])
    _write_json(folder / "vae" / "config.json", _VAE_CONFIG | {"sample_size": 512})
    _write_json(folder / "text_encoder" / "config.json", configs["text_encoder"])
    _write_json(folder / "scheduler" / "scheduler_config.json", _SCHEDULER_CONFIG)
    _write_json(folder / "model_index.json", _INDEX)
    merges = gzip.decompress(_MERGES.read_bytes()).decode("utf-8")
    # CLIP's order: bytes (those that can be printed first), the same at a word's end, merges.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in printable] + [
        chr(256 + i) for i in range(256 - len(printable))
    ]
    joined = [line.replace(" ", "") for line in merges.splitlines()[1:]]
    ends = ["<|startoftext|>", "<|endoftext|>"]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *joined, *ends]
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "merges.txt").write_text(merges, encoding="utf-8")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    _write_json(folder / "tokenizer" / "vocab.json", vocabulary)
    # Stable Diffusion 2 was trained with OpenCLIP's padding, which is token 0.
    padding = tokens[configs["text_encoder"]["pad_token_id"]] if "2" in kind else ends[1]
    names = {"bos_token": ends[0], "eos_token": ends[1], "unk_token": ends[1], "pad_token": padding}
    about = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}
    _write_json(folder / "tokenizer" / "tokenizer_config.json", about | names)


def _copy_settings(like: Path, folder: Path) -> None:
    """The same of another folder, which is checked."""
    inspect_configs(like)
    for file in like.glob("*/*"):
        if file.suffix in (".json", ".txt") and ".index" not in file.name and file.is_file():
            (folder / file.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / file.parent.name / file.name)
    shutil.copyfile(like / "model_index.json", folder / "model_index.json")


def _write_weights(file: Path, folder: Path) -> None:
    """The weights of UNet, VAE and text encoder, renamed by diffusers, in their own dtypes."""
    with quiet():
        from diffusers.loaders import single_file_utils as converter

    configs = {p: read_json(folder / p / "config.json") for p in ("unet", "vae", "text_encoder")}
    try:
        weights = load_file(file)
        made = {
            "unet": converter.convert_ldm_unet_checkpoint(weights, configs["unet"]),
            "vae": converter.convert_ldm_vae_checkpoint(weights, configs["vae"]),
        }
        if any(name.startswith(_OPEN_CLIP) for name in weights):
            about = SimpleNamespace(config=SimpleNamespace(**configs["text_encoder"]))
            text = converter.convert_open_clip_checkpoint(about, weights, _OPEN_CLIP)
        else:
            text = converter.convert_ldm_clip_checkpoint(weights)
        made["text_encoder"] = text
    # Names and shapes that it does not expect end in errors of many types there.
    except Exception as error:
        raise ValueError(
            f"{file}: diffusers' converter cannot rename its weights: {brief(error)}; they are not "
            "laid out as those of Stable Diffusion 1 or 2"
        ) from error
    for piece, tensors in made.items():
        kept = {n: t.clone().contiguous() for n, t in tensors.items() if isinstance(t, Tensor)}
        save_file(kept, folder / piece / f"{stem_of(piece)}.safetensors", metadata={"format": "pt"})


def _settle_prediction(folder: Path) -> None:
    """Whether a Stable Diffusion 2 predicts noise (base, 512 pixels) or velocity (768 pixels).

    No tensor's name or shape tells; its own prediction at the highest level does.
    """
    with quiet():
        from diffusers import UNet2DConditionModel
    unet = load_component(UNet2DConditionModel, folder / "unet", torch.float32)
    if not predicts_velocity(unet, 1024):
        log.info("it predicts noise: a base model, of 512 pixels")
        return
    log.info("it predicts velocity: a model of 768 pixels")
    scheduler = folder / "scheduler" / "scheduler_config.json"
    _write_json(scheduler, read_json(scheduler) | {"prediction_type": "v_prediction"})
    config = folder / "unet" / "config.json"
    _write_json(config, read_json(config) | {"sample_size": 96})


@torch.no_grad()
def predicts_velocity(unet: Network, width: int, side: int = 32) -> bool:
    """Whether a UNet predicts velocity and not noise.

    Latents at level 999 are noise but for 7 %. A prediction of noise gives them back; of velocity,
    it is the clean picture's, which has nothing of them.

    Args:
        unet: float32, on the CPU.
        width: of its context.
        side: of the latents that it is tried with.
    """
    noise = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(0))
    t, text = torch.tensor([999]), torch.zeros(1, 77, width)
    found = unet(noise, t, encoder_hidden_states=text, return_dict=False)[0]
    likeness = torch.nn.functional.cosine_similarity(found.flatten(), noise.flatten(), dim=0)
    return bool(likeness < 0.5)


def _check(file: Path, folder: Path) -> None:
    """ValueError for a conversion that is not whole."""
    with quiet():
        import diffusers
        from transformers import CLIPTextModel
    _, configs = inspect_configs(folder)
    classes = {p: getattr(diffusers, configs[p]["_class_name"]) for p in ("unet", "vae")}
    for piece, cls in (*classes.items(), ("text_encoder", CLIPTextModel)):
        wanted = outline(cls, folder / piece).state_dict()
        have = headers(list((folder / piece).glob("*.safetensors")))
        lacks = [n for n in wanted if n not in have and f"text_model.{n}" not in have]
        # A table of positions is made where it is not there.
        lacks = [name for name in lacks if not name.endswith("position_ids")]
        if lacks:
            raise ValueError(
                f"{file}: it lacks {len(lacks)} tensors of its {piece}, first {lacks[0]!r}"
            )


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2), encoding="utf-8")
