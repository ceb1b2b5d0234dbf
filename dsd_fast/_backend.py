"""Access to the compiled module ``dsd_fast._C`` and the choice of backend.

Every op runs compiled code for the device its tensors are on. The pure-torch reference is an
explicit choice, made by the environment variable ``DSD_BACKEND=torch`` (read at each call), and
never a silent fallback. The compiled module is never None: it is there, or an ImportError tells why
not.
"""

import hashlib
import os
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Literal

import torch

_BACKENDS = ("compiled", "torch")

# Whether Triton can be imported; nothing imports it before a kernel is needed. No cached function,
# for torch.compile traces what asks.
_HAS_TRITON = find_spec("triton") is not None

# There in a source folder; an installed package has no sources that its module could lag behind.
_BINDINGS = Path(__file__).parent.parent / "csrc" / "bindings.cpp"


@cache
def _load() -> ModuleType | ImportError:
    try:
        from dsd_fast import _C
    except ImportError as error:
        return error
    if _is_stale(_C.build_info()):
        return ImportError(f"{_C.__file__} was built from other sources than {_BINDINGS.parent}")
    return _C


def _is_stale(build_info: dict[str, object]) -> bool:
    """Whether the module was built from other bindings than those in the source folder."""
    if not _BINDINGS.is_file():
        return False
    now = hashlib.sha256(_BINDINGS.read_bytes()).hexdigest()
    return build_info.get("bindings_sha256") != now


def extension() -> ModuleType:
    """The compiled module.

    Raises:
        ImportError: it is not built, does not load, or was built from other sources than those in
            the source folder; the cause is in the text and chained.
    """
    loaded = _load()
    if isinstance(loaded, ImportError):
        raise ImportError(
            f"dsd_fast's compiled kernels do not load: {loaded}. Build them with `pip install -e .`"
            " in the source folder, or choose the slow pure-torch reference with DSD_BACKEND=torch."
        ) from loaded
    return loaded


def keep_freed_memory(device: torch.device) -> None:
    """Make a run on the CPU keep the memory it frees, for the next step to take over.

    The C library otherwise hands large buffers back, and each step spends half its time on first
    touches of the same ones. It holds for the whole process and is not undone. Nothing happens for
    another device, with the pure-torch reference, or where the C library is not glibc.

    Raises:
        ImportError: as `extension`.
    """
    if device.type == "cpu" and backend(device) != "torch":
        extension().keep_freed_memory()


def backend(where: torch.Tensor | torch.device) -> Literal["torch", "compiled", "triton"]:
    """What runs for a tensor, or on a device: the one gate, which all ask who have a choice.

    - "torch": the pure-torch references and diffusers' own networks. ``DSD_BACKEND=torch`` asks for
      them, and then they run everywhere.
    - "compiled": the ops of csrc, and torch for what has Triton kernels.
    - "triton": the ops of csrc, and Triton's kernels: on CUDA where Triton is installed, for all
      tensors but those of float64.

    Raises:
        ValueError: ``DSD_BACKEND`` has another value than "compiled", "torch" or nothing.
    """
    asked = os.environ.get("DSD_BACKEND") or "compiled"
    if asked not in _BACKENDS:
        raise ValueError(f"DSD_BACKEND must be one of {', '.join(_BACKENDS)}, got {asked!r}")
    if asked == "torch":
        return "torch"
    # Ops ask before they check what they were given, which may be no tensor at all.
    if isinstance(where, torch.Tensor):
        fits = where.is_cuda and where.dtype != torch.float64
    else:
        fits = getattr(where, "type", None) == "cuda"
    return "triton" if fits and _HAS_TRITON else "compiled"


def deterministic() -> bool:
    """Whether the same call on CUDA must give the same bits, at some cost.

    ``torch.use_deterministic_algorithms(True)`` asks for it. With its ``warn_only`` what is fast
    stays, as it does in torch where there is no other way.
    """
    return (
        torch.are_deterministic_algorithms_enabled()
        and not torch.is_deterministic_algorithms_warn_only_enabled()
    )


def runs_on(capability: tuple[int, int], archs: str) -> bool:
    """Whether code built for `archs` (build_info's text, "86-real 90-virtual") runs on a GPU.

    Machine code runs within its major version from its own minor version on, PTX on everything not
    older; the suffixes "a" and "f" bind code to one version or family and count as exact.
    """
    device = capability[0] * 10 + capability[1]
    for item in archs.split():
        number, kind = item.split("-")
        if number[-1] in "af":
            fits = int(number[:-1]) == device
        elif kind == "virtual":
            fits = int(number) <= device
        else:
            fits = int(number) // 10 == capability[0] and int(number) <= device
        if fits:
            return True
    return False


def rebuild_for(capability: tuple[int, int]) -> str:
    """The way out for a GPU of a capability that a build has no code for."""
    return (
        "Build it again on this computer, `pip install -e .` in the source folder, or with "
        f"DSD_CUDA_ARCHS={capability[0]}.{capability[1]}; DSD_CUDA_ARCHS=all is for every GPU"
    )


@cache
def _check_cuda_device(index: int) -> None:
    """Raises RuntimeError in words when the compiled module cannot run on CUDA device `index`."""
    info = extension().build_info()
    if info["cuda"] is None:
        raise RuntimeError(
            "tensors are on a CUDA device, but dsd_fast was built for the CPU only: "
            f"{info['cuda_absent']}. Build it again on this computer with `pip install -e .` in "
            "the source folder (DSD_CUDA=1 insists on CUDA), or choose the slow pure-torch "
            "reference with DSD_BACKEND=torch."
        )
    capability = torch.cuda.get_device_capability(index)
    if not runs_on(capability, info["cuda_archs"]):
        raise RuntimeError(
            f"{torch.cuda.get_device_name(index)} has compute capability "
            f"{capability[0]}.{capability[1]}, but dsd_fast was built for {info['cuda_archs']}. "
            f"{rebuild_for(capability)}."
        )


def target(tensor: torch.Tensor) -> tuple[int, int, int]:
    """(device index or -1, CUDA stream, CPU threads): the last three arguments of a binding.

    The launch goes to the device of `tensor` and, on CUDA, to torch's current stream there.

    Raises:
        RuntimeError: a CUDA tensor and no code for its GPU.
        ValueError: neither a CPU nor a CUDA tensor.
    """
    device = tensor.device
    if device.type == "cpu":
        return -1, 0, torch.get_num_threads()
    if device.type == "cuda":
        _check_cuda_device(device.index)
        return device.index, torch.cuda.current_stream(device).cuda_stream, 0
    raise ValueError(
        f"dsd_fast has compiled kernels for cpu and cuda, got a tensor on {device}. "
        "DSD_BACKEND=torch selects the pure-torch reference, which runs anywhere."
    )


def address(tensor: torch.Tensor | None) -> int:
    """The tensor's data pointer for a binding, 0 for an absent one."""
    return 0 if tensor is None else tensor.data_ptr()


def aligned(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor, or a copy where CUDA cannot move 16 bytes of it at a time.

    For gradients, which autograd may hand over as a view that begins anywhere.
    """
    if tensor is None or not tensor.is_cuda or address(tensor) % 16 == 0:
        return tensor
    return tensor.clone()
