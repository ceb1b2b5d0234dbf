"""The small bias-free perceptrons of the field and of the background."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn


class MLP(nn.Module):
    """Linear → ReLU → … → Linear without biases, float32.

    The weights are drawn as `nn.Linear` draws them, U(±1/√fan_in), but from `generator`.
    The layers sit at `layers.0`, `layers.2`, …: the names of official checkpoints.
    """

    def __init__(
        self,
        n_inputs: int,
        n_outputs: int,
        *,
        n_neurons: int,
        n_hidden_layers: int,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        widths = [n_inputs] + [n_neurons] * n_hidden_layers + [n_outputs]
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths):
            linear = nn.Linear(fan_in, fan_out, bias=False, device="meta").to_empty(
                device=torch.get_default_device()
            )
            bound = 1.0 / math.sqrt(fan_in)
            with torch.no_grad():
                linear.weight.uniform_(-bound, bound, generator=generator)
            layers += [linear, nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers[:-1])

    @property
    def weights(self) -> list[nn.Parameter]:
        """One a layer, [n_outputs, n_inputs] of it."""
        return list(self.parameters())

    def forward(self, inputs: Tensor) -> Tensor:
        """[N, n_inputs] → [N, n_outputs]."""
        return self.layers(inputs)
