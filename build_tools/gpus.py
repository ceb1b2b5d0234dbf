"""Which NVIDIA GPUs this machine has, and for which architectures to compile.

A compute capability is (major, minor), as (8, 9). Architectures have CMake's form: "89-real" is
machine code for 8.9, "89-virtual" PTX that newer GPUs compile when it is loaded.
"""

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

OLDEST = (7, 5)  # Turing: the kernels use its tensor cores and instructions.

# Oldest major version of a driver -> major version of CUDA that it runs.
CUDA_OF_DRIVER = {580: 13, 525: 12, 450: 11}

# In a process of its own: a driver that is broken may hang or crash who asks it.
ASK_LIBCUDA = """
import ctypes, sys
cuda = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
def call(name, *arguments):
    status = getattr(cuda, name)(*arguments)
    if status:
        sys.exit(f"{name}: {status}")
def number(name, *arguments):
    value = ctypes.c_int()
    call(name, ctypes.byref(value), *arguments)
    return value.value
call("cuInit", 0)
print(number("cuDriverGetVersion") // 1000)
for i in range(number("cuDeviceGetCount")):
    # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
    print(number("cuDeviceGetAttribute", 75, i), number("cuDeviceGetAttribute", 76, i))
"""


class Driver(NamedTuple):
    """An NVIDIA driver, and what it says."""

    cuda: int  # newest major version of CUDA that it runs, 0 if older than all we know
    capabilities: tuple[tuple[int, int], ...]  # of its GPUs, sorted; empty if it does not say


@cache
def find_driver() -> Driver | None:
    """The driver of this machine with all of its GPUs, None without a driver."""
    return ask_libcuda() or ask_smi() or ask_proc()


def ask_libcuda() -> Driver | None:
    """By the driver's library, which knows of packages for forward compatibility too."""
    first, *rows = answer([sys.executable, "-c", ASK_LIBCUDA]).split("\n")
    if not first:
        return None
    pairs = (row.split() for row in rows if row)
    return Driver(int(first), tuple(sorted({(int(major), int(minor)) for major, minor in pairs})))


def ask_smi() -> Driver | None:
    """By nvidia-smi, where the library is not to be found."""
    query = ["nvidia-smi", "--query-gpu=driver_version,compute_cap", "--format=csv,noheader"]
    rows = re.findall(r"^(\d+)[\d.]*, (\d+)\.(\d+)\s*$", answer(query), re.MULTILINE)
    if not rows:
        return None
    capabilities = sorted({(int(major), int(minor)) for _, major, minor in rows})
    return Driver(cuda_of(int(rows[0][0])), tuple(capabilities))


def ask_proc() -> Driver | None:
    """By what the kernel's module writes down, which names no GPU."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"\b(\d{3})\.\d+", text)
    return Driver(cuda_of(int(found.group(1))) if found else 0, ())


def answer(command: list[str]) -> str:
    """What a command prints, "" if it fails or takes longer than 30 s."""
    env = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    try:
        result = subprocess.run(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.decode(errors="replace").strip() if result.returncode == 0 else ""


def cuda_of_nvcc(nvcc: Path) -> int:
    """Major version of CUDA that an nvcc is of, 0 if it does not say."""
    found = re.search(r"release (\d+)\.", answer([str(nvcc), "--version"]))
    return int(found[1]) if found else 0


def cuda_of(driver: int) -> int:
    """Major version of CUDA that a driver of this major version runs."""
    return next((cuda for oldest, cuda in CUDA_OF_DRIVER.items() if driver >= oldest), 0)


def usable(driver: Driver) -> list[tuple[int, int]]:
    """The capabilities of the GPUs that the kernels can run on."""
    return [capability for capability in driver.capabilities if capability >= OLDEST]


def archs_of(capabilities: list[tuple[int, int]], known: list[int]) -> str:
    """The least code for these GPUs by a compiler that knows the architectures `known` (89, 120).

    Where `known` is empty it may know any.

    A GPU that is newer than the compiler gets machine code of an older one of its major version,
    which runs on it, or else the newest PTX.

    >>> archs_of([(8, 9)], [75, 86, 89])
    '89-real'
    >>> archs_of([(8, 6), (12, 1)], [75, 86, 90])
    '86-real;90-virtual'
    """
    archs = []
    for major, minor in capabilities:
        number = 10 * major + minor
        older = [arch for arch in known or [number] if arch <= number]
        if not older:
            raise SystemExit(
                f"dsd_fast: this nvcc compiles for {', '.join(map(str, known))}, none of which "
                f"runs on the GPU here, of compute capability {major}.{minor}; set CUDA_HOME to a "
                "CUDA toolkit that knows it, or DSD_CUDA=0 for the CPU backend alone"
            )
        kind = "real" if max(older) // 10 == major else "virtual"
        archs.append(f"{max(older)}-{kind}")
    return ";".join(dict.fromkeys(archs))


def known_archs(nvcc: Path) -> list[int]:
    """The architectures that an nvcc compiles for, as 89; empty if it does not say."""
    listed = answer([str(nvcc), "--list-gpu-arch"])
    return sorted(int(arch) for arch in re.findall(r"^compute_(\d+)$", listed, re.MULTILINE))


def parse_archs(text: str, known: list[int], name: str = "DSD_CUDA_ARCHS") -> str:
    """The architecture list of the environment variable `name` in CMake's form; "" for "all".

    >>> parse_archs("8.6 8.9+PTX", [])
    '86-real;89-real;89-virtual'

    Raises:
        SystemExit: it cannot be read, or names what is not among `known` (if that is not empty).
    """
    if text.strip().lower() == "all":
        return ""

    def refusal(why: str) -> SystemExit:
        way_out = "" if name == "DSD_CUDA_ARCHS" else "; DSD_CUDA_ARCHS, if set, is read instead"
        return SystemExit(f"dsd_fast: {name}={text!r}: {why}{way_out}")

    archs = []
    for item in filter(None, re.split(r"[;,\s]+", text)):
        found = re.fullmatch(r"(\d{1,2})\.?(\d)([af]?)(\+PTX)?", item)
        if not found:
            raise refusal(
                f"cannot read the CUDA architecture {item!r}; write 8.9, 89 or 8.9+PTX, separated "
                "by ';' or spaces, or all, alone, for every one"
            )
        major, minor, suffix, ptx = found.groups()
        number = int(major + minor)
        if number < 10 * OLDEST[0] + OLDEST[1]:
            raise refusal(f"the kernels need a GPU of Turing (7.5) or newer, got {item!r}")
        if known and number not in known:
            names = ", ".join(f"{arch // 10}.{arch % 10}" for arch in known)
            raise refusal(f"this nvcc does not know {item!r}, it compiles for {names}")
        archs.append(f"{number}{suffix}-real")
        if ptx:
            archs.append(f"{number}{suffix}-virtual")
    if not archs:
        raise refusal("it names no CUDA architecture; write 8.9, say, or all")
    return ";".join(dict.fromkeys(archs))
