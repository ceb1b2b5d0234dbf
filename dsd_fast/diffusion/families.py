"""What a model folder is, where it is not Stable Diffusion 1 or 2: named, with what would work."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

_INSTEAD = (
    "expected a text-to-image model of Stable Diffusion 1 or 2's kind, such as "
    "stable-diffusion-2-1-base"
)
_PICTURE = (
    "a model of Zero-1-to-3's kind, which is given a picture of the object: train with "
    "--task single-view --image PICTURE"
)
# Pipelines by class name (the first that matches): what they are.
_PIPELINES = (
    ("Zero123Plus", "Zero123++, which makes six fixed views at once"),
    ("Zero1to3|Zero123", _PICTURE),
    ("ImageDream", "ImageDream, which needs a picture beside the prompt; expected MVDream"),
    (
        "StableDiffusionXL|PlaygroundV2",
        "Stable Diffusion XL, whose UNet is told of a second text encoder and of picture sizes",
    ),
    ("StableDiffusion3", "Stable Diffusion 3, a transformer in place of a UNet, and a flow"),
    ("Flux", "Flux, a transformer in place of a UNet, and a flow"),
    ("StableVideo|AnimateDiff|TextToVideo|Video|Mochi|Wan|LTX", "a model of videos"),
    ("ControlNet|T2IAdapter|Adapter", "a model that needs a control picture beside the prompt"),
    ("LatentUpscale|Upscale|SuperResolution", "an upscaler, which needs a small picture"),
    ("Depth2Img", "a model that needs a depth map beside the prompt"),
    ("InstructPix2Pix|Diffedit|CycleDiffusion", "a model that edits a picture"),
    ("UnCLIP|unCLIP|ImageVariation|PaintByExample|Versatile", "a model that needs a picture"),
    ("LatentConsistency", "a latent consistency model, distilled to a few steps"),
    ("AltDiffusion", "AltDiffusion, whose text encoder is not CLIP's"),
    ("GLIGEN", "GLIGEN, which needs boxes beside the prompt"),
    ("^IF|DeepFloyd", "DeepFloyd IF, which works on pixels and has a T5 text encoder"),
    ("Kandinsky|Wuerstchen|StableCascade", "a model with a prior network before its decoder"),
    (
        "PixArt|DiT|Hunyuan|Lumina|AuraFlow|Sana|CogView|QwenImage|Chroma|HiDream|ZImage|OmniGen"
        "|Bria|Cosmos|Kolors",
        "another kind of network than Stable Diffusion's UNet and CLIP",
    ),
    ("^LDM|^DDPM|^DDIM|^PNDM|^ScoreSde|^KarrasVe|^LatentDiffusion|Unconditional|Audio|Dance",
     "a model that no CLIP prompt steers"),
)  # fmt: skip
# Input channels of UNets with 4 output channels that are shown more than noisy latents.
_INPUTS = {
    5: "a depth model, which needs a depth map beside the prompt",
    7: "an upscaler, which needs a small picture beside the prompt",
    8: f"a UNet that reads a picture beside the noise. If it is {_PICTURE}; a model that edits "
    "pictures (InstructPix2Pix) is not supported",
    9: "an inpainting model, which needs a mask and a picture beside the prompt",
}
# Schedulers of models that are no diffusion with betas.
_NO_BETAS = re.compile(r"^(FlowMatch|EDM|KarrasVe|ScoreSde|CMStochastic|UnCLIP|DDPMWuerstchen)")
_FEW_STEP_SCHEDULERS = re.compile(r"^(LCM|TCD)Scheduler$")
_FEW_STEP_NAMES = re.compile(
    r"(?<![a-z])(turbo|lcm|lightning|hyper-?sd|dmd2?|pcm|tcd|schnell|distill(ed)?)(?![a-z])", re.I
)


def refuse_pipeline(path: Path, index: Mapping[str, Any]) -> None:
    """ValueError for a pipeline of another kind, by its class in model_index.json."""
    name = index.get("_class_name") or ""
    for pattern, what in _PIPELINES:
        if re.search(pattern, name):
            raise ValueError(
                f"model folder {path}: model_index.json says {name}: this is {what}; {_INSTEAD}"
            )


def refuse_single_piece(path: Path, config: Mapping[str, Any]) -> None:
    """ValueError for a folder with a config.json in place of a model_index.json."""
    name = config.get("_class_name") or config.get("architectures") or config.get("model_type")
    raise ValueError(
        f"model folder {path}: config.json says {name!r:.80}: this is one piece of a pipeline; "
        "expected the folder with model_index.json, unet, vae, text_encoder, tokenizer, scheduler"
    )


def refuse_unet(where: Path, unet: Mapping[str, Any], latent_channels: int) -> None:
    """ValueError for a UNet of Stable Diffusion's class that needs more than noise and text.

    Args:
        where: its config.json.
        latent_channels: the VAE's.
    """
    found = unet.get("in_channels", 4)
    if found != latent_channels and unet.get("out_channels", 4) == latent_channels:
        what = _INPUTS.get(found, "a UNet that reads more than noisy latents")
        raise ValueError(f"{where}: in_channels = {found}: this is {what}; {_INSTEAD}")
    if unet.get("addition_embed_type") == "text_time":
        raise ValueError(
            f"{where}: addition_embed_type = 'text_time': this is Stable Diffusion XL's UNet, "
            f"which is told of a second text encoder and of picture sizes; {_INSTEAD}"
        )
    if unet.get("time_cond_proj_dim") is not None:
        raise ValueError(
            f"{where}: time_cond_proj_dim = {unet['time_cond_proj_dim']!r}: this is a latent "
            "consistency model: it is told its guidance scale and predicts the end of a "
            f"trajectory, which is no score to follow; {_INSTEAD}, the model that it was made from"
        )


def refuse_scheduler(where: Path, scheduler: Mapping[str, Any]) -> None:
    """ValueError for the scheduler of a model that is no diffusion with betas."""
    name = scheduler.get("_class_name") or ""
    if _NO_BETAS.search(name):
        raise ValueError(
            f"{where}: _class_name = {name!r}: this model's noise levels are not those of Stable "
            f"Diffusion (no betas); {_INSTEAD}"
        )


def warn_of_distilled(
    path: Path, index: Mapping[str, Any], unet: Mapping[str, Any], scheduler: Mapping[str, Any]
) -> None:
    """A line for what seems to be distilled to a few steps, which no file of a model says outright.

    Signs are a scheduler for few steps, Euler's with trailing levels (as SD-Turbo has it), and
    names.
    """
    kind = scheduler.get("_class_name") or ""
    names = [part for part in path.parts if part.startswith("models--")] or [path.name]
    names += [str(config.get("_name_or_path") or "") for config in (index, unet)]
    named = next((m[0] for name in names if (m := _FEW_STEP_NAMES.search(name))), None)
    if _FEW_STEP_SCHEDULERS.search(kind):
        sign = f"its scheduler is {kind}"
    elif kind.startswith("Euler") and scheduler.get("timestep_spacing") == "trailing":
        sign = f"its scheduler is {kind} with timestep_spacing 'trailing', as SD-Turbo's"
    elif named:
        sign = f"its name has {named!r}"
    else:
        return
    say_once(
        f"{path}: this may be a model distilled to a few steps ({sign}). Such a model predicts "
        "where a trajectory ends and not the score that guidance follows, and its scale is built "
        "in: expect flat or garish objects; the model that it was made from is the better choice"
    )


def latents_of_old_folder(where: Path, unet: dict[str, Any]) -> None:
    """Correct `sample_size` of folders from before diffusers 0.9: 64, as diffusers itself does.

    They had the class's default, 32, for a UNet of 64. A folder that names no version at all is
    taken for one where its UNet has Stable Diffusion 1's shape.
    """
    size, version = unet.get("sample_size"), unet.get("_diffusers_version")
    if not isinstance(size, int) or size >= 64:
        return
    if version is None:
        old = (
            size == 32
            and unet.get("cross_attention_dim") == 768
            and unet.get("block_out_channels") == [320, 640, 1280, 1280]
        )
    else:
        numbers = re.match(r"(\d+)\.(\d+)", version)
        old = numbers is not None and (int(numbers[1]), int(numbers[2])) < (0, 9)
    if old:
        unet["sample_size"] = 64
        say_once(
            f"{where}: sample_size {size} is taken for 64, as diffusers does with folders written "
            f"before its version 0.9 (here {version or 'none is named'})"
        )


@functools.cache
def say_once(message: str) -> None:
    """Log a warning, unless this process has: a run looks at a folder more than once."""
    log.warning("%s", message)
