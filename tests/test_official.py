"""Official configuration files: every key has a fate, and the result is the preset."""

from pathlib import Path

import pytest

from dsd_fast.config import ConfigError, leaves, official, preset

DATA = Path(__file__).parent / "data"
DSD = DATA / "dsd.yaml"


@pytest.mark.parametrize(
    ("file", "name"), [("dsd.yaml", "dsd"), ("dsd_low_res.yaml", "dsd-low-res")]
)
def test_files_give_the_presets(file, name):
    ours, theirs = leaves(preset(name)), leaves(official.load(DATA / file))
    differing = {key for key in ours if ours[key] != theirs[key]}
    # One view in every stage, written twice.
    assert ours["cameras.batch_size"] == 1 and theirs["cameras.batch_size"] == (1, 1)
    # The file's own seed and its line a step are not worth a preset's.
    assert differing - {"preset"} == {"seed", "trainer.log_every", "cameras.batch_size"}
    assert theirs["seed"] == 10000


def test_every_key_is_known_and_its_target_exists():
    keys = official._read(DSD)
    assert len(keys) > 70 and set(keys) <= set(official.KEYS)
    existing = leaves(preset("dsd"))
    for key, rule in official.KEYS.items():
        if isinstance(rule, official.Sets):
            assert rule.path in existing, key


def test_ignored_keys_are_logged_with_a_reason(caplog):
    official.load(DSD)
    assert "system.guidance.weighting_strategy is ignored: the official guidance" in caplog.text


def test_overrides_and_references():
    cfg = official.load(
        DSD,
        [
            "system.prompt_processor.prompt=a toy robot, very detailed",
            "system.geometry.radius=1.5",
            "data.width=[32,64]",
            "trainer.max_steps=20",
            "seed=3",
            "system.optimizer.args.eps=1e-8",
            "checkpoint.every_n_train_steps=5",
        ],
    )
    assert cfg.prompt == "a toy robot, very detailed"
    assert cfg.tag == ""
    assert cfg.field.radius == 1.5
    assert cfg.cameras.width == (32, 64)
    assert (cfg.max_steps, cfg.seed) == (20, 3)
    assert cfg.optimizer.eps == 1e-8
    assert cfg.trainer.checkpoint_every == 5


def test_a_run_that_only_saves_at_its_end_is_given_checkpoints():
    assert official.load(DSD).trainer.checkpoint_every < 10000


@pytest.mark.parametrize("prompt", ["1984", "yes", "a: b", "[x]", '"quoted"', "x=1, y=2", "null"])
def test_prompts_stay_text(prompt):
    cfg = official.load(DSD, [f"system.prompt_processor.prompt={prompt}"])
    assert cfg.prompt == prompt.strip('"')


def test_tag_of_its_own():
    cfg = official.load(DSD, ["tag=${rmspace:my run 3,-}", "system.prompt_processor.prompt=x"])
    assert cfg.tag == "my-run-3"


def test_missing_prompt_is_left_to_the_flags():
    cfg = official.load(DSD)
    assert cfg.prompt == cfg.tag == ""


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("system.guidance.guidance_scal=5", "did you mean system.guidance.guidance_scale"),
        ("system.guidance_type=stable-diffusion-guidance", "only 'stable-diffusion-dsd-guidance'"),
        ("system.guidance.guidance_scale=big", "expected a number"),
        ("data.width=${data.widht}", "no .data.widht. .*did you mean data.width"),
        ("data.width=${data.width}", "circle"),
        ("tag=${rmspce:a b,_}", "unknown function 'rmspce'.*rmspace"),
        ("trainer.precision=8", "trainer.precision: expected one of 16-mixed"),
        ("seed.x=1", "seed.x. is not a known setting; did you mean seed"),
        ("system.renderer.radius=1.5", "geometry.radius = .* must agree"),
        ("system.optimizer.args.betas=[2,2]", "args.betas: .*expected less than 1"),
        ("system.guidance.pretrained_model_name_or_path=other", "must agree"),
    ],
)
def test_wrong_overrides(override, message):
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        official.load(DSD, [override])


@pytest.mark.parametrize(
    ("expression", "value"),
    [("${mul:${trainer.max_steps},2}", 20000), ("${idiv:7,2}", 3), ("${add:1,${sub:5,2}}", 4)],
)
def test_arithmetic(expression, value):
    assert (
        official.load(DSD, [f"data.progressive_until={expression}"]).cameras.progressive_until
        == value
    )


def test_bad_files(tmp_path):
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        official.load(tmp_path / "absent.yaml")
    (tmp_path / "a.yaml").write_text("a: [1")
    with pytest.raises(ConfigError, match="not a YAML file"):
        official.load(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("just text")
    with pytest.raises(ConfigError, match="expected groups of settings"):
        official.load(tmp_path / "b.yaml")
