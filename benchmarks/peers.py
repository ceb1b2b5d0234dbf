"""Other packages' times: recorded ones, and nerfacc beside ours where it is installed."""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import NamedTuple

RECORDED_ON = "H100"


class Recorded(NamedTuple):
    """A peer's time on one NVIDIA H100 80GB HBM3, torch 2.11, CUDA 13.0: median by CUDA events."""

    peer: str
    ms: float


# The revision of tiny-cuda-nn was not written down. The official loop is threestudio with
# tiny-cuda-nn and nerfacc 0.5.3, its field held at the initial blob.
_TCNN_16, _TCNN_32 = "tiny-cuda-nn fp16", "tiny-cuda-nn fp32"
_NERFACC = "nerfacc 0.5.3"
_OFFICIAL = "official loop"

# (case, size) -> peers that do the same: 2^20 uniform points in the same grid; marching and
# compositing of 0.77 (128² rays) and 12.25 million samples (512²).
RECORDED: dict[tuple[str, int], tuple[Recorded, ...]] = {
    ("encode/forward", 1 << 20): (Recorded(_TCNN_32, 0.809),),
    ("encode/forward-half", 1 << 20): (Recorded(_TCNN_16, 0.705),),
    ("encode/backward", 1 << 20): (Recorded(_TCNN_16, 2.43), Recorded(_TCNN_32, 3.98)),
    ("jacobian/forward", 1 << 20): (Recorded(_TCNN_16, 2.22), Recorded(_TCNN_32, 2.39)),
    # Value, input gradient, and the backward pass through both to the table.
    ("jacobian/forward-backward", 1 << 20): (Recorded(_TCNN_16, 17.2), Recorded(_TCNN_32, 26.0)),
    # Grid and a fully fused 64 → 4 network, compiled at run time; the unfused normals are those of
    # the grid alone.
    ("field/forward", 1 << 20): (Recorded(_TCNN_16, 0.78),),
    ("field/forward-backward", 1 << 20): (Recorded(_TCNN_16, 2.91),),
    ("field/normals", 1 << 20): (Recorded(_TCNN_16, 17.2),),
    ("march", 128): (Recorded(_NERFACC, 0.78),),
    ("march", 512): (Recorded(_NERFACC, 4.44),),
    ("composite/forward", 512): (Recorded(_NERFACC, 1.85),),
    ("composite/forward-backward", 128): (Recorded(_NERFACC, 1.19),),
    ("composite/forward-backward", 512): (Recorded(_NERFACC, 3.22),),
    # Render forward + field and march backward, as timed inside the loop.
    ("render", 128): (Recorded(_OFFICIAL, 14 + 24),),
    ("render", 512): (Recorded(_OFFICIAL, 180 + 542),),
}


class OfficialIteration(NamedTuple):
    """One iteration of the official loop, random weights in Stable Diffusion 2.1-base's networks.

    Medians in milliseconds, on the GPU of `Recorded`; perp-neg, one view, the field held at its
    initial blob.
    """

    ms: float
    unet_calls: int
    unet_ms: float  # of one call
    render_ms: float
    encode_ms: float
    encode_backward_ms: float
    render_backward_ms: float  # field and march
    samples_m: float  # millions kept
    allocated_gib: float  # peak
    in_use_gib: float  # of the device


# (width, progress) -> the official loop there.
OFFICIAL: dict[tuple[int, float], OfficialIteration] = {
    (128, 0.0): OfficialIteration(320, 4, 48, 14, 14, 19, 24, 0.47, 5.0, 8.0),
    (128, 0.5): OfficialIteration(512, 8, 31, 13, 14, 18, 23, 0.49, 5.0, 8.0),
    (128, 1.0): OfficialIteration(478, 10, 41, 13, 14, 18, 23, 0.49, 4.7, 6.5),
    (512, 0.0): OfficialIteration(999, 4, 39, 180, 14, 19, 542, 8.8, 24.5, 63.8),
    (512, 0.5): OfficialIteration(1106, 8, 34, 146, 14, 19, 423, 8.0, 22.9, 47.1),
    (512, 1.0): OfficialIteration(1091, 10, 35, 121, 14, 19, 362, 6.4, 27.8, 70.3),
}

# Case -> the same networks by diffusers 0.42 in float16, on the same GPU. Captured and compiled
# ones have the channels innermost.
_EAGER, _GRAPH, _COMPILED = "diffusers eager", "diffusers graph", "diffusers compiled"
NETWORKS: dict[str, tuple[Recorded, ...]] = {
    "unet/b4": (Recorded(_EAGER, 30.4), Recorded(_GRAPH, 15.7), Recorded(_COMPILED, 11.4)),
    "unet/b8": (Recorded(_EAGER, 33.1), Recorded(_GRAPH, 27.6), Recorded(_COMPILED, 19.6)),
    "vae/encode": (
        Recorded(_EAGER, 25.4),
        Recorded(_COMPILED, 21.6),
        Recorded("diffusers compiled, graph", 18.5),
    ),
}


@cache
def nerfacc() -> ModuleType | None:
    """The installed nerfacc, or None. It computes on CUDA only."""
    try:
        import nerfacc
    except ImportError:
        return None
    return nerfacc
