"""A hash-grid field in front of a background, and the renderer that shows them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from dsd_fast.scene.background import Background, BackgroundConfig
from dsd_fast.scene.cameras import CameraBatch
from dsd_fast.scene.field import Field, FieldConfig
from dsd_fast.scene.material import MaterialConfig
from dsd_fast.scene.mesh import Made, MeshConfig, make_asset, make_mesh
from dsd_fast.scene.mesh_scene import Surface
from dsd_fast.scene.protocol import GraphKey, Trainable
from dsd_fast.scene.rates import OptimizerConfig
from dsd_fast.scene.renderer import Renderer, RendererConfig, RenderOutput


class FieldSettings(Protocol):
    """The parts of a configuration that a `FieldScene` reads."""

    field: FieldConfig
    background: BackgroundConfig
    renderer: RendererConfig
    material: MaterialConfig
    optimizer: OptimizerConfig


class FieldScene(nn.Module):
    """Field, background and renderer; weights drawn from a CPU generator. See `Scene`.

    Its state dict (parameters and occupancy grid) is all that rendering and export need.
    """

    is_latent = False
    fixed = "the sizes of its field"

    def __init__(self, cfg: FieldSettings, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.field = Field(cfg.field, generator)
        self.background = Background(cfg.background, generator)
        self.renderer = Renderer(cfg.renderer, cfg.field.radius, cfg.material)
        self._rates = cfg.optimizer

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def trainables(self) -> dict[str, Trainable]:
        """The grid's table with its float16 copy, the field's networks, the background's."""
        cfg = self._rates
        network_lr = cfg.geometry_lr if cfg.network_lr is None else cfg.network_lr
        found = {
            name: Trainable(
                parameter, network_lr if name.startswith("field.") else cfg.background_lr
            )
            for name, parameter in self.named_parameters()
        }
        table = self.field.grid.table
        found["field.grid.table"] = Trainable(table, cfg.geometry_lr, self.field.changing_table)
        return found

    def draw(self, views: CameraBatch, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        return self.renderer.draw(self.field, self.background, views, step, generator)

    def render(self, views: CameraBatch, draws: Mapping[str, Tensor]) -> RenderOutput:
        return self.renderer.render(self.field, self.background, views, draws)

    def surface(self, views: CameraBatch, seen: RenderOutput) -> Tensor:
        """As `RenderOutput.surface`, of the field's box."""
        return seen.surface(views, self.field.cfg.radius)

    @property
    def can_capture(self) -> bool:
        return self.field.skips_rows(self.device)

    def graph_key(self, views: CameraBatch) -> GraphKey | None:
        """Active levels, and room for samples as soon as it is learnt."""
        marched, kept = self.renderer.rooms(views.n_rays)
        if marched is None or kept is None:
            return None
        return GraphKey(self.field.grid.n_active_levels, (marched, kept))

    def watch_replay(self, views: CameraBatch) -> None:
        self.renderer.watch_replay(views.n_rays)

    @property
    def n_dropped(self) -> int:
        """As `Renderer.n_dropped`."""
        return self.renderer.n_dropped

    def view(self, cameras: CameraBatch, step: int) -> RenderOutput:
        """What cameras see at a step of the run, without chance or gradients."""
        return self.renderer.view(self.field, self.background, cameras, step)

    def asset(
        self,
        cfg: MeshConfig,
        step: int,
        tell: Callable[[str], object] | None = None,
        say: Callable[[str], object] | None = None,
    ) -> Made:
        """The object at a step of the run, as `make_asset`, with its arguments and errors."""
        self.field.set_step(step)
        length = self.renderer.step_size
        return make_asset(self.field, self.field.cfg.radius, cfg, self.device, length, tell, say)

    def mesh(
        self, cfg: MeshConfig, step: int, tell: Callable[[str], object] | None = None
    ) -> Surface:
        """The surface alone, in the field's coordinates."""
        self.field.set_step(step)
        length = self.renderer.step_size
        return make_mesh(self.field, self.field.cfg.radius, cfg, self.device, length, tell)[0]
