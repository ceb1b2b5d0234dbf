"""A diffusion model of views: given one picture of an object, what it looks like from elsewhere.

Zero-1-to-3 (Liu et al. 2023), from a diffusers folder of it or from the small prior's.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from dsd_fast.diffusion.condition import Condition
from dsd_fast.diffusion.model import DiffusionModel
from dsd_fast.diffusion.model_files import headers
from dsd_fast.diffusion.networks import Network
from dsd_fast.diffusion.reference_picture import POSE_WIDTH, CameraProjection, latent_features

# CLIP's normalisation of pixels (Radford et al. 2021).
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class ViewModel(DiffusionModel):
    """A frozen UNet, VAE and camera projection; `condition` gives it the picture to go by.

    Its UNet reads the picture's latents beside the noisy ones (a condition's `image`) and its
    features with a view's pose as tokens; unconditional rows have zeros for both (`conditions`).

    Args:
        projection: features and pose to context, on the model's device.
        image_encoder: CLIPVisionModelWithProjection there; None for a projection that reads
            `latent_features`.
        others: as for a DiffusionModel.
    """

    def __init__(
        self,
        unet: nn.Module,
        vae: Network,
        projection: CameraProjection,
        image_encoder: Network | None = None,
        **others: Any,
    ) -> None:
        super().__init__(unet, vae, None, **others)
        self.projection = projection.eval().requires_grad_(False)
        self.image_encoder = image_encoder
        self._reference: Tensor | None = None
        self._base_tokens: Tensor | None = None

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
        self._reference = latents.to(self.dtype)
        if self.image_encoder is None:
            features = latent_features(latents)
        else:
            features = _clip_features(self.image_encoder, small)
        proj = self.projection.proj
        # The part that no pose changes, [1,L,D] float32.
        self._base_tokens = F.linear(features, proj.weight[:, :-POSE_WIDTH], proj.bias)

    @torch.no_grad()
    def conditions(self, pose: Tensor, known: Tensor | None = None) -> Condition:
        """What rows of views at poses [R,4] (`relative_pose`, on the device) are conditioned on.

        Args:
            known: float32 [R] on the device, 1 and 0 for unconditional rows; all known without.
        """
        if self._base_tokens is None or self._reference is None:
            raise ValueError("view model: expected a reference picture first; call condition()")
        # A sum of four products: as a matrix product it would be rounded as the GPU's settings say.
        moved = (pose[:, :, None] * self._to_tokens).sum(1)
        tokens = self._base_tokens + moved[:, None]
        if known is None:
            known = pose.new_ones(len(pose))
        return Condition(
            (tokens * known[:, None, None]).to(self.dtype),
            image=self._reference * known.view(-1, 1, 1, 1).to(self.dtype),
        )

    @cached_property
    def _to_tokens(self) -> Tensor:
        """[4,D] float32 on the device: a pose's part of every token is its product with this."""
        return self.projection.proj.weight[:, -POSE_WIDTH:].T.contiguous()


def _clip_features(encoder: Network, rgb: Tensor) -> Tensor:
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
    try:
        headers(files)
    except ValueError as error:
        raise ValueError(f"cannot read {error}") from error
    state = {k: v.float() for file in files for k, v in load_file(file).items()}
    named = {name.rpartition(".")[2]: value for name, value in state.items()}
    weight, bias = named.get("weight"), named.get("bias")
    if len(state) != 2 or weight is None or bias is None or weight.ndim != 2:
        raise ValueError(
            f"{files[0]}: expected the weight and bias of one linear layer, got {sorted(state)}"
        )
    if bias.shape != weight.shape[:1] or not all(
        bool(torch.isfinite(x).all()) for x in (weight, bias)
    ):
        raise ValueError(
            f"{files[0]}: expected a finite weight [outputs,inputs] and bias [outputs], got "
            f"{list(weight.shape)} and {list(bias.shape)}"
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
