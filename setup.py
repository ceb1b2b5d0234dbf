"""Builds dsd_fast/_C through CMakeLists.txt; everything else about the package is pyproject.toml.

The environment variables that it reads are in docs/reference/environment.md.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # build_tools

from build_tools import gpus, progress  # noqa: E402

# Here, for every kind of build and install, so that none compiles what another has compiled.
BUILD = ROOT / "build" / f"cmake-{sysconfig.get_platform()}"

# See CMakeLists.txt.
STABLE_ABI = os.name == "posix" and not sysconfig.get_config_var("Py_GIL_DISABLED")
CMAKE = (3, 22)

# nvcc, its headers and the static runtime as wheels. CUDA 13 needs driver 580 or newer.
NVCC_WHEELS = [
    "nvidia-cuda-nvcc>=13,<14",
    "nvidia-cuda-crt>=13,<14",
    "nvidia-nvvm>=13,<14",
    "nvidia-cuda-runtime>=13,<14",
    "nvidia-cuda-cccl>=13,<14",
]
NVCC_WHEELS_CUDA = 13
NVCC = "nvcc.exe" if os.name == "nt" else "nvcc"


def find_nvcc() -> Path | None:
    """nvcc of CUDA_HOME, PATH, the nvidia-cuda-nvcc wheel, /usr/local/cuda, or an earlier build."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        nvcc = Path(home, "bin", NVCC)
        if not nvcc.exists():
            raise SystemExit(f"dsd_fast: CUDA_HOME is {home}, but {nvcc} does not exist")
        return nvcc
    on_path = shutil.which("nvcc")
    if on_path:
        return Path(on_path)
    in_wheel = nvcc_of_wheel()
    if in_wheel is not None:
        return in_wheel
    usual = Path("/usr/local/cuda/bin", NVCC)
    if usual.exists():
        return usual
    return max(BUILD.parent.glob(f"nvcc-*/bin/{NVCC}"), default=None)


def nvcc_of_wheel() -> Path | None:
    """nvcc of the nvidia-cuda-nvcc wheel, None where it is not installed.

    An isolated build's environment goes when the build ends, and objects are of the compiler and
    the headers at a path: from there it is copied to build/, for this build and the next ones.
    """
    spec = find_spec("nvidia")
    found = [
        nvcc
        for folder in (spec.submodule_search_locations or [] if spec else [])
        for nvcc in Path(folder).glob(f"cu[0-9]*/bin/{NVCC}")
    ]
    if not found:
        return None
    nvcc = max(found)
    if find_spec("torch") is not None:  # an environment to live in, not one for this build alone
        return nvcc
    kept = BUILD.parent / f"nvcc-{version('nvidia-cuda-nvcc')}"
    if not kept.exists():
        partial = BUILD.parent / "nvcc.partial"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(nvcc.parent.parent, partial)
        partial.rename(kept)
    return kept / "bin" / NVCC


def cuda_absent() -> str:
    """Why this build is to be without the CUDA backend, "" if it is to have it.

    `DSD_CUDA` says so, or a list of architectures, or else a GPU that this machine has.
    """
    value = os.environ.get("DSD_CUDA", "").strip()
    if value not in ("", "0", "1"):
        raise SystemExit(f"dsd_fast: DSD_CUDA must be 0 or 1, got {value!r}")
    if value == "0":
        return "switched off by DSD_CUDA=0"
    if is_demanded():
        return ""
    driver = gpus.find_driver()
    if driver is None:
        return "no NVIDIA driver was found"
    if driver.capabilities and not gpus.usable(driver):
        found = ", ".join(f"{major}.{minor}" for major, minor in driver.capabilities)
        return f"no GPU of Turing or newer was found, but compute capability {found}"
    nvcc = find_nvcc()
    cuda = NVCC_WHEELS_CUDA if nvcc is None else gpus.cuda_of_nvcc(nvcc)
    if cuda > driver.cuda:
        return (
            f"the NVIDIA driver is too old for CUDA {cuda}, of which nvcc is; update it, or set "
            "CUDA_HOME to an older CUDA toolkit"
        )
    return ""


def is_demanded() -> bool:
    """Whether the CUDA backend is to be built whatever this machine has."""
    return os.environ.get("DSD_CUDA", "").strip() == "1" or bool(
        os.environ.get("DSD_CUDA_ARCHS", "").strip()
    )


def cuda_archs(nvcc: Path) -> str:
    """The architectures to compile for, in CMake's form; "" for all of them (CMakeLists.txt)."""
    known = gpus.known_archs(nvcc)
    for name in ("DSD_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST"):
        if os.environ.get(name, "").strip():
            return gpus.parse_archs(os.environ[name], known, name)
    driver = None if is_demanded() else gpus.find_driver()
    return gpus.archs_of(gpus.usable(driver), known) if driver else ""


def build_requirements() -> list[str]:
    """Wheels to add to an isolated build: the tools that this machine has not."""
    wheels = []
    if cmake_version() < CMAKE:
        wheels.append(f"cmake>={CMAKE[0]}.{CMAKE[1]}")
    if not runs("ninja"):
        wheels.append("ninja")
    if sys.platform == "linux" and not cuda_absent() and find_nvcc() is None:
        wheels += NVCC_WHEELS
    return wheels


def runs(tool: str) -> bool:
    """Whether a tool is on PATH and starts: one of a virtual environment may not, in isolation."""
    return bool(gpus.answer([tool, "--version"]))


def cmake_version() -> tuple[int, ...]:
    """(major, minor) of the cmake on PATH, (0, 0) without one that starts."""
    found = re.search(r"version (\d+)\.(\d+)", gpus.answer(["cmake", "--version"]))
    return (int(found[1]), int(found[2])) if found else (0, 0)


class FreshPackage(build_py):
    """Collects the package's files, none of an earlier build's that are no longer in it."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib, "dsd_fast"), ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    """Configures and builds the CMake project, with _C placed where setuptools wants it."""

    def run(self) -> None:
        super().run()
        if self.inplace:
            link_kernels()

    def build_extension(self, ext: Extension) -> None:
        options, env = cmake_options()
        forget_other_tools(options)
        generator = ["-G", "Ninja"] if options["CMAKE_MAKE_PROGRAM"] else []
        definitions = [f"-D{key}={value}" for key, value in options.items() if value is not None]
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        configure = ["cmake", "-S", str(ROOT), "-B", str(BUILD), *generator, *definitions]
        run(configure, env, "looking for compilers")
        build = ["cmake", "--build", str(BUILD), "--config", "Release", "--parallel", jobs]
        run(build, env, backends(options))

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        for other in target.parent.glob("_C.*"):  # Python would take one for its version alone
            if other.suffix in (".so", ".pyd"):
                other.unlink()
        (built,) = (BUILD / "module").rglob(f"_C*{target.suffix}")
        shutil.copy2(built, target)


def forget_other_tools(options: dict[str, object]) -> None:
    """Empties the build folder if its objects are of other compilers, or of another Python."""
    cxx = os.environ.get("CXX", "c++")
    tools = {
        "python": options["Python_EXECUTABLE"],
        "generator": "Ninja" if options["CMAKE_MAKE_PROGRAM"] else "",
        "cxx": f"{cxx} {gpus.answer([cxx, '--version'])}",
        "flags": [os.environ.get(name) for name in ("CXXFLAGS", "CUDAFLAGS", "LDFLAGS")],
    }
    nvcc = options.get("CMAKE_CUDA_COMPILER")
    if nvcc is not None:
        host = os.environ.get("CUDAHOSTCXX", "")
        tools["nvcc"] = f"{nvcc} {host} {gpus.answer([str(nvcc), '--version'])}"
    record = BUILD / "made_with.json"
    try:
        before = json.loads(record.read_text())
    except (OSError, ValueError):
        before = dict.fromkeys(tools)
    if any(before.get(name, tool) != tool for name, tool in tools.items()):
        shutil.rmtree(BUILD, ignore_errors=True)
        before = {}
    BUILD.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps({**before, **tools}))


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


def cmake_options() -> tuple[dict[str, object], dict[str, str]]:
    """(CMake definitions, environment) for a build."""
    # One that stays: an isolated build has a Python of its own.
    python = getattr(sys, "_base_executable", None) or sys.executable
    options: dict[str, object] = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": BUILD / "module",
        "CMAKE_MAKE_PROGRAM": shutil.which("ninja") if runs("ninja") else None,
        "Python_EXECUTABLE": python,
        "DSD_STABLE_ABI": "ON" if STABLE_ABI else "OFF",
        "DSD_SANITIZE": os.environ.get("DSD_SANITIZE", ""),
        "DSD_CUDA": "OFF",
    }
    env = dict(os.environ)
    absent = cuda_absent()
    nvcc = None if absent else find_nvcc()
    if nvcc is not None:
        options["DSD_CUDA"] = "ON"
        options["DSD_CUDA_ARCHS"] = cuda_archs(nvcc)
        options["CMAKE_CUDA_COMPILER"] = nvcc
        # The wheels keep the static runtime in lib, where nvcc does not look by itself.
        lib = nvcc.resolve().parent.parent / "lib"
        env["LIBRARY_PATH"] = os.pathsep.join(filter(None, [str(lib), env.get("LIBRARY_PATH")]))
    elif not absent and is_demanded():
        raise SystemExit(
            "dsd_fast: the CUDA backend is demanded (DSD_CUDA=1 or DSD_CUDA_ARCHS), but no nvcc "
            "was found. Set CUDA_HOME, put nvcc on PATH, or pip install "
            + " ".join(f'"{wheel}"' for wheel in NVCC_WHEELS)
        )
    else:
        options["DSD_CUDA_ABSENT"] = absent or "no nvcc was found"
        print(f"dsd_fast: the CPU backend only: {options['DSD_CUDA_ABSENT']}")
    return options, env


def backends(options: dict[str, object]) -> str:
    """What a build with these CMake definitions compiles, in few words."""
    if options["DSD_CUDA"] == "OFF":
        return "CPU kernels"
    numbers = dict.fromkeys(re.findall(r"\d+", str(options["DSD_CUDA_ARCHS"])))
    return "CPU and CUDA kernels" + (f" for {', '.join(numbers)}" if numbers else "")


def run(command: list[str], env: dict[str, str], title: str) -> None:
    """Runs a build step, `title` on the terminal; its failure ends the build with a way out."""
    try:
        progress.run(command, env, title)
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
requirements = build_requirements() if "egg_info" in sys.argv else []

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
    ext_modules=[Extension("dsd_fast._C", sources=[], py_limited_api=STABLE_ABI)],
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if STABLE_ABI else {},
    cmdclass={"build_ext": CMakeBuild, "build_py": FreshPackage},
    setup_requires=requirements,
)
