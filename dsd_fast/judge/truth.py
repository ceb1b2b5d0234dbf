"""True views of an object, in a file beside its picture."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

TRUTH = "truth.npz"


@dataclass(frozen=True)
class Truth:
    """True views of an object: rgba [V,S,S,4] uint8 of straight alpha; elevation, azimuth (the
    picture's being 0), fovy [V] in degrees; distance [V]."""

    rgba: np.ndarray
    elevation: np.ndarray
    azimuth: np.ndarray
    distance: np.ndarray
    fovy: np.ndarray

    def on_white(self) -> np.ndarray:
        """[V,S,S,3] float64 in [0,1]."""
        image = self.rgba.astype(np.float64) / 255
        return image[..., :3] * image[..., 3:] + 1 - image[..., 3:]

    def save(self, folder: Path) -> None:
        """Write the views into a folder that is there, for `read_truth`."""
        np.savez_compressed(folder / TRUTH, **asdict(self))


def read_truth(folder: Path) -> Truth:
    """The true views in a folder.

    Raises:
        ValueError: there are none, or they do not fit together.
    """
    path = folder / TRUTH
    if not path.is_file():
        raise ValueError(
            f"{path}: there are no true views; `python -m dsd_fast.prior render-objects` writes "
            "them, in a folder for each object"
        )
    names = [field.name for field in fields(Truth)]
    try:
        with np.load(path) as file:
            columns = {name: file[name] for name in names}
    except (KeyError, ValueError, OSError) as error:
        raise ValueError(f"{path}: expected {', '.join(names)}: {error}") from error
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) != 1 or columns["rgba"].ndim != 4:
        raise ValueError(f"{path}: expected as many cameras as views, got {lengths}")
    return Truth(**columns)
