"""setup.py and build_tools: what is compiled on which machine, what is kept, what is shown."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from dsd_fast import _backend, info

ROOT = Path(__file__).parent.parent

# What nvcc 13.0 answers.
KNOWN = [75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121]

posix = pytest.mark.skipif(os.name != "posix", reason="shell scripts and pseudo-terminals")


@pytest.fixture
def setup_py(monkeypatch) -> dict:
    """The functions of setup.py, by name, as in an environment that says nothing of the build."""
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    monkeypatch.setattr(sys, "argv", ["setup.py"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("DSD_CUDA", "DSD_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    scope: dict = {"__file__": str(ROOT / "setup.py"), "__name__": "setup"}
    exec(compile((ROOT / "setup.py").read_text(), "setup.py", "exec"), scope)
    return scope


@pytest.fixture
def gpus(setup_py) -> ModuleType:
    return setup_py["gpus"]


@pytest.fixture
def machine(setup_py, gpus, monkeypatch):
    """Sets which driver and which nvcc (its CUDA) this machine has."""

    def set_machine(cuda: int | None, *capabilities: tuple[int, int], nvcc: int = 13) -> None:
        driver = None if cuda is None else gpus.Driver(cuda, capabilities)
        monkeypatch.setattr(gpus, "find_driver", lambda: driver)
        found = Path("nvcc") if nvcc else None
        monkeypatch.setitem(setup_py, "find_nvcc", lambda: found)
        monkeypatch.setattr(gpus, "cuda_of_nvcc", lambda _: nvcc)
        monkeypatch.setattr(gpus, "known_archs", lambda _: KNOWN)

    return set_machine


# ---- for which GPUs -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "capabilities, archs",
    [
        ([(8, 9)], "89-real"),
        ([(8, 6), (8, 6), (12, 0)], "86-real;120-real"),  # several: the union
        ([(6, 1), (9, 0)], "90-real"),  # one that nothing of ours runs on
        ([], ""),  # a driver that names no GPU: all
    ],
)
def test_a_build_is_for_the_gpus_that_are_there(capabilities, archs, setup_py, machine) -> None:
    machine(13, *capabilities)
    options, _ = setup_py["cmake_options"]()
    assert (options["DSD_CUDA"], options["DSD_CUDA_ARCHS"]) == ("ON", archs)


@pytest.mark.parametrize(
    "environment, archs",
    [
        ({"DSD_CUDA": "1"}, ""),
        ({"DSD_CUDA_ARCHS": "all"}, ""),
        ({"DSD_CUDA": "1", "DSD_CUDA_ARCHS": "8.6"}, "86-real"),
        ({"DSD_CUDA_ARCHS": "8.6;9.0+PTX"}, "86-real;90-real;90-virtual"),
        ({"DSD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "8.0"}, "80-real"),
        ({"DSD_CUDA_ARCHS": "all", "TORCH_CUDA_ARCH_LIST": "8.0"}, ""),
    ],
)
@pytest.mark.parametrize("has_gpu", [True, False])
def test_architectures_that_were_asked_for(
    environment, archs, has_gpu, setup_py, machine, monkeypatch
) -> None:
    """With a GPU and without one."""
    machine(*(13, (8, 9)) if has_gpu else (None,))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    options, _ = setup_py["cmake_options"]()
    assert (options["DSD_CUDA"], options["DSD_CUDA_ARCHS"]) == ("ON", archs)


@pytest.mark.parametrize(
    "environment, driver, nvcc, reason",
    [
        ({"DSD_CUDA": "0"}, (13, (8, 9)), 13, "switched off by DSD_CUDA=0"),
        ({"DSD_CUDA": "0", "DSD_CUDA_ARCHS": "all"}, (13,), 13, "switched off by DSD_CUDA=0"),
        ({}, (None,), 13, "no NVIDIA driver was found"),
        ({"TORCH_CUDA_ARCH_LIST": "8.0"}, (None,), 13, "no NVIDIA driver was found"),
        ({}, (12, (6, 1)), 12, "no GPU of Turing or newer was found, but compute capability 6.1"),
        ({}, (12, (8, 9)), 13, "the NVIDIA driver is too old for CUDA 13, of which nvcc is"),
        ({}, (12, (8, 9)), 0, "the NVIDIA driver is too old for CUDA 13, of which nvcc is"),
        ({}, (13, (8, 9)), 0, "no nvcc was found"),
    ],
)
def test_a_build_without_cuda_says_why(
    environment, driver, nvcc, reason, setup_py, machine, monkeypatch
) -> None:
    machine(*driver, nvcc=nvcc)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    options, _ = setup_py["cmake_options"]()
    absent = options["DSD_CUDA_ABSENT"]
    assert options["DSD_CUDA"] == "OFF" and absent.startswith(reason)
    built = {"cuda": None, "cuda_archs": "", "cuda_absent": absent}
    extension = SimpleNamespace(build_info=lambda: built)
    monkeypatch.setattr(_backend, "extension", lambda: extension)
    assert dict(info.report())["CUDA kernels"].startswith(f"not built: {reason}")


def test_wheels_of_nvcc_come_where_a_gpu_is_and_no_toolkit(setup_py, machine, monkeypatch) -> None:
    def wheels() -> list[str]:
        return [wheel for wheel in setup_py["build_requirements"]() if "nvcc" in wheel]

    monkeypatch.setattr(sys, "platform", "linux")
    machine(13, (8, 9), nvcc=0)
    assert len(wheels()) == 1
    machine(12, (8, 9), nvcc=0)  # a driver that cannot run what they compile
    assert not wheels()
    machine(13, (8, 9))
    assert not wheels()
    machine(None, nvcc=0)
    assert not wheels()
    monkeypatch.setenv("DSD_CUDA", "1")
    assert len(wheels()) == 1
    with pytest.raises(SystemExit, match=r"CUDA backend is demanded.*no nvcc was found"):
        setup_py["cmake_options"]()


@pytest.mark.parametrize("have, wheels", [("3.28.1", []), ("3.16.3", ["cmake>=3.22"])])
def test_cmake_and_ninja_of_the_machine_are_taken(
    have, wheels, setup_py, gpus, machine, monkeypatch
) -> None:
    machine(None)
    answers = {"cmake": f"cmake version {have}\n\nCMake suite", "ninja": "1.11.1"}
    monkeypatch.setattr(gpus, "answer", lambda command: answers.get(command[0], ""))
    assert setup_py["build_requirements"]() == wheels
    answers.clear()
    assert setup_py["build_requirements"]() == ["cmake>=3.22", "ninja"]


def test_dsd_cuda_is_a_yes_or_a_no(setup_py, machine, monkeypatch) -> None:
    machine(13, (8, 9))
    monkeypatch.setenv("DSD_CUDA", "yes")
    with pytest.raises(SystemExit, match="DSD_CUDA must be 0 or 1, got 'yes'"):
        setup_py["cmake_options"]()


def test_architecture_lists(gpus) -> None:
    archs = gpus.parse_archs
    assert archs("8.6;8.9", KNOWN) == archs("86, 89;", []) == "86-real;89-real"
    assert archs("7.5 12.0+PTX", KNOWN) == "75-real;120-real;120-virtual"
    assert archs("90a, 100", KNOWN) == "90a-real;100-real"
    assert archs(" ALL ", KNOWN) == ""


@pytest.mark.parametrize(
    "text, words",
    [
        ("Ampere", "cannot read the CUDA architecture 'Ampere'; write 8.9"),
        ("all;8.6", "cannot read the CUDA architecture 'all'.*or all, alone"),
        ("8.66", "cannot read the CUDA architecture '8.66'"),
        ("-1", "cannot read the CUDA architecture '-1'"),
        ("8.9+ptx", "cannot read the CUDA architecture"),
        ("native", "cannot read the CUDA architecture 'native'"),
        (";", "it names no CUDA architecture"),
        ("5.2", r"the kernels need a GPU of Turing \(7.5\) or newer, got '5.2'"),
        ("0.0", r"the kernels need a GPU of Turing \(7.5\) or newer"),
        ("8.5", "this nvcc does not know '8.5', it compiles for 7.5, 8.0, 8.6"),
        ("99.9", "this nvcc does not know '99.9'"),
    ],
)
def test_architectures_that_make_no_sense(text, words, setup_py, machine, monkeypatch) -> None:
    machine(None)
    monkeypatch.setenv("DSD_CUDA_ARCHS", text)
    with pytest.raises(SystemExit, match=rf"dsd_fast: DSD_CUDA_ARCHS='{re.escape(text)}': {words}"):
        setup_py["cmake_options"]()


def test_list_of_torch_names_itself(setup_py, machine, monkeypatch) -> None:
    machine(13, (8, 9))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(SystemExit, match=r"TORCH_CUDA_ARCH_LIST='Hopper'.*DSD_CUDA_ARCHS, if set"):
        setup_py["cmake_options"]()


def test_gpus_that_nvcc_does_not_know(gpus) -> None:
    assert (
        gpus.archs_of([(12, 1)], [75, 90, 120]) == "120-real"
    )  # machine code of its major version
    assert gpus.archs_of([(12, 0)], [75, 90]) == "90-virtual"
    assert gpus.archs_of([(12, 0), (8, 9)], []) == "120-real;89-real"  # nvcc does not say
    with pytest.raises(SystemExit, match=r"compiles for 100, 120.*compute capability 8\.9"):
        gpus.archs_of([(8, 9)], [100, 120])


@pytest.mark.parametrize("archs", ["89-real", "86-real;90-virtual", "120-real"])
def test_code_for_the_gpus_runs_on_them(archs, gpus) -> None:
    """What the build chooses and what is checked when it runs agree."""
    for major, minor in [(8, 6), (8, 9), (9, 0), (12, 1)]:
        chosen = gpus.archs_of([(major, minor)], KNOWN[:7]).replace(";", " ")
        assert _backend.runs_on((major, minor), chosen)


# ---- what the driver says -----------------------------------------------------------------------


@posix
def test_driver_asked_by_nvidia_smi(gpus, tmp_path, monkeypatch) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text('#!/bin/sh\n[ -z "$CUDA_VISIBLE_DEVICES" ] || exit 1\ncat "$0.txt"\n')
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    text = tmp_path / "nvidia-smi.txt"
    text.write_text("550.54.15, 8.9\n550.54.15, 12.0\n550.54.15, 8.9\n")
    assert gpus.ask_smi() == gpus.Driver(12, ((8, 9), (12, 0)))
    for nonsense in ("", "No devices were found\n", "580.65, [N/A]\n", "Failed: mismatch 580.1\n"):
        text.write_text(nonsense)
        assert gpus.ask_smi() is None
    text.unlink()
    assert gpus.ask_smi() is None  # it fails


LIBCUDA = """
#include <stdlib.h>
static int env(const char* name) { return getenv(name) ? atoi(getenv(name)) : 0; }
int cuInit(unsigned flags) { return env("FAKE_STATUS"); }
int cuDriverGetVersion(int* version) { *version = 13010; return 0; }
int cuDeviceGetCount(int* n) { *n = getenv("CUDA_VISIBLE_DEVICES") ? 0 : 2; return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
    *value = attribute == 75 ? (device ? 8 : 12) : device ? 6 : 0;
    return 0;
}
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or shutil.which("cc") is None, reason="needs cc on Linux"
)
def test_driver_asked_by_its_library(gpus, tmp_path, monkeypatch) -> None:
    (tmp_path / "cuda.c").write_text(LIBCUDA)
    command = ["cc", "-shared", "-fPIC", "-o", "libcuda.so.1", "cuda.c"]
    subprocess.run(command, cwd=tmp_path, check=True)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # hides one from what runs, not from a build
    assert gpus.ask_libcuda() == gpus.Driver(13, ((8, 6), (12, 0)))
    monkeypatch.setenv("FAKE_STATUS", "100")
    assert gpus.ask_libcuda() is None


def test_driver_that_hangs_is_left_alone(gpus, monkeypatch) -> None:
    def hang(*_: object, **__: object) -> None:
        raise subprocess.TimeoutExpired("nvidia-smi", 30)

    monkeypatch.setattr(subprocess, "run", hang)
    assert gpus.ask_libcuda() is None and gpus.ask_smi() is None


# ---- nothing twice ------------------------------------------------------------------------------


def test_objects_are_kept_while_compilers_stay(setup_py, gpus, tmp_path, monkeypatch) -> None:
    versions = {"c++": "g++ 12", "nvcc": "release 13.0"}
    monkeypatch.setattr(gpus, "answer", lambda command: versions[command[0]])
    monkeypatch.setitem(setup_py, "BUILD", tmp_path / "build")
    monkeypatch.delenv("CXX", raising=False)
    kept = tmp_path / "build" / "field.cpp.o"
    cpu = {"Python_EXECUTABLE": "python3", "CMAKE_MAKE_PROGRAM": "/one/ninja"}
    gpu = {**cpu, "CMAKE_CUDA_COMPILER": "nvcc"}

    def is_kept(options: dict) -> bool:
        setup_py["forget_other_tools"](options)
        found = kept.exists()
        kept.touch()
        return found

    assert not is_kept(cpu)
    assert is_kept({**cpu, "CMAKE_MAKE_PROGRAM": "/another/ninja"})  # of another isolated build
    assert is_kept(gpu) and is_kept(cpu)
    versions["nvcc"] = "release 13.1"
    assert is_kept(cpu) and not is_kept(gpu)
    versions["c++"] = "g++ 13"
    assert not is_kept(cpu)
    assert not is_kept({**cpu, "Python_EXECUTABLE": "another"})
    monkeypatch.setenv("CXXFLAGS", "-O0")
    assert not is_kept(cpu) and is_kept(cpu)
    (tmp_path / "build" / "made_with.json").write_text("[")
    assert not is_kept(cpu)


def test_nvcc_of_an_isolated_build_is_kept(setup_py, tmp_path, monkeypatch) -> None:
    """Its environment goes; the next build finds the copy, and asks for no wheels."""
    nvcc = tmp_path / "isolated" / "nvidia" / "cu13" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.touch()
    (nvcc.parent / "nvcc.profile").touch()
    (nvcc.parent.parent / "include").mkdir()
    specs = {"nvidia": SimpleNamespace(submodule_search_locations=[nvcc.parents[2]])}
    monkeypatch.setitem(setup_py, "find_spec", specs.get)
    monkeypatch.setitem(setup_py, "version", lambda _: "13.0.88")
    monkeypatch.setitem(setup_py, "BUILD", tmp_path / "build" / "cmake")
    copy = tmp_path / "build" / "nvcc-13.0.88" / "bin" / "nvcc"
    assert setup_py["nvcc_of_wheel"]() == copy and copy.exists()
    assert (copy.parent.parent / "include").is_dir()
    specs["torch"] = SimpleNamespace()  # an environment that stays
    assert setup_py["nvcc_of_wheel"]() == nvcc
    specs.clear()
    assert setup_py["nvcc_of_wheel"]() is None


@pytest.mark.parametrize("in_place", [False, True])
def test_wheel_has_no_file_of_an_earlier_one(in_place, setup_py, tmp_path, monkeypatch) -> None:
    from setuptools import Distribution

    monkeypatch.setattr(setup_py["build_py"], "run", lambda _: None)
    old = tmp_path / "dsd_fast" / "moved.py"
    old.parent.mkdir()
    old.touch()
    command = setup_py["FreshPackage"](Distribution())
    command.build_lib, command.editable_mode = str(tmp_path), in_place
    command.run()
    assert old.exists() == in_place


def test_kernels_of_a_source_folder(setup_py, tmp_path, monkeypatch) -> None:
    """A build in place makes them importable: by a link, or a copy where there are none."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("first")
    (tmp_path / "dsd_fast").mkdir()
    made = tmp_path / "dsd_fast" / "kernels"
    monkeypatch.setitem(setup_py, "ROOT", tmp_path)

    def no_links(*_: object, **__: object) -> None:
        raise OSError

    with monkeypatch.context() as windows:
        windows.setattr(Path, "symlink_to", no_links)
        setup_py["link_kernels"]()
        (tmp_path / "kernels" / "__init__.py").write_text("second")
        setup_py["link_kernels"]()
    assert not made.is_symlink() and (made / "__init__.py").read_text() == "second"
    for _ in range(2):
        setup_py["link_kernels"]()
    assert made.resolve() == tmp_path / "kernels"


# ---- what is shown ------------------------------------------------------------------------------

# Prints what Ninja prints, some of it wrongly encoded, then ends with a status of its own.
NINJA = r"""
import sys
out = sys.stdout.buffer
out.write(b"[0/2] Re-checking globbed directories...\n")
out.write(b"[1/2] Building CXX object CMakeFiles/dsd_cpu.dir/csrc/field.cpp.o\n")
out.write(b"warning: \xff\n[2/2] Linking CXX shared module module/_C.abi3.so\n")
sys.exit(int(sys.argv[1]))
"""
BUILDER = """
import os, subprocess, sys
sys.path.insert(0, sys.argv[1])
from build_tools import progress
try:
    progress.run([sys.executable, *sys.argv[2:]], dict(os.environ), "CPU kernels")
except subprocess.CalledProcessError as error:
    print("status", error.returncode)
"""


def built(log: Path, status: int, script: Path) -> list[str]:
    script.write_text(NINJA)
    return [sys.executable, "-c", BUILDER, str(ROOT), str(script), str(status)]


@posix
@pytest.mark.parametrize("status", [0, 3])
def test_progress_reaches_the_terminal_past_pip(status, tmp_path) -> None:
    """A build whose output goes elsewhere, on a terminal."""
    import pty

    command = built(tmp_path, status, tmp_path / "ninja.py")
    child, terminal = pty.fork()
    if child == 0:
        os.environ["TERM"] = "xterm"
        log = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.execv(sys.executable, command)
    shown = b""
    while True:
        try:
            shown += os.read(terminal, 4096)
        except OSError:  # Linux's way to say that nobody is left
            break
    os.waitpid(child, 0)
    os.close(terminal)
    words = re.findall(r"CPU kernels[^\x1b]*", shown.decode())
    assert words == [
        "CPU kernels",
        "CPU kernels: 0 of 2 (directories...)",
        "CPU kernels: 1 of 2 (field.cpp)",
        "CPU kernels: 2 of 2 (_C.abi3.so)",
    ]
    assert shown.endswith(b"\x1b7\x1b[?7l\x1b[K\x1b[?7h\x1b8")  # nothing stays
    log = (tmp_path / "log").read_text()
    assert "[1/2] Building" in log and "\x1b" not in log
    assert ("status 3" in log) == (status == 3)


@posix
@pytest.mark.parametrize("status", [0, 3])
def test_progress_without_a_terminal_is_plain(status, tmp_path) -> None:
    command = built(tmp_path, status, tmp_path / "ninja.py")
    result = subprocess.run(command, capture_output=True, start_new_session=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert b"[1/2] Building" in result.stdout and b"\x1b" not in result.stdout
    assert (b"status 3" in result.stdout) == (status == 3)


def test_words_of_what_make_prints(setup_py) -> None:
    words_of = setup_py["progress"].words_of
    line = "[ 38%] Building CUDA object CMakeFiles/dsd_cuda.dir/csrc/field.cu.o"
    assert words_of(line) == "38% (field.cu)"
    assert words_of("field.cpp:3: warning: [1/2]") is None


def test_title_of_a_build(setup_py) -> None:
    backends = setup_py["backends"]
    assert backends({"DSD_CUDA": "OFF"}) == "CPU kernels"
    cuda = {"DSD_CUDA": "ON", "DSD_CUDA_ARCHS": "86-real;90-real;90-virtual"}
    assert backends(cuda) == "CPU and CUDA kernels for 86, 90"
    assert backends({**cuda, "DSD_CUDA_ARCHS": ""}) == "CPU and CUDA kernels"


# ---- info ---------------------------------------------------------------------------------------


def test_report_names_the_gpus_of_the_build(monkeypatch) -> None:
    cuda = {"cuda": 13000, "cuda_archs": "75-real 86-real 90a-real 120-virtual", "cuda_absent": ""}
    extension = SimpleNamespace(build_info=lambda: cuda)
    monkeypatch.setattr(_backend, "extension", lambda: extension)
    line = dict(info.report())["CUDA kernels"]
    assert line == "built with CUDA 13.0 for compute capability 7.5, 8.6, 9.0a, 12.0+PTX"


def test_report_of_a_gpu_that_the_build_leaves_out(monkeypatch) -> None:
    cuda = {"cuda": 13000, "cuda_archs": "86-real", "cuda_absent": ""}
    gpu = SimpleNamespace(name="H100", major=9, minor=0, total_memory=80 * 2**30)
    monkeypatch.setattr(_backend, "extension", lambda: SimpleNamespace(build_info=lambda: cuda))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: gpu)
    line = dict(info.report())["GPU"]
    assert "NO CODE BUILT FOR IT: Build it again on this computer, `pip install -e .`" in line
    assert "DSD_CUDA_ARCHS=9.0;" in line and "DSD_CUDA_ARCHS=all" in line
    cuda["cuda_archs"] = "90-real"
    assert "NO CODE" not in dict(info.report())["GPU"]
