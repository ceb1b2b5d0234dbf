"""A learned environment map as background."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dsd_fast import ops
from dsd_fast.ops.sh import N_VALUES
from dsd_fast.ranges import Color, Layers, Neurons, Share, check
from dsd_fast.scene.mlp import MLP


@dataclass
class BackgroundConfig:
    # Replace the background of some training views by one random colour.
    random_aug: bool = True
    # The share of those views.
    random_aug_prob: Share = 0.5
    # That colour is one for all views of a step, as views that belong together need it.
    share_aug_bg: bool = False
    # One fixed colour (r g b in 0 to 1) in previews and evaluation instead of the learned map.
    eval_color: Color | None = None
    # Neurons of the hidden layers.
    n_neurons: Neurons = 16
    # Hidden layers of the network.
    n_hidden_layers: Layers = 2


class Background(nn.Module):
    """Colour of a ray direction: spherical harmonics of degree 3 → MLP → sigmoid, float32."""

    def __init__(self, cfg: BackgroundConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        check(cfg)
        self.cfg = cfg
        self.network = MLP(
            N_VALUES,
            3,
            n_neurons=cfg.n_neurons,
            n_hidden_layers=cfg.n_hidden_layers,
            generator=generator,
        )

    def draw(
        self, n_views: int, generator: torch.Generator, learned: bool = False
    ) -> Tensor | None:
        """The paint of training views, for `forward`; None where it is never used.

        `learned` views have the learned map.

        [B,4] on the generator's device: a colour, and 1 where it takes the learned map's place.
        """
        if not self.cfg.random_aug:
            return None
        device = generator.device
        chance = torch.rand((), generator=generator, device=device)
        if not learned and chance < self.cfg.random_aug_prob:
            n_colors = 1 if self.cfg.share_aug_bg else n_views
            color = torch.rand(n_colors, 3, generator=generator, device=device)
            color = color.expand(n_views, -1)
            return torch.cat([color, torch.ones_like(color[:, :1])], dim=1)
        return torch.zeros(n_views, 4, device=device)

    def forward(self, dirs: Tensor, training: bool, paint: Tensor | None = None) -> Tensor:
        """Colours [B,H,W,3] in (0, 1) of unit directions [B,H,W,3].

        Where `paint` of `draw` takes a view, the network receives zero gradients from it (zero, not
        none: an optimizer with momentum treats the two differently).
        """
        if not training and self.cfg.eval_color is not None:
            return dirs.new_tensor(self.cfg.eval_color).expand(dirs.shape)
        with torch.autocast(dirs.device.type, enabled=False):
            harmonics = ops.spherical_harmonics(dirs.reshape(-1, 3))
            learned = torch.sigmoid(self.network(harmonics)).reshape(dirs.shape)
        if paint is None:
            return learned
        color, share = paint[:, None, None, :3], paint[:, None, None, 3:]
        return share * color + (1.0 - share) * learned
