"""What a scene is to those who train it: the seam for other things to optimise.

A step asks for `draw` on the host and `render` on the device, and has the gradient go back through
what was rendered to the `trainables`. A scene is an `nn.Module`: it can be moved and saved.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from dsd_fast.scene.cameras import CameraBatch


class Trainable(NamedTuple):
    """A parameter, and how the optimizer is to take it."""

    parameter: nn.Parameter
    # Learning rate.
    rate: float
    # Within its context a pass over the parameter is to write the new values to a float16 copy of
    # it too, [numel], or to none.
    half_copy: Callable[[], AbstractContextManager[Tensor | None]] = nullcontext


class GraphKey(NamedTuple):
    """What a CUDA graph of a rendering holds for: as long as it is this, replays show the scene."""

    # What memory does not depend on.
    form: Hashable
    # Sizes of what a rendering allocates; where one grows, graphs need another pool of memory.
    rooms: tuple[int, ...] = ()


class Seen(Protocol):
    """A rendering; a scene may tell more of it."""

    @property
    def rgb(self) -> Tensor:
        """[B,H,W,3] float32 in [0,1], with gradient to the trainables; latents [B,C,h,w] if the
        scene `is_latent`."""
        ...


class Scene(Protocol):
    """What a run optimises.

    Its state dict is a checkpoint's ``scene`` entry. Implementations: `FieldScene`, `Image`.
    """

    # Whether renderings are the diffusion model's latents, which nothing encodes.
    is_latent: bool
    # What a resumed run keeps of its settings, for the error where a checkpoint does not fit.
    fixed: str

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        ...

    def trainables(self) -> dict[str, Trainable]:
        """The parameters by their names in the state dict; asked for once, on their device."""
        ...

    def draw(self, views: CameraBatch, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The host's part of a rendering: get ready for a step, and draw what chance decides.

        Args:
            views: on the CPU.
            step: optimizer steps completed.
            generator: CPU generator of this scene; what is drawn, and its order, is part of what a
                seed means.
        Returns:
            Small tensors on the CPU by name, which `render` finds on the scene's device. Names and
            shapes are the same as long as those of the views are.
        """
        ...

    def render(self, views: CameraBatch, draws: Mapping[str, Tensor]) -> Any:
        """The device's part: a `Seen` of the views, which are on the scene's device as `draws` are.

        Under a CUDA graph it must neither wait for the device nor draw; see `can_capture`.
        """
        ...

    @property
    def can_capture(self) -> bool:
        """Whether a CUDA graph can hold `render` and the way back."""
        ...

    def graph_key(self, views: CameraBatch) -> GraphKey | None:
        """What a graph of `render` would hold for now; None while that is not settled yet."""
        ...

    def watch_replay(self, views: CameraBatch) -> None:
        """A graph has rendered these views: have what it counted looked at, without waiting."""
        ...

    # Of nn.Module.

    def to(self, device: torch.device) -> Any: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any: ...
