"""The package as a whole: a lean import, clear failures, complete operators, a truthful report."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch

import dsd_fast
from dsd_fast import _backend, info, ops
from dsd_fast.__main__ import COMMANDS

ROOT = Path(__file__).parent.parent

# Public operator -> the csrc files and the test that hold its kernels.
KERNELS = {
    "adam_step": "adam",
    "composite": "composite",
    "composite_full": "composite",
    "fused_field": "field",
    "hashgrid": "hashgrid",
    "hashgrid_jacobian": "hashgrid",
    "march": "march",
    "march_packed": "march",
    "occupancy_threshold": "occupancy",
    "occupancy_update": "occupancy",
    "prune": "prune",
    "rasterize": "rasterize",
    "spherical_harmonics": "sh",
    "visibility": "composite",
}


def run_python(code: str, **env: str) -> subprocess.CompletedProcess:
    """Runs `code` in a fresh interpreter, with `env` added to the environment."""
    import os

    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        timeout=120,
    )


def test_import_is_lean() -> None:
    """No heavy library, no CUDA context, and little time beyond torch itself."""
    result = run_python(
        "import sys, time, torch\n"
        "start = time.perf_counter()\n"
        "import dsd_fast, dsd_fast.ops, dsd_fast.scene.encoding\n"
        "grid = dsd_fast.HashGrid(2, 2, 6, 4, 1.5)\n"
        "seconds = time.perf_counter() - start\n"
        "heavy = {'diffusers', 'transformers', 'triton', 'moderngl', 'trimesh', 'skimage'}\n"
        "print(sorted(heavy & set(sys.modules)), torch.cuda.is_initialized(), seconds)\n"
    )
    assert result.returncode == 0, result.stderr
    heavy, initialized, seconds = result.stdout.rsplit(maxsplit=2)
    assert (heavy, initialized) == ("[]", "False")
    assert float(seconds) < 2.0


def test_bare_import_does_not_even_load_torch() -> None:
    result = run_python("import sys, dsd_fast; print('torch' in sys.modules)")
    assert result.stdout.strip() == "False", result.stderr


@pytest.mark.parametrize(
    "imports, given, policy",
    [
        ("dsd_fast", None, "PASSIVE"),
        ("dsd_fast", "ACTIVE", "ACTIVE"),
        ("torch, dsd_fast", None, ""),
    ],
)
def test_threads_of_torch_do_not_spin(imports, given, policy, monkeypatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY")
    code = f"import os, {imports}; print(os.environ.get('OMP_WAIT_POLICY', ''))"
    result = run_python(code, **({"OMP_WAIT_POLICY": given} if given else {}))
    assert result.stdout.strip() == policy, result.stderr


def test_version_and_lazy_names() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", dsd_fast.__version__)
    for name in dsd_fast.__all__:
        assert getattr(dsd_fast, name) is not None
    assert set(dsd_fast.__all__) <= set(dir(dsd_fast))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = dsd_fast.nothing


def test_kernels_folder_is_a_subpackage() -> None:
    import dsd_fast.kernels

    assert "Triton" in dsd_fast.kernels.__doc__


# ---- backend ------------------------------------------------------------------------------------


def test_missing_extension_is_an_import_error_with_its_cause() -> None:
    result = run_python(
        "import sys\n"
        "sys.modules['dsd_fast._C'] = None\n"  # what Python sees when a module cannot be imported
        "import torch\n"
        "from dsd_fast.ops import spherical_harmonics\n"
        "spherical_harmonics(torch.zeros(1, 3))\n"
    )
    assert result.returncode != 0
    assert "ImportError: dsd_fast's compiled kernels do not load" in result.stderr
    assert "pip install -e ." in result.stderr and "DSD_BACKEND=torch" in result.stderr


def test_reference_works_without_the_extension() -> None:
    result = run_python(
        "import sys\n"
        "sys.modules['dsd_fast._C'] = None\n"
        "import torch\n"
        "from dsd_fast.ops import spherical_harmonics\n"
        "print(spherical_harmonics(torch.zeros(2, 3)).shape)\n",
        DSD_BACKEND="torch",
    )
    assert result.stdout.strip() == "torch.Size([2, 9])", result.stderr


def test_other_devices_are_refused_in_words() -> None:
    with pytest.raises(ValueError, match="compiled kernels for cpu and cuda, got a tensor on meta"):
        _backend.target(torch.empty(1, device="meta"))


@pytest.mark.parametrize(
    "capability, archs, fits",
    [
        ((8, 9), "75-real 86-real", True),  # machine code runs on later minor versions
        ((8, 0), "75-real 86-real", False),
        ((9, 0), "75-real 86-real", False),
        ((12, 0), "75-real 86-real 86-virtual", True),  # PTX runs on everything newer
        ((7, 5), "86-real 86-virtual", False),
        ((9, 0), "90a-real", True),
        ((10, 0), "90a-real 90a-virtual", False),
    ],
)
def test_which_gpus_a_build_runs_on(capability, archs, fits) -> None:
    assert _backend.runs_on(capability, archs) is fits


# ---- operators ----------------------------------------------------------------------------------


def test_every_operator_has_its_five_faces() -> None:
    public = {name for name in ops.__all__ if not name[0].isupper()}
    assert public == set(KERNELS)
    for name, stem in KERNELS.items():
        module = sys.modules[getattr(ops, name).__module__]
        assert module.__name__ == f"dsd_fast.ops.{stem}"
        assert callable(getattr(module, f"{name}_reference")), f"{name}: no reference"
        for suffix in ("h", "cpp", "cu"):
            assert (ROOT / "csrc" / f"{stem}.{suffix}").exists(), f"{name}: no csrc/{stem}.{suffix}"
        assert hasattr(torch.ops.dsd_fast, name), f"{name}: no torch.library operator"
        # test_field.py is about the module of that name.
        test_name = "test_field_op.py" if stem == "field" else f"test_{stem}.py"
        test = (ROOT / "tests" / test_name).read_text()
        assert f"{name}(" in test or f"{name}," in test, f"{name}: no test"
        assert getattr(ops, name).__doc__, f"{name}: no doc string"


def test_every_registered_operator_is_public_or_a_backward() -> None:
    registered = {
        name.removeprefix("dsd_fast::").removesuffix(".default")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("dsd_fast::")
    }
    forward = {name.split("_bwd")[0] for name in registered}
    assert forward <= set(KERNELS), forward - set(KERNELS)


def test_bindings_are_the_only_python_in_csrc_and_torch_is_nowhere() -> None:
    for path in (ROOT / "csrc").iterdir():
        text = path.read_text()
        assert "#include <torch" not in text and "#include <ATen" not in text, path.name
        assert ('#include "python.h"' in text) == (path.name == "bindings.cpp"), path.name
        assert ("#include <Python.h>" in text) == (path.name == "python.h"), path.name


# ---- rooms ----


def test_packages_of_extras_are_asked_for_by_the_extra():
    """In code and docs alike."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = project.split("[project.optional-dependencies]")[1].split("\n[")[0]
    names, extras = {}, dict(re.findall(r"^(\w+) = \[(.*?)\]$", section, re.MULTILINE | re.DOTALL))
    for extra, requirements in extras.items():
        names |= dict.fromkeys(re.findall(r'"([A-Za-z0-9_-]+)', requirements.lower()), extra)
    # Parts of no extra of their own, and what TensorRT for data centres goes with.
    names = {name: extra for name, extra in names.items() if name not in ("dsd_fast", "onnx")}
    for path in [*ROOT.glob("dsd_fast/**/*.py"), *ROOT.glob("docs/**/*.md"), ROOT / "README.md"]:
        text = re.sub(r'"\s+f?"', "", path.read_text())
        for match in re.finditer(r"pip install\s+['\"]?([A-Za-z0-9_-]+)(\[(\w+)\])?", text):
            package, extra = match[1].lower(), match[3]
            assert package not in names, f"{path}: {match[0]} is dsd_fast[{names[package]}]"
            assert package != "dsd_fast" or extra is None or extra in extras, f"{path}: {match[0]}"


# A room imports from itself and from the rooms above it, never from one below. Commands are the
# last room, the modules beside the rooms the first.
GROUND = {"_C", "_backend", "determinism", "files", "graphs", "kernels", "output_file"}
GROUND |= {"picture_file", "ranges", "resize", "rng", "schedules", "upload"}
ROOMS = ["ops", "asset", "scene", "diffusion", "guidance", "config", "run", "tasks"]
ROOMS += ["judge", "prior", "evaluate"]


def floor(name: str) -> int:
    """The place of a module or room of the package, from the ground up."""
    if name in GROUND:
        return 0
    return 1 + ROOMS.index(name) if name in ROOMS else 1 + len(ROOMS)


def test_imports_point_one_way() -> None:
    package = ROOT / "dsd_fast"
    upwards = set()
    for path in package.rglob("*.py"):
        name = path.relative_to(package).parts[0].removesuffix(".py")
        if name == "__init__":
            continue
        upwards |= {(name, other) for other in imports_of(path) if floor(other) > floor(name)}
    assert not upwards


def imports_of(path: Path) -> set[str]:
    """The modules right below dsd_fast that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "dsd_fast":
            names |= {f"dsd_fast.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return {name.split(".")[1] for name in names if name.startswith("dsd_fast.")}


def test_modules_import_in_no_circle() -> None:
    """Nor anywhere in a function; what only types are read from is no import."""
    package = ROOT / "dsd_fast"
    paths = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in package.rglob("*.py")
        if path.relative_to(package).parts[0] != "kernels"
    }
    graph = {}
    for name, path in paths.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                node.body = []
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        named = {
            module
            for node in imports
            for alias in node.names
            for module in [f"{node.module}.{alias.name}", node.module]
        }
        submodules = {module for module in named if module in paths}
        # `from package import module` is of the module alone.
        parents = {module.rpartition(".")[0] for module in submodules}
        graph[name] = {m for m in submodules if m not in parents and m != name}
    assert len(graph) > 100
    TopologicalSorter(graph).prepare()  # CycleError names the modules


# ---- commands ----


def test_commands_are_listed_and_found() -> None:
    """`python -m dsd_fast` lists every module that is a command, and needs no torch for it."""
    package = ROOT / "dsd_fast"
    main = re.compile(r'^if __name__ == "__main__":', re.MULTILINE)
    paths = [path for path in package.rglob("*.py") if main.search(path.read_text("utf-8"))]
    names = {".".join(path.relative_to(package).with_suffix("").parts) for path in paths}
    commands = {name.removesuffix(".__main__") for name in names - {"__main__"}}
    assert commands == set(COMMANDS)
    result = run_python(
        "import sys, dsd_fast.__main__ as m; m.main(); print('torch' in sys.modules)"
    )
    assert result.returncode == 0, result.stderr
    assert all(re.search(rf"^  {name} +\S", result.stdout, re.MULTILINE) for name in COMMANDS)
    assert result.stdout.endswith("False\n")


def dispatch(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "dsd_fast", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_a_command_runs_by_its_name() -> None:
    assert dispatch("--version").stdout == f"dsd_fast {dsd_fast.__version__}\n"
    result = dispatch("build-engine", "--help")
    assert result.returncode == 0 and "python -m dsd_fast.build_engine" in result.stdout
    unknown = dispatch("trian")
    assert unknown.returncode == 2 and "did you mean train?" in unknown.stderr


# ---- tools, module and info ----------------------------------------------------------------------


def test_tools_have_one_version() -> None:
    """What the extra `dev` installs is what pre-commit runs."""
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    pinned = set(re.findall(r'"((?:ruff|clang-format)==[^"]+)"', hooks))
    assert {pin.split("==")[0] for pin in pinned} == {"ruff", "clang-format"}
    assert all(f'"{pin}"' in project for pin in pinned)


def test_module_of_other_bindings_is_refused(monkeypatch, tmp_path) -> None:
    built = _backend.extension().build_info()
    assert not _backend._is_stale(built)
    monkeypatch.setattr(_backend, "_BINDINGS", tmp_path / "bindings.cpp")
    assert not _backend._is_stale(built)  # installed without sources
    (tmp_path / "bindings.cpp").write_text("other")
    assert _backend._is_stale(built)
    monkeypatch.setattr(_backend, "_load", _backend._load.__wrapped__)
    with pytest.raises(ImportError, match=r"other sources than .*pip install -e"):
        _backend.extension()


def test_build_info_is_complete() -> None:
    built = _backend.extension().build_info()
    cuda = {"cuda", "cuda_archs", "cuda_absent"}
    own = {"cpu_isa", "cpu_dense", "sanitize", "compiler", "bindings_sha256"}
    assert set(built) == own | cuda
    assert (built["cuda"] is None) == (built["cuda_archs"] == "") == (built["cuda_absent"] != "")


def test_info_survives_a_broken_probe(monkeypatch) -> None:
    def broken() -> str:
        raise RuntimeError("no luck")

    monkeypatch.setattr(info, "_torch", broken)
    findings = dict(info.report())
    assert findings["torch"] == "cannot tell: RuntimeError: no luck"
    assert findings["dsd_fast"].startswith(dsd_fast.__version__)


def test_info_without_extension_or_optional_pieces(monkeypatch) -> None:
    monkeypatch.setattr(info.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(info, "PRIOR", Path("nowhere"))
    findings = dict(info.report())
    assert findings["diffusers"].startswith("missing: ")
    assert findings["embedded prior"].startswith("missing (nowhere)")


@pytest.mark.parametrize("arguments", [["info"], ["train", "--help"], ["export", "--help"]])
def test_a_reader_may_leave(arguments) -> None:
    """`python -m dsd_fast.train --help | head` ends without a traceback."""
    module, *flags = arguments
    command = [sys.executable, "-m", f"dsd_fast.{module}", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (141, b"")


def test_info_command() -> None:
    result = run_python("import runpy; runpy.run_module('dsd_fast.info', run_name='__main__')")
    assert result.returncode == 0, result.stderr
    for name in ("python", "torch", "CPU kernels", "CUDA kernels", "driver", "GPU", "triton"):
        assert re.search(rf"^{name} +\S", result.stdout, re.MULTILINE), name
