"""Conditioning on a reference picture and a camera, as in Zero-1-to-3 (Liu et al. 2023).

The UNet reads the reference twice: its latents beside the noisy ones, and features of it, joined
with the pose of the wanted view by one linear layer, as the tokens of the cross-attention.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Numbers of a pose.
POSE_WIDTH = 4
# The small prior's tokens: so many parts of the latents along a side, each so many cells wide.
PARTS = 4
CELLS = 4


def relative_pose(
    elevation_deg: Tensor,
    azimuth_deg: Tensor,
    distance: Tensor,
    reference_elevation_deg: Tensor | float,
    reference_azimuth_deg: Tensor | float,
    reference_distance: Tensor | float,
) -> Tensor:
    """T = [polar difference, sin and cos of the azimuth difference, distance difference].

    The polar angle is 90 degrees minus the elevation; its difference is in radians. Distances are
    in the units of the world that the model was trained with.

    Args:
        elevation_deg, azimuth_deg, distance: [B] of the views, on one device.
        reference_elevation_deg, reference_azimuth_deg, reference_distance: of the reference view,
            one number or [B].
    Returns:
        [B,4] float32 on that device.
    """
    polar = torch.deg2rad(reference_elevation_deg - elevation_deg)
    azimuth = torch.deg2rad(azimuth_deg - reference_azimuth_deg)
    pose = [polar, torch.sin(azimuth), torch.cos(azimuth), distance - reference_distance]
    return torch.stack(pose, dim=-1).float()


def latent_features(latents: Tensor) -> Tensor:
    """Features of the small prior's tokens: PARTS x PARTS parts of a picture, and which part it is.

    Args:
        latents: [B,C,h,w] of the reference picture, without the scaling factor, of any device.
    Returns:
        [B,16,16C + 16] in their dtype: C x CELLS x CELLS means over the part's area, and a one-hot
        place.
    """
    cells = F.adaptive_avg_pool2d(latents, PARTS * CELLS)
    parts = F.unfold(cells, CELLS, stride=CELLS).transpose(1, 2)
    place = torch.eye(PARTS**2, dtype=latents.dtype, device=latents.device)
    return torch.cat([parts, place.expand(len(parts), -1, -1)], dim=2)


def latent_feature_width(channels: int) -> int:
    """Width of `latent_features` of latents with so many channels."""
    return channels * CELLS**2 + PARTS**2


class CameraProjection(nn.Module):
    """One linear layer from features of the reference picture and a pose to context tokens.

    Args:
        features: width of a token's features, the pose not counted.
        outputs: width of the UNet's context.
    """

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__()
        self.proj = nn.Linear(features + POSE_WIDTH, outputs)

    def forward(self, features: Tensor, pose: Tensor) -> Tensor:
        """[B,L,outputs] of features [B,L,features] and poses [B,4], in the features' dtype."""
        pose = pose.to(features.dtype)[:, None].expand(-1, features.shape[1], -1)
        return self.proj(torch.cat([features, pose], dim=2))
