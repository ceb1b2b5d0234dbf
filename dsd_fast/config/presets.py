"""Starting values: those of the presets, and what a task makes of them."""

from __future__ import annotations

import dataclasses

from dsd_fast.config.tree import PRESETS, TASK_PRESETS, Start, TrainConfig, register_task
from dsd_fast.diffusion.loader import EMBEDDED
from dsd_fast.guidance import GuidanceConfig, MultiViewConditions, settings
from dsd_fast.guidance.registry import FORMULATIONS
from dsd_fast.ranges import ConfigError
from dsd_fast.scene.background import BackgroundConfig
from dsd_fast.scene.cameras import CameraConfig
from dsd_fast.scene.material import MaterialConfig
from dsd_fast.scene.mesh_file import RADIUS

STABLE_DIFFUSION = "stabilityai/stable-diffusion-2-1-base"
MVDREAM = "ashawkey/mvdream-sd2.1-diffusers"
# What MVDream is guided away from.
MVDREAM_NEGATIVE = (
    "ugly, bad anatomy, blurry, pixelated obscure, unnatural colors, poor lighting, dull, and "
    "unclear, cropped, lowres, low quality, artifacts, duplicate, morbid, mutilated, poorly drawn "
    "face, deformed, dehydrated, bad proportions"
)

# Steps of the embedded preset where --max-steps does not say: of four views each, and of one.
EMBEDDED_STEPS_GPU, EMBEDDED_STEPS_CPU = 700, 300
SINGLE_STEPS_GPU, SINGLE_STEPS_CPU = 1500, 600
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


def preset(
    name: str,
    max_steps: int | None = None,
    on_cpu: bool = False,
    task: str = "text",
    exact: bool = False,
    method: str = "dsd",
    model: str | None = None,
) -> TrainConfig:
    """The configuration of a preset, for a run of ``max_steps`` (None: the preset's own length).

    ``exact`` is the exact form of the task "image", whose own length is another; ``method`` that of
    the guidance, for which the task "single-view" and the preset "mvdream" have scale and levels of
    their own; ``model`` the diffusion model, where it is not the preset's: the embedded preset has
    four views a step with its own alone. ConfigError for a preset or a task that is not registered.
    """
    for kind, given, known in (("preset", name, PRESETS), ("task", task, TASK_PRESETS)):
        if given not in known:
            raise ConfigError(f"unknown {kind} {given!r}: expected one of {', '.join(known)}")
    if name == "mvdream" and task not in ("text", "texture"):
        raise ConfigError(f"--preset mvdream makes objects from prompts: drop --task {task}")
    start = Start(name, max_steps, on_cpu, method, model, exact)
    cfg = (TASK_PRESETS[task] or PRESETS[name])(start)
    cfg.preset, cfg.task = name, task
    return cfg


def _embedded(start: Start) -> TrainConfig:
    """Settings for objects by the small priors that ship with the package.

    By the multi-view one where the formulation can do with it; by that of single views otherwise,
    and with any other model.
    """
    formulation = FORMULATIONS.get(start.method)
    together = formulation is not None and MultiViewConditions.suit(formulation)
    if start.model in (None, EMBEDDED) and together:
        return _embedded_together(start)
    return _embedded_single(start)


def _embedded_together(start: Start) -> TrainConfig:
    """Four views a step, a quarter turn apart, of which the multi-view prior makes one object."""
    on_cpu = start.on_cpu
    steps = start.max_steps or (EMBEDDED_STEPS_CPU if on_cpu else EMBEDDED_STEPS_GPU)
    cfg = _embedded_single(dataclasses.replace(start, max_steps=steps))
    cfg.text.view_dependent = False
    guidance, cameras = cfg.guidance, cfg.cameras
    guidance.use_perp_neg, guidance.standard_cfg = False, True
    guidance.mirror_trajectory = False
    # Without the rescaling colours burst, the more so the longer the run; at 0.6 some objects fade
    # into the background.
    guidance.guidance_scale, guidance.rescale = 4.0, 0.4
    # One trajectory, of four views from between the sides: the object that a seed chooses. Those of
    # other cameras are of other objects; of them the more there are, the more alike seeds become.
    cfg.multiview.azimuth_bins = cfg.multiview.elevation_bins = 1
    cfg.multiview.at_bins = False
    # At first mostly the trajectory's own views, as its clean images sharpen; then ever more from
    # everywhere, which know what those do not see and mend where those do not agree.
    sharp = _at(0.1, steps)
    guidance.anchors = (sharp, 0.75, 0.0, max(_at(0.6, steps), sharp + 1))
    guidance.anchor_percent = (0, 0.98, 0.02, sharp)
    # A trajectory for all of the run may be a fine one.
    guidance.n_ddim_steps = 40
    cameras.n_view = cameras.batch_size = 4
    cameras.camera_perturb = cameras.center_perturb = cameras.up_perturb = 0.0
    # As the prior's views were taken.
    cameras.relative_distance, cameras.camera_distance_range = True, (0.65, 0.85)
    cameras.fovy_range = (40.0, 60.0)
    cameras.elevation_range = (-5.0, 35.0)
    cameras.progressive_until = 0
    cfg.background.share_aug_bg = True
    # The prior's own views are lit softly from above, which is part of their colours.
    cfg.material.diffuse_prob = 0.0
    if on_cpu:
        # So few steps have to be long ones.
        cfg.optimizer.geometry_lr = 0.02
    cfg.optimizer.lr_share = (_at(0.5, steps), 1.0, 0.1, max(steps, _at(0.5, steps) + 1))
    # A pixel of a finer picture has less of a difference to its neighbours.
    _surfaces(cfg, roughness=12.0 if on_cpu else 25.0, opaque=300.0, z_variance=100.0)
    return cfg


def _embedded_single(start: Start) -> TrainConfig:
    """Settings for the small prior of single views.

    Everything that is indexed by the step is a share of the run's length, so that a run of any
    length goes through all of its phases. On a CPU renderings are smaller and the run shorter.
    """
    on_cpu = start.on_cpu
    steps = start.max_steps or (SINGLE_STEPS_CPU if on_cpu else SINGLE_STEPS_GPU)
    cfg = TrainConfig(model=EMBEDDED, max_steps=steps)
    # Its captions have no words for what is poor.
    cfg.text.poor = ""
    # At the official scale of 7.5 the small prior's colours saturate and its shapes stay fog.
    cfg.guidance.guidance_scale = 5.0
    cfg.guidance.mirror_trajectory = True
    # The step at which a run this short needs fewest rows, as near the exact gradient.
    cfg.guidance.noise_table_step = 25
    # From the highest level to the lowest, in proportion to the steps. At first views agree on one
    # object, whose colours and edges then come to rest.
    cfg.guidance.trajectory_share = (320, 0.5, 0.125, 650, 0.0, 980)
    # Each trajectory has a background of its own. Learned too slowly, it is made up for by floating
    # shapes of its colour.
    cfg.optimizer.background_lr = 0.01
    # What is learned behind the object is of no use to anyone: pictures show a plain grey.
    cfg.background.eval_color = (0.7, 0.7, 0.7)
    cfg.loss.lambda_sparsity = (0, 0.2, 0.05, _at(0.75, steps))
    cfg.loss.lambda_convex = (0, 1.0, 1.0, _at(0.5, steps))
    _surfaces(cfg, roughness=30.0, opaque=500.0, z_variance=300.0)
    cfg.renderer.occupancy.grow = True
    _embedded_scene(cfg, on_cpu)
    cfg.trainer.log_every = min(10, _at(0.02, steps))
    cfg.trainer.preview_every = _at(0.2, steps)
    cfg.trainer.checkpoint_every = _at(0.25, steps)
    cfg.mesh.resolution = 128 if on_cpu else 192
    return cfg


def _surfaces(cfg: TrainConfig, roughness: float, opaque: float, z_variance: float) -> None:
    """Smooth and opaque surfaces, by weights that rise to these (docs/logs/surfaces.md).

    Guidance's gradients are sums over a latent's elements, regularisers means over pixels: at the
    official weights of about 1 these move nothing. They rise when the shape is there: earlier, fog
    is what is smoothest and stays, and what is still thin vanishes.
    """
    begin = _at(0.5, cfg.max_steps)
    end = max(_at(0.75, cfg.max_steps), begin + 1)
    cfg.loss.lambda_roughness = (begin, 0.0, roughness, end)
    cfg.loss.lambda_opaque = (begin, 0.1, opaque, end)
    cfg.loss.lambda_z_variance = (begin, 1.0, z_variance, end)


def _embedded_scene(cfg: TrainConfig, on_cpu: bool) -> None:
    steps, cameras, field = cfg.max_steps, cfg.cameras, cfg.field
    cameras.width = cameras.height = (48, 64) if on_cpu else (64, 128)
    cameras.resolution_milestones = (_at(0.5, steps),)
    if on_cpu:
        # Half of a video's size shows all that a CPU's grid holds, and 24 pictures a second turn as
        # smoothly.
        cfg.pictures.enlarge, cfg.pictures.fps, cameras.n_test_views = 2, 24, 96
    # Looking past the object teaches a 32x32 latent little: it stays near the centre.
    cameras.camera_perturb = cameras.center_perturb = 0.05
    # Views spread from the front: an object is the front's first, and so the seed's own, before the
    # trajectories of other views, which are of other objects, have a say. Longer than this, what
    # few pixels and steps there are on a CPU make it flat.
    cameras.progressive_until = _at(1 / 6 if on_cpu else 1 / 3, steps)
    cameras.eval_camera_distance = 1.9
    cameras.eval_fovy_deg = 48.0
    # What a larger blob leaves above flat things floats there to the end.
    field.density_blob_std = 0.3
    finest = 128 if on_cpu else 256  # cells along an edge
    field.grid.n_levels, field.grid.log2_table_size = 12, 16
    field.grid.per_level_scale = (finest / field.grid.base_resolution) ** (1 / 11)
    field.grid.start_level = 6
    field.grid.start_step = _at(0.1, steps)
    field.grid.update_steps = _at(0.08, steps)
    cfg.material.ambient_only_steps = _at(0.1, steps)
    cfg.material.ambient_only_on_test = True
    cfg.renderer.num_samples_per_ray = 256 if on_cpu else 512


def _dsd(start: Start) -> TrainConfig:
    """The official settings for Stable Diffusion."""
    return TrainConfig(model=STABLE_DIFFUSION, max_steps=start.max_steps or TrainConfig.max_steps)


def _dsd_low_res(start: Start) -> TrainConfig:
    cfg = _dsd(start)
    cfg.max_steps = start.max_steps or 5000
    cfg.cameras.width = cfg.cameras.height = (128, 128)
    return cfg


def _mvdream(start: Start) -> TrainConfig:
    """MVDream in threestudio (mathematics.md 11.3); with "dsd" scale and levels are DSD's.

    The original's "no-material" is the albedo alone; its AdamW decays weights by 0.01 of each step,
    which is left out.
    """
    cfg = TrainConfig(model=MVDREAM, max_steps=start.max_steps or 10000)
    cfg.text.negative, cfg.text.view_dependent = MVDREAM_NEGATIVE, False
    cfg.guidance = GuidanceConfig(method=start.method, use_perp_neg=False, standard_cfg=True)
    if start.method != "dsd":
        # Every method's scale here, its authors' own where they have tried it.
        cfg.guidance.guidance_scale = 50.0
        cfg.guidance.t_anneal = False
    if start.method == "cfd":
        levels = settings(start.method, cfg.max_steps)
        cfg.guidance.min_step_percent = levels["min_step_percent"]
        cfg.guidance.max_step_percent = levels["max_step_percent"]
        cfg.guidance.weighting = levels["weighting"]
    elif start.method != "dsd":
        cfg.guidance.min_step_percent = (0, 0.98, 0.02, 8000)
        cfg.guidance.max_step_percent = (0, 0.98, 0.50, 8000)
    cfg.loss.lambda_orient = cfg.loss.lambda_sparsity = cfg.loss.lambda_opaque = 0.0
    cfg.loss.lambda_convex = cfg.loss.lambda_z_variance = 0.0
    cfg.cameras = CameraConfig(
        width=(64, 256),
        height=(64, 256),
        batch_size=(8, 4),
        n_view=4,
        elevation_range=(0.0, 30.0),
        camera_distance_range=(0.8, 1.0),
        relative_distance=True,
        fovy_range=(15.0, 60.0),
        camera_perturb=0.0,
        center_perturb=0.0,
        up_perturb=0.0,
        eval_camera_distance=3.0,
        eval_fovy_deg=40.0,
    )
    cfg.field.radius = 1.0
    # All levels from the start.
    cfg.field.grid.start_level = cfg.field.grid.n_levels
    cfg.material.diffuse_prob, cfg.material.ambient_only_on_test = 0.0, True
    cfg.background.share_aug_bg = True
    cfg.optimizer.network_lr = 0.001
    return cfg


def _image(start: Start) -> TrainConfig:
    """Settings of the task "image": of a preset's those of the model stay."""
    steps = start.max_steps or (EXACT_STEPS if start.exact else IMAGE_STEPS)
    of_preset = _embedded_single if start.preset == "embedded" else PRESETS[start.preset]
    cfg = of_preset(dataclasses.replace(start, max_steps=steps))
    cfg.name = f"{cfg.name}-2d{'-exact' * start.exact}"
    cfg.image.exact = start.exact
    if start.exact and start.on_cpu:
        # Nothing less is exact.
        cfg.diffusion.dtype = "float32"
    # No view is asked for, and scales are those of samplers. Levels fall evenly, as a sampler's do,
    # and to the end: no camera moves the details. Steps have DDIM's weight, for what is left of
    # official steps at the highest levels is too short to settle colours and layout.
    cfg.guidance = GuidanceConfig(
        guidance_scale=IMAGE_SCALE_EXACT if start.exact else IMAGE_SCALE,
        use_perp_neg=False,
        standard_cfg=True,
        min_step_percent=0.02,
        max_step_percent=0.999,
        sqrt_anneal=False,
        weighting="ddim",
        noise_table_step=cfg.guidance.noise_table_step,
    )
    cfg.trainer.log_every = min(10, max(steps // 20, 1))
    cfg.trainer.preview_every = max(steps // 8, 1)
    cfg.trainer.checkpoint_every = max(steps // 4, 1)
    return cfg


def _texture(start: Start) -> TrainConfig:
    """Settings of the task "texture": those of an object's, at full size from the start."""
    cfg = PRESETS[start.preset](start)
    cameras, field, steps = cfg.cameras, cfg.field, cfg.max_steps
    for name in ("height", "width", "batch_size"):
        setattr(cameras, name, cameras.per_stage(name)[-1])
    cameras.resolution_milestones = ()
    if not cfg.guidance.has_anchors:
        # Views spread from those of the trajectories, whose colours are the seed's: from everywhere
        # at once they mix.
        cameras.progressive_from, cameras.progressive_until = 0, _at(0.5, steps)
    field.radius = 1.05 * RADIUS
    field.grid.start_level = field.grid.n_levels
    if start.preset == "embedded":
        # A rasterised view costs little at any size. Cells much finer than its pixels are noise.
        cameras.height = cameras.width = 128 if start.on_cpu else 256
        finest = 192 if start.on_cpu else 384
        # What is opaque from the first step gets all of the gradient: faster, colours burst before
        # the trajectory has a say in them.
        cfg.optimizer.geometry_lr = 0.005
        field.grid.per_level_scale = (finest / field.grid.base_resolution) ** (1 / 11)
    # Lit from about where the camera is, so that the model sees the shape, and shadows are none of
    # the colours that are learned.
    cfg.material = MaterialConfig(
        ambient_light_color=(0.6, 0.6, 0.6),
        diffuse_light_color=(0.45, 0.45, 0.45),
        ambient_only_steps=0,
        diffuse_prob=1.0,
        textureless_prob=0.0,
    )
    cameras.light_position_perturb = 0.3
    if start.method == "dsd":
        # Where trajectories begin, from the shape: higher, what they come to has a shape of its
        # own, lower, the grey of the shape.
        cfg.guidance.max_step_percent = 0.85
        # What is seen from the left is near the mirror image of what is seen from the right.
        cfg.guidance.mirror_trajectory = cameras.n_view == 1
    return cfg


def _single_view(start: Start) -> TrainConfig:
    """Settings for one picture: Zero-1-to-3's in threestudio (mathematics.md 11.2), on the presets
    "dsd" and "dsd-low-res" as they are, on "embedded" with the small model's camera and size."""
    small = start.preset == "embedded"
    default = (VIEW_STEPS_CPU if start.on_cpu else VIEW_STEPS_GPU) if small else ZERO123_STEPS
    steps = start.max_steps or default
    if small:
        cfg = _embedded_single(dataclasses.replace(start, max_steps=steps))
    else:
        cfg = TrainConfig(model=ZERO123, max_steps=steps)
    small_dsd = small and start.method == "dsd"
    cfg.guidance = _single_view_guidance(start, steps, small_dsd)
    cfg.cameras = _single_view_cameras(start, steps, small_dsd)
    cfg.loss.lambda_dsd = (0.2 if start.on_cpu else 0.15) if small_dsd else 0.1
    cfg.loss.lambda_orient = 1.0
    cfg.loss.lambda_sparsity = cfg.loss.lambda_opaque = 0.1
    cfg.loss.lambda_convex = cfg.loss.lambda_z_variance = cfg.loss.lambda_roughness = 0.0
    # The box holds the object, and the cameras stand outside.
    cfg.field.radius = 1.0
    # The picture's light is part of its colours.
    cfg.material = MaterialConfig(diffuse_prob=0.0, ambient_only_on_test=True)
    cfg.background = BackgroundConfig(random_aug=False, eval_color=(1.0, 1.0, 1.0))
    return cfg


def _single_view_guidance(start: Start, steps: int, small_dsd: bool) -> GuidanceConfig:
    guidance = GuidanceConfig(
        method=start.method,
        guidance_scale=3.0,
        use_perp_neg=False,
        standard_cfg=True,
        # Views come from so many directions that a table would be filled more often than read.
        noise_table_step=0,
    )
    if small_dsd:
        # Against the rendering's own prediction the small model's contrast has no bound.
        guidance.trajectory_share = 1.0
        guidance.guidance_scale = 5.0
        guidance.min_step_percent = 0.25
        # A CPU's run has no time for finer trajectories.
        guidance.n_ddim_steps = 20 if start.on_cpu else 40
    if start.method == "sds":
        third = _at(1 / 3, steps)
        guidance.t_anneal = False
        guidance.min_step_percent = (0, 0.4, 0.2, third)
        guidance.max_step_percent = (0, 0.85, 0.5, third)
    return guidance


def _single_view_cameras(start: Start, steps: int, small_dsd: bool) -> CameraConfig:
    small = start.preset == "embedded"
    distance, fovy = VIEW_CAMERA if small else ZERO123_CAMERA
    # Rendered size and views a step.
    stages = ((48, 1), (64, 1)) if start.on_cpu else ((64, 4), (128, 4))
    stages = stages if small else ((64, 12), (128, 4), (256, 2))
    sizes, views = (tuple(column) for column in zip(*stages))
    return CameraConfig(
        width=sizes,
        height=sizes,
        batch_size=views,
        resolution_milestones=tuple(_at(s, steps) for s in ((1 / 2,) if small else (1 / 3, 1 / 2))),
        elevation_range=(-10.0, 80.0),
        camera_distance_range=(distance, distance),
        fovy_range=(fovy, fovy),
        camera_perturb=0.0,
        # A trajectory's cameras stand still: unless they shift, their pixels' cells show.
        center_perturb=0.03 if small_dsd else 0.0,
        up_perturb=0.0,
        eval_camera_distance=distance,
        eval_fovy_deg=fovy,
    )


def _at(share: float, steps: int) -> int:
    """The step at which a share of a run is done."""
    return max(round(share * steps), 1)


PRESETS |= {"embedded": _embedded, "dsd": _dsd, "dsd-low-res": _dsd_low_res, "mvdream": _mvdream}
register_task("text")
register_task("single-view", _single_view)
register_task("image", _image)
register_task("texture", _texture)
