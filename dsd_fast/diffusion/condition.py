"""What each row of a UNet's batch is conditioned on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

# What diffusers' UNets call the conditions that they take as a group (Podell et al. 2023).
_ADDED = {"pooled": "text_embeds", "size_ids": "time_ids"}


class Condition(Mapping[str, Tensor]):
    """Named tensors with one entry a row, [R,...], on one device. Not changed but by `copy_`.

    - tokens [R,L,D]: what cross-attention reads, of text or of a picture; always there;
    - image [R,C,h,w]: latents that the network reads beside the noisy ones;
    - camera [R,16]: where a view of several is seen from (`cameras.camera_condition`);
    - pooled [R,P], size_ids [R,6]: a whole prompt's embedding, sizes and crop (SDXL);
    - any other name: a keyword argument of the network's forward.

    Floating tensors have the network's dtype.
    """

    def __init__(self, tokens: Tensor, **others: Tensor) -> None:
        self._tensors = {"tokens": tokens, **others}

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        """How many names there are."""
        return len(self._tensors)

    @property
    def tokens(self) -> Tensor:
        return self._tensors["tokens"]

    @property
    def shapes(self) -> tuple[tuple[str, torch.Size], ...]:
        """Name and shape of each tensor: what a CUDA graph or an engine holds for."""
        return tuple((name, tensor.shape) for name, tensor in self._tensors.items())

    def map(self, function: Callable[[Tensor], Tensor]) -> Condition:
        """The same names with `function` of each tensor."""
        return Condition(**{name: function(tensor) for name, tensor in self._tensors.items()})

    def rows(self, start: int | None, stop: int | None = None) -> Condition:
        """Rows start to stop, as of a list."""
        return self.map(lambda tensor: tensor[start:stop])

    def to(self, dtype: torch.dtype) -> Condition:
        """Floating tensors in a dtype."""
        return self.map(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)

    def copy_(self, other: Condition) -> None:
        """Take over the numbers of another condition of the same shapes, at the same addresses."""
        for name, tensor in self._tensors.items():
            tensor.copy_(other[name])

    @staticmethod
    def cat(parts: list[Condition]) -> Condition:
        """The rows of all parts, which have the same names, in their order."""
        return Condition(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def forward(unet: Callable[..., Any], latents: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """A UNet's own forward, in the form of diffusers: latents [R,C,h,w], t [R] -> [R,C,h,w]."""
    arguments: dict[str, Any] = dict(condition)
    tokens = arguments.pop("tokens")
    latents = beside(latents, arguments.pop("image", None))
    added = {theirs: arguments.pop(name) for name, theirs in _ADDED.items() if name in arguments}
    if added:
        arguments["added_cond_kwargs"] = added
    return unet(latents, t, encoder_hidden_states=tokens, return_dict=False, **arguments)[0]


def beside(latents: Tensor, image: Tensor | None) -> Tensor:
    """Noisy latents with those of a condition's image, if there is one, as further channels."""
    return latents if image is None else torch.cat([latents, image], dim=1)
