"""The configuration of a run: one tree of dataclasses, and the names that may be registered for it.

A comment above a field is that flag's help, its type says which values are legal (`ranges`). The
classes live with the code that reads them; here they are put together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Interval

from dsd_fast import ranges
from dsd_fast.diffusion.text import VIEWS
from dsd_fast.guidance import GuidanceConfig, MultiViewConfig
from dsd_fast.ranges import ConfigError, Registered
from dsd_fast.scene.background import BackgroundConfig
from dsd_fast.scene.cameras import CameraConfig
from dsd_fast.scene.field import FieldConfig
from dsd_fast.scene.image import ImageConfig
from dsd_fast.scene.losses import LossConfig
from dsd_fast.scene.material import MaterialConfig
from dsd_fast.scene.mesh import MeshConfig
from dsd_fast.scene.picture import SingleViewConfig
from dsd_fast.scene.rates import OptimizerConfig
from dsd_fast.scene.renderer import RendererConfig
from dsd_fast.scene.texture import RefineConfig, TextureConfig


@dataclass(frozen=True)
class Start:
    """What starting values depend on."""

    # The name of the preset.
    preset: str
    # Length of the run; None is the preset's own.
    max_steps: int | None = None
    on_cpu: bool = False
    # The guidance's formulation.
    method: str = "dsd"
    # The diffusion model; None is the preset's own.
    model: str | None = None
    # The exact form of the task "image".
    exact: bool = False


# Most rows and columns of H.264.
VIDEO_SIDE = 16384

Preset = Callable[[Start], "TrainConfig"]
# --preset -> starting values of an object from a prompt.
PRESETS: dict[str, Preset] = {}
# --task -> its own starting values, if it has any; else those of the preset are taken.
TASK_PRESETS: dict[str, Preset | None] = {}

_PRESET = Registered(lambda: PRESETS)
_TASK = Registered(lambda: TASK_PRESETS)


def register_task(name: str, preset: Preset | None = None) -> None:
    """Let --task take a name; without `preset` it starts from what objects from prompts do.

    A name that is there keeps its starting values where none are given.
    """
    TASK_PRESETS[name] = preset or TASK_PRESETS.get(name)


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
    # Precision of the UNet; "auto" is float16 on CUDA, on a CPU products in bfloat16 where it has
    # AVX512-BF16, else float32.
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    # How the UNet is run: "fused" passes or torch.compile in CUDA graphs, CUDA graphs alone, plain
    # calls, TensorRT; "auto" is fused where that works, else graphs, else plain calls.
    engine: Literal["auto", "eager", "graph", "fused", "compiled", "tensorrt"] = "auto"


@dataclass
class TrainerConfig:
    # Steps between lines of metrics.jsonl; each line waits for the device once.
    log_every: ranges.Count = 10
    # Steps between preview images; 0 makes none.
    preview_every: ranges.CountOrNone = 500
    # Steps between checkpoints; there is always one at the end and on Ctrl-C.
    checkpoint_every: ranges.Count = 500
    # Checkpoints kept, the newest ones.
    keep_checkpoints: ranges.Count = 2
    # Stop after this many steps in a row whose gradients were not finite.
    max_bad_steps: ranges.Count = 50
    # Warn when the mean opacity stays under this ...
    min_opacity: ranges.NonNegative = 0.005
    # ... for this many steps.
    min_opacity_steps: ranges.Count = 200
    # Show progress.
    progress: bool = True
    # On CUDA, hold steps in CUDA graphs.
    graphs: bool = True
    # Log the GPU memory of each phase of a step, with every line of metrics.
    log_memory: bool = False


@dataclass
class PictureConfig:
    # Views in a preview image.
    preview_views: ranges.Count = 4
    # Height and width of a view in a preview image.
    preview_size: ranges.Pixels = 256
    # Views in the final contact sheet.
    sheet_views: ranges.Count = 8
    # Height and width of a view in the final contact sheet.
    sheet_size: ranges.Pixels = 256
    # Make the turntable video (views and size: --cameras.n-test-views, --cameras.eval-height).
    turntable: bool = True
    # What the video shows: the colours, or colours, normals and opacity side by side.
    panels: Literal["color", "all"] = "color"
    # Render the video at one so-many-th of its size and enlarge it: with 2 in a quarter of the
    # time.
    enlarge: Annotated[int, Interval(ge=1, le=8)] = 1
    # Frames per second of the video.
    fps: Annotated[int, Interval(ge=1, le=240)] = 30
    # Make the mesh.
    mesh: bool = True

    def rendered(self, height: int, width: int) -> tuple[int, int]:
        """The size at which a video of this one is rendered."""
        return -(-height // self.enlarge), -(-width // self.enlarge)


@dataclass
class TrainConfig:
    """Everything that decides what a run does."""

    # What to make, for example "an armchair".
    prompt: str = ""
    # What is made: a 3D object from a prompt ("text") or from one picture of it ("single-view"),
    # the "texture" of a mesh, or a single "image".
    task: Annotated[str, _TASK.check, _TASK.flag] = "text"
    # Random seed: other seeds give other objects.
    seed: ranges.Seed = 0
    # Diffusion model: "embedded", a Stable Diffusion folder in diffusers format, a hub id, or a
    # checkpoint in one safetensors file.
    model: str = "embedded"
    # Starting values: "embedded" suits the model that ships with the package, "dsd" and
    # "dsd-low-res" are the official ones for Stable Diffusion, "mvdream" those of MVDream.
    preset: Annotated[str, _PRESET.check, _PRESET.flag] = "embedded"
    # Length of the run; the schedules of the embedded preset scale with it.
    max_steps: ranges.Count = 10000
    # "auto" (CUDA if there is one), "cpu", "cuda" or "cuda:1".
    device: str = "auto"
    # On CUDA, give the same bits each time for the same command on the same kind of GPU; the CPU
    # always does. Steps take longer (see "Stop and resume" in the documentation).
    deterministic: bool = False
    # Fit a GPU of so many GiB: choose settings that need less memory (other flags win over them),
    # and let this process take no more.
    vram: ranges.Positive | None = None
    # Folder under which run folders are made.
    output: ranges.TextPath = Path("outputs")
    # Folder inside --output that holds the runs.
    name: ranges.FolderName = "diverse-score-distillation"
    # Name of the run folder in place of the prompt.
    tag: str = ""

    text: PromptConfig = dataclasses.field(default_factory=PromptConfig)
    diffusion: DiffusionConfig = dataclasses.field(default_factory=DiffusionConfig)
    guidance: GuidanceConfig = dataclasses.field(default_factory=GuidanceConfig)
    image: ImageConfig = dataclasses.field(default_factory=ImageConfig)
    single_view: SingleViewConfig = dataclasses.field(default_factory=SingleViewConfig)
    texture: TextureConfig = dataclasses.field(default_factory=TextureConfig)
    refine: RefineConfig = dataclasses.field(default_factory=RefineConfig)
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

    @staticmethod
    def of_older(values: dict[str, Any]) -> dict[str, Any]:
        """Saved values, also of an older version, whose renderer had a radius of its own."""
        renderer, field = (values.get(name, {}) for name in ("renderer", "field"))
        if not (isinstance(renderer, dict) and isinstance(field, dict) and "radius" in renderer):
            return values
        radius, of_field = renderer["radius"], field.get("radius", FieldConfig.radius)
        if radius != of_field:
            raise ConfigError(
                f"renderer.radius: expected that of the field, {ranges.shown(of_field)}, since "
                f"they describe one box, got {ranges.shown(radius)}"
            )
        others = {name: value for name, value in renderer.items() if name != "radius"}
        return values | {"renderer": others}

    def validate(self) -> None:
        """Raise ConfigError for settings that do not go together."""
        if self.task == "single-view" and self.single_view.image is None:
            raise ConfigError("--task single-view needs a picture: pass --image chair.png")
        if self.task == "texture" and self.texture.mesh is None:
            raise ConfigError("--task texture needs a mesh: pass --mesh chair.glb")
        if self.task != "texture" and self.texture.mesh is not None:
            raise ConfigError(
                f"--mesh {self.texture.mesh} is what --task texture paints: pass that too"
            )
        if self.task == "refine" and self.refine.run is None:
            raise ConfigError(
                "--task refine is of an object that is there: python -m dsd_fast.refine RUN, or "
                "--refine 100 beside a prompt"
            )
        if self.refine.steps and self.task not in ("text", "refine"):
            raise ConfigError(
                f"--refine goes on with objects from prompts: drop it, or --task {self.task}"
            )
        if not self.prompt.strip():
            raise ConfigError('the prompt is empty: pass --prompt "an armchair"')
        if self.guidance.method == "recon" and self.cameras.n_view == 1:
            raise ConfigError(
                "--guidance.method recon is for a multi-view model alone: pass --preset mvdream"
            )
        if self.task in ("image", "single-view") and self.cameras.n_view > 1:
            raise ConfigError(
                f"--cameras.n-view {self.cameras.n_view} is for objects from prompts: drop --task "
                f"{self.task}"
            )
        if self.deterministic and self.diffusion.engine in ("compiled", "tensorrt"):
            raise ConfigError(
                f"--deterministic: the engine {self.diffusion.engine} chooses its kernels by their "
                "time, expected --diffusion.engine auto, fused, graph or eager"
            )
        if self.task == "image":
            self._validate_image()
        elif self.pictures.turntable:
            self._validate_video()

    def _validate_video(self) -> None:
        """ConfigError for frames that no encoder takes: it would say so when all training is
        done."""
        n_panels = 3 if self.pictures.panels == "all" else 1
        height, width = self.cameras.eval_height, n_panels * self.cameras.eval_width
        if not (2 <= height <= VIDEO_SIDE and width <= VIDEO_SIDE):
            raise ConfigError(
                f"cameras: a video has 2 to {VIDEO_SIDE} rows and at most {VIDEO_SIDE} columns, "
                f"got {height} x {width}: pass other --cameras.eval-height and "
                "--cameras.eval-width, or --pictures.no-turntable"
            )

    def _validate_image(self) -> None:
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
