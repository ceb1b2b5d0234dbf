"""dsd_fast: text-to-3D by Diverse Score Distillation on one consumer GPU.

``import dsd_fast`` is lean: names below are loaded on first use, so that neither diffusers nor
triton is imported and no CUDA context is made before something needs one.
"""

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dsd_fast.ops import composite as composite
    from dsd_fast.ops import march as march
    from dsd_fast.scene.encoding import HashGrid as HashGrid

# After each operation torch's OpenMP threads spin for some milliseconds in wait of the next one, on
# the very cores that the compiled kernels' threads need; on a machine that does something else too,
# that costs several times the work itself. OpenMP reads this once, when torch loads it.
if "torch" not in sys.modules:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Public name -> the module that defines it.
_LAZY = {
    "HashGrid": "dsd_fast.scene.encoding",
    "composite": "dsd_fast.ops",
    "march": "dsd_fast.ops",
}
_SUBMODULES = ("diffusion", "guidance", "ops")

__all__ = ["HashGrid", "__version__", "composite", "march"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    if name in _SUBMODULES:
        return import_module(f"dsd_fast.{name}")
    raise AttributeError(f"module 'dsd_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_SUBMODULES])
