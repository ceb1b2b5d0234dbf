"""Diffuse material with an ambient and a point light."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dsd_fast._backend import backend
from dsd_fast.ranges import Color, CountOrNone, Share

ShadingMode = Literal["albedo", "textureless", "diffuse"]
MODES: tuple[ShadingMode, ...] = ("albedo", "textureless", "diffuse")


@dataclass
class MaterialConfig:
    # Colour of the ambient light.
    ambient_light_color: Color = (0.1, 0.1, 0.1)
    # Colour of the point light.
    diffuse_light_color: Color = (0.9, 0.9, 0.9)
    # Steps at the start that show the albedo alone.
    ambient_only_steps: CountOrNone = 1000
    # After that, the share of training views that are lit.
    diffuse_prob: Share = 0.3
    # Among the lit views, the share without texture.
    textureless_prob: Share = 0.75
    # Show the albedo alone in previews, turntables and evaluation.
    ambient_only_on_test: bool = False
    # Draw the strength of the point light in training; the ambient light is the rest.
    soft_shading: bool = False


class Shading(NamedTuple):
    """How one rendering is lit."""

    mode: ShadingMode
    ambient: Color
    diffuse: Color

    def numbers(self) -> Tensor:
        """The same as eight numbers, float32 on the CPU, which `shade` takes on its device.

        Ambient and point light, then whether the albedo and whether the light count.
        """
        counts = (float(self.mode != "textureless"), float(self.mode != "albedo"))
        return torch.tensor([*self.ambient, *self.diffuse, *counts])

    @classmethod
    def of(cls, numbers: Tensor) -> Shading:
        """The shading that these are the `numbers` of, on the CPU."""
        *colors, texture, light = numbers.tolist()
        ambient, diffuse = (colors[0], colors[1], colors[2]), (colors[3], colors[4], colors[5])
        mode: ShadingMode = ("diffuse" if texture else "textureless") if light else "albedo"
        return cls(mode, ambient, diffuse)


def choose_shading(
    cfg: MaterialConfig, step: int, training: bool, generator: torch.Generator | None = None
) -> Shading:
    """The shading of one rendering: drawn from the CPU `generator` in training, fixed otherwise."""
    ambient, diffuse = cfg.ambient_light_color, cfg.diffuse_light_color
    ambient_only = step < cfg.ambient_only_steps
    if not training:
        albedo = ambient_only or cfg.ambient_only_on_test
        return Shading("albedo" if albedo else "diffuse", ambient, diffuse)
    if generator is None:
        raise ValueError("choose_shading: training needs a generator, got None")

    def draw() -> float:
        return torch.rand((), generator=generator).item()

    if cfg.soft_shading:
        strength = draw()
        rest = 1.0 - strength
        ambient, diffuse = (rest, rest, rest), (strength, strength, strength)
    mode: ShadingMode = "albedo"
    if not ambient_only and draw() <= cfg.diffuse_prob:
        mode = "textureless" if draw() < cfg.textureless_prob else "diffuse"
    return Shading(mode, ambient, diffuse)


def albedo_color(features: Tensor) -> Tensor:
    """Surface colour in (0, 1) from features, both [N,3]; also the colour of exported meshes."""
    return torch.sigmoid(features)


def shade(
    features: Tensor,
    points: Tensor,
    normals: Tensor,
    light_positions: Tensor,
    shading: Shading | Tensor,
    n_valid: Tensor | None = None,
) -> Tensor:
    """Colours [N,3] of samples, differentiable in features and normals.

    features, points, unit normals [N,3]; light_positions [N,3] or [1,3].
    Lambert: diffuse · max(0, n·l) + ambient, times the albedo unless the mode is "textureless".
    With the `numbers` of a shading on the device of the points, the host need not know which it is.
    Rows from `n_valid` (0-dim int64 there) on may be left with any numbers in them.
    """
    if isinstance(shading, Tensor):
        if n_valid is not None and backend(points) == "triton":
            return _FusedShade.apply(features, points, normals, light_positions, shading, n_valid)
        return _shade_by_numbers(features, points, normals, light_positions, shading)
    albedo = albedo_color(features)
    if shading.mode == "albedo":
        return albedo
    cosine = _cosine(points, normals, light_positions)
    light = cosine * points.new_tensor(shading.diffuse) + points.new_tensor(shading.ambient)
    if shading.mode == "textureless":
        # Zero gradients, not none: an optimizer with momentum treats the two differently.
        return light + 0.0 * albedo
    return albedo * light


def _cosine(points: Tensor, normals: Tensor, light_positions: Tensor) -> Tensor:
    to_light = F.normalize(light_positions - points, dim=-1)
    return (normals * to_light).sum(-1, keepdim=True).clamp(min=0.0)


def _shade_by_numbers(
    features: Tensor, points: Tensor, normals: Tensor, light_positions: Tensor, numbers: Tensor
) -> Tensor:
    numbers = numbers.to(points.dtype)
    ambient, diffuse, albedo_counts, light_counts = numbers.split([3, 3, 1, 1])
    light = _cosine(points, normals, light_positions) * diffuse + ambient
    light = light_counts * light + (1.0 - light_counts)
    return (albedo_counts * albedo_color(features) + (1.0 - albedo_counts)) * light


class _FusedShade(torch.autograd.Function):
    """One kernel each way; see kernels/samples.py."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        points: Tensor,
        normals: Tensor,
        lights: Tensor,
        numbers: Tensor,
        n_valid: Tensor,
    ) -> Tensor:
        from dsd_fast.kernels import ray_samples as kernels

        tensors = (features, points, normals, lights, numbers, n_valid)
        tensors = [tensor.contiguous() for tensor in tensors]
        ctx.save_for_backward(*tensors)
        return kernels.shade_fwd(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from dsd_fast.kernels import ray_samples as kernels

        to_features, to_normals = kernels.shade_bwd(*ctx.saved_tensors, grad=grad.contiguous())
        return to_features, None, to_normals, None, None, None
