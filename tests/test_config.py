"""The configuration tree: presets, JSON round trip, and words for wrong settings."""

import json
from pathlib import Path

import pytest
import torch

from dsd_fast.config import (
    ConfigError,
    TrainConfig,
    check,
    from_dict,
    leaves,
    preset,
    resolve_device,
    set_value,
    to_dict,
)
from dsd_fast.scene.losses import LossConfig
from dsd_fast.schedules import Schedule


@pytest.mark.parametrize("name", ["embedded", "dsd", "dsd-low-res"])
@pytest.mark.parametrize("on_cpu", [True, False])
def test_json_round_trip(name, on_cpu):
    cfg = preset(name, on_cpu=on_cpu)
    assert cfg.preset == name
    text = json.dumps(to_dict(cfg))
    again = from_dict(TrainConfig, json.loads(text))
    assert again == cfg
    assert isinstance(again.output, Path)
    # The type of a schedule's end step has a meaning: an int counts steps.
    assert [type(x) for x in again.loss.lambda_sparsity] == [int, float, float, int]


def test_dsd_presets_are_the_official_settings():
    cfg, low = preset("dsd"), preset("dsd-low-res")
    assert (cfg.max_steps, low.max_steps) == (10000, 5000)
    assert (cfg.cameras.width, low.cameras.width) == ((128, 512), (128, 128))
    assert cfg.guidance.trajectory == low.guidance.trajectory == "cached"
    assert (cfg.guidance.azimuth_bins, cfg.guidance.noise_table_step) == (48, 20)
    assert cfg.model == low.model == "stabilityai/stable-diffusion-2-1-base"
    assert preset("dsd", max_steps=7).max_steps == 7


@pytest.mark.parametrize("steps", [1, 2, 7, 300, 20000])
def test_embedded_schedules_scale_with_the_run(steps):
    cfg = preset("embedded", max_steps=steps)
    assert cfg.max_steps == steps
    ends = [
        Schedule.parse(v).knots[-1][0] for v in (cfg.loss.lambda_sparsity, cfg.loss.lambda_convex)
    ]
    ends += [*cfg.cameras.resolution_milestones, cfg.material.ambient_only_steps]
    assert all(1 <= end <= steps for end in ends)
    grid = cfg.field.grid
    if steps >= 100:
        last = grid.start_step + (grid.n_levels - grid.start_level) * grid.update_steps
        assert last < 0.8 * steps, "the finest level must be unlocked long before the end"


@pytest.mark.parametrize("steps", [1, 2, 3, 600])
def test_embedded_asks_for_surfaces_when_the_shape_is_there(steps):
    """Of a picture's object the task has weights of its own."""
    loss, official = preset("embedded", max_steps=steps).loss, LossConfig()
    for name in ("lambda_roughness", "lambda_opaque", "lambda_z_variance"):
        schedule = Schedule.parse(getattr(loss, name))
        assert schedule(0) == schedule(steps // 4) == getattr(official, name)
        assert schedule(max(steps, 2)) > 10
    single = preset("embedded", max_steps=steps, task="single-view").loss
    assert single.lambda_roughness == single.lambda_z_variance == 0


def test_embedded_is_shorter_and_smaller_on_a_cpu():
    cpu, gpu = preset("embedded", on_cpu=True), preset("embedded")
    assert cpu.max_steps < gpu.max_steps
    assert cpu.cameras.width[-1] < gpu.cameras.width[-1]


def test_unknown_settings_name_the_nearest():
    with pytest.raises(
        ConfigError, match=r"guidance.guidance_scal: .*did you mean guidance_scale\?"
    ):
        from_dict(TrainConfig, {"guidance": {"guidance_scal": 7}})
    with pytest.raises(ConfigError, match="unknown preset 'dsdd'"):
        preset("dsdd")


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("guidance.guidance_scale", "high", "a number"),
        ("cameras.fovy_range", [40], "2 values"),
        ("cameras.width", [64, "x"], "an integer, got"),
        ("cameras.width", "x", "an integer or a list"),
        ("field.normal_type", "numeric", "'analytic', 'finite_difference', .* or 'pred'"),
        ("max_steps", 10.5, "an integer"),
        ("trainer.progress", 1, "true or false"),
        ("text.front", 3, "a text, got 3"),
    ],
)
def test_wrong_types(path, value, expected):
    with pytest.raises(ConfigError, match=f"{path}.*: expected {expected}"):
        set_value(TrainConfig(), path, value)


def test_values_are_converted():
    cfg = TrainConfig()
    set_value(cfg, "cameras.fovy_range", [40, 70])
    set_value(cfg, "cameras.width", [64, 128])
    set_value(cfg, "field.density_bias", -1)
    assert cfg.cameras.fovy_range == (40.0, 70.0)
    assert cfg.cameras.width == (64, 128)
    assert cfg.field.density_bias == -1.0
    assert leaves(cfg)["cameras.width"] == (64, 128)


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_empty_prompt(prompt):
    with pytest.raises(ConfigError, match="the prompt is empty"):
        check(TrainConfig(prompt=prompt))


def test_values_that_cannot_work():
    cfg = TrainConfig(prompt="a chair", max_steps=0)
    with pytest.raises(ConfigError, match="max_steps: expected 1 or more, got 0"):
        check(cfg)
    cfg.max_steps, cfg.renderer.near_plane = 1, 1e10
    with pytest.raises(ConfigError, match=r"^renderer\.near_plane: expected less than far_plane"):
        check(cfg)


def test_the_radius_of_older_configurations():
    older = to_dict(TrainConfig())
    older["field"]["radius"] = older["renderer"]["radius"] = 1.0
    assert from_dict(TrainConfig, older).field.radius == 1.0
    assert "radius" in older["renderer"], "what is given stays as it is"
    for values in (older | {"field": {"radius": 2.0}}, {"renderer": {"radius": 1.0}}):
        with pytest.raises(ConfigError, match=r"renderer\.radius: expected that of the field, 2.0"):
            from_dict(TrainConfig, values)


def test_devices(monkeypatch):
    assert resolve_device("cpu") == torch.device("cpu")
    for name in ("gpu", "cuda:x", "meta"):
        with pytest.raises(ConfigError, match="--device"):
            resolve_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"no CUDA GPU.*--device cpu"):
        resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="there are 1 GPUs"):
        resolve_device("cuda:3")
