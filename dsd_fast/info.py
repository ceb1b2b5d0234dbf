"""``python -m dsd_fast.info``: what was built, what was found, what each missing piece would bring.

Every probe is guarded: the report comes out whatever is missing or broken, and says so in the line.
"""

import argparse
import hashlib
import importlib.util
import os
import platform
import re
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import dsd_fast
from dsd_fast.run.terminal import reader_may_leave

PRIOR = Path(__file__).resolve().parent / "assets" / "prior"

# Optional piece -> what it brings.
PIECES = {
    "diffusers": "opens diffusion models; without it nothing can be trained",
    "transformers": "encodes prompts; without it nothing can be trained",
    "triton": "torch.compile and fused passes on CUDA; nothing requires it",
    "tensorrt_rtx": "TensorRT for the UNet, GeForce and RTX (pip install dsd_fast[tensorrt])",
    "tensorrt": "TensorRT for the UNet on any GPU (pip install tensorrt onnx)",
    "pxr": "meshes as USDZ (pip install dsd_fast[usd])",
    "moderngl": "rendering training views for a prior of your own (pip install dsd_fast[prior])",
}


def _python() -> str:
    return f"{platform.python_version()} ({sys.executable}), {platform.platform()}"


def _torch() -> str:
    import torch

    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    return f"{torch.__version__} ({built_for}), {torch.get_num_threads()} CPU threads"


def _kernels_cpu() -> str:
    from dsd_fast._backend import extension

    info = extension().build_info()
    sanitize = f", sanitizers {info['sanitize']}" if info["sanitize"] else ""
    dense = ("by torch", "in float32 (AVX-512)", "in bfloat16 (AVX512-BF16)")[info["cpu_dense"]]
    return (
        f"{info['cpu_isa']} code, products of networks {dense}, compiler {info['compiler']}"
        f"{sanitize}"
    )


def _kernels_cuda() -> str:
    from dsd_fast._backend import extension

    info = extension().build_info()
    if info["cuda"] is None:
        return (
            f"not built: {info['cuda_absent']}. They make GPU runs possible: build again with "
            "`pip install -e .` in the source folder of the computer with the GPU (DSD_CUDA=1 "
            "builds for every GPU anywhere), and with CUDA_HOME where nvcc is not found"
        )
    major, minor = divmod(info["cuda"] // 10, 100)
    return f"built with CUDA {major}.{minor} for compute capability {_archs(info['cuda_archs'])}"


def _archs(built: str) -> str:
    """build_info's architectures in words: "86-real 89-real 89-virtual" is "8.6, 8.9+PTX"."""
    names: dict[str, str] = {}
    for item in built.split():
        found = re.fullmatch(r"(\d+)(\d[af]?)-(\w+)", item)
        if found is None:
            return built
        major, minor, kind = found.groups()
        name = f"{major}.{minor}"
        names[name] = names.get(name, "") if kind == "real" else "+PTX"
    return ", ".join(name + suffix for name, suffix in names.items())


def _backend_choice() -> str:
    import torch

    from dsd_fast._backend import backend

    is_reference = backend(torch.device("cpu")) == "torch"
    chosen = "pure-torch reference (slow)" if is_reference else "compiled kernels"
    return f"{chosen}; DSD_BACKEND={os.environ.get('DSD_BACKEND', '')!r}"


def _driver() -> str:
    text = Path("/proc/driver/nvidia/version")
    if not text.exists():
        return "no NVIDIA driver found: CPU runs only"
    return text.read_text().splitlines()[0].removeprefix("NVRM version: ").strip()


def _gpus() -> str:
    import torch

    from dsd_fast._backend import extension, rebuild_for, runs_on

    if not torch.cuda.is_available():
        return "none that torch can use: CPU runs only"
    archs = extension().build_info()["cuda_archs"]
    lines = []
    for i in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(i)
        capability = (found.major, found.minor)
        fits = not archs or runs_on(capability, archs)
        words = "" if fits else f", NO CODE BUILT FOR IT: {rebuild_for(capability)}"
        lines.append(
            f"{found.name}, compute capability {found.major}.{found.minor}, "
            f"{found.total_memory / 2**30:.1f} GiB{words}"
        )
    return "; ".join(lines)


def _prior() -> str:
    weights = sorted(PRIOR.rglob("*.safetensors"))
    if not weights:
        return f"missing ({PRIOR}); --model takes any diffusers Stable Diffusion folder instead"
    # The same number as DiffusionModel.model_hash, which run folders record.
    digest = hashlib.sha256()
    for path in weights:
        digest.update(path.read_bytes())
    size = sum(path.stat().st_size for path in PRIOR.rglob("*") if path.is_file())
    return f"{PRIOR}, {size / 1e6:.1f} MB, weights' sha256 {digest.hexdigest()[:12]}"


def _piece(name: str) -> str:
    if importlib.util.find_spec(name) is None:
        return f"missing: {PIECES[name]}"
    try:
        return version(name)
    except PackageNotFoundError:
        return "found, version unknown"


def _guarded(probe: Callable[[], str]) -> str:
    # A report of what is broken must outlive any way of being broken.
    try:
        return probe()
    except Exception as error:
        return f"cannot tell: {type(error).__name__}: {error}"


def report() -> list[tuple[str, str]]:
    """(name, finding) lines, in the order to show them."""
    probes: list[tuple[str, Callable[[], str]]] = [
        ("python", _python),
        ("torch", _torch),
        ("CPU kernels", _kernels_cpu),
        ("CUDA kernels", _kernels_cuda),
        ("backend", _backend_choice),
        ("driver", _driver),
        ("GPU", _gpus),
        ("embedded prior", _prior),
        *((name, lambda name=name: _piece(name)) for name in PIECES),
    ]
    return [
        ("dsd_fast", f"{dsd_fast.__version__} ({Path(dsd_fast.__file__).parent})"),
        *((name, _guarded(probe)) for name, probe in probes),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Print the report; there are no flags, and SystemExit (code 2) for any."""
    description = "Say what was built, what was found, what each missing piece would bring."
    parser = argparse.ArgumentParser("python -m dsd_fast.info", description=description)
    parser.parse_args(argv)
    lines = report()
    width = max(len(name) for name, _ in lines)
    with reader_may_leave():
        for name, finding in lines:
            print(f"{name:<{width}}  {finding}")


if __name__ == "__main__":
    main()
