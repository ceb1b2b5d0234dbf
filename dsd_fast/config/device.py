"""The device that a name asks for."""

from __future__ import annotations

import torch

from dsd_fast.ranges import ConfigError


def resolve_device(name: str) -> torch.device:
    """The device that a name asks for; ConfigError when it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(
            f'--device takes "auto", "cpu", "cuda" or "cuda:N", got {name!r}'
        ) from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device {name}: only cpu and cuda are supported")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(
                f"--device {name}: this PyTorch ({torch.__version__}) sees no CUDA GPU. "
                "`python -m dsd_fast.info` says what was found; --device cpu works everywhere."
            )
        if (device.index or 0) >= torch.cuda.device_count():
            raise ConfigError(
                f"--device {name}: there are {torch.cuda.device_count()} GPUs, numbered from 0"
            )
    return device
