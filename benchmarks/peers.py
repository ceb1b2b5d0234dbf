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


@cache
def nerfacc() -> ModuleType | None:
    """The installed nerfacc, or None. It computes on CUDA only."""
    try:
        import nerfacc
    except ImportError:
        return None
    return nerfacc
