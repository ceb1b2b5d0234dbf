"""The configuration of a run: one tree of dataclasses, its presets, and its JSON form.

A comment above a field is that flag's help. The classes live with the code that reads them; here
they are put together.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import torch

from dsd_fast.diffusion.text import VIEWS
from dsd_fast.guidance import GuidanceConfig, MultiViewConfig
from dsd_fast.scene.background import BackgroundConfig
from dsd_fast.scene.cameras import CameraConfig
from dsd_fast.scene.field import FieldConfig, GridConfig
from dsd_fast.scene.image import ImageConfig
from dsd_fast.scene.losses import LossConfig
from dsd_fast.scene.material import MaterialConfig
from dsd_fast.scene.mesh import MeshConfig
from dsd_fast.scene.picture import SingleViewConfig
from dsd_fast.scene.rates import OptimizerConfig
from dsd_fast.scene.renderer import RendererConfig
from dsd_fast.schedules import Schedule

T = TypeVar("T")

PRESETS = ("embedded", "dsd", "dsd-low-res", "mvdream")
STABLE_DIFFUSION = "stabilityai/stable-diffusion-2-1-base"
MVDREAM = "ashawkey/mvdream-sd2.1-diffusers"
# What MVDream is guided away from.
MVDREAM_NEGATIVE = (
    "ugly, bad anatomy, blurry, pixelated obscure, unnatural colors, poor lighting, dull, and "
    "unclear, cropped, lowres, low quality, artifacts, duplicate, morbid, mutilated, poorly drawn "
    "face, deformed, dehydrated, bad proportions"
)

# Steps of the embedded preset where --max-steps does not say.
EMBEDDED_STEPS_GPU = 1500
EMBEDDED_STEPS_CPU = 600
# Steps of a 2D run, and of one in the exact form.
IMAGE_STEPS = 100
EXACT_STEPS = 50
# Their guidance scales. Every step of the practical form adds its share of guidance: with these
# steps and this rate, a scale of 1.5 comes to as much as 4 in a sampler.
IMAGE_SCALE = 1.5
IMAGE_SCALE_EXACT = 4.0
# The same from one picture.
VIEW_STEPS_GPU = 600
VIEW_STEPS_CPU = 300
# Distance and vertical field of view in degrees of the cameras that the models of views know.
VIEW_CAMERA = (1.75, 50.0)
ZERO123 = "ashawkey/zero123-xl-diffusers"
ZERO123_CAMERA = (3.8, 20.0)
ZERO123_STEPS = 600


class ConfigError(ValueError):
    """A setting that does not exist, does not fit, or cannot work."""


@dataclass
class PromptConfig:
    # The negative prompt, for every view.
    negative: str = ""
    # What a picture should not be: the prompt that `nfsd` takes for noise.
    poor: str = (
        "unrealistic, blurry, low quality, out of focus, ugly, low contrast, dull, dark, "
        "low-resolution, gloomy"
    )
    # "front view of ..." instead of "..., front view".
    prefix: bool = False
    # Tell the model which side is seen; False uses the bare prompt for every view.
    view_dependent: bool = True
    # A prompt of its own for the front view.
    front: str | None = None
    # A prompt of its own for the side views.
    side: str | None = None
    # A prompt of its own for the back view.
    back: str | None = None
    # A prompt of its own for the view from above.
    overhead: str | None = None

    def overrides(self) -> dict[str, str]:
        """View name -> prompt, for the views that have one of their own."""
        prompts = {view: getattr(self, view) for view in VIEWS}
        return {view: prompt for view, prompt in prompts.items() if prompt is not None}


@dataclass
class DiffusionConfig:
    # Precision of the UNet; "auto" is float16 on CUDA and float32 on the CPU.
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    # How the UNet is run: "fused" passes or torch.compile in CUDA graphs, CUDA graphs alone, plain
    # calls, TensorRT; "auto" is fused where that works, else graphs, else plain calls.
    engine: Literal["auto", "eager", "graph", "fused", "compiled", "tensorrt"] = "auto"


@dataclass
class TrainerConfig:
    # Steps between lines of metrics.jsonl; each line waits for the device once.
    log_every: int = 10
    # Steps between preview images; 0 makes none.
    preview_every: int = 500
    # Steps between checkpoints; there is always one at the end and on Ctrl-C.
    checkpoint_every: int = 500
    # Checkpoints kept, the newest ones.
    keep_checkpoints: int = 2
    # Stop after this many steps in a row whose gradients were not finite.
    max_bad_steps: int = 50
    # Warn when the mean opacity stays under this ...
    min_opacity: float = 0.005
    # ... for this many steps.
    min_opacity_steps: int = 200
    # Show progress.
    progress: bool = True
    # On CUDA, hold steps in CUDA graphs.
    graphs: bool = True
    # Log the GPU memory of each phase with every line of metrics, not at the first step alone.
    log_memory: bool = False


@dataclass
class PictureConfig:
    # Views in a preview image.
    preview_views: int = 4
    # Height and width of a view in a preview image.
    preview_size: int = 128
    # Views in the final contact sheet.
    sheet_views: int = 8
    # Make the turntable video (views and size: --cameras.n-test-views, --cameras.eval-height).
    turntable: bool = True
    # Frames per second of the video.
    fps: int = 30
    # Make the mesh.
    mesh: bool = True


@dataclass
class TrainConfig:
    """Everything that decides what a run does."""

    # What to make, for example "an armchair".
    prompt: str = ""
    # What is made: a 3D object from a prompt ("text") or from one picture of it ("single-view"), or
    # a single "image".
    task: Literal["text", "single-view", "image"] = "text"
    # Random seed: other seeds give other objects.
    seed: int = 0
    # Diffusion model: "embedded", a Stable Diffusion folder in diffusers format, or a hub id.
    model: str = "embedded"
    # Starting values: "embedded" suits the model that ships with the package, "dsd" and
    # "dsd-low-res" are the official ones for Stable Diffusion, "mvdream" those of MVDream.
    preset: Literal["embedded", "dsd", "dsd-low-res", "mvdream"] = "embedded"
    # Length of the run; the schedules of the embedded preset scale with it.
    max_steps: int = 10000
    # "auto" (CUDA if there is one), "cpu", "cuda" or "cuda:1".
    device: str = "auto"
    # Fit a GPU of so many GiB: choose settings that need less memory (other flags win over them),
    # and let this process take no more.
    vram: float | None = None
    # Folder under which run folders are made.
    output: Path = Path("outputs")
    # Folder inside --output that holds the runs.
    name: str = "diverse-score-distillation"
    # Name of the run folder in place of the prompt.
    tag: str = ""

    text: PromptConfig = dataclasses.field(default_factory=PromptConfig)
    diffusion: DiffusionConfig = dataclasses.field(default_factory=DiffusionConfig)
    guidance: GuidanceConfig = dataclasses.field(default_factory=GuidanceConfig)
    image: ImageConfig = dataclasses.field(default_factory=ImageConfig)
    single_view: SingleViewConfig = dataclasses.field(default_factory=SingleViewConfig)
    multiview: MultiViewConfig = dataclasses.field(default_factory=MultiViewConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    cameras: CameraConfig = dataclasses.field(default_factory=CameraConfig)
    field: FieldConfig = dataclasses.field(default_factory=FieldConfig)
    material: MaterialConfig = dataclasses.field(default_factory=MaterialConfig)
    background: BackgroundConfig = dataclasses.field(default_factory=BackgroundConfig)
    renderer: RendererConfig = dataclasses.field(default_factory=RendererConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = dataclasses.field(default_factory=TrainerConfig)
    pictures: PictureConfig = dataclasses.field(default_factory=PictureConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

    def validate(self) -> None:
        """Raise ConfigError for values that cannot work, before anything is loaded."""
        if not self.prompt.strip():
            raise ConfigError('the prompt is empty: pass --prompt "an armchair"')
        for name, value in (
            ("max_steps", self.max_steps),
            ("trainer.log_every", self.trainer.log_every),
            ("trainer.checkpoint_every", self.trainer.checkpoint_every),
            ("trainer.keep_checkpoints", self.trainer.keep_checkpoints),
            ("trainer.max_bad_steps", self.trainer.max_bad_steps),
            ("cameras.n_test_views", self.cameras.n_test_views),
            ("pictures.preview_views", self.pictures.preview_views),
            ("pictures.sheet_views", self.pictures.sheet_views),
            ("mesh.resolution", self.mesh.resolution),
        ):
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if self.guidance.method == "recon" and self.cameras.n_view == 1:
            raise ConfigError(
                "--guidance.method recon is for a multi-view model alone: pass --preset mvdream"
            )
        if self.task != "text" and self.cameras.n_view > 1:
            raise ConfigError(
                f"--cameras.n-view {self.cameras.n_view} is for objects from prompts: drop --task "
                f"{self.task}"
            )
        schedules = (
            leaves(self.loss, "loss.")
            | {
                f"single_view.lambda_{name}": value
                for name, value in self.single_view.schedules().items()
            }
            | {
                "guidance.min_step_percent": self.guidance.min_step_percent,
                "guidance.max_step_percent": self.guidance.max_step_percent,
            }
        )
        for name, value in schedules.items():
            try:
                Schedule.parse(value)
            except (TypeError, ValueError) as error:
                raise ConfigError(f"{name}: {error}") from error
        if self.task == "image":
            self._validate_image()
        if self.field.radius != self.renderer.radius:
            raise ConfigError(
                f"field.radius is {self.field.radius} and renderer.radius is "
                f"{self.renderer.radius}: pass both, they describe one box"
            )

    def _validate_image(self) -> None:
        try:
            self.image.validate()
        except ValueError as error:
            raise ConfigError(str(error)) from error
        if self.image.exact and self.loss.lambda_dsd != 1:
            raise ConfigError(
                "--image.exact takes steps of unit length: loss.lambda_dsd must be 1, got "
                f"{self.loss.lambda_dsd}"
            )
        if self.image.azimuth is not None:
            if not self.text.view_dependent:
                raise ConfigError(
                    "--image.azimuth asks for a view and --text.no-view-dependent for none: "
                    "drop one of them"
                )
            return
        if self.guidance.use_perp_neg:
            raise ConfigError(
                "Perp-Neg pushes away from other views, and this image asks for no view: pass "
                "--guidance.no-use-perp-neg, or a view, as --image.azimuth 0"
            )
        for view in self.text.overrides():
            raise ConfigError(
                f"--text.{view} is the prompt of one view, and this image asks for none: pass "
                "--prompt, or a view, as --image.azimuth 0"
            )


def preset(
    name: str,
    max_steps: int | None = None,
    on_cpu: bool = False,
    task: str = "text",
    exact: bool = False,
    method: str = "dsd",
) -> TrainConfig:
    """The configuration of a preset, for a run of ``max_steps`` (None: the preset's own length).

    ``exact`` is the exact form of the task "image", whose own length is another; ``method`` that of
    the guidance, for which the task "single-view" and the preset "mvdream" have scale and levels of
    their own.
    """
    if name == "mvdream":
        if task != "text":
            raise ConfigError(f"--preset mvdream makes objects from prompts: drop --task {task}")
        return _mvdream(max_steps, method)
    if task == "single-view":
        return _single_view(name, max_steps, on_cpu, method)
    if task == "image" and max_steps is None:
        max_steps = EXACT_STEPS if exact else IMAGE_STEPS
    if name == "embedded":
        cfg = _embedded(max_steps, on_cpu)
    elif name in PRESETS:
        cfg = TrainConfig(model=STABLE_DIFFUSION, preset=name)
        if name == "dsd-low-res":
            cfg.max_steps = 5000
            cfg.cameras.width = cfg.cameras.height = (128, 128)
        cfg.max_steps = max_steps or cfg.max_steps
    else:
        raise ConfigError(f"unknown preset {name!r}: expected one of {', '.join(PRESETS)}")
    if task == "image":
        _for_images(cfg, exact)
    return cfg


def _for_images(cfg: TrainConfig, exact: bool) -> None:
    """Turn a preset into that of the task "image": of its settings those of the model stay."""
    cfg.task, cfg.name = "image", f"{cfg.name}-2d{'-exact' * exact}"
    cfg.image.exact = exact
    # No view is asked for, and scales are those of samplers. Levels fall evenly, as a sampler's do,
    # and to the end: no camera moves the details. Steps have DDIM's weight, for what is left of
    # official steps at the highest levels is too short to settle colours and layout.
    cfg.guidance = GuidanceConfig(
        guidance_scale=IMAGE_SCALE_EXACT if exact else IMAGE_SCALE,
        use_perp_neg=False,
        standard_cfg=True,
        min_step_percent=0.02,
        max_step_percent=0.999,
        sqrt_anneal=False,
        weighting="ddim",
        noise_table_step=cfg.guidance.noise_table_step,
    )
    steps = cfg.max_steps
    cfg.trainer.log_every = min(10, max(steps // 20, 1))
    cfg.trainer.preview_every = max(steps // 8, 1)
    cfg.trainer.checkpoint_every = max(steps // 4, 1)


def _embedded(max_steps: int | None, on_cpu: bool) -> TrainConfig:
    """Settings for the small prior that ships with the package.

    Everything that is indexed by the step is a share of the run's length, so that a run of any
    length goes through all of its phases. On a CPU renderings are smaller and the run shorter.
    """
    steps = max_steps or (EMBEDDED_STEPS_CPU if on_cpu else EMBEDDED_STEPS_GPU)

    def at(share: float) -> int:
        return max(round(share * steps), 1)

    size = (48, 64) if on_cpu else (64, 128)
    eval_size = 128 if on_cpu else 256
    return TrainConfig(
        model="embedded",
        preset="embedded",
        max_steps=steps,
        # Its captions have no words for what is poor.
        text=PromptConfig(poor=""),
        # At the official scale of 7.5 the small prior's colours saturate and its shapes stay fog.
        guidance=GuidanceConfig(
            guidance_scale=5.0,
            mirror_trajectory=True,
            # The step at which a run this short needs fewest rows, as near the exact gradient.
            noise_table_step=25,
            # From the highest level to the lowest, in proportion to the steps. At first views agree
            # on one object, whose colours and edges then come to rest.
            trajectory_share=(320, 0.5, 0.125, 650, 0.0, 980),
        ),
        # Each trajectory has a background of its own. Learned too slowly, it is made up for by
        # floating shapes of its colour.
        optimizer=OptimizerConfig(background_lr=0.01),
        # What is learned behind the object is of no use to anyone: pictures show a plain grey.
        background=BackgroundConfig(eval_color=(0.7, 0.7, 0.7)),
        loss=LossConfig(
            lambda_sparsity=(0, 0.2, 0.05, at(0.75)),
            lambda_convex=(0, 1.0, 1.0, at(0.5)),
        ),
        cameras=CameraConfig(
            width=size,
            height=size,
            resolution_milestones=(at(0.5),),
            eval_height=eval_size,
            eval_width=eval_size,
            # Looking past the object teaches a 32x32 latent little: it stays near the centre.
            camera_perturb=0.05,
            center_perturb=0.05,
            # Views spread from the front: an object is the front's first, and so the seed's own,
            # before the trajectories of other views, which are of other objects, have a say. Longer
            # than this, what few pixels and steps there are on a CPU make it flat.
            progressive_until=at(1 / 6 if on_cpu else 1 / 3),
            eval_camera_distance=1.9,
            eval_fovy_deg=60,
        ),
        field=FieldConfig(
            # What a larger blob leaves above flat things floats there to the end.
            density_blob_std=0.3,
            grid=GridConfig(
                n_levels=12,
                log2_table_size=16,
                base_resolution=16,
                per_level_scale=((128 if on_cpu else 256) / 16) ** (1 / 11),  # cells of the finest
                start_level=6,
                start_step=at(0.1),
                update_steps=at(0.08),
            ),
        ),
        material=MaterialConfig(ambient_only_steps=at(0.1), ambient_only_on_test=True),
        renderer=RendererConfig(num_samples_per_ray=256 if on_cpu else 512),
        trainer=TrainerConfig(
            log_every=min(10, at(0.02)), preview_every=at(0.2), checkpoint_every=at(0.25)
        ),
        mesh=MeshConfig(resolution=128 if on_cpu else 192),
    )


def _single_view(name: str, max_steps: int | None, on_cpu: bool, method: str) -> TrainConfig:
    """Settings for one picture: those of Zero-1-to-3 in threestudio (DSD_SPEC 11.2), on the presets
    "dsd" and "dsd-low-res" as they are, on "embedded" with the small model's camera and size."""
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}: expected one of {', '.join(PRESETS)}")
    small = name == "embedded"
    default = (VIEW_STEPS_CPU if on_cpu else VIEW_STEPS_GPU) if small else ZERO123_STEPS
    steps = max_steps or default
    cfg = _embedded(steps, on_cpu) if small else TrainConfig(model=ZERO123, preset=name)
    cfg.task, cfg.max_steps = "single-view", steps

    def at(share: float) -> int:
        return max(round(share * steps), 1)

    cfg.guidance = GuidanceConfig(
        method=method,
        guidance_scale=3.0,
        use_perp_neg=False,
        standard_cfg=True,
        # Views come from so many directions that a table would be filled more often than read.
        noise_table_step=0,
    )
    small_dsd = small and method == "dsd"
    if small_dsd:
        # Against the rendering's own prediction the small model's contrast has no bound.
        cfg.guidance.trajectory_share = 1.0
        cfg.guidance.guidance_scale = 5.0
        cfg.guidance.min_step_percent = 0.25
        # A CPU's run has no time for finer trajectories.
        cfg.guidance.n_ddim_steps = 20 if on_cpu else 40
    if method == "sds":
        cfg.guidance.t_anneal = False
        cfg.guidance.min_step_percent = (0, 0.4, 0.2, at(1 / 3))
        cfg.guidance.max_step_percent = (0, 0.85, 0.5, at(1 / 3))
    distance, fovy = VIEW_CAMERA if small else ZERO123_CAMERA
    # Rendered size and views a step.
    stages = ((48, 1), (64, 1)) if on_cpu else ((64, 4), (128, 4))
    stages = stages if small else ((64, 12), (128, 4), (256, 2))
    sizes, views = (tuple(column) for column in zip(*stages))
    cfg.cameras = CameraConfig(
        width=sizes,
        height=sizes,
        batch_size=views,
        resolution_milestones=(at(0.5),) if small else (at(1 / 3), at(1 / 2)),
        elevation_range=(-10.0, 80.0),
        camera_distance_range=(distance, distance),
        fovy_range=(fovy, fovy),
        camera_perturb=0.0,
        # A trajectory's cameras stand still: unless they shift, their pixels' cells show.
        center_perturb=0.03 if small_dsd else 0.0,
        up_perturb=0.0,
        eval_height=cfg.cameras.eval_height,
        eval_width=cfg.cameras.eval_width,
        eval_camera_distance=distance,
        eval_fovy_deg=fovy,
    )
    cfg.loss = LossConfig(
        lambda_dsd=(0.2 if on_cpu else 0.15) if small_dsd else 0.1,
        lambda_orient=1.0,
        lambda_sparsity=0.1,
        lambda_opaque=0.1,
        lambda_convex=0.0,
        lambda_z_variance=0.0,
    )
    # The box holds the object, and the cameras stand outside.
    cfg.field.radius = cfg.renderer.radius = 1.0
    # The picture's light is part of its colours.
    cfg.material = MaterialConfig(diffuse_prob=0.0, ambient_only_on_test=True)
    cfg.background = BackgroundConfig(random_aug=False, eval_color=(1.0, 1.0, 1.0))
    return cfg


def _mvdream(max_steps: int | None, method: str) -> TrainConfig:
    """Settings of MVDream in threestudio (DSD_SPEC 11.3); with "dsd" scale and levels are DSD's.

    The original's "no-material" is the albedo alone; its AdamW decays weights by 0.01 of each step,
    which is left out.
    """
    steps = max_steps or 10000
    guidance = GuidanceConfig(method=method, use_perp_neg=False, standard_cfg=True)
    if method != "dsd":
        guidance.guidance_scale = 50.0
        guidance.t_anneal = False
        guidance.min_step_percent = (0, 0.98, 0.02, 8000)
        guidance.max_step_percent = (0, 0.98, 0.50, 8000)
    return TrainConfig(
        model=MVDREAM,
        preset="mvdream",
        max_steps=steps,
        text=PromptConfig(negative=MVDREAM_NEGATIVE, view_dependent=False),
        guidance=guidance,
        loss=LossConfig(
            lambda_orient=0.0,
            lambda_sparsity=0.0,
            lambda_opaque=0.0,
            lambda_convex=0.0,
            lambda_z_variance=0.0,
        ),
        cameras=CameraConfig(
            width=(64, 256),
            height=(64, 256),
            batch_size=(8, 4),
            n_view=4,
            resolution_milestones=(5000,),
            elevation_range=(0.0, 30.0),
            camera_distance_range=(0.8, 1.0),
            relative_distance=True,
            fovy_range=(15.0, 60.0),
            camera_perturb=0.0,
            center_perturb=0.0,
            up_perturb=0.0,
            eval_camera_distance=3.0,
            eval_fovy_deg=40.0,
        ),
        # All levels from the start.
        field=FieldConfig(radius=1.0, grid=GridConfig(start_level=16)),
        material=MaterialConfig(diffuse_prob=0.0, ambient_only_on_test=True),
        background=BackgroundConfig(share_aug_bg=True),
        renderer=RendererConfig(radius=1.0),
        optimizer=OptimizerConfig(network_lr=0.001),
    )


def resolve_device(name: str) -> torch.device:
    """The device that a name asks for; ConfigError when it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(
            f'--device takes "auto", "cpu", "cuda" or "cuda:N", got {name!r}'
        ) from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device {name}: only cpu and cuda are supported")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(
                f"--device {name}: this PyTorch ({torch.__version__}) sees no CUDA GPU. "
                "`python -m dsd_fast.info` says what was found; --device cpu works everywhere."
            )
        if (device.index or 0) >= torch.cuda.device_count():
            raise ConfigError(
                f"--device {name}: there are {torch.cuda.device_count()} GPUs, numbered from 0"
            )
    return device


def to_dict(config: object) -> dict[str, Any]:
    """A dataclass tree as nested dictionaries of JSON values."""
    return dataclasses.asdict(config, dict_factory=_json_dict)


def from_dict(cls: type[T], values: dict[str, Any], where: str = "") -> T:
    """The dataclass tree that `to_dict` made; absent fields take their defaults.

    Raises ConfigError for a name that does not exist (with the nearest one) and for a value of the
    wrong type.
    """
    types_of = _field_types(cls)
    arguments = {}
    for name, value in values.items():
        path = f"{where}.{name}" if where else name
        if name not in types_of:
            raise ConfigError(f"{path}: there is no such setting{nearest(name, types_of)}")
        arguments[name] = _coerce(types_of[name], value, path)
    return cls(**arguments)


def set_value(config: object, path: str, value: Any) -> None:
    """Set one value of a dataclass tree by its dotted path, with the checks of `from_dict`."""
    *parents, name = path.split(".")
    for parent in parents:
        config = getattr(config, parent)
    setattr(config, name, _coerce(_field_types(type(config))[name], value, path))


def leaves(config: object, where: str = "") -> dict[str, Any]:
    """Dotted path -> value of every leaf of a dataclass tree."""
    found: dict[str, Any] = {}
    for spec in dataclasses.fields(config):
        value, path = getattr(config, spec.name), f"{where}{spec.name}"
        if dataclasses.is_dataclass(value):
            found |= leaves(value, f"{path}.")
        else:
            found[path] = value
    return found


def nearest(name: str, names: typing.Iterable[str]) -> str:
    """The end of an error message: "; did you mean ...?", or nothing when nothing is near."""
    matches = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]}?" if matches else ""


def _json_dict(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in items}


@functools.cache
def _field_types(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {spec.name: hints[spec.name] for spec in dataclasses.fields(cls)}


class _Mismatch(Exception):
    """A value that is not of the wanted type."""


def _coerce(kind: Any, value: Any, where: str) -> Any:
    """``value`` (as JSON or YAML gives it) as the annotated type ``kind``."""
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: expected a group of settings, got {value!r}")
        return from_dict(kind, value, where)
    try:
        return _convert(kind, value)
    except _Mismatch:
        raise ConfigError(f"{where}: expected {_describe(kind)}, got {value!r}") from None


def _convert(kind: Any, value: Any) -> Any:
    origin = typing.get_origin(kind)
    if origin in (Union, types.UnionType):
        for option in typing.get_args(kind):
            try:
                return _convert(option, value)
            except _Mismatch:
                continue
        raise _Mismatch
    if origin is Literal:
        matches = value in typing.get_args(kind)
    elif origin is tuple:
        items = typing.get_args(kind)
        if not isinstance(value, (list, tuple)):
            raise _Mismatch
        if len(items) == 2 and items[1] is Ellipsis:
            return tuple(_convert(items[0], item) for item in value)
        if len(items) != len(value):
            raise _Mismatch
        return tuple(_convert(option, item) for option, item in zip(items, value))
    elif kind is Path:
        return Path(_convert(str, value))
    elif kind is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        raise _Mismatch
    elif kind is int:
        matches = isinstance(value, int) and not isinstance(value, bool)
    else:
        matches = isinstance(value, kind)
    if not matches:
        raise _Mismatch
    return value


def _describe(kind: Any) -> str:
    """A type in words."""
    arguments = typing.get_args(kind)
    origin = typing.get_origin(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(option) for option in arguments)
    if origin is Literal:
        return " or ".join(repr(option) for option in arguments)
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"a list of {_describe(arguments[0])}"
    if origin is tuple:
        return f"a list of {len(arguments)} ({', '.join(_describe(a) for a in arguments)})"
    if kind is types.NoneType:
        return "nothing"
    return {
        str: "a text",
        Path: "a path",
        float: "a number",
        int: "an integer",
        bool: "true or false",
    }[kind]
