"""`load_model`: one loader for every Stable Diffusion folder, the embedded prior included."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from dsd_fast.diffusion import hub, single_file
from dsd_fast.diffusion.components import (
    ENCODERS,
    TEXT_PIECES,
    VIEW_PIECES,
    PipelineFolder,
    inspect_configs,
    inspect_folder,
    inspect_view_configs,
    inspect_view_folder,
    is_multiview,
    latent_size,
    quiet,
    vae_factor,
)
from dsd_fast.diffusion.condition import Condition, forward
from dsd_fast.diffusion.engines import on_cpu
from dsd_fast.diffusion.model import DiffusionModel
from dsd_fast.diffusion.model_files import brief
from dsd_fast.diffusion.network_loading import load_component, outline
from dsd_fast.diffusion.networks import Network
from dsd_fast.diffusion.networks.multiview_unet import N_VIEWS, load_multiview_unet
from dsd_fast.diffusion.noise_path import NoisePath
from dsd_fast.diffusion.reference_picture import latent_feature_width
from dsd_fast.diffusion.text import ClipText
from dsd_fast.diffusion.view_model import ViewModel, load_projection

EMBEDDED = "embedded"
_EMBEDDED_FOLDER = Path(__file__).resolve().parent.parent / "assets" / "prior"
_MULTIVIEW_FOLDER = _EMBEDDED_FOLDER.parent / "multiview_prior"
_VIEWS_FOLDER = _EMBEDDED_FOLDER.parent / "view_prior"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_URL = re.compile(r"https?://[\w.-]+/([\w.-]+/[\w.-]+)")


@contextmanager
def _os_errors() -> Iterator[None]:
    """ValueErrors of files that may not be read, or cannot be."""
    try:
        yield
    except (FileNotFoundError, ConnectionError):
        raise
    except OSError as error:
        raise ValueError(f"cannot read the model: {error}") from error


@_os_errors()
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
            (downloaded once, then read from the local cache), a checkpoint of Stable Diffusion 1 or
            2 in one safetensors file (converted once), or "embedded" for the prior that ships with
            the package, of one view or of four.
        dtype: of the UNet; default float16 on CUDA. On a CPU weights and results are float32, and
            products are bfloat16 where it has AVX512-BF16 (2.4 times as fast, at a relative error
            of 3e-3 a prediction), which float32 declines. The VAE, which is differentiated, goes
            with the UNet.
        engine: one of `dsd_fast.diffusion.engines.ENGINES`, see there.
        n_views: views that the model is to predict together: 1, or 4 for one of MVDream's kind
            (a folder whose UNet is a MultiViewUNetModel), which needs cameras beside the text.
    Raises:
        FileNotFoundError: a missing folder or piece, named before anything is loaded.
        ValueError: unsupported or damaged configuration, weights that do not fit it, or a model of
            another kind or number of views; names the file, and the key where there is one.
        ConnectionError: a hub id that can be neither found nor downloaded.
    """
    several = n_views > 1 and str(path_or_id) == EMBEDDED
    folder = inspect_folder(_embedded(_MULTIVIEW_FOLDER) if several else resolve(path_or_id))
    unet, vae, others = _networks(folder, device, dtype, engine, n_views)
    text = ClipText(folder.places["tokenizer"], folder.places["text_encoder"], others["device"])
    return _released(DiffusionModel(unet, vae, text, **others, engine=engine))


@_os_errors()
def load_view_model(
    path_or_id: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    *,
    engine: str = "auto",
) -> ViewModel:
    """Load a Zero-1-to-3 model for guidance; `ViewModel.condition` gives it its picture.

    Args:
        path_or_id: a folder with unet, vae, scheduler, image_encoder and a camera projection
            (`clip_camera_projection` or `cc_projection`), as diffusers stores Zero-1-to-3, a hub id
            of one, or "embedded" for the small model that ships with the package.
        device, dtype, engine: as for `load_model`.
    Raises:
        FileNotFoundError, ValueError, ConnectionError: as `load_model`.
    """
    embedded = str(path_or_id) == EMBEDDED
    path = _embedded(_VIEWS_FOLDER) if embedded else resolve(path_or_id, views=True)
    folder = inspect_view_folder(path)
    unet, vae, others = _networks(folder, device, dtype, engine)
    encoder = None
    if "image_encoder" in folder.places:
        with quiet():
            from transformers import CLIPVisionModelWithProjection

        encoder = load_component(
            CLIPVisionModelWithProjection,
            folder.places["image_encoder"],
            next(vae.parameters()).dtype,
        )
        encoder = encoder.to(others["device"]).eval().requires_grad_(False)
        features = encoder.config.projection_dim
    else:
        features = latent_feature_width(others["latent_channels"])
    projection = load_projection(folder.weights["projection"], features)
    width = folder.configs["unet"].get("cross_attention_dim", 1280)
    if projection.proj.out_features != width:
        raise ValueError(
            f"{folder.places['projection']}: the projection gives context of width "
            f"{projection.proj.out_features}, the unet reads {width}"
        )
    projection = projection.to(others["device"])
    return _released(ViewModel(unet, vae, projection, encoder, **others, engine=engine))


def _networks(
    folder: PipelineFolder,
    device: torch.device | str,
    dtype: torch.dtype | None,
    engine: str,
    n_views: int = 1,
) -> tuple[Network, Network, dict[str, Any]]:
    """UNet and VAE on the device, and what else a DiffusionModel is told of them, by name."""
    device = torch.device(device)
    asked = dtype
    if asked == torch.float16 and device.type == "cpu":
        raise ValueError("float16 is not supported on the CPU; use float32 or bfloat16")
    # On a CPU the UNet takes bfloat16 as a whole where its products alone cannot.
    dtype = (asked or torch.float16) if device.type == "cuda" else torch.float32
    _check_views(folder, n_views)
    with quiet():
        import diffusers
        import transformers

    def class_of(piece: str) -> type:
        return getattr(diffusers, folder.configs[piece]["_class_name"])

    def placed(network: Network) -> Network:
        # The fast convolutions, of tensor cores and of oneDNN, want the channels innermost.
        return network.to(device, memory_format=torch.channels_last)

    # What does not fit is found before gigabytes are read.
    for piece, name in ENCODERS.items():
        if piece in folder.configs:
            outline(getattr(transformers, name), folder.places[piece])
    _try_vae(folder, outline(class_of("vae"), folder.places["vae"]))
    if n_views > 1:
        unet = load_multiview_unet(folder.configs["unet"], folder.weights["unet"], dtype)
    else:
        _try_unet(folder, outline(class_of("unet"), folder.places["unet"]))
        unet = load_component(class_of("unet"), folder.places["unet"], dtype, outlined=True)
    vae = load_component(class_of("vae"), folder.places["vae"], dtype, outlined=True)
    products = None
    if device.type == "cpu":
        products = on_cpu(unet, engine, asked)
        if products is None and asked is not None:
            with quiet():
                unet = unet.to(asked)
    return (
        placed(unet),
        placed(vae),
        {
            "noise_path": NoisePath.of_scheduler(folder.configs["scheduler"]),
            "latent_channels": vae.config.latent_channels,
            "latent_size": latent_size(folder.configs["unet"]),
            "vae_factor": _factor(folder),
            "scaling_factor": vae.config.scaling_factor,
            "shift_factor": folder.configs["vae"].get("shift_factor") or 0.0,
            "device": device,
            "products": products,
            "path": folder.path,
            "weight_files": folder.weight_files,
        },
    )


Model = TypeVar("Model", bound=DiffusionModel)


def _released(model: Model) -> Model:
    """The model with only what training needs on a GPU."""
    if model.device.type == "cuda":
        model.release_decoder()
    return model


class PictureShape(NamedTuple):
    """Sizes of a model's latents [B,channels,latent_size,latent_size] and square images."""

    channels: int
    latent_size: int
    image_size: int


@_os_errors()
def picture_shape(path_or_id: str | Path) -> PictureShape:
    """What `load_model` would say of a model's pictures, without its weights. Errors: as there."""
    folder = inspect_folder(resolve(path_or_id))
    side = latent_size(folder.configs["unet"])
    channels = int(folder.configs["vae"].get("latent_channels", 4))
    return PictureShape(channels, side, side * _factor(folder))


def resolve(path_or_id: str | Path, *, views: bool = False) -> Path:
    """The local folder of a model: a folder wins over a hub id of the same spelling.

    Args:
        path_or_id: as for `load_model`; a folder of the hub's cache stands for its snapshot, and
            a file for the folder that it is converted to (`single_file.folder_of`).
        views: whether a hub id is of a model for `load_view_model`.
    Raises:
        ConnectionError, FileNotFoundError, ValueError: as `hub.download`.
    """
    text = str(path_or_id)
    if text == EMBEDDED:
        return _embedded(_EMBEDDED_FOLDER)
    if url := _HUB_URL.match(text):
        raise ValueError(f"model {text!r:.200}: expected no address; pass the hub id, {url[1]}")
    try:
        path = Path(path_or_id).expanduser()
        path.exists()
    # No such user; a name that is too long, a folder that must not be read.
    except (RuntimeError, OSError) as error:
        raise ValueError(f"model {text!r:.200} is no path: {brief(error)}") from error
    if path.is_file() and not views:
        return single_file.folder_of(path)
    if path.exists() or not isinstance(path_or_id, str) or not _HUB_ID.fullmatch(text):
        return hub.of_cache(path)
    if views:
        return hub.download(text, VIEW_PIECES, inspect_view_configs)
    return hub.download(text, TEXT_PIECES, inspect_configs)


def _embedded(folder: Path) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(
            f"the embedded prior is missing: expected {folder}; reinstall the "
            "package, or pass a folder of another model with --model"
        )
    return folder


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


def _factor(folder: PipelineFolder) -> int:
    return vae_factor(folder.configs["vae"], folder.places["vae"] / "config.json")


def _try_unet(folder: PipelineFolder, unet: Network) -> None:
    """ValueError for a UNet that cannot be called as guidance calls it: a call without numbers."""
    config, side = folder.configs["unet"], latent_size(folder.configs["unet"])
    where = folder.places["unet"] / "config.json"
    text = torch.empty(1, 77, config.get("cross_attention_dim", 1280), device="meta")
    latents = torch.empty(1, config.get("in_channels", 4), side, side, device="meta")
    t = torch.zeros(1, dtype=torch.int64, device="meta")
    expected = (1, config.get("out_channels", 4), side, side)
    _expect(where, expected, lambda: forward(unet, latents, t, Condition(text)))


def _try_vae(folder: PipelineFolder, vae: Network) -> None:
    """The same of a VAE's encoder."""
    config, side = folder.configs["vae"], latent_size(folder.configs["unet"])
    where = folder.places["vae"] / "config.json"
    picture = torch.empty(1, 3, *[side * _factor(folder)] * 2, device="meta")
    expected = (1, config.get("latent_channels", 4), side, side)

    def encoded() -> Tensor:
        found = vae.encode(picture)
        return found.latent_dist.mean if hasattr(found, "latent_dist") else found.latents

    _expect(where, expected, encoded)


def _expect(where: Path, shape: tuple[int, ...], call: Callable[[], Tensor]) -> None:
    try:
        with quiet(), torch.no_grad():
            found = tuple(call().shape)
    except Exception as error:
        raise ValueError(f"{where} describes a network that fails: {brief(error)}") from error
    if found != shape:
        raise ValueError(f"{where}: the network gives {list(found)}, expected {list(shape)}")
