"""True views of an object, in a file beside its picture."""

from __future__ import annotations

from collections.abc import Sequence
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
        columns = read_npz(path, names)
        rgba = columns["rgba"]
        if rgba.ndim != 4 or rgba.shape[1:] != (rgba.shape[1], rgba.shape[1], 4):
            raise ValueError(f"rgba [V,S,S,4], got {list(rgba.shape)}")
        if rgba.dtype != np.uint8 or rgba.size == 0:
            raise ValueError(f"rgba of uint8, got {list(rgba.shape)} {rgba.dtype}")
        lengths = {name: list(column.shape[:1]) for name, column in columns.items()}
        if any(
            column.shape != rgba.shape[:1] for name, column in columns.items() if name != "rgba"
        ):
            raise ValueError(f"as many cameras as views, got {lengths}")
        for name in set(names) - {"rgba"}:
            if columns[name].dtype.kind not in "fiu" or not np.isfinite(columns[name]).all():
                raise ValueError(f"{name} of finite numbers")
    except ValueError as error:
        raise ValueError(f"{path}: expected {', '.join(names)}: {error}") from error
    return Truth(**columns)


def read_npz(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Arrays of an .npz file that anybody may have made, by name; nothing is unpickled.

    Raises:
        ValueError: they are not there, or cannot be read.
    """
    if not path.is_file():
        raise ValueError("there is no such file")
    try:
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
            return {name: file[name] for name in names}
    except Exception as error:  # damaged archives bring errors of all kinds
        raise ValueError(f"{type(error).__name__}: {error}") from error
