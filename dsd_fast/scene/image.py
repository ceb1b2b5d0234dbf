"""A 2D image that is optimised in place of a scene: a latent, or the pixels themselves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from annotated_types import Interval
from pydantic import AfterValidator
from torch import Tensor, nn

from dsd_fast.ranges import ConfigError, Decay, Elevation, Epsilon, NonNegative, Number, Positive
from dsd_fast.scene.cameras import CameraBatch
from dsd_fast.scene.protocol import GraphKey, Trainable

# Latents [B,C,h,w] to images [B,3,H,W] in [0,1].
Decode = Callable[[Tensor], Tensor]

# Learning rates for the embedded model.
RATES = {"latent": 0.3, "rgb": 1.0}


def _none_or_whole(lengths: float) -> float:
    if 0 < lengths < 1:
        raise ValueError(f"expected 0, or 1 or more, got {lengths}")
    return lengths


@dataclass
class ImageConfig:
    # What is optimised: the "latent", or the "rgb" pixels, which the VAE encodes at every step.
    parameter: Literal["latent", "rgb"] = "latent"
    # Where it begins: "prediction" is the clean image that the model sees in the seed's noise,
    # "noise" is normal noise for a latent, uniform noise for pixels.
    start: Literal["prediction", "noise"] = "prediction"
    # Height and width of an rgb parameter; none is the model's own.
    size: Annotated[int, Interval(ge=8, le=8192)] | None = None
    # Ask for the view from this azimuth in degrees, 0 the front; none asks for no view.
    azimuth: Number | None = None
    # Elevation in degrees of that view; above 60 it is the overhead view.
    elevation: Elevation = 0.0
    # The exact form: one step a DDIM step, of unit length, so that the image is DDIM's sample. The
    # length of the run is then the number of DDIM steps, and the optimizer is not used.
    exact: bool = False
    # Learning rate of Adam at its highest; none is 0.3 for a latent, 1 for pixels.
    lr: Positive | None = None
    # Share of the run in which the learning rate rises to that.
    warm_up: Decay = 0.0
    # The rate falls as a cosine that would reach zero after so many lengths of the run; 0 keeps it.
    cosine_length: Annotated[NonNegative, AfterValidator(_none_or_whole)] = 0.0
    # Adam's decay rates.
    betas: tuple[Decay, Decay] = (0.0, 0.99)
    # Adam's epsilon. Above the gradients it makes Adam gradient descent, which leaves alone what
    # the gradient leaves alone.
    eps: Epsilon = 1.0

    def validate(self) -> None:
        """Raise ConfigError for settings that do not go together."""
        if self.size is not None and self.parameter == "latent":
            raise ConfigError(
                "size: --image.size is for --image.parameter rgb alone, a latent has the model's "
                f"size; got {self.size}"
            )
        if self.exact and self.parameter != "latent":
            raise ConfigError(
                "exact: DDIM leaves a latent; drop --image.exact or --image.parameter rgb"
            )

    @property
    def rate(self) -> float:
        """`lr`, or what none means: a step in pixels moves the latent by a third of it."""
        return RATES[self.parameter] if self.lr is None else self.lr

    def share_of_lr(self, step: int, max_steps: int) -> float:
        """The share of `lr` that the step after `step` finished ones takes: linear, then cosine."""
        rise = self.warm_up * max_steps
        if step < rise:
            return (step + 1) / (rise + 1)
        if not self.cosine_length:
            return 1.0
        through = (step - rise) / (self.cosine_length * max_steps - rise)
        return 0.5 * (1 + math.cos(math.pi * min(through, 1.0)))


class ImageSeen(NamedTuple):
    """The parameter itself, as a `Seen`."""

    rgb: Tensor


class Image(nn.Module):
    """One parameter, `latent` [1,C,h,w] or `rgb` [1,H,W,3], float32; zero for the exact form.

    The latent is as the UNet reads it; colours are in [0,1], beyond which nothing keeps them. As a
    `Scene` it looks the same from everywhere, and nothing is drawn.

    Args:
        latent_shape, image_size: of the model: (C, h, w), and both sides in pixels.
        generator: CPU generator of the noise that it starts as (mathematics.md 11.1).
    """

    fixed = "its --image.parameter, size and model"
    can_capture = True

    def __init__(
        self,
        cfg: ImageConfig,
        latent_shape: tuple[int, int, int],
        image_size: int,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.kind, self.rate = cfg.parameter, cfg.rate
        self.is_latent = self.kind == "latent"
        if self.is_latent:
            start = torch.randn(1, *latent_shape, generator=generator)
        else:
            size = cfg.size or image_size
            start = torch.rand(1, size, size, 3, generator=generator)
        self.register_parameter(self.kind, nn.Parameter(start))
        if cfg.exact:
            start.zero_()
            # The prediction of the last step, by which the next one is linked.
            self.register_buffer("link", torch.zeros_like(start))

    @property
    def value(self) -> nn.Parameter:
        """The parameter."""
        return getattr(self, self.kind)

    @property
    def device(self) -> torch.device:
        return self.value.device

    def trainables(self) -> dict[str, Trainable]:
        return {self.kind: Trainable(self.value, self.rate)}

    def draw(self, views: CameraBatch, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {}

    def render(self, views: CameraBatch, draws: Mapping[str, Tensor]) -> ImageSeen:
        return ImageSeen(self.value)

    def graph_key(self, views: CameraBatch) -> GraphKey:
        return GraphKey(self.kind)

    def watch_replay(self, views: CameraBatch) -> None:
        """It counts nothing."""

    @torch.no_grad()
    def set_latent(self, latent: Tensor, decode: Decode) -> None:
        """Become a latent [1,C,h,w], or its decoded image in the parameter's size."""
        if self.is_latent:
            self.value.copy_(latent)
            return
        rgb = F.interpolate(decode(latent), self.value.shape[1:3], mode="bilinear", antialias=True)
        self.value.copy_(rgb.permute(0, 2, 3, 1))

    @torch.no_grad()
    def picture(self, decode: Decode) -> Tensor:
        """The image [H,W,3] float32 in [0,1]; a latent is decoded."""
        if self.is_latent:
            return decode(self.value.detach())[0].permute(1, 2, 0)
        return self.value[0].detach().clamp(0, 1)
