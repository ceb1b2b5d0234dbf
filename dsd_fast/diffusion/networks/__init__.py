"""Our forwards of the networks of diffusion models."""

from typing import Any

# A network of diffusers or transformers, or a part of one: what it has, torch's types do not tell.
Network = Any
