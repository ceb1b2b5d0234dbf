"""Real models as assets: views of them by the cameras that look at trained objects.

`python -m dsd_fast.evaluate` takes them as a method of its own, "real": how far real armchairs lie
from each other is what the diversity of trained ones is held against.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dsd_fast.config import preset
from dsd_fast.files import write_json
from dsd_fast.judge.captions import COLOURS, COUNTED_NOUNS, noun_of
from dsd_fast.judge.nouns import noun_by_id
from dsd_fast.prior import views as training
from dsd_fast.prior.mesh import Pack
from dsd_fast.prior.render import Renderer
from dsd_fast.prior.views import Views
from dsd_fast.ranges import AnyPath, Bins, Count, DeviceIndex, Pixels, UnsignedSeed, check
from dsd_fast.run.outputs import slugify


@dataclass(kw_only=True)
class TurntableConfig:
    """Settings of the turntables of real models.

    Raises:
        ValueError: fewer than one view, size or model.
    """

    # Packed models.
    pack: AnyPath
    # Folder to write: OUT/PROMPT-seedN/000.png, ...
    out: AnyPath
    # What to show, such as "an armchair"; a colour word paints what can be painted.
    prompts: tuple[str, ...]
    # Models of each prompt, drawn at random; fewer where there are not so many.
    models: Count = 8
    # Views of each model, evenly spaced from the front on.
    views: Bins = 8
    # Side of the images in pixels.
    size: Pixels = 224
    # Seed of the draw.
    seed: UnsignedSeed = 0
    # EGL device.
    device_index: DeviceIndex = 0

    def __post_init__(self) -> None:
        check(self)


def write_turntables(cfg: TurntableConfig) -> None:
    """Write the views of each prompt's models as PNG images with alpha, and asset.json beside them.

    Raises:
        ValueError: a prompt names no noun of the models, or the pack is none.
        ContextError: no EGL.
    """
    from PIL import Image

    pack = Pack(cfg.pack)
    chosen = {prompt: _models_of(prompt, pack, cfg) for prompt in cfg.prompts}
    renderer = Renderer(cfg.device_index, cfg.size)
    for prompt, numbers in chosen.items():
        for seed, number in enumerate(numbers):
            images = renderer.render(pack.load(number), _views(prompt, pack, number, cfg.views))
            folder = cfg.out / f"{slugify(prompt)}-seed{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            for i, image in enumerate(images):
                Image.fromarray(image).save(folder / f"{i:03d}.png")
            about = {
                "method": "real",
                "prompt": prompt,
                "seed": seed,
                "elevation": preset("embedded").cameras.eval_elevation_deg,
            }
            write_json(folder / "asset.json", about)


def _models_of(prompt: str, pack: Pack, cfg: TurntableConfig) -> list[int]:
    index = noun_of(prompt)
    noun = None if index is None else COUNTED_NOUNS[index]
    found = [i for i, name in enumerate(pack.ids) if noun_by_id()[name].noun == noun]
    if not found:
        raise ValueError(
            f"prompts: {prompt!r} names none of the nouns that are counted: "
            f"{', '.join(COUNTED_NOUNS)}"
        )
    return np.random.default_rng(cfg.seed).permutation(found)[: cfg.models].tolist()


def _views(prompt: str, pack: Pack, number: int, n: int) -> Views:
    """Evaluation cameras under one mild light from the viewer."""
    cfg = preset("embedded").cameras
    azimuth = np.arange(n) * (360.0 / n)
    elevation = np.full(n, cfg.eval_elevation_deg)
    toward = training.direction(azimuth, elevation)
    colour = next((k for k, word in enumerate(COLOURS) if word in prompt.lower().split()), -1)
    group = noun_by_id()[pack.ids[number]].group
    if not training.is_recolourable(group, pack.parts(number), pack.main(number)):
        colour = -1
    # The middle of the ranges that the word means; of an unpainted model nothing looks at it.
    paint = np.tile(training.mean_paint(colour), (n, 1))
    return Views(
        azimuth=azimuth,
        elevation=elevation,
        position=cfg.eval_camera_distance * toward,
        centre=np.zeros((n, 3)),
        up=np.tile([0.0, 0.0, 1.0], (n, 1)),
        fovy=np.full(n, np.radians(cfg.eval_fovy_deg)),
        key=np.concatenate([toward, np.full((n, 1), 0.3)], 1),
        fill=np.concatenate([-toward, np.zeros((n, 1))], 1),
        sky=np.full((n, 3), 0.75),
        ground=np.full((n, 3), 0.65),
        gloss=np.tile([0.0, 16.0], (n, 1)),
        colour=np.full(n, colour),
        paint=paint,
        stretch=np.ones((n, 3)),
    )
