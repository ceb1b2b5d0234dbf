"""Builds dsd_fast/_C through CMakeLists.txt; everything else about the package is pyproject.toml.

The environment variables that it reads are in docs/reference/environment.md.
"""

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent

# nvcc, its headers and the static runtime as wheels. CUDA 13 needs driver 580 or newer.
NVCC_WHEELS = [
    "nvidia-cuda-nvcc>=13,<14",
    "nvidia-cuda-crt>=13,<14",
    "nvidia-nvvm>=13,<14",
    "nvidia-cuda-runtime>=13,<14",
    "nvidia-cuda-cccl>=13,<14",
]
NVCC_WHEELS_DRIVER = 580


def find_nvcc() -> Path | None:
    """nvcc of CUDA_HOME, of PATH or of the nvidia-cuda-nvcc wheel, in this order."""
    name = "nvcc.exe" if os.name == "nt" else "nvcc"
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        nvcc = Path(home, "bin", name)
        if not nvcc.exists():
            raise SystemExit(f"dsd_fast: CUDA_HOME is {home}, but {nvcc} does not exist")
        return nvcc
    on_path = shutil.which("nvcc")
    if on_path:
        return Path(on_path)
    spec = find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        found = sorted(Path(folder).glob(f"cu[0-9]*/bin/{name}"))
        if found:
            return found[-1]
    usual = Path("/usr/local/cuda/bin/nvcc")
    return usual if usual.exists() else None


def driver_version() -> int | None:
    """Major version of the NVIDIA driver here, None without one."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"\b(\d{3})\.\d+", text)
    return int(found.group(1)) if found else None


def wants_cuda() -> bool | None:
    """DSD_CUDA as yes, no or None (decide by what is found)."""
    value = os.environ.get("DSD_CUDA", "").strip()
    if value not in ("", "0", "1"):
        raise SystemExit(f"dsd_fast: DSD_CUDA must be 0 or 1, got {value!r}")
    return None if value == "" else value == "1"


def nvcc_requirements() -> list[str]:
    """Wheels to add to an isolated build: nvcc, where CUDA is wanted and there is no toolkit."""
    if wants_cuda() is False or sys.platform != "linux" or find_nvcc() is not None:
        return []
    driver = driver_version()
    if wants_cuda() or (driver is not None and driver >= NVCC_WHEELS_DRIVER):
        return NVCC_WHEELS
    return []


def cmake_archs(text: str) -> str:
    """An architecture list in CMake's form.

    >>> cmake_archs("8.6 8.9+PTX")
    '86-real;89-real;89-virtual'
    """
    archs = []
    for item in re.split(r"[;,\s]+", text.strip()):
        found = re.fullmatch(r"(\d+)\.?(\d)([af]?)(\+PTX)?", item)
        if not found:
            raise SystemExit(
                f"dsd_fast: cannot read the CUDA architecture {item!r}; write 8.9, 89 or 8.9+PTX, "
                "separated by ';' or spaces"
            )
        major, minor, suffix, ptx = found.groups()
        archs.append(f"{major}{minor}{suffix}-real")
        if ptx:
            archs.append(f"{major}{minor}{suffix}-virtual")
    return ";".join(archs)


class CMakeBuild(build_ext):
    """Configures and builds the CMake project, with _C placed where setuptools wants it."""

    def run(self) -> None:
        super().run()
        if self.inplace:
            link_kernels()

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        options, env = cmake_options(target.parent)
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        definitions = [f"-D{key}={value}" for key, value in options.items()]

        # CMake's cache keeps paths of tools, which an isolated build takes with it when it ends.
        build_dir = Path(self.build_temp).resolve()
        tools = [shutil.which("cmake") or "", shutil.which("ninja") or ""]
        made_with, wanted = build_dir / "made_with.txt", "\n".join([*tools, *definitions])
        if not made_with.exists() or made_with.read_text() != wanted:
            shutil.rmtree(build_dir, ignore_errors=True)
            build_dir.mkdir(parents=True)
            made_with.write_text(wanted)

        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        run(["cmake", "-S", str(ROOT), "-B", str(build_dir), *generator, *definitions], env)
        run(["cmake", "--build", str(build_dir), "--config", "Release", "--parallel", jobs], env)


def link_kernels() -> None:
    """Makes kernels/ dsd_fast.kernels in the source folder, as package_dir does where installed."""
    link = ROOT / "dsd_fast" / "kernels"
    if link.is_symlink():
        return
    shutil.rmtree(link, ignore_errors=True)  # an earlier copy
    try:
        link.symlink_to(Path("..", "kernels"), target_is_directory=True)
    except OSError:  # Windows without the right to make links
        shutil.copytree(ROOT / "kernels", link)


def cmake_options(output: Path) -> tuple[dict[str, object], dict[str, str]]:
    """(CMake definitions, environment) for a build that puts the module into `output`."""
    import pybind11

    options: dict[str, object] = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": output,
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "DSD_SANITIZE": os.environ.get("DSD_SANITIZE", ""),
        "DSD_CUDA": "OFF",
        "DSD_CUDA_ABSENT": (
            "switched off by DSD_CUDA=0" if wants_cuda() is False else "no nvcc was found"
        ),
    }
    env = dict(os.environ)
    nvcc = None if wants_cuda() is False else find_nvcc()
    if nvcc is not None:
        archs = env.get("DSD_CUDA_ARCHS") or env.get("TORCH_CUDA_ARCH_LIST")
        options["DSD_CUDA"] = "ON"
        options["DSD_CUDA_ARCHS"] = cmake_archs(archs) if archs else ""
        options["CMAKE_CUDA_COMPILER"] = nvcc
        # The wheels keep the static runtime in lib, where nvcc does not look by itself.
        lib = nvcc.resolve().parent.parent / "lib"
        env["LIBRARY_PATH"] = os.pathsep.join(filter(None, [str(lib), env.get("LIBRARY_PATH")]))
    elif wants_cuda():
        raise SystemExit(
            "dsd_fast: DSD_CUDA=1, but no nvcc was found. Set CUDA_HOME, put nvcc on PATH, or "
            "pip install " + " ".join(f'"{wheel}"' for wheel in NVCC_WHEELS)
        )
    else:
        print("dsd_fast: no nvcc wanted or found, building the CPU backend only")
        driver = driver_version()
        if wants_cuda() is None and driver is not None and driver < NVCC_WHEELS_DRIVER:
            print(
                f"dsd_fast: the NVIDIA driver {driver} is too old for the nvcc wheels, which need "
                f"{NVCC_WHEELS_DRIVER}; for the CUDA backend update it, or set CUDA_HOME to a "
                "CUDA 12 toolkit"
            )
    return options, env


def run(command: list[str], env: dict[str, str]) -> None:
    """Runs a build step; its failure ends the build with a way out."""
    try:
        subprocess.run(command, check=True, env=env)
    except FileNotFoundError:
        raise SystemExit("dsd_fast: cmake was not found: pip install cmake ninja") from None
    except subprocess.CalledProcessError as error:
        raise SystemExit(
            f"dsd_fast: {' '.join(command[:2])} failed with status {error.returncode}; the "
            "compiler's words are above. A C++17 compiler is needed (GCC 9+, Clang 10+, MSVC "
            "2019+; nvcc may accept only older ones: set CUDAHOSTCXX). DSD_CUDA=0 builds without "
            "CUDA."
        ) from None


# The hooks that ask for build requirements run egg_info; a direct build must never reach out to
# the network, so only they see the wheels.
build_requirements = nvcc_requirements() if "egg_info" in sys.argv else []

setup(
    # A source folder that was built in place has the kernels already.
    packages=sorted({*find_packages(include=["dsd_fast", "dsd_fast.*"]), "dsd_fast.kernels"}),
    package_dir={"dsd_fast.kernels": "kernels"},
    include_package_data=False,
    package_data={
        "dsd_fast": ["assets/**/*", "py.typed"],
        "dsd_fast.evaluate": ["*.css"],
        "dsd_fast.judge": ["*.tsv"],
        "dsd_fast.prior": ["*.glsl"],
    },
    ext_modules=[Extension("dsd_fast._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    setup_requires=build_requirements,
)
