"""Random views of one model: camera, light and paint of each training image of the prior."""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import numpy as np

from dsd_fast.judge import captions
from dsd_fast.prior.mesh import MainPart, Part

NEAR, FAR = 0.05, 20.0
OVERHEAD_SHARE = 0.1
RECOLOUR_SHARE = 0.45
RECOLOUR_VISIBLE = 0.5  # least visible share of the part to be painted
# Of orbits, in degrees: a sphere of the models' radius, 0.6, just fits at the nearest distance.
ORBIT_ELEVATION = (-10.0, 80.0)
ORBIT_FOVY = 50.0
# Share of orbits of a stretched model, and how much shorter than the longest its axes get at most:
# what a view of one thing says of another must hold for shapes that no model has.
STRETCHED_SHARE = 0.5
STRETCH = 0.7
# Of four views a quarter turn apart: elevations in degrees as guidance asks for them, fields of
# view in degrees, and half of what is seen at the object, so that a sphere of radius 0.6 just fits.
QUARTER_ELEVATION = (-10.0, 45.0)
QUARTER_FOVY = (40.0, 60.0)
QUARTER_FRAME = (0.65, 0.85)
# How directional their light is at most: what one view's light leaves dark, another one shows.
QUARTER_CONTRAST = 0.6

# (hue in degrees, saturation, value) ranges of the paints, in the order of captions.COLOURS.
PAINTS: tuple[tuple[tuple[float, float], tuple[float, float], tuple[float, float]], ...] = (
    ((-6, 4), (0.78, 0.95), (0.62, 0.88)),  # red
    ((20, 30), (0.82, 1.0), (0.88, 1.0)),  # orange
    ((48, 56), (0.72, 0.95), (0.88, 1.0)),  # yellow
    ((98, 145), (0.55, 0.9), (0.38, 0.68)),  # green
    ((212, 232), (0.62, 0.9), (0.48, 0.85)),  # blue
    ((270, 285), (0.55, 0.8), (0.42, 0.72)),  # purple
    ((326, 344), (0.38, 0.6), (0.92, 1.0)),  # pink
    ((18, 27), (0.58, 0.75), (0.3, 0.46)),  # brown
    ((0, 360), (0.0, 0.1), (0.05, 0.12)),  # black
    ((0, 360), (0.0, 0.04), (0.93, 1.0)),  # white
    ((0, 360), (0.0, 0.04), (0.42, 0.58)),  # gray
)


@dataclass(frozen=True)
class Views:
    """Cameras, lights and paint of n renders of one model.

    azimuth, elevation [n] in degrees are the nominal ones, before perturbation. position, centre,
    up [n, 3] and fovy [n] in radians are what is rendered. key, fill [n, 4] are the unit direction
    to the light and its strength; sky, ground [n, 3] the ambient light; gloss [n, 2] the specular
    strength and exponent. colour [n] indexes captions.COLOURS, -1 for unpainted; paint [n, 3] is
    its sRGB value. stretch [n, 3] scales the model's own axes, 1 at most.
    """

    azimuth: np.ndarray
    elevation: np.ndarray
    position: np.ndarray
    centre: np.ndarray
    up: np.ndarray
    fovy: np.ndarray
    key: np.ndarray
    fill: np.ndarray
    sky: np.ndarray
    ground: np.ndarray
    gloss: np.ndarray
    colour: np.ndarray
    paint: np.ndarray
    stretch: np.ndarray

    def __len__(self) -> int:
        return len(self.azimuth)

    def c2w(self) -> np.ndarray:
        """[n, 4, 4] camera-to-world: columns right, up, backward, position (scene.cameras)."""
        backward = _unit(self.position - self.centre)
        right = _unit(np.cross(-backward, self.up))
        matrix = np.zeros((len(self), 4, 4))
        matrix[:, :3, 0] = right
        matrix[:, :3, 1] = np.cross(backward, right)
        matrix[:, :3, 2] = backward
        matrix[:, :3, 3] = self.position
        matrix[:, 3, 3] = 1.0
        return matrix

    def view_projection(self) -> np.ndarray:
        """[n, 4, 4] from world to OpenGL clip space; square images, +y up."""
        projection = np.zeros((len(self), 4, 4))
        focal = 1.0 / np.tan(self.fovy / 2)
        projection[:, 0, 0] = projection[:, 1, 1] = focal
        projection[:, 2, 2] = (FAR + NEAR) / (NEAR - FAR)
        projection[:, 2, 3] = 2 * FAR * NEAR / (NEAR - FAR)
        projection[:, 3, 2] = -1.0
        return projection @ np.linalg.inv(self.c2w())


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def direction(azimuth_deg: np.ndarray, elevation_deg: np.ndarray) -> np.ndarray:
    """[n, 3] unit vectors; azimuth from +x toward +y, elevation toward +z."""
    a, e = np.radians(azimuth_deg), np.radians(elevation_deg)
    return np.stack([np.cos(e) * np.cos(a), np.cos(e) * np.sin(a), np.sin(e)], axis=-1)


def sample_views(n: int, recolourable: bool, rng: np.random.Generator) -> Views:
    """Random views as the training loop will ask for them, and lights from flat to directional.

    Elevation is DSD's even mix of uniform in degrees and uniform in area over [-10, 45], with
    OVERHEAD_SHARE of the views in [60, 85]; distance U[1.5, 2], fovy U[40, 70] degrees. The
    perturbations are gentler than DSD's, so that most objects lie wholly in view.
    """
    azimuth = rng.permutation((np.arange(n) + rng.random(n)) * (360.0 / max(n, 1))) - 180.0
    u = rng.random(n)
    elevation = _elevations(u, (-10.0, 45.0), rng)
    overhead = rng.random(n) < OVERHEAD_SHARE
    elevation = np.where(overhead, 60.0 + 25.0 * u, elevation)
    distance = rng.uniform(1.5, 2.0, n)
    wobble = rng.uniform(-0.1, 0.1, (n, 3)) * rng.random((n, 1))
    position = distance[:, None] * direction(azimuth, elevation) + wobble
    spread = np.where(rng.random(n) < 0.25, 0.15, 0.05)
    centre = rng.normal(size=(n, 3)) * spread[:, None]
    up = np.array([0.0, 0.0, 1.0]) + rng.normal(size=(n, 3)) * 0.02
    fovy = np.radians(rng.uniform(40.0, 70.0, n))

    lights = _lights(position, rng)
    colour, paint = _paints(n, recolourable, rng)
    return Views(
        azimuth, elevation, position, centre, up, fovy, *lights, colour, paint, np.ones((n, 3))
    )


def sample_orbits(n: int, views: int, recolourable: bool, rng: np.random.Generator) -> Views:
    """`n` orbits of `views` views each, orbit by orbit: one object of one stretch, light and paint.

    What is needed where one view is to say what another looks like: the camera looks straight at
    the object, through a lens of one width. Elevation is an even mix of uniform in degrees and
    uniform in area over ORBIT_ELEVATION, azimuths are spread evenly over the circle; distance
    U[1.5, 2] as in `sample_views`. The light comes from around the camera of the first view.
    """
    total = n * views
    azimuth = rng.permuted((np.arange(views) + rng.random((n, views))) * (360.0 / views), axis=1)
    azimuth = azimuth.reshape(total) - 180.0
    elevation = _elevations(rng.random(total), ORBIT_ELEVATION, rng)
    position = rng.uniform(1.5, 2.0, total)[:, None] * direction(azimuth, elevation)
    lights = _lights(position[::views], rng)
    paints = _paints(n, recolourable, rng)
    parts = (*lights, *paints, _stretches(n, rng))
    shared = (np.repeat(part, views, axis=0) for part in parts)
    return Views(
        azimuth,
        elevation,
        position,
        np.zeros((total, 3)),
        np.tile([0.0, 0.0, 1.0], (total, 1)),
        np.full(total, np.radians(ORBIT_FOVY)),
        *shared,
    )


def sample_quarters(n: int, recolourable: bool, rng: np.random.Generator) -> Views:
    """`n` objects of four views each, a quarter turn apart at one elevation and distance.

    As MVDream's (Shi et al. 2023), with any first azimuth; what is shown of one object is as in
    `sample_orbits`, but that the light comes from above and is softer. Framed by the field of view:
    how large an object looks hangs on the frame drawn, not on the lens.
    """
    azimuth = rng.uniform(0.0, 90.0, (n, 1)) + np.arange(4) * 90.0
    azimuth = ((azimuth + 180.0) % 360.0 - 180.0).reshape(4 * n)
    elevation = np.repeat(_elevations(rng.random(n), QUARTER_ELEVATION, rng), 4)
    fovy = np.radians(np.repeat(rng.uniform(*QUARTER_FOVY, n), 4))
    frame = np.repeat(rng.uniform(*QUARTER_FRAME, n), 4)
    position = (frame / np.tan(fovy / 2))[:, None] * direction(azimuth, elevation)
    lights = _lights(np.tile([0.0, 0.0, 1.0], (n, 1)), rng, QUARTER_CONTRAST)
    parts = (*lights, *_paints(n, recolourable, rng), _stretches(n, rng))
    shared = (np.repeat(part, 4, axis=0) for part in parts)
    return Views(
        azimuth,
        elevation,
        position,
        np.zeros((4 * n, 3)),
        np.tile([0.0, 0.0, 1.0], (4 * n, 1)),
        fovy,
        *shared,
    )


def _elevations(u: np.ndarray, limits: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """Degrees [n] between limits at shares u [n]: half of them of the angle, half of the area."""
    by_degree = limits[0] + (limits[1] - limits[0]) * u
    low, high = np.sin(np.radians(limits))
    by_area = np.degrees(np.arcsin(low + (high - low) * u))
    return np.where(rng.random(len(u)) < 0.5, by_degree, by_area)


def _lights(
    position: np.ndarray, rng: np.random.Generator, strongest: float = 1.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """key, fill, sky, ground and gloss of `Views`, as seen from cameras at `position` [n, 3]."""
    n = len(position)
    # 0: flat, the colours as they are; 1: strongly directional.
    contrast = strongest * rng.random(n) ** 1.3
    key_direction = _unit(_unit(position) + rng.normal(size=(n, 3)) * 0.7 + [0.0, 0.0, 0.4])
    fill_direction = _unit(key_direction * [-1.0, -1.0, 0.3] + rng.normal(size=(n, 3)) * 0.3)
    tint = 1.0 + rng.normal(size=(n, 3)) * 0.02
    ambient = (1.0 - 0.62 * contrast)[:, None] * tint
    relief = (0.25 * contrast)[:, None]
    key = np.concatenate([key_direction, (0.7 * contrast)[:, None]], axis=1)
    fill = np.concatenate([fill_direction, (0.22 * contrast)[:, None]], axis=1)
    gloss = np.stack([rng.random(n) ** 2 * 0.35, rng.uniform(12.0, 60.0, n)], axis=1)
    return key, fill, ambient * (1.0 + relief), ambient * (1.0 - relief), gloss


def _paints(n: int, recolourable: bool, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """colour and paint of `Views`."""
    colour = np.full(n, -1, np.int64)
    paint = np.zeros((n, 3))
    if recolourable:
        for k in np.flatnonzero(rng.random(n) < RECOLOUR_SHARE):
            colour[k] = rng.integers(len(PAINTS))
            hue, saturation, value = (rng.uniform(*limits) for limits in PAINTS[colour[k]])
            paint[k] = colorsys.hsv_to_rgb(hue % 360.0 / 360.0, saturation, value)
    return colour, paint


def _stretches(n: int, rng: np.random.Generator) -> np.ndarray:
    """stretch of `Views`, [n, 3]: of STRETCHED_SHARE even in the logarithm, of the others ones."""
    stretch = STRETCH ** rng.random((n, 3))
    stretch /= stretch.max(axis=1, keepdims=True)
    return np.where(rng.random((n, 1)) < STRETCHED_SHARE, stretch, 1.0)


def is_recolourable(group: str, parts: tuple[Part, ...], main: MainPart) -> bool:
    """Whether painting the main part makes a colour word true of the whole object."""
    return (
        group not in captions.NATURAL
        and main.share >= RECOLOUR_VISIBLE
        and parts[main.part].opacity >= 1.0
    )


def mean_paint(colour: int) -> tuple[float, float, float]:
    """The sRGB value in the middle of what captions.COLOURS[colour] is painted with."""
    hue, saturation, value = (sum(limits) / 2 for limits in PAINTS[colour])
    return colorsys.hsv_to_rgb(hue % 360.0 / 360.0, saturation, value)
