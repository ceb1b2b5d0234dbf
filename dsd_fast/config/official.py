"""The official configuration files and their dotted overrides, read as a `TrainConfig`.

Every key has one of three fates, written down in `KEYS`: it sets something here, it must have the
one value that this code implements, or it is ignored for a stated reason. Any other key is an
error that names the nearest known one.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dsd_fast.config.codec import nearest, set_value
from dsd_fast.config.presets import preset
from dsd_fast.config.reading import naming, read_text
from dsd_fast.config.tree import TrainConfig
from dsd_fast.config.yaml_subset import parse
from dsd_fast.diffusion.text import VIEWS
from dsd_fast.ranges import LONGEST, ConfigError, shown

log = logging.getLogger(__name__)

# OmegaConf's mark of a value that the user must give.
MISSING = "???"


@dataclass(frozen=True)
class Sets:
    """The key sets this setting, after `convert`."""

    path: str
    convert: Callable[[Any], Any] = lambda value: value


@dataclass(frozen=True)
class Only:
    """The key may be given, with one of these values."""

    values: tuple[Any, ...]


@dataclass(frozen=True)
class Ignored:
    """The key has no effect here; the reason is logged."""

    reason: str


def _precision(value: Any) -> str:
    names = {"16-mixed": "auto", "bf16-mixed": "bfloat16", "32": "float32", "32-true": "float32"}
    if str(value) not in names:
        raise ConfigError(
            f"trainer.precision: expected one of {', '.join(names)}, got {shown(value)}"
        )
    return names[str(value)]


def _group(official: str, ours: str, names: str) -> dict[str, Sets]:
    """Keys that have the same name on both sides."""
    return {f"{official}.{name}": Sets(f"{ours}.{name}") for name in names.split()}


_LOGGER = Ignored("metrics go to metrics.jsonl, there is no other logger")

KEYS: dict[str, Sets | Only | Ignored] = {
    "name": Sets("name"),
    "tag": Sets("tag"),
    "exp_root_dir": Sets("output"),
    "use_timestamp": Only((False,)),
    "seed": Sets("seed"),
    # Data
    "data_type": Only(("random-camera-datamodule",)),
    **_group(
        "data",
        "cameras",
        "width height batch_size resolution_milestones elevation_range azimuth_range "
        "camera_distance_range fovy_range camera_perturb center_perturb up_perturb "
        "light_distance_range light_position_perturb light_sample_strategy batch_uniform_azimuth "
        "progressive_until eval_height eval_width eval_elevation_deg eval_camera_distance "
        "eval_fovy_deg n_test_views",
    ),
    "data.eval_batch_size": Ignored("evaluation renders one view at a time"),
    "data.n_val_views": Sets("pictures.preview_views"),
    "data.rays_d_normalize": Only((True,)),
    # Geometry
    "system_type": Only(("dsd-system",)),
    "system.geometry_type": Only(("implicit-volume",)),
    "system.geometry.radius": Sets("field.radius"),
    **_group(
        "system.geometry",
        "field",
        "normal_type density_bias density_activation density_blob_scale density_blob_std "
        "finite_difference_normal_eps",
    ),
    "system.geometry.n_feature_dims": Only((3,)),
    "system.geometry.pos_encoding_config.otype": Only(("ProgressiveBandHashGrid",)),
    "system.geometry.pos_encoding_config.n_features_per_level": Sets("field.grid.n_features"),
    "system.geometry.pos_encoding_config.log2_hashmap_size": Sets("field.grid.log2_table_size"),
    **_group(
        "system.geometry.pos_encoding_config",
        "field.grid",
        "n_levels base_resolution per_level_scale start_level start_step update_steps",
    ),
    "system.geometry.mlp_network_config.n_neurons": Sets("field.n_neurons"),
    "system.geometry.mlp_network_config.n_hidden_layers": Sets("field.n_hidden_layers"),
    "system.geometry.mlp_network_config.otype": Only(("VanillaMLP",)),
    "system.geometry.mlp_network_config.activation": Ignored("the networks always use ReLU"),
    "system.geometry.mlp_network_config.output_activation": Only(("none",)),
    # Material, background, renderer
    "system.material_type": Only(("diffuse-with-point-light-material",)),
    "system.material.albedo_activation": Only(("sigmoid",)),
    **_group(
        "system.material",
        "material",
        "ambient_light_color diffuse_light_color ambient_only_steps diffuse_prob textureless_prob "
        "soft_shading ambient_only_on_test",
    ),
    "system.background_type": Only(("neural-environment-map-background",)),
    "system.background.color_activation": Only(("sigmoid",)),
    **_group("system.background", "background", "random_aug random_aug_prob eval_color"),
    "system.renderer_type": Only(("nerf-volume-renderer",)),
    "system.renderer.radius": Sets("field.radius"),
    "system.renderer.estimator": Only(("occgrid",)),
    "system.renderer.return_comp_normal": Only((True,)),
    **_group(
        "system.renderer",
        "renderer",
        "num_samples_per_ray eval_chunk_size randomized near_plane far_plane grid_prune "
        "prune_alpha_threshold",
    ),
    # Prompt and guidance
    "system.prompt_processor_type": Only(("stable-diffusion-prompt-processor",)),
    "system.prompt_processor.pretrained_model_name_or_path": Sets("model"),
    "system.prompt_processor.prompt": Sets("prompt"),
    "system.prompt_processor.negative_prompt": Sets("text.negative"),
    **{f"system.prompt_processor.prompt_{view}": Sets(f"text.{view}") for view in VIEWS},
    "system.prompt_processor.view_dependent_prompt_front": Sets("text.prefix"),
    "system.prompt_processor.use_perp_neg": Sets("guidance.use_perp_neg"),
    "system.prompt_processor.use_cache": Ignored("embeddings take seconds and are made each run"),
    "system.prompt_processor.spawn": Ignored("the text encoder is released after use"),
    "system.guidance_type": Only(("stable-diffusion-dsd-guidance",)),
    "system.guidance.pretrained_model_name_or_path": Sets("model"),
    "system.guidance.view_dependent_prompting": Sets("text.view_dependent"),
    **_group(
        "system.guidance",
        "guidance",
        "guidance_scale min_step_percent max_step_percent n_ddim_steps t_anneal sqrt_anneal "
        "delta_min",
    ),
    "system.guidance.trainer_max_steps": Ignored(
        "the annealing always spans trainer.max_steps, so that the two cannot disagree"
    ),
    "system.guidance.half_precision_weights": Sets(
        "diffusion.dtype", lambda value: "auto" if value else "float32"
    ),
    **{
        f"system.guidance.{name}": Ignored("the official guidance never reads it either")
        for name in ("weighting_strategy", "grad_clip", "use_img_loss", "var_red", "max_items_eval")
    },
    **{
        f"system.guidance.{name}": Ignored("the UNet runs through --diffusion.engine")
        for name in (
            "enable_memory_efficient_attention",
            "enable_sequential_cpu_offload",
            "enable_attention_slicing",
            "enable_channels_last_format",
            "token_merging",
        )
    },
    # Loss and optimizer
    **_group(
        "system.loss",
        "loss",
        "lambda_dsd lambda_orient lambda_sparsity lambda_opaque lambda_convex lambda_z_variance",
    ),
    "system.optimizer.name": Only(("Adam",)),
    "system.optimizer.args.lr": Ignored("both parameter groups have a rate of their own"),
    "system.optimizer.args.betas": Sets("optimizer.betas"),
    "system.optimizer.args.eps": Sets("optimizer.eps"),
    "system.optimizer.params.geometry.lr": Sets("optimizer.geometry_lr"),
    "system.optimizer.params.background.lr": Sets("optimizer.background_lr"),
    "system.loggers.wandb.enable": _LOGGER,
    "system.loggers.wandb.project": _LOGGER,
    "system.loggers.wandb.name": _LOGGER,
    # Trainer
    "trainer.max_steps": Sets("max_steps"),
    "trainer.log_every_n_steps": Sets("trainer.log_every"),
    "trainer.num_sanity_val_steps": Ignored("there is no validation before the first step"),
    "trainer.val_check_interval": Sets("trainer.preview_every"),
    "trainer.enable_progress_bar": Sets("trainer.progress"),
    "trainer.precision": Sets("diffusion.dtype", _precision),
    "checkpoint.save_last": Only((True,)),
    "checkpoint.save_top_k": Ignored("--trainer.keep-checkpoints says how many are kept"),
    "checkpoint.every_n_train_steps": Sets("trainer.checkpoint_every"),
}

# Keys whose values are text, whatever they look like in YAML.
_TEXT_KEYS = {"name", "tag"} | {
    f"system.prompt_processor.{name}"
    for name in ("prompt", "negative_prompt", *(f"prompt_{view}" for view in VIEWS))
}


def load(path: Path, overrides: list[str] | tuple[str, ...] = ()) -> TrainConfig:
    """The configuration of an official YAML file with ``a.b.c=value`` overrides applied.

    A prompt left at ``???`` stays empty, for --prompt to fill. Raises ConfigError for a file that
    cannot be read, an unknown key, or a value that this code does not implement.
    """
    values = naming(path, _read, path)
    for override in overrides:
        key, value = _override(override)
        values[key] = value
    return naming(path, _config, values, path.name)


def _config(values: Mapping[str, Any], file: str) -> TrainConfig:
    """The configuration of official keys; `file` for the log."""
    resolver = _Resolver(values)
    cfg = preset("dsd")
    source: dict[str, tuple[str, Any]] = {}
    for key, raw in values.items():
        if raw == MISSING:
            continue
        rule = KEYS[key]
        if isinstance(rule, Ignored):
            log.info("%s: %s is ignored: %s", file, key, rule.reason)
            continue
        value = resolver(raw, key)
        if value == MISSING:  # A value made from one that is still to come, as the tag is.
            continue
        if isinstance(rule, Only):
            if value not in rule.values:
                expected = " or ".join(repr(option) for option in rule.values)
                raise ConfigError(f"{key}: only {expected} is implemented here, got {shown(value)}")
            continue
        _set(cfg, rule.path, rule.convert(value), key, source)
    if cfg.tag == cfg.prompt.replace(" ", "_"):
        cfg.tag = ""  # The run folder is named so anyway, and a --prompt flag may still come.
    if cfg.trainer.checkpoint_every >= cfg.max_steps:
        # The official files save at the very end only; a crash then loses everything.
        cfg.trainer.checkpoint_every = TrainConfig().trainer.checkpoint_every
        log.info("checkpoints are written every %d steps", cfg.trainer.checkpoint_every)
    return cfg


def is_override(token: str) -> bool:
    """Whether a command-line token has the form ``a.b.c=value`` (or ``seed=1``)."""
    return re.match(r"[A-Za-z_]\w*(\.\w+)*=", token) is not None


def _set(cfg: TrainConfig, target: str, value: Any, key: str, source: dict) -> None:
    if target in source and source[target][1] != value:
        other, other_value = source[target]
        raise ConfigError(f"{other} = {shown(other_value)} and {key} = {shown(value)} must agree")
    source[target] = (key, value)
    try:
        set_value(cfg, target, value)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}" if key != target else str(error)) from None


def _read(path: Path) -> dict[str, Any]:
    """Dotted key -> value of a file, its references as they are written."""
    try:
        tree = parse(read_text(path))
    except yaml.YAMLError as error:
        raise ConfigError(f"not a YAML file of settings: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"expected groups of settings, got {shown(tree)}")
    values: dict[str, Any] = {}
    _flatten(tree, "", values)
    return values


def _override(override: str) -> tuple[str, Any]:
    key, _, text = override.partition("=")
    _check_key(key)
    # "yes", "1984" and "a: b" are prompts; only quotes around one are taken off.
    if key in _TEXT_KEYS and text[:1] not in ("'", '"'):
        return key, text
    try:
        return key, parse(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {shown(override)}: {error}") from error


def _flatten(tree: dict[str, Any], prefix: str, values: dict[str, Any]) -> None:
    """Put what a tree holds into `values`, by dotted keys that are known."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value:
            _flatten(value, f"{key}.", values)
            continue
        _check_key(key)
        if key in values:  # "a.b: 1" beside "a: {b: 2}"
            raise ConfigError(f"{key} is there twice")
        values[key] = value


def _check_key(key: str) -> None:
    if key in KEYS:
        return
    if any(known.startswith(f"{key}.") for known in KEYS):
        raise ConfigError(f"{key}: expected a group of settings, got a value or none")
    raise ConfigError(f"{shown(key)} is not a known setting{nearest(key, KEYS)}")


# The functions of the official files. Text stays text: a prompt may look like YAML.
_TEXT_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "rmspace": lambda text, replacement: text.replace(" ", replacement),
    "basename": lambda path: Path(path).name,
}
# Of so many numbers.
_NUMBER_FUNCTIONS: dict[str, tuple[int, Callable[..., Any]]] = {
    "add": (2, lambda a, b: a + b),
    "sub": (2, lambda a, b: a - b),
    "mul": (2, lambda a, b: a * b),
    "div": (2, lambda a, b: a / b),
    "idiv": (2, lambda a, b: a // b),
    "not": (1, lambda value: not value),
    "gt0": (1, lambda value: value > 0),
    "tuple2": (1, lambda value: [float(value), float(value)]),
}


class _Resolver:
    """``${a.b}`` and ``${function:argument,...}`` inside values, as OmegaConf with the official
    functions resolves them.

    A text that a reference stands in twice doubles with each reference to it in turn: what all
    values of a file take, and the length of each, is bounded.
    """

    # Official files have ten.
    MOST_REFERENCES = 1000

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values
        self.references = 0

    def __call__(self, value: Any, key: str, depth: int = 0) -> Any:
        if depth > 20:
            raise ConfigError(f"{key}: the references go in a circle")
        if isinstance(value, list):
            return [self(item, key, depth) for item in value]
        # The innermost ${...}; what it gives may complete an outer one.
        while isinstance(value, str) and (match := re.search(r"\$\{([^${}]*)\}", value)):
            self.references += 1
            if self.references > self.MOST_REFERENCES:
                raise ConfigError(
                    f"{key}: the file takes more than {self.MOST_REFERENCES} references"
                )
            part = self._evaluate(match[1], key, depth)
            if part == MISSING:
                return MISSING
            whole = match[0] == value
            value = part if whole else value[: match.start()] + str(part) + value[match.end() :]
            if isinstance(value, str) and len(value) > LONGEST:
                raise ConfigError(
                    f"{key}: expected at most {LONGEST} characters, got {len(value)} when its "
                    "references are resolved"
                )
        return value

    def _evaluate(self, expression: str, key: str, depth: int) -> Any:
        name, colon, text = expression.partition(":")
        if not colon:
            if name not in self.values:
                raise ConfigError(
                    f"{key}: there is no {shown(name)} to refer to{nearest(name, KEYS)}"
                )
            return self(self.values[name], name, depth + 1)
        try:
            if name in _TEXT_FUNCTIONS:
                # The last comma separates: the text itself may hold commas.
                return _TEXT_FUNCTIONS[name](
                    *(text.rsplit(",", 1) if name == "rmspace" else [text])
                )
            if name in _NUMBER_FUNCTIONS:
                count, function = _NUMBER_FUNCTIONS[name]
                return function(*_numbers(text, count))
        except (ValueError, TypeError, ArithmeticError, yaml.YAMLError) as error:
            raise ConfigError(f"{key}: cannot evaluate {shown(expression)}: {error}") from error
        known = [*_TEXT_FUNCTIONS, *_NUMBER_FUNCTIONS]
        raise ConfigError(f"{key}: unknown function {shown(name)}{nearest(name, known)}")


def _numbers(text: str, count: int) -> list[int | float]:
    """The arguments of a function; ValueError for others: a text times a number may fill memory."""
    values = [parse(part) for part in text.split(",")]
    if len(values) != count or not all(isinstance(value, (int, float)) for value in values):
        raise ValueError(f"expected {count} number{'s' * (count > 1)}, got {shown(text)}")
    return values
