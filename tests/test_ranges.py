"""Legal ranges: every setting refuses in words what cannot work, wherever it comes from."""

import contextlib
import io
import math
from dataclasses import dataclass, is_dataclass, replace
from typing import Annotated

import pytest
import tyro
from annotated_types import Gt
from pydantic import AllowInfNan
from runs import SMALL
from tiny_model import build_tiny_model

from dsd_fast import guidance, ranges, tasks, train
from dsd_fast.config import (
    TASK_PRESETS,
    ConfigError,
    TrainConfig,
    check,
    from_dict,
    leaves,
    preset,
    register_task,
    to_dict,
)
from dsd_fast.run import cli
from dsd_fast.scene.background import Background, BackgroundConfig
from dsd_fast.scene.cameras import CameraConfig, RandomCameras
from dsd_fast.scene.field import Field, FieldConfig
from dsd_fast.scene.mesh import MeshConfig, make_mesh
from dsd_fast.scene.occupancy import OccupancyConfig, OccupancyGrid
from dsd_fast.scene.renderer import Renderer, RendererConfig
from dsd_fast.tasks import TASKS

NAN, INF = math.nan, math.inf
ODD = [NAN, INF, -INF, -1, 0, -0.5, 0.5, 2, 1e30, 10**20, True, None, "word", "", (), [], {}]
ODD += [(2.0, 1.0), (2, 2), (NAN, 1.0), (0, 1.0, 0.0, 5), (0, 1.0, INF, 5), (5, 1.0, 0.0, 5)]


def config() -> TrainConfig:
    cfg = preset("embedded", max_steps=2, on_cpu=True)
    cfg.prompt = "a chair"
    return cfg


PATHS = sorted(leaves(config()))


def put(cfg: TrainConfig, path: str, value: object) -> None:
    """Set a value as a library's user may: nothing looks at it."""
    *parents, name = path.split(".")
    for parent in parents:
        cfg = getattr(cfg, parent)
    setattr(cfg, name, value)


def verdict(judge, *arguments, **keywords) -> str | None:
    """The words of the ConfigError, if there is one; any other error passes through."""
    try:
        judge(*arguments, **keywords)
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.parametrize("path", PATHS)
def test_every_setting_takes_a_value_or_says_why_not(path):
    """Through `check`, and through `from_dict`, which decides alike on each value alone."""
    *sections, name = path.split(".")
    flag = f"pass another --{path.replace('_', '-')}"
    refused = 0
    for value in ODD:
        cfg = config()
        put(cfg, path, value)
        words = verdict(check, cfg, flags=True)
        nested = {name: value}
        for section in reversed(sections):
            nested = {section: nested}
        from_json = verdict(from_dict, TrainConfig, nested)
        refused += words is not None
        if words is None:
            assert from_json is None
        elif flag in words:
            assert from_json is not None and words == f"{from_json}: {flag}"
            assert words.startswith((f"{path}: expected ", f"{path}: schedule: "))
        else:
            assert from_json is None, "what settings have in common is checked when all are there"
    assert refused, "nothing is refused"


@pytest.mark.parametrize("path", PATHS)
def test_no_number_is_nan(path):
    value = leaves(config())[path]
    if isinstance(value, bool) or not isinstance(value, (int, float, tuple)):
        return
    wrong = NAN if not isinstance(value, tuple) else (*value[:-1], NAN)
    cfg = config()
    put(cfg, path, wrong)
    assert "nan" in verdict(check, cfg)


SECTIONS = [name for name, value in vars(config()).items() if is_dataclass(value)]


@pytest.mark.parametrize("section", SECTIONS)
def test_every_flag_ends_in_a_value_or_in_words(section):
    """Words on the command line: tyro's for another type (exit code 2), ours for the range."""
    starting = getattr(config(), section)
    for path in leaves(starting):
        if path == "digest":
            continue
        for words in (["nan"], ["-1"], ["1", "0"], ["word"], []):
            flag = f"--{path.replace('_', '-')}"
            try:
                with contextlib.redirect_stderr(io.StringIO()) as said:
                    parsed = tyro.cli(type(starting), args=[flag, *words], default=starting)
            except SystemExit as error:
                assert error.code == 2 and said.getvalue()
                continue
            assert verdict(check, parsed) != ""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--optimizer.betas 2 2", "optimizer.betas: expected less than 1, got (2.0, 2.0)"),
        ("--optimizer.geometry-lr -1", "expected 0 or more, got -1.0"),
        ("--renderer.near-plane nan", "expected a finite number, got nan"),
        ("--renderer.occupancy.decay 2", "expected 1 or less, got 2.0"),
        ("--guidance.guidance-scale nan", "expected a finite number"),
        ("--guidance.min-step-percent 0.99", "expected at most max_step_percent, 0.98 at step 0"),
        ("--trainer.preview-every -1", "expected 0 or more, got -1"),
        (
            "--pictures.fps 0",
            "pictures.fps: expected 1 or more, got 0: pass another --pictures.fps",
        ),
        ("--cameras.eval-fovy-deg 0", "expected 0.1 or more"),
        ("--cameras.fovy-range 70 40", "expected (low, high), got (70.0, 40.0)"),
        ("--cameras.width 100000", "expected 8192 or less"),
        ("--cameras.resolution-milestones 5 5", "the steps must grow"),
        ("--field.grid.start-level 99", "field.grid.start_level: expected 1 to n_levels = 12"),
        ("--loss.lambda-sparsity 1 2", "loss.lambda_sparsity: schedule: expected [v0, v1, s1]"),
        ("--loss.lambda-sparsity 0 1 -1 9", "expected values of 0 to 1e+18, got [1, -1]"),
        ("--guidance.trajectory-share 2", "expected values of 0 to 1, got [2]"),
        ("--mesh.iso word", "expected \"auto\" or a number above 0, got 'word'"),
        ("--image.cosine-length 0.5", "expected 0, or 1 or more, got 0.5"),
        ("--max-steps 99999999999999999999", "max_steps: expected 2147483647 or less"),
        ("--max-steps 0", "max_steps: expected 1 or more"),
        ("--stop-at 0", "stop_at: expected 1 or more, got 0: pass another --stop-at"),
        ("--vram nan", "vram: expected a finite number"),
    ],
)
def test_refused_before_any_work(flags, message):
    words = verdict(cli.parse, ["--prompt", "a chair", "--device", "cpu", *flags.split()])
    assert message in words


def test_odd_but_legal_settings_run(tmp_path):
    model = build_tiny_model(tmp_path / "model")
    odd = """--renderer.far-plane inf --optimizer.network-lr 0 --trainer.preview-every 0
        --guidance.guidance-scale 0 --cameras.camera-perturb 0 --cameras.azimuth-range 0 0
        --renderer.occupancy.decay 1 --loss.lambda-dsd 0 --cameras.progressive-until 2000000000
        --background.random-aug-prob 1 --guidance.delta-min 0 --renderer.eval-chunk-size 1
        --pictures.no-mesh --pictures.no-turntable --max-steps 1"""
    where = ["--model", str(model), "--output", str(tmp_path), "--prompt", "a chair"]
    assert train.main([*SMALL, *where, *odd.split()]) == 0


def test_one_radius(tmp_path):
    argv = ["--prompt", "a chair", "--device", "cpu", "--output", str(tmp_path)]
    for flag in ("--renderer.radius", "--field.radius"):
        cfg = cli.parse([*argv, flag, "1.5"])[0].config
        assert cfg.field.radius == 1.5 and "radius" not in to_dict(cfg)["renderer"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Field(FieldConfig(radius=-1.0)), "radius: expected 0.001 or more"),
        (lambda: RandomCameras(CameraConfig(fovy_range=(0.0, 9.0))), "fovy_range: expected 0.1"),
        (lambda: Background(BackgroundConfig(n_neurons=0)), "n_neurons: expected 1 or more"),
        (lambda: Renderer(RendererConfig(near_plane=NAN), 2.0), "near_plane: expected a finite"),
        (lambda: OccupancyGrid(OccupancyConfig(decay=2.0), 2.0, 0.1), "decay: expected 1 or less"),
        (
            lambda: make_mesh(None, 1.0, MeshConfig(resolution=0), None, 0.1),
            "resolution: expected 2",
        ),
    ],
)
def test_the_parts_check_what_they_are_given(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


# ---- the checks themselves ----------------------------------------------------------------------


@dataclass
class Fan:
    speed: ranges.Positive = 1.0
    far: Annotated[float, AllowInfNan(), Gt(0)] = 1.0
    blades: ranges.Count | None = None
    span: ranges.Span[ranges.Share] = (0.0, 1.0)

    def validate(self) -> None:
        if self.blades == 1:
            raise ConfigError("blades: one alone wobbles")


@dataclass
class House:
    fan: Fan


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"speed": "fast"}, "fan.speed: expected a number, got 'fast'"),
        ({"speed": True}, "fan.speed: expected a number, got True"),
        ({"far": NAN}, "fan.far: expected more than 0, got nan"),
        ({"blades": 0}, "fan.blades: expected 1 or more, got 0"),
        ({"blades": "two"}, "fan.blades: expected an integer, got 'two'"),
        ({"blades": 1}, "fan.blades: one alone wobbles"),
        ({"span": (0.1,)}, "fan.span: expected 2 values, got (0.1,)"),
        ({"span": (0.1, 0.2, 0.3)}, "fan.span: expected 2 values"),
        ({"span": 0.5}, "fan.span: expected a list, got 0.5"),
        ({"span": (0.5, 0.1)}, "fan.span: expected (low, high), got (0.5, 0.1)"),
        ({"span": (0.5, 1.1)}, "fan.span: expected 1 or less, got (0.5, 1.1)"),
    ],
)
def test_words(changes, message):
    check(House(Fan(far=INF, blades=2, span=[0, 1])))
    assert verdict(check, House("blue")) == "fan: expected a Fan, got 'blue'"
    assert message in verdict(check, House(replace(Fan(), **changes)))


# ---- names that are registered at run time ------------------------------------------------------


def test_a_task_of_ones_own(tmp_path, monkeypatch):
    """One file: the task, its name and its starting values."""
    for registry in (TASKS, TASK_PRESETS):
        monkeypatch.setitem(registry, "mine", None)  # which takes it away after the test
        del registry["mine"]

    def starting(start):
        cfg = preset(start.preset, start.max_steps, start.on_cpu, model=start.model)
        cfg.trainer.keep_checkpoints = 7
        return cfg

    with pytest.raises(ConfigError, match="unknown task 'mine': expected one of text"):
        preset("embedded", task="mine")

    @tasks.register("mine", starting)
    class Mine(type(TASKS["text"])):
        """Objects from prompts by other starting values."""

    model = build_tiny_model(tmp_path / "model")
    argv = ["--task", "mine", "--prompt", "a chair", "--model", str(model), *SMALL]
    cfg = cli.parse(argv)[0].config
    assert (cfg.task, cfg.trainer.keep_checkpoints) == ("mine", 7)
    assert from_dict(TrainConfig, to_dict(cfg)) == cfg
    brief = ["--max-steps", "1", "--pictures.no-mesh", "--pictures.no-turntable"]
    assert train.main([*argv, *brief, "--output", str(tmp_path / "runs")]) == 0
    register_task("mine")
    assert TASK_PRESETS["mine"] is starting, "a name keeps its starting values"


def test_names_are_checked_and_listed(capsys):
    names = "text, single-view, image, texture, refine"
    with pytest.raises(ConfigError, match=f"task: expected one of {names}, got"):
        from_dict(TrainConfig, {"task": "sculpture"})
    with pytest.raises(ConfigError, match=r"guidance.method: expected one of dsd, .*recon.*, got"):
        from_dict(TrainConfig, {"guidance": {"method": "best"}})
    with pytest.raises(SystemExit):
        cli.parse(["--help", "--device", "cpu"])
    said = capsys.readouterr().out
    assert "--task {text,single-view,image,texture,refine}" in said and "(default: text)" in said
    assert "--preset {embedded,dsd,dsd-low-res,mvdream}" in said
    assert f"--guidance.method {{{','.join(guidance.METHODS)}}}" in said


def test_a_formulation_of_ones_own(tmp_path, monkeypatch):
    """One file: the class, with its name and what it brings along."""
    monkeypatch.setitem(guidance.FORMULATIONS, "mine", None)  # which takes it away after the test
    del guidance.FORMULATIONS["mine"]

    @guidance.formulation
    class Mine(guidance.FORMULATIONS["sds"]):
        """SDS at a scale of its own."""

        name = "mine"

        @classmethod
        def settings(cls, max_steps):
            return {"guidance_scale": 3.0}

    model = build_tiny_model(tmp_path / "model")
    argv = ["--guidance.method", "mine", "--prompt", "a chair", "--model", str(model), *SMALL]
    assert cli.parse(argv)[0].config.guidance.guidance_scale == 3.0
    brief = ["--max-steps", "1", "--pictures.no-mesh", "--pictures.no-turntable"]
    assert train.main([*argv, *brief, "--output", str(tmp_path / "runs")]) == 0
