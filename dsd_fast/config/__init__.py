"""The configuration of a run: the tree of settings, its presets, and its JSON form."""

from dsd_fast.config.codec import from_dict, leaves, nearest, set_value, to_dict
from dsd_fast.config.device import resolve_device
from dsd_fast.config.presets import preset
from dsd_fast.config.reading import read_config
from dsd_fast.config.tree import (
    PRESETS,
    TASK_PRESETS,
    Preset,
    PromptConfig,
    Start,
    TrainConfig,
    register_task,
)
from dsd_fast.ranges import ConfigError, check
from dsd_fast.scene.cameras import CameraConfig
from dsd_fast.scene.rates import OptimizerConfig

__all__ = [
    "PRESETS",
    "TASK_PRESETS",
    "CameraConfig",
    "ConfigError",
    "OptimizerConfig",
    "Preset",
    "PromptConfig",
    "Start",
    "TrainConfig",
    "check",
    "from_dict",
    "leaves",
    "nearest",
    "preset",
    "read_config",
    "register_task",
    "resolve_device",
    "set_value",
    "to_dict",
]
