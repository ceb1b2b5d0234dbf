"""Views of a mesh with its colours, as `FieldScene.view` gives them of a field."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsd_fast import ops
from dsd_fast.asset.model import FIELD_TO_GLTF
from dsd_fast.scene.background import Background
from dsd_fast.scene.cameras import CameraBatch, clip_matrices
from dsd_fast.scene.material import MaterialConfig, Shading, choose_shading
from dsd_fast.scene.mesh import Made
from dsd_fast.scene.mesh_scene import NEAREST
from dsd_fast.scene.renderer import RenderOutput

# Samples of a pixel.
SAMPLES = 8


class PaintedMesh(nn.Module):
    """A finished object in front of a background, lit as the field was.

    Its normals are those of its vertices: what a normal map adds is not shown.
    """

    points: Tensor
    normals: Tensor
    faces: Tensor
    colors: Tensor
    uvs: Tensor
    texture: Tensor

    def __init__(self, made: Made, background: Background, material: MaterialConfig) -> None:
        super().__init__()
        asset = made.asset
        self.background, self.material = background, material
        self.has_texture = asset.texture is not None and asset.uvs is not None
        self._reach = float(np.linalg.norm(made.points, axis=1).max())
        normals = np.empty_like(asset.normals)
        normals[:, FIELD_TO_GLTF] = asset.normals
        texture = np.zeros((1, 1, 3)) if asset.texture is None else asset.texture / 255
        uvs = np.zeros((1, 2)) if asset.uvs is None else asset.uvs
        for name, values in (
            ("points", made.points),
            ("normals", normals),
            ("colors", asset.colors),
            ("uvs", uvs),
            ("texture", texture),
        ):
            self.register_buffer(name, torch.as_tensor(np.asarray(values, np.float32)))
        self.register_buffer("faces", torch.as_tensor(asset.faces.astype(np.int32)))

    @property
    def device(self) -> torch.device:
        return self.points.device

    @torch.no_grad()
    def view(self, cameras: CameraBatch, step: int) -> RenderOutput:
        """What cameras see of it; `step` decides whether objects are lit yet."""
        seen, ids, weights = self._samples(cameras)
        corners = self.faces[ids].long()
        shape = (len(cameras), cameras.height, cameras.width, SAMPLES)

        def mean(values: Tensor) -> Tensor:
            return (weights[:, :, None] * values[corners]).sum(1)

        def pixels(values: Tensor) -> Tensor:
            spread = values.new_zeros(seen.numel(), values.shape[-1])
            spread[seen] = values
            return spread.view(*shape, -1).mean(3)

        points, normals = mean(self.points), F.normalize(mean(self.normals), dim=-1)
        of_view = seen.nonzero()[:, 0] // (cameras.height * cameras.width * SAMPLES)
        eyes = cameras.camera_positions[of_view]
        colors = self._texture_at(mean(self.uvs)) if self.has_texture else mean(self.colors)
        shading = choose_shading(self.material, step, training=False)
        lights = cameras.light_positions[of_view]
        rgb_fg = pixels(_lit(colors, points, normals, lights, shading))
        opacity = seen.view(shape).float().mean(3)[..., None]
        depth = pixels((points - eyes).norm(dim=-1, keepdim=True))
        normal = F.normalize(pixels(normals), dim=-1)
        behind = self.background(cameras.rays_d, False, None)
        nothing = torch.zeros_like(opacity)
        return RenderOutput(
            rgb=rgb_fg + behind * (1.0 - opacity),
            opacity=opacity,
            depth=depth,
            normal=(normal + 1.0) * 0.5 * opacity,
            z_variance=nothing,
            rgb_fg=rgb_fg,
            orientation=nothing,
            n_samples=seen.sum(),
        )

    def _samples(self, cameras: CameraBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Which samples see the mesh, bool [N]; of those the triangles [C] and weights [C,3]."""
        far = cameras.camera_positions.norm(dim=-1) + self._reach
        near = (far - 2 * self._reach).clamp_min(NEAREST * self._reach)
        corners = torch.cat([self.points, self.points.new_ones(len(self.points), 1)], 1)
        clip = corners @ clip_matrices(cameras, near, far).transpose(1, 2)
        size = (cameras.height, cameras.width, SAMPLES)
        found = ops.rasterize(clip.contiguous(), self.faces, *size)
        seen = found.ids.flatten() >= 0
        return seen, found.ids.flatten()[seen].long(), found.weights.view(-1, 3)[seen]

    def _texture_at(self, uvs: Tensor) -> Tensor:
        """Colours [C,3] of the texture at uvs [C,2], linear between its texels."""
        at = torch.stack([2 * uvs[:, 0] - 1, 1 - 2 * uvs[:, 1]], -1)
        picture = self.texture.permute(2, 0, 1)[None]
        found = F.grid_sample(picture, at[None, None], align_corners=False, padding_mode="border")
        return found[0, :, 0].T


def _lit(
    colors: Tensor, points: Tensor, normals: Tensor, lights: Tensor, shading: Shading
) -> Tensor:
    """As `material.shade`, of colours in the place of features."""
    if shading.mode == "albedo":
        return colors
    to_light = F.normalize(lights - points, dim=-1)
    cosine = (normals * to_light).sum(-1, keepdim=True).clamp(min=0.0)
    return colors * (
        cosine * colors.new_tensor(shading.diffuse) + colors.new_tensor(shading.ambient)
    )
