"""`load_model`: one loader for every Stable Diffusion folder, the embedded prior included."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from dsd_fast.diffusion import noise_schedule
from dsd_fast.diffusion.components import (
    PipelineFolder,
    inspect_folder,
    is_multiview,
    latent_size,
    load_component,
    quiet,
)
from dsd_fast.diffusion.model import DiffusionModel
from dsd_fast.diffusion.multiview_unet import N_VIEWS, load_multiview_unet
from dsd_fast.diffusion.text import ClipText

EMBEDDED = "embedded"
_EMBEDDED_FOLDER = Path(__file__).resolve().parent.parent / "assets" / "prior"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Only what is read: no pickles, no second precision, no safety checker.
_HUB_FILES = [
    "model_index.json",
    "tokenizer/*",
    "scheduler/*.json",
    *(f"{piece}/*.json" for piece in ("unet", "vae", "text_encoder")),
    *(f"{piece}/*.safetensors" for piece in ("unet", "vae", "text_encoder")),
]
_HUB_IGNORED = ["*.fp16.*", "*non_ema*"]


def load_model(
    path_or_id: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    *,
    engine: str = "auto",
    n_views: int = 1,
) -> DiffusionModel:
    """Load a Stable Diffusion model, or a multi-view one made from it, for guidance.

    Args:
        path_or_id: a folder in diffusers' StableDiffusionPipeline format, a hub id "owner/name"
            (downloaded once, then read from the local cache), or "embedded" for the prior that
            ships with the package.
        dtype: of the UNet; default float16 on CUDA, float32 elsewhere. bfloat16 is 1.8 times as
            fast on a CPU with AVX512-BF16, at a relative error of 1e-2 a prediction. The VAE,
            which is differentiated, takes the dtype on CUDA and stays float32 elsewhere.
        engine: one of `dsd_fast.diffusion.engine.ENGINES`, see there.
        n_views: views that the model is to predict together: 1, or 4 for one of MVDream's kind
            (a folder whose UNet is a MultiViewUNetModel), which needs cameras beside the text.
    Raises:
        FileNotFoundError: a missing folder or piece, named before anything is loaded.
        ValueError: unsupported configuration, weights that do not fit it, or a model of another
            number of views.
        ConnectionError: a hub id that can be neither found nor downloaded.
    """
    device = torch.device(device)
    if dtype is None:
        dtype = torch.float16 if device.type == "cuda" else torch.float32
    if dtype == torch.float16 and device.type == "cpu":
        raise ValueError("float16 is not supported on the CPU; use float32 or bfloat16")
    vae_dtype = dtype if device.type == "cuda" else torch.float32
    folder = inspect_folder(resolve(path_or_id))
    _check_views(folder, n_views)
    with quiet():
        import diffusers

    def read(piece: str, piece_dtype: torch.dtype) -> torch.nn.Module:
        cls = getattr(diffusers, folder.configs[piece]["_class_name"])
        return load_component(
            cls, folder.path / piece, variant=folder.variants[piece], torch_dtype=piece_dtype
        )

    # The fast convolutions, of tensor cores and of oneDNN, want the channels innermost.
    unet = (
        load_multiview_unet(folder.configs["unet"], folder.weights["unet"], dtype)
        if n_views > 1
        else read("unet", dtype)
    ).to(device, memory_format=torch.channels_last)
    vae = read("vae", vae_dtype).to(device, memory_format=torch.channels_last)
    vae_config = folder.configs["vae"]
    model = DiffusionModel(
        unet,
        vae,
        ClipText(folder.path, device, folder.variants["text_encoder"]),
        alphas_cumprod=noise_schedule.alphas_cumprod(folder.configs["scheduler"]),
        prediction_type=noise_schedule.prediction_type(folder.configs["scheduler"]),
        latent_channels=vae.config.latent_channels,
        latent_size=latent_size(folder.configs["unet"]),
        vae_factor=_vae_factor(folder),
        scaling_factor=vae.config.scaling_factor,
        shift_factor=vae_config.get("shift_factor") or 0.0,
        device=device,
        path=folder.path,
        weight_files=folder.weight_files,
        engine=engine,
    )
    if device.type == "cuda":
        model.release_decoder()
    return model


def resolve(path_or_id: str | Path) -> Path:
    """The local folder of a model: a folder wins over a hub id of the same spelling."""
    text = str(path_or_id)
    if text == EMBEDDED:
        if not _EMBEDDED_FOLDER.is_dir():
            raise FileNotFoundError(
                f"the embedded prior is missing: expected {_EMBEDDED_FOLDER}; reinstall the "
                "package, or pass a Stable Diffusion folder with --model"
            )
        return _EMBEDDED_FOLDER
    path = Path(path_or_id).expanduser()
    if path.exists() or not isinstance(path_or_id, str) or not _HUB_ID.fullmatch(text):
        return path
    return _download(text)


def _download(hub_id: str) -> Path:
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(
                hub_id, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_IGNORED
            )
        )
    # Offline mode, no network, no such repository and no permission have unrelated types there.
    except Exception as error:
        raise ConnectionError(
            f"model {hub_id!r}: there is no such local folder, and the hub did not give it "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no detail'})"
            "; pass the path of a local Stable Diffusion folder, or 'embedded'"
        ) from error


def _check_views(folder: PipelineFolder, n_views: int) -> None:
    """ValueError for a model of another number of views than is asked for."""
    found = N_VIEWS if is_multiview(folder.configs["unet"]) else 1
    if found == n_views:
        return
    if found > 1:
        raise ValueError(
            f"{folder.path}: this model predicts {found} views of an object at once, and {n_views} "
            "is asked for: train with --preset mvdream (or --cameras.n-view "
            f"{found}); other commands need a model of single images"
        )
    raise ValueError(
        f"{folder.path}: this model knows one view at a time, and {n_views} together are asked for "
        "(--cameras.n-view): expected a multi-view model, a folder whose UNet is a "
        "MultiViewUNetModel, as MVDream's"
    )


def _vae_factor(folder: PipelineFolder) -> int:
    """Image pixels per latent pixel: every encoder block but one halves the image."""
    config = folder.configs["vae"]
    tiny = config["_class_name"] == "AutoencoderTiny"
    blocks = config.get("encoder_block_out_channels" if tiny else "block_out_channels")
    if not blocks:
        raise ValueError(f"{folder.path / 'vae' / 'config.json'} does not list its encoder blocks")
    return 2 ** (len(blocks) - 1)
