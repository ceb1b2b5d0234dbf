"""A diffusion model of views: given one picture of an object, what it looks like from elsewhere.

Zero-1-to-3 (Liu et al. 2023), from a diffusers folder of it or from the small prior's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from dsd_fast.diffusion.engines.base import UNetEngine
from dsd_fast.diffusion.model import DiffusionModel
from dsd_fast.diffusion.reference_picture import POSE_WIDTH, CameraProjection, latent_features

# CLIP's normalisation of pixels (Radford et al. 2021).
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class ReferenceEngine:
    """An engine of a UNet that reads reference latents beside the noisy ones.

    Called like any engine. A row whose context is zero throughout is unconditional: it gets no
    reference either.

    Args:
        engine: of the UNet with twice as many input channels.
        reference: [1,C,h,w] latents in the UNet's dtype, on its device.
    """

    def __init__(self, engine: UNetEngine, reference: Tensor) -> None:
        self.engine = engine
        self.reference = reference

    def __call__(self, latents: Tensor, t: Tensor, context: Tensor) -> Tensor:
        known = (context != 0).any(2).any(1).view(-1, 1, 1, 1)
        beside = self.reference * known
        return self.engine(torch.cat([latents, beside], dim=1), t, context)

    def release_graphs(self) -> None:
        """As `UNetEngine.release_graphs`."""
        self.engine.release_graphs()


class ViewModel(DiffusionModel):
    """A frozen UNet, VAE and camera projection; `condition` gives it the picture to go by.

    The context that `predict_noise` and the engine take is that of `context`, and zeros for
    unconditional rows.

    Args:
        projection: features and pose to context, on the model's device.
        image_encoder: CLIPVisionModelWithProjection there; None for a projection that reads
            `latent_features`.
        others: as for a DiffusionModel.
    """

    def __init__(
        self,
        unet: nn.Module,
        vae: nn.Module,
        projection: CameraProjection,
        image_encoder: nn.Module | None = None,
        **others: Any,
    ) -> None:
        super().__init__(unet, vae, None, **others)
        self.projection = projection.eval().requires_grad_(False)
        self.image_encoder = image_encoder
        self._unet_engine = self.engine
        self._features: Tensor | None = None

    @torch.no_grad()
    def condition(self, rgb: Tensor) -> None:
        """Take the reference picture: [1,3,H,W] float32 in [0,1], the object on white.

        It is brought to the model's size by area, as Zero-1-to-3 has it.
        """
        if rgb.ndim != 4 or rgb.shape[:2] != (1, 3):
            raise ValueError(f"view model: expected a picture [1,3,H,W], got {list(rgb.shape)}")
        rgb = rgb.to(self.device, torch.float32)
        small = rgb
        if rgb.shape[-2:] != (self.image_size, self.image_size):
            small = F.interpolate(rgb, (self.image_size, self.image_size), mode="area")
        # The posterior's mean, without the scaling factor.
        latents = self._posterior(small)[0]
        self.engine = ReferenceEngine(self._unet_engine, latents.to(self.dtype))
        if self.image_encoder is None:
            self._features = latent_features(latents)
        else:
            self._features = _clip_features(self.image_encoder, small)

    @torch.no_grad()
    def context(self, pose: Tensor) -> Tensor:
        """Context [B,L,D] float32 of views at poses [B,4] (`relative_pose`), on the device."""
        return self.base_context + (pose @ self.pose_weight.T)[:, None]

    @property
    def base_context(self) -> Tensor:
        """The context's part that no pose changes, [1,L,D] float32 on the device."""
        if self._features is None:
            raise ValueError("view model: expected a reference picture first; call condition()")
        proj = self.projection.proj
        return F.linear(self._features, proj.weight[:, :-POSE_WIDTH], proj.bias)

    @property
    def pose_weight(self) -> Tensor:
        """[D,4] float32 on the device: a pose's part is its product with this, for every token."""
        return self.projection.proj.weight[:, -POSE_WIDTH:]


def _clip_features(encoder: nn.Module, rgb: Tensor) -> Tensor:
    """CLIP's image embedding [1,1,F] float32 of a picture [1,3,H,W] in [0,1]."""
    side = encoder.config.image_size
    image = F.interpolate(rgb, (side, side), mode="bicubic", align_corners=False, antialias=True)
    mean, std = (rgb.new_tensor(v).view(1, 3, 1, 1) for v in (_CLIP_MEAN, _CLIP_STD))
    dtype = next(encoder.parameters()).dtype
    pixels = ((image.clamp(0, 1) - mean) / std).to(dtype)
    return encoder(pixel_values=pixels).image_embeds.float()[:, None]


def load_projection(files: list[Path], features: int | None) -> CameraProjection:
    """A camera projection of safetensors with one weight and one bias, float32 on the CPU.

    Args:
        features: width that the features have; None takes any.
    Raises:
        ValueError: other tensors, or of another width.
    """
    state = {k: v.float() for file in files for k, v in load_file(file).items()}
    named = {name.rpartition(".")[2]: value for name, value in state.items()}
    weight, bias = named.get("weight"), named.get("bias")
    if len(state) != 2 or weight is None or bias is None or weight.ndim != 2:
        raise ValueError(
            f"{files[0]}: expected the weight and bias of one linear layer, got {sorted(state)}"
        )
    width = weight.shape[1] - POSE_WIDTH
    if features is not None and width != features:
        raise ValueError(
            f"{files[0]}: the camera projection reads {width} features and a pose of {POSE_WIDTH}, "
            f"the picture gives {features}"
        )
    projection = CameraProjection(width, len(weight))
    projection.proj.load_state_dict({"weight": weight, "bias": bias})
    return projection
