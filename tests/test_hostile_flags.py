"""Flags that nobody means: each ends in work or in one message with exit code 2, within seconds.

DSD_HOSTILE=25 tries 500 at random in place of 20.
"""

import contextlib
import dataclasses
import importlib
import io
import logging
import os
import random
import re
import signal
import subprocess
import sys
import time
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
from runs import SMALL

from dsd_fast import build_engine, export, sample, train
from dsd_fast.config import TrainConfig, leaves, preset, read_config, to_dict
from dsd_fast.evaluate import __main__ as evaluate
from dsd_fast.evaluate import truth
from dsd_fast.files import write_json
from dsd_fast.prior import __main__ as prior
from dsd_fast.run import cli, needs
from dsd_fast.scene.picture import read_picture

ROOT = Path(__file__).resolve().parent.parent
TRIALS = 20 * int(os.environ.get("DSD_HOSTILE", "1"))
SECONDS = 10
HUGE = "9" * 5000
TINY = [*SMALL, "--pictures.no-mesh", "--pictures.no-turntable", "--max-steps", "1"]


class Hang(BaseException):
    """Not caught by what catches errors."""


@contextlib.contextmanager
def alarm(seconds: int) -> Iterator[None]:
    def ring(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run(main: Callable[[list[str]], object], argv: list[str]) -> tuple[int, str]:
    """Exit code and what was said; errors that are no answer pass through."""
    said = io.StringIO()
    # Of the stream that a command writes to when it starts.
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said), alarm(SECONDS):
        try:
            code = main(argv)
        except SystemExit as error:
            code = error.code
    logging.getLogger("dsd_fast").handlers = []
    return (code if isinstance(code, int) else 0 if code is None else 2), said.getvalue()


def words(main: Callable[[list[str]], object], argv: list[str]) -> str:
    """What was said by a command that refuses its flags."""
    code, said = run(main, argv)
    assert code == 2 and "Traceback" not in said, said
    return " ".join(said.split())


# ---- train, one by one --------------------------------------------------------------------------


@pytest.fixture
def argv(tmp_path, tiny_model, monkeypatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    return [*TINY, "--model", str(tiny_model), "--output", "out", "--prompt", "a chair"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--num-seeds", "1000000000"], "num_seeds: expected 1024 or less, got 1000000000"),
        (["--num-seeds", "0"], "num_seeds: expected 1 or more"),
        (["--num-seeds", "²"], "²"),
        (["--max-steps", "²"], "²"),
        (["--max-steps", HUGE], "max-steps"),
        (["--stop-at", "0"], "stop_at: expected 1 or more, got 0: pass another --stop-at"),
        (["--stop-at", "1e9"], "1e9"),
        (["--vram", "-1"], "vram: expected more than 0"),
        (["--seed", "9" * 30], "seed: expected less than"),
        (["--seed", str(2**63 - 1), "--num-seeds", "2"], "the last of --num-seeds"),
        (["--name", "../.."], "name: expected the name of a folder inside another one"),
        (["--name", "/etc"], "inside another one"),
        (["--name", ""], "inside another one"),
        (["--name", "."], "inside another one"),
        (["--name", "a/../../b"], "inside another one"),
        (["--name", "C:\\x"], "inside another one"),
        (["--name", "ä" * 128], "at most 255 bytes"),
        (["--name", "a\0b"], "control character '\\x00'"),
        (["--tag", "a\x1b[31mb"], "tag: expected text, got 'a\\x1b[31mb'"),
        (["--prompt", "x" * 100_000], "prompt: expected at most 10000 characters, got 100000"),
        (["--prompt", "caf\udce9"], "prompt: expected text in UTF-8, got 'caf\\udce9'"),
        (["--text.negative", "\udce9"], "text.negative: expected text in UTF-8"),
        (["--output", "a\0b"], "output: expected a path"),
        (["--output", "o" * 300], "its names at most 255 bytes"),
        (["--model", "a\0b"], "model: expected text"),
        (["--config", "a\0b.yaml"], "expected a path"),
        (["--config", "/dev/zero"], "/dev/zero is not a regular file"),
        (["--resume", "a\0b"], "resume: expected a path"),
        (["--image", "a\0b.png"], "expected a path"),
        (["--task", "single-view"], "--task single-view needs a picture: pass --image"),
        (["--cameras.n-test-views", "2000000000"], "cameras.n_test_views: expected 3600 or less"),
        (["--cameras.eval-height", "1", "--pictures.turntable"], "2 to 16384 rows"),
        (
            ["--cameras.eval-width", "8192", "--pictures.turntable", "--pictures.panels", "all"],
            "16 x 24576",
        ),
        (["--max-step", "3"], "max-step"),
        (["--guidance.method"], "guidance.method"),
    ],
)
def test_refused(argv, given, message):
    said = words(train.main, [*argv, *given])
    assert message in said
    assert not Path("out").exists()


def test_picture_alone_names_the_run_and_no_picture_is_asked_for(argv):
    without_prompt = argv[:-2]
    said = words(train.main, [*without_prompt, "--task", "single-view"])
    assert "pass --image" in said and "--prompt" not in said
    job = cli.parse([*without_prompt, "--task", "single-view", "--image", "caf\udce9.png"])[0]
    assert job.config.prompt == "caf\\xe9"


def test_texts_that_work(argv):
    for prompt in ("a\nchair", "x" * 9_000, "🪑 é", "../../etc"):
        code, said = run(train.main, [*argv[:-1], prompt])
        # The tiny model reads 77 tokens.
        assert code == 0 or (code == 2 and "tokens" in said), said
    assert {path.parent for path in Path("out").rglob("config.json")}
    assert not Path("etc").exists() and set(os.listdir()) == {"out"}


def test_paths_that_are_no_text(argv, tmp_path):
    """Bytes of another encoding: file names are bytes, but safetensors takes text alone."""
    folder = os.fsdecode(b"caf\xe9")
    assert "output: expected text in UTF-8" in words(train.main, [*argv, "--output", folder])
    picture = Path(f"{folder}.png")
    rgba = np.zeros((64, 64, 4), np.uint8)
    rgba[16:48, 16:48] = 200
    imageio.imwrite(picture, rgba)
    cfg = cli.parse([*argv[:-2], "--task", "single-view", "--image", str(picture)])[0].config
    write_json(tmp_path / "config.json", to_dict(cfg))
    assert b"caf\\udce9.png" in (tmp_path / "config.json").read_bytes()
    assert read_config(tmp_path / "config.json").single_view.image == picture
    assert read_picture(picture).shape == (1, 4, 64, 64)
    run_folder = Path(folder) / "run"
    run_folder.mkdir(parents=True)
    assert folder in words(export.main, [str(run_folder), "--device", "cpu"])


# ---- memory and packages ------------------------------------------------------------------------

MUCH = [
    ("--cameras.width 8192 --cameras.height 8192 --cameras.batch-size 4096", "4096 views of 8192"),
    ("--cameras.batch-size 32768 --cameras.width 512 --cameras.height 512", "--cameras.batch-size"),
    ("--pictures.sheet-views 2000000000", "a contact sheet of 2000000000 views"),
    ("--pictures.preview-views 2000000000", "a preview of 2000000000 views"),
    ("--pictures.sheet-size 8192 --pictures.sheet-views 9999", "--pictures.sheet-size"),
    ("--num-seeds 1024 --field.grid.log2-table-size 24 --field.grid.n-levels 16", "1024 seeds"),
    ("--num-seeds 1024 --renderer.occupancy.resolution 512", "--renderer.occupancy.resolution"),
    ("--task image --image.parameter rgb --image.size 8192 --num-seeds 1024", "--image.size"),
    ("--guidance.azimuth-bins 3600 --guidance.noise-table-step 1 --num-seeds 99", "trajectories"),
]


@pytest.mark.parametrize(("given", "message"), MUCH)
def test_what_cannot_fit(argv, given, message, monkeypatch):
    monkeypatch.setattr(needs, "computer_gib", lambda: 512.0)
    said = words(train.main, [*argv, *given.split()])
    assert message in said and re.search(r"would need about [\d,.]+ GiB, and the computer", said)
    assert not Path("out").exists() or not any(Path("out").rglob("config.json"))


def test_a_large_mesh_and_a_small_computer(argv, monkeypatch):
    monkeypatch.setattr(needs, "computer_gib", lambda: 2.0)
    said = words(train.main, [*argv, "--pictures.mesh", "--mesh.resolution", "1024"])
    assert "a mesh of 1024^3 grid points would need about 4.0 GiB" in said


@pytest.mark.parametrize("name", ["embedded", "dsd", "dsd-low-res", "mvdream"])
def test_the_presets_fit(name, monkeypatch):
    cfg = preset(name, on_cpu=True)
    cfg.device = "cpu"
    monkeypatch.setattr(needs, "computer_gib", lambda: 8.0)
    needs.check_memory(cfg, 1)
    assert needs.computer_gib.__wrapped__() > 0.1 if hasattr(needs, "__wrapped__") else True


def test_the_memory_of_this_computer():
    assert 0.1 < needs.computer_gib() < 1e6


@pytest.mark.parametrize(
    ("package", "given", "message"),
    [
        ("imageio_ffmpeg", "--pictures.turntable", "--pictures.no-turntable"),
        ("peft", "--guidance.method vsd", "dsd_fast[vsd]"),
        ("peft", "--guidance.method dive3d", "dsd_fast[vsd]"),
    ],
)
def test_packages_of_the_end_are_looked_for_at_the_beginning(
    argv, package, given, message, monkeypatch
):
    find = needs.find_spec
    monkeypatch.setattr(needs, "find_spec", lambda name: None if name == package else find(name))
    said = words(train.main, [*argv, *given.split()])
    assert f"needs the package {package.replace('_', '-')}" in said and message in said
    assert not any(Path().rglob("step-*"))


# ---- other commands -----------------------------------------------------------------------------

COMMANDS = {
    "sample": sample.main,
    "export": export.main,
    "evaluate": evaluate.main,
    "evaluate.truth": truth.main,
    "build_engine": build_engine.main,
    "prior": prior.main,
}


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("sample --prompt x --num-seeds 1000000000", "num_seeds: expected 1024 or less"),
        ("sample --prompt x --steps 0", "steps: expected 1 or more"),
        ("sample --prompt x --guidance-scale nan", "guidance_scale: expected a finite number"),
        ("sample --prompt x --name ../..", "inside another one"),
        ("sample --prompt caf\udce9", "prompt: expected text in UTF-8"),
        ("sample --like absent", "expected a run folder"),
        ("build_engine --rows 0", "rows: expected 1 or more, got (0,)"),
        ("build_engine --rows 99999999", "rows: expected 1024 or less"),
        ("evaluate x --json x.json --views 0", "views"),
        ("evaluate x --json x.json --size -1", "size"),
        ("evaluate.truth --json x.json", "expected run folders"),
        ("prior pack --source absent --out x --workers 0", "workers: expected 1 or more"),
        ("prior render --pack absent --out x", "absent"),
        ("prior render --pack x --out x --device-index -1", "device_index: expected 0 or more"),
        ("prior render-objects --pack x --out x --limit -1", "limit: expected 0 or more"),
        ("prior render-objects --pack x --out x --elevation nan", "elevation: expected a finite"),
        ("prior train-vae --views absent --out x --minutes inf", "minutes: expected"),
        ("prior train-vae --views absent --out x --batch-size 0", "batch_size: expected 1"),
        ("prior train-unet --views absent --out x --vae absent --seed 1e9", "1e9"),
        ("prior sheet --out x --steps 1000 --device cpu", "steps: expected less than 1000"),
        ("prior export --state absent --out x", "expected a folder that train-unet wrote"),
        ("prior evaluate-views --views absent --out x --seed -1", "seed: expected 0 or more"),
        ("prior turntables --pack absent --out x --prompts a --size 0", "size: expected 1"),
        ("prior fly", "expected one of: pack"),
        ("prior", "expected one of: pack"),
    ],
)
def test_other_commands_refuse(command, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, *given = command.split()
    assert message in words(COMMANDS[name], given)
    assert not os.listdir()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("run march --size 9^999999999", "at most 20 digits"),
        ("run march --size 2^63", "at most 2^40"),
        ("run march --size ²", "invalid _integer value"),
        ("run march --budget nan", "expected seconds of 0 to 1e6"),
        ("run march --budget inf", "expected seconds of 0 to 1e6"),
        ("run march --json absent/x.json", "expected a file in a folder that is there"),
        ("run iteration --progress nan", "between 0 and 1"),
        ("run iteration --memory-cap -1", "expected a number above 0"),
        ("comparison text --out x --seeds 1000000000", "--seeds: expected 1 to 1024"),
        ("comparison text --out x --steps -5", "--steps: expected 1 to"),
    ],
)
def test_benchmarks_refuse(command, message, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    name, *given = command.split()
    module = importlib.import_module(f"benchmarks.{name}")
    monkeypatch.chdir(tmp_path)
    assert message in words(module.main, given)
    assert not os.listdir()


# ---- the terminal -------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", ["1", "7", "1000000000", "-1", "x"])
def test_help_of_any_width(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    code, said = run(build_engine.main, ["--help"])
    assert code == 0 and "--rows" in said
    assert max(map(len, said.splitlines())) <= 250
    assert os.environ["COLUMNS"] == columns


def command_line(*argv: str | bytes, **environment: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", *argv],
        capture_output=True,
        timeout=60,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
    )
    said = (done.stdout + done.stderr).decode("utf-8", "replace")
    assert "Traceback" not in said, said
    return done.returncode, said


def test_bytes_and_encodings_of_a_real_command_line(tmp_path):
    """What only a process of its own has: its locale, and arguments that are bytes."""
    command = ("dsd_fast.train", "--device", "cpu", "--output", str(tmp_path), "--prompt")
    code, said = command_line(*command, b"caf\xe9")
    assert code == 2 and "prompt: expected text in UTF-8" in said
    no_text = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    code, said = command_line(*command, "🪑".encode(), "--max-steps", "0", **no_text)
    assert code == 2 and "prompt: expected text in UTF-8" in said
    assert "PYTHONUTF8=1" in said
    assert not any(tmp_path.iterdir())


# ---- at random ----------------------------------------------------------------------------------

VALUES = ["nan", "inf", "-inf", "-1", "0", "1", "2", "0.5", "1e30", "-1e30", "1e-30", "1e400"]
VALUES += [str(2**31), str(2**63), HUGE, "", " ", "²", "١", "é", "🪑", "\udce9", "a\0b", "\x1b[2J"]
VALUES += ["x" * 100_000, "[1,2]", "None", "True", "auto", "cpu", "word", "--", "-", "=", "a=b"]
VALUES += ["0x10", "1_0", "1,2", "${a}", "*", "~", "file", "folder", "absent/x", "folder/new"]
# Never as a place to write to.
READ = ["/dev/zero", "/dev/null", "fifo", "/", ".."]
WRITTEN = {"output", "out", "html", "json", "save-features", "save-reference", "sheets"}
# Words that would be looked for on the hub.
MODELS = {"model", "text-model", "clip"}


def flags_of(kind: type) -> list[str]:
    return [field.name.replace("_", "-") for field in dataclasses.fields(kind)]


SETTINGS = [path.replace("_", "-") for path in leaves(TrainConfig()) if path != "max_steps"]
OWN = ["config", "resume", "num-seeds", "overwrite", "stop-at", "image"]
PRIOR = "pack render train-vae train-unet export evaluate train-views export-views evaluate-views"
PRIOR_FLAGS = ["source", "out", "workers", "pack", "views", "vae", "state", "minutes", "resume"]
PRIOR_FLAGS += ["batch-size", "lr", "seed", "steps", "scale", "pairs", "prompts", "limit", "size"]
FLAGS = {
    "train": [*SETTINGS, *OWN],
    "sample": flags_of(sample.SampleCommand),
    "export": flags_of(export.ExportCommand),
    "evaluate": flags_of(evaluate.EvaluateCommand),
    "evaluate.truth": flags_of(truth.TruthCommand),
    "build_engine": flags_of(build_engine.BuildCommand),
    "prior": PRIOR_FLAGS,
}


def random_flags(rng: random.Random, names: list[str]) -> list[str]:
    given = []
    for _ in range(rng.randint(1, 3)):
        name = rng.choice(names)
        leaf = name.rpartition(".")[2]
        values = VALUES if leaf in WRITTEN else VALUES + READ
        if leaf in MODELS:
            values = ["", "a\0b", "absent/x/y", "file", "folder", "fifo", "\udce9/x/y", "x" * 9999]
        spelling = rng.choice([name] * 12 + [name[:-1], name + "x", name.upper(), "no-" + name])
        count = rng.choice([1, 1, 1, 1, 1, 0, 2, 3])
        flag = [f"--{spelling}", *(rng.choice(values) for _ in range(count))]
        if rng.random() < 0.1:
            flag = ["=".join(flag[:2]), *flag[2:]]
        given += flag * rng.choice([1, 1, 1, 1, 2])
    return given


@pytest.fixture
def surroundings(tmp_path, tiny_model, monkeypatch) -> Path:
    """Files for the flags to name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("text")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    return tiny_model


@pytest.mark.parametrize("seed", range(TRIALS))
def test_random_flags(surroundings, seed):
    rng = random.Random(seed)
    name = rng.choice(["train"] * 6 + list(COMMANDS))
    given = random_flags(rng, FLAGS[name])
    device = ["--device", "cpu"]
    model = ["--model", str(surroundings)]
    argv = {
        "train": [*TINY, *model, "--output", "out", "--prompt", "a chair"],
        "sample": [*device, *model, "--output", "out", "--steps", "2", "--prompt", "x"],
        "export": ["folder", *device],
        "evaluate": ["folder", "--json", "x.json", *device],
        "evaluate.truth": ["folder", "--json", "x.json", *device],
        "build_engine": ["--compute-capability", "8.9", *model],
        "prior": [rng.choice([*PRIOR.split(), "sheet", "turntables", "render-objects"])],
    }[name] + given
    began = time.monotonic()
    main = train.main if name == "train" else COMMANDS[name]
    code, said = run(main, argv)
    assert code in (0, 1, 2) and "Traceback" not in said
    assert time.monotonic() - began < SECONDS
    # One that is refused says something.
    assert code == 0 or said.strip()


def test_every_flag_is_among_those_at_random():
    """A new setting is tried as well."""
    assert {path.replace("_", "-") for path in leaves(TrainConfig())} <= {*SETTINGS, "max-steps"}
    own = {f.name.replace("_", "-") for f in dataclasses.fields(cli.Command)} - {"train"}
    assert own <= {*OWN}


# Kept for their types: a command whose flags have none is checked against nothing.
@pytest.mark.parametrize("kind", [sample.SampleCommand, build_engine.BuildCommand, cli.Command])
def test_numbers_of_commands_have_ranges(kind):
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        assert hint not in (int, float), f"{name}: a range is missing"
