"""Pictures from files that anybody may have made.

What a file holds is decided by its content, not by its name, and Pillow knows formats that start
other programs (PostScript) or that few have tried to break. Here three are read, all others
refused; and a picture's size is looked at before its pixels are.
"""

from __future__ import annotations

import logging
import os
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)

FORMATS = ("PNG", "JPEG", "WEBP")
# As many pixels as 8192 x 8192 has: 256 MiB of memory.
MAX_PIXELS = 1 << 26
# More than the largest of such pictures takes.
MAX_BYTES = 1 << 30

_patching = threading.RLock()


def read_rgba(path: Path) -> np.ndarray:
    """A picture [h,w,4] uint8 of straight alpha, upright.

    Grey, palettes, 16 bits a channel and CMYK become 8 bits of red, green and blue. Of an animation
    the first frame is taken, with a line in the log.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no regular file, no whole picture of FORMATS, or larger than MAX_PIXELS.
    """
    _refuse_irregular(path)
    try:
        with warnings.catch_warnings(record=True) as noted:
            warnings.simplefilter("always")
            with open_picture(path) as image:
                frames = getattr(image, "n_frames", 1)
                if frames > 1:
                    log.warning("%s has %d frames: the first is taken", path, frames)
                rgba = _to_rgba(_upright(image, path))
    # A damaged file may bring any error out of a decoder.
    except Exception as error:
        raise ValueError(f"cannot read {path}: {_in_words(error)}") from error
    for words in dict.fromkeys(str(warning.message).strip() for warning in noted):
        log.warning("%s: %s", path, words)
    return rgba


@contextmanager
def only_safe_pictures() -> Iterator[list[str]]:
    """Libraries that open pictures by themselves, through Pillow, get those of FORMATS alone.

    Yields:
        what was refused on the way, in words; libraries may pass over it.
    """
    from PIL import Image

    refused: list[str] = []
    open_any = Image.open

    def open_safe(fp: Any, mode: Any = "r", formats: Any = None) -> Image.Image:
        name = f"{fp}: " if isinstance(fp, (str, os.PathLike)) else "a picture in it: "
        try:
            if isinstance(fp, (str, os.PathLike)):
                _refuse_irregular(Path(fp))
            return open_picture(fp, open_any)
        except Exception as error:
            refused.append(f"{name}{_in_words(error)}")
            raise

    with _patching:
        Image.open = open_safe
        try:
            yield refused
        finally:
            Image.open = open_any


class _Refused(ValueError):
    """The reason, for people."""


def _in_words(error: Exception) -> str:
    from PIL import UnidentifiedImageError

    if isinstance(error, _Refused):
        return str(error)
    if isinstance(error, UnidentifiedImageError):
        return "not a picture that is PNG, JPEG or WebP: convert it"
    return f"the picture is damaged: {str(error) or type(error).__name__}"


def _refuse_irregular(path: Path) -> None:
    """Reading a pipe or a device may never end, and a folder is no file."""
    try:
        found = path.stat()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: there is no such file") from None
    except (OSError, ValueError) as error:
        words = getattr(error, "strerror", None) or error
        raise _Refused(f"cannot read {path}: {words}") from error
    problem = ""
    if stat.S_ISDIR(found.st_mode):
        problem = "it is a folder"
    elif not stat.S_ISREG(found.st_mode):
        problem = "it is a pipe, a socket or a device"
    elif found.st_size == 0:
        problem = "it is empty"
    elif found.st_size > MAX_BYTES:
        problem = f"it has {found.st_size >> 20} MiB, at most {MAX_BYTES >> 20} MiB are read"
    if problem:
        raise _Refused(f"cannot read {path}: expected a PNG, JPEG or WebP picture, and {problem}")


def open_picture(file: Any, open_any: Any = None) -> Image.Image:
    """A picture of FORMATS of which no more than the size is read; ValueError by that.

    Args:
        file: a path or an open file; what else Pillow raises is up to the caller.
        open_any: stands for `Image.open`.
    """
    from PIL import Image

    with _patching:
        # Pillow's own limit says nothing of width and height, and only warns up to twice as many.
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            image = (open_any or Image.open)(file, formats=FORMATS)
        finally:
            Image.MAX_IMAGE_PIXELS = limit
    width, height = image.size
    if width * height > MAX_PIXELS:
        image.close()
        raise _Refused(
            f"the picture has {width} x {height} pixels, expected at most "
            f"{MAX_PIXELS // 10**6} million, as 8192 x 8192 have: make it smaller"
        )
    return image


def _upright(image: Image.Image, path: Path) -> Image.Image:
    """Turned as the camera says that it was held."""
    from PIL import ImageOps

    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except Exception as error:  # notes of cameras, and of what edits them, come in all states
        log.warning("%s: which side is up cannot be read, taken as it is: %s", path, error)
        return image


def _to_rgba(image: Image.Image) -> np.ndarray:
    if not image.mode.startswith("I"):
        return np.array(image.convert("RGBA"))
    # Grey of 16 bits, which conversion would cut off.
    grey = np.asarray(image).astype(np.int64)
    rgba = np.repeat((grey >> 8).clip(0, 255).astype(np.uint8)[..., None], 4, axis=-1)
    rgba[..., 3] = np.where(grey == image.info.get("transparency"), 0, 255)
    return rgba
