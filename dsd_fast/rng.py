"""Named, independent random streams derived from one seed.

Every consumer of randomness draws from its own CPU generator, so that one more draw in one place
(a validation image, a larger batch) cannot shift the numbers of another, and the same seed gives
the same trajectory on every device.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

# The stream names are part of what a seed means: renaming one changes every result.
STREAM_NAMES = ("noise", "init", "cameras", "sampler", "guidance")


def stream_seed(seed: int, name: str) -> int:
    """A 63-bit seed for the stream `name`, unrelated to that of any other (seed, name) pair."""
    digest = hashlib.blake2b(f"{int(seed)}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class RngStreams:
    """CPU generators of one run, as attributes:

    `noise` the trajectory's seed noise, `init` network weights, `cameras` cameras and lights,
    `sampler` ray jitter, occupancy, background and shading draws, `guidance` the VAE posterior and
    the time jitter.
    """

    noise: torch.Generator
    init: torch.Generator
    cameras: torch.Generator
    sampler: torch.Generator
    guidance: torch.Generator

    def __init__(self, seed: int) -> None:
        self.seed = int(seed)
        for name in STREAM_NAMES:
            generator = torch.Generator(device="cpu")
            generator.manual_seed(stream_seed(self.seed, name))
            setattr(self, name, generator)

    def state_dict(self) -> dict[str, Tensor]:
        """The state of each stream: name -> uint8 tensor."""
        return {name: getattr(self, name).get_state() for name in STREAM_NAMES}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue every stream where `state_dict` was taken.

        Raises ValueError if a stream is missing from or unknown in `state`.
        """
        if set(state) != set(STREAM_NAMES):
            raise ValueError(
                f"random state: expected the streams {sorted(STREAM_NAMES)}, got {sorted(state)}; "
                "was the checkpoint written by another version?"
            )
        for name in STREAM_NAMES:
            getattr(self, name).set_state(state[name].cpu())
