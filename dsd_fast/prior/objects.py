"""Pictures of models that the pose-conditioned prior has never seen, with true views of them."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
from annotated_types import Interval
from PIL import Image

from dsd_fast.judge.nouns import noun_by_id
from dsd_fast.judge.truth import Truth
from dsd_fast.prior.mesh import Pack
from dsd_fast.prior.orbits import is_held_out
from dsd_fast.prior.render import Renderer
from dsd_fast.prior.views import ORBIT_FOVY, Views, direction, sample_orbits
from dsd_fast.ranges import (
    AnyPath,
    Bins,
    CountOrNone,
    DeviceIndex,
    UnsignedSeed,
    ViewElevation,
    check,
)

# Of the cameras, that of reconstruction with the small prior.
DISTANCE = 1.75


@dataclass
class ObjectsConfig:
    """From packed models to one picture of each held-out one, and true views around it."""

    # Packed models.
    pack: AnyPath
    # Folder to write: NAME/NAME.png, straight alpha, and NAME/truth.npz.
    out: AnyPath
    # True views, evenly around from the picture's azimuth on.
    views: Bins = 12
    # Elevation of the picture in degrees.
    elevation: ViewElevation = 5.0
    # Elevation of the true views in degrees.
    view_elevation: ViewElevation = 15.0
    # Azimuth of the picture in degrees, in the models' own axes, whose front is 0.
    azimuth: Annotated[float, Interval(ge=-720, le=720)] = 30.0
    # At most so many objects, the first ones; 0 takes all.
    limit: CountOrNone = 0
    # EGL device.
    device_index: DeviceIndex = 0
    # Seed of the lights.
    seed: UnsignedSeed = 0


def object_views(cfg: ObjectsConfig, number: int) -> Views:
    """The picture's camera, then those of the true views, under one light; nothing is painted or
    stretched."""
    n = 1 + cfg.views
    drawn = sample_orbits(1, n, False, np.random.default_rng([cfg.seed, number]))
    around = np.arange(cfg.views) * (360.0 / cfg.views)
    azimuth = cfg.azimuth + np.concatenate([[0.0], around])
    elevation = np.array([cfg.elevation] + [cfg.view_elevation] * cfg.views)
    return replace(
        drawn,
        azimuth=azimuth,
        elevation=elevation,
        position=DISTANCE * direction(azimuth, elevation),
        stretch=np.ones((n, 3)),
    )


def render_objects(cfg: ObjectsConfig) -> None:
    """Write the pictures and the true views.

    Raises:
        ValueError: no views were asked for, or no model of the pack is held out.
        ContextError: no EGL context.
    """
    check(cfg)
    pack = Pack(cfg.pack)
    numbers = [i for i, id_ in enumerate(pack.ids) if is_held_out(id_)]
    if not numbers:
        raise ValueError(f"{cfg.pack}: none of its {len(pack)} models is held out")
    renderer = Renderer(cfg.device_index)
    for number in numbers[: cfg.limit or None]:
        views = object_views(cfg, number)
        images = renderer.render(pack.load(number), views)
        name = object_name(pack.ids[number])
        folder = cfg.out / name
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[0]).save(folder / f"{name}.png")
        truth = Truth(
            rgba=images[1:],
            elevation=views.elevation[1:].astype(np.float32),
            azimuth=(views.azimuth[1:] - cfg.azimuth).astype(np.float32),
            distance=np.full(cfg.views, DISTANCE, np.float32),
            fovy=np.full(cfg.views, ORBIT_FOVY, np.float32),
        )
        truth.save(folder)
        print(f"{folder}: {noun_by_id()[pack.ids[number]].noun}", flush=True)


def object_name(model_id: str) -> str:
    """A folder's name for a model: its library is left out."""
    return re.sub(r"[^\w-]+", "-", model_id.partition("#")[2] or model_id).strip("-").lower()
