"""Files of assets by the ending of their names.

    write(asset, Path("chair.glb"))

| ending | colours | axes | files |
|---|---|---|---|
| .glb | texture, normal map | y up, front +z | one |
| .gltf | texture, normal map | y up, front +z | and .bin |
| .obj | texture, normal map | y up, front +z | and .mtl, .png |
| .ply | of vertices, 8 bits | z up, front -y | one |
| .stl | none | z up, front -y | one |
| .usdz | texture, normal map | y up, front +z | one |

An asset without a texture has colours of vertices where the format has them. trimesh writes all but
.usdz, which OpenUSD does.
"""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from dsd_fast.asset.formats import gltf, obj, plain, usd
from dsd_fast.asset.formats.scene import beside
from dsd_fast.asset.model import Asset
from dsd_fast.output_file import check_output, writing
from dsd_fast.ranges import ConfigError


class Format(NamedTuple):
    # Writes an asset to files in an empty folder, the first of which is called as it is told.
    write: Callable[[Asset, Path], None]
    # What the names of files that it names end in.
    beside: tuple[str, ...] = ()
    # The package that it needs, and the extra that brings it, where that is none of the usual ones.
    needs: tuple[str, str] | None = None


FORMATS = {
    "glb": Format(gltf.write_glb),
    "gltf": Format(gltf.write_gltf, (".bin",)),
    "obj": Format(obj.write, (".mtl", ".png", "-normal.png")),
    "ply": Format(plain.write_ply),
    "stl": Format(plain.write_stl),
    "usdz": Format(usd.write, needs=("pxr", "usd")),
}
SUFFIXES = tuple(f".{name}" for name in FORMATS)


def files_of(path: Path) -> list[Path]:
    """The files that an asset of this name may be, the one of the name first."""
    endings = FORMATS[path.suffix[1:].lower()].beside
    return [path, *(beside(path, ending) for ending in endings)]


def check_format(name: str, flag: str) -> None:
    """ConfigError for a format whose package is missing."""
    needs = FORMATS[name].needs
    if needs is not None and find_spec(needs[0]) is None:
        raise ConfigError(
            f"{flag} .{name} needs a package: pip install 'dsd_fast[{needs[1]}]', or pass a name "
            "that ends in .glb"
        )


def check_asset_output(path: Path, flag: str = "--output") -> Path:
    """The file that can be written at ``path``, as `check_output`, and those beside it too.

    Raises:
        ConfigError: it cannot be written, ends otherwise, or its format's package is missing.
    """
    target = check_output(path, SUFFIXES, flag)
    name = path.suffix[1:].lower()
    check_format(name, flag)
    if target.suffix.lower() != path.suffix.lower():
        raise ConfigError(f"{flag} {path}: it is a link to a file of another kind, {target}")
    for other in files_of(target)[1:]:
        check_output(other, flag=flag)
    return target


def write(asset: Asset, path: Path) -> list[Path]:
    """Write an asset in the format that the name of the file asks for.

    Each file is written atomically, the one of the name last.

    Returns:
        The files, the one of the name first.
    Raises:
        OSError: one cannot be written; names it.
        ImportError: the format's package is missing.
    """
    suffix = path.suffix[1:].lower()
    with tempfile.TemporaryDirectory(prefix="dsd-asset-") as folder:
        made = Path(folder, path.name)
        try:
            FORMATS[suffix].write(asset, made)
        except OSError as error:
            words = error.strerror or str(error) or type(error).__name__
            raise OSError(error.errno or errno.EIO, words, str(path)) from error
        written = [file for file in files_of(path) if made.with_name(file.name).exists()]
        for file in reversed(written):
            with writing(file) as temporary:
                shutil.copyfile(made.with_name(file.name), temporary)
    for file in files_of(path):
        if file not in written:
            file.unlink(missing_ok=True)  # of an earlier asset, whose texture this one has not
    return written
