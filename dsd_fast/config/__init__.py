"""The configuration of a run: the tree of settings, its presets, and its JSON form."""

from dsd_fast.config.codec import from_dict, leaves, nearest, set_value, to_dict
from dsd_fast.config.device import resolve_device
from dsd_fast.config.presets import preset
from dsd_fast.config.tree import (
    PRESETS,
    TASKS,
    BackgroundConfig,
    CameraConfig,
    DiffusionConfig,
    FieldConfig,
    GuidanceConfig,
    ImageConfig,
    LossConfig,
    MaterialConfig,
    MeshConfig,
    MultiViewConfig,
    OptimizerConfig,
    PictureConfig,
    PromptConfig,
    RendererConfig,
    SingleViewConfig,
    Start,
    TrainConfig,
    TrainerConfig,
    register_task,
)
from dsd_fast.ranges import ConfigError, check
from dsd_fast.scene.field import GridConfig

__all__ = [
    "PRESETS",
    "TASKS",
    "BackgroundConfig",
    "CameraConfig",
    "ConfigError",
    "DiffusionConfig",
    "FieldConfig",
    "GridConfig",
    "GuidanceConfig",
    "ImageConfig",
    "LossConfig",
    "MaterialConfig",
    "MeshConfig",
    "MultiViewConfig",
    "OptimizerConfig",
    "PictureConfig",
    "PromptConfig",
    "RendererConfig",
    "SingleViewConfig",
    "Start",
    "TrainConfig",
    "TrainerConfig",
    "check",
    "from_dict",
    "leaves",
    "nearest",
    "preset",
    "register_task",
    "resolve_device",
    "set_value",
    "to_dict",
]
