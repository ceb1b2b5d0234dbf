"""A mesh whose colours are optimised: a field asked on its surface, in front of a background."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsd_fast import ops
from dsd_fast.ranges import ConfigError
from dsd_fast.scene.background import Background, BackgroundConfig
from dsd_fast.scene.cameras import CameraBatch, clip_matrices
from dsd_fast.scene.field import Field, FieldConfig
from dsd_fast.scene.material import MaterialConfig, Shading, albedo_color, choose_shading, shade
from dsd_fast.scene.protocol import GraphKey, Trainable
from dsd_fast.scene.rates import OptimizerConfig
from dsd_fast.scene.renderer import RenderOutput
from dsd_fast.upload import upload

# Cameras nearer to the mesh than this share of its reach see through what is before them.
NEAREST = 0.01
# What shows a shape alone: its grey, the share of that where light grazes, and what is behind it.
CLAY, CLAY_AMBIENT = 0.5, 0.5
PLAIN = (0.7, 0.7, 0.7)
# Points at which colours are asked for at a time where no gradient is needed.
QUERY_POINTS = 1 << 18


@dataclass(frozen=True)
class Surface:
    """Triangles in the field's coordinates (z up, front on +x)."""

    points: np.ndarray  # [V,3] float32
    normals: np.ndarray  # [V,3] float32, unit, outward
    faces: np.ndarray  # [F,3] int32


class MeshSettings(Protocol):
    """The parts of a configuration that a `MeshScene` reads."""

    field: FieldConfig
    background: BackgroundConfig
    material: MaterialConfig
    optimizer: OptimizerConfig


class _OnSurface(NamedTuple):
    """Where samples see the mesh: C points, of which on CUDA the first `n_valid` count."""

    points: Tensor  # [C,3]
    normals: Tensor  # [C,3] unit, towards the camera
    rows: Tensor  # int64 [C] the sample of each
    places: Tensor  # int64 [N] the point of each sample, -1 for none
    n_valid: Tensor | None  # 0-dim int64; None: all

    def spread(self, values: Tensor) -> Tensor:
        """Values [C,K] at the samples, [N,K], zeros where none sees the mesh."""
        return _Spread.apply(values, self.rows, self.places)


class MeshScene(nn.Module):
    """A field's colours on a surface that stays as it is, and a background. See `Scene`.

    Of the field the features count; its density is never seen, and does not change. Each pixel is
    the mean of `n_samples` samples, so that outlines are smooth and a texture finer than pixels
    does not flicker. The surface is no part of the state dict: who loads one makes the scene of the
    same mesh.

    Args:
        surface: inside of the field's box; ConfigError where it is not.
        n_samples: of a pixel, as `ops.rasterize` takes them.
        generator: CPU generator of the weights.
    """

    is_latent = False
    fixed = "the sizes of its field"

    points: Tensor
    normals: Tensor
    faces: Tensor

    def __init__(
        self,
        cfg: MeshSettings,
        surface: Surface,
        n_samples: int = 4,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.field = Field(cfg.field, generator)
        self.background = Background(cfg.background, generator)
        self.material = cfg.material
        self.n_samples = n_samples
        self._rates = cfg.optimizer
        radius = cfg.field.radius
        if not (np.abs(surface.points) <= radius).all():
            raise ConfigError(
                f"field.radius: expected the mesh within the box of the field, whose radius is "
                f"{radius}, got a mesh that reaches {np.abs(surface.points).max():.4g}"
            )
        self._reach = float(np.linalg.norm(surface.points, axis=1).max())
        ones = np.ones((len(surface.points), 1))
        corners = np.concatenate([surface.points, ones], 1)
        for name, values, dtype in (
            ("points", corners, np.float32),
            ("normals", surface.normals, np.float32),
            ("faces", surface.faces, np.int32),
        ):
            values = torch.from_numpy(np.ascontiguousarray(values, dtype))
            self.register_buffer(name, values, persistent=False)

    @property
    def device(self) -> torch.device:
        return self.points.device

    def trainables(self) -> dict[str, Trainable]:
        """The grid's table with its float16 copy, the network of colours, the background's."""
        cfg = self._rates
        network_lr = cfg.geometry_lr if cfg.network_lr is None else cfg.network_lr
        found = {}
        for name, parameter in self.named_parameters():
            if name.startswith("background."):
                found[name] = Trainable(parameter, cfg.background_lr)
            elif name.startswith("field.feature_network."):
                found[name] = Trainable(parameter, network_lr)
        table = self.field.grid.table
        found["field.grid.table"] = Trainable(table, cfg.geometry_lr, self.field.changing_table)
        return found

    def draw(self, views: CameraBatch, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The field's levels for a step; then shading and paint, as `Renderer.draw` has them."""
        self.field.set_step(step)
        draws = {"shading": choose_shading(self.material, step, True, generator).numbers()}
        paint = self.background.draw(len(views), generator, views.anchored)
        return draws if paint is None else {**draws, "paint": paint}

    def render(
        self, views: CameraBatch, draws: Mapping[str, Tensor], training: bool = True
    ) -> RenderOutput:
        """Gradients go to colours and background, none to the mesh."""
        seen = self._on_surface(views, self.field.skips_rows(self.device))
        features = self._features(seen.points, seen.n_valid)
        shading = draws["shading"]
        # On the CPU by its mode: an albedo needs no light computed.
        shading = shading if shading.is_cuda else Shading.of(shading)
        per_view = views.height * views.width * self.n_samples
        lights = views.light_positions
        if len(views) > 1:
            lights = lights.index_select(0, seen.rows // per_view)
        colors = shade(features, seen.points, seen.normals, lights, shading, seen.n_valid)
        rgb_fg = self._pixels(seen.spread(colors), views)
        with torch.no_grad():
            opacity = self._pixels((seen.places >= 0).float()[:, None], views)
            origins = views.camera_positions.index_select(0, seen.rows // per_view)
            distance = (seen.points - origins).norm(dim=-1, keepdim=True)
            depth = self._pixels(seen.spread(distance), views)
            normal = F.normalize(self._pixels(seen.spread(seen.normals), views), dim=-1)
            nothing = torch.zeros_like(opacity)
        paint = draws.get("paint")
        if paint is not None:
            paint = upload(paint, self.device)
        behind = self.background(views.rays_d, training, paint)
        return RenderOutput(
            rgb=rgb_fg + behind * (1.0 - opacity),
            opacity=opacity,
            depth=depth,
            normal=(normal + 1.0) * 0.5 * opacity,
            z_variance=nothing,
            rgb_fg=rgb_fg,
            orientation=nothing,
            n_samples=(seen.places >= 0).sum(),
        )

    def surface(self, views: CameraBatch, seen: RenderOutput) -> Tensor:
        """As `FieldScene.surface`."""
        return seen.surface(views, self.field.cfg.radius)

    @property
    def can_capture(self) -> bool:
        return self.field.skips_rows(self.device)

    def graph_key(self, views: CameraBatch) -> GraphKey:
        """Active levels, and the size of pictures."""
        size = (len(views), views.height, views.width)
        return GraphKey((self.field.grid.n_active_levels, *size))

    def watch_replay(self, views: CameraBatch) -> None:
        """It counts nothing."""

    @torch.no_grad()
    def view(self, cameras: CameraBatch, step: int) -> RenderOutput:
        """What cameras see at a step of the run, without chance or gradients."""
        self.field.set_step(step)
        shading = choose_shading(self.material, step, training=False)
        draws = {"shading": upload(shading.numbers(), self.device)}
        return self.render(cameras, draws, training=False)

    @torch.no_grad()
    def clay(self, cameras: CameraBatch) -> Tensor:
        """The shape alone, without colours: [B,H,W,3], grey, lit from the camera, over the plain
        background of pictures."""
        seen = self._on_surface(cameras, False)
        per_view = cameras.height * cameras.width * self.n_samples
        origins = cameras.camera_positions.index_select(0, seen.rows // per_view)
        towards = F.normalize(origins - seen.points, dim=-1)
        light = CLAY_AMBIENT + (1 - CLAY_AMBIENT) * (seen.normals * towards).sum(-1, keepdim=True)
        shape = self._pixels(seen.spread(CLAY * light), cameras)
        opacity = self._pixels((seen.places >= 0).float()[:, None], cameras)
        behind = shape.new_tensor(self.background.cfg.eval_color or PLAIN)
        return shape + (1.0 - opacity) * behind

    @torch.no_grad()
    def colors(self, points: np.ndarray, step: int) -> np.ndarray:
        """sRGB in [0,1], float32 [N,3], of points [N,3] on the surface at a step of the run."""
        self.field.set_step(step)
        chunks = torch.from_numpy(np.ascontiguousarray(points, np.float32)).split(QUERY_POINTS)
        found = [albedo_color(self._features(c.to(self.device), None)).cpu() for c in chunks]
        return torch.cat(found).numpy() if found else np.zeros((0, 3), np.float32)

    def _features(self, points: Tensor, n_valid: Tensor | None) -> Tensor:
        return self.field(points, normals=False, n_valid=n_valid).features

    @torch.no_grad()
    def _on_surface(self, views: CameraBatch, skips: bool) -> _OnSurface:
        """With `skips` every sample has room, those that see the mesh first, and the host counts
        nothing."""
        far = views.camera_positions.norm(dim=-1) + self._reach
        near = (far - 2 * self._reach).clamp_min(NEAREST * self._reach)
        clip = self.points @ clip_matrices(views, near, far).transpose(1, 2)
        size = (views.height, views.width, self.n_samples)
        found = ops.rasterize(clip.contiguous(), self.faces, *size)
        ids, weights = found.ids.flatten(), found.weights.view(-1, 3)
        seen = ids >= 0
        rows = (~seen).byte().argsort(stable=True) if skips else seen.nonzero()[:, 0]
        counted = seen.cumsum(0)
        n_valid = counted[-1] if skips else None
        corners = self.faces.index_select(0, ids.index_select(0, rows).clamp_min(0)).long()
        weights = weights.index_select(0, rows)
        points = self._mean(self.points[:, :3], corners, weights)
        normals = F.normalize(self._mean(self.normals, corners, weights), dim=-1)
        # A triangle is seen from both sides.
        per_view = views.height * views.width * self.n_samples
        towards = views.camera_positions.index_select(0, rows // per_view) - points
        away = (normals * towards).sum(-1, keepdim=True) < 0
        places = torch.where(seen, counted - 1, -1)
        return _OnSurface(points, torch.where(away, -normals, normals), rows, places, n_valid)

    def _mean(self, values: Tensor, corners: Tensor, weights: Tensor) -> Tensor:
        """Of vertices' values [V,K], by the corners [C,3] and their weights: [C,K]."""
        own = values.index_select(0, corners.flatten()).view(len(corners), 3, values.shape[1])
        return (weights[:, :, None] * own).sum(1)

    def _pixels(self, samples: Tensor, views: CameraBatch) -> Tensor:
        """[N,K] of samples as [B,H,W,K], their means."""
        size = (len(views), views.height, views.width, self.n_samples)
        return samples.view(*size, samples.shape[1]).mean(3)


class _Spread(torch.autograd.Function):
    """Rows of values to the samples they are of; each sample has one, so that both ways gather."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(rows, places)
        if len(values) == 0:
            return values.new_zeros(len(places), values.shape[1])
        found = values.index_select(0, places.clamp_min(0))
        return torch.where(places[:, None] >= 0, found, 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        rows, places = ctx.saved_tensors
        grad = torch.where(places[:, None] >= 0, grads[0], 0.0)
        return grad.index_select(0, rows), None, None
