"""The catalogue of the embedded prior's 3D models: which file is which noun.

The models are the Sweet Home 3D furniture libraries of Debian's package `sweethome3d-furniture`
1.8-1: five `.sh3f` files, each a zip of OBJ models and a `PluginFurnitureCatalog.properties`.
The table of nouns (`judge.nouns`) adds what the properties do not say: the noun of each model, the
azimuth of its front, its main colour and material, and why some models are left out.
"""

from __future__ import annotations

import io
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from zipfile import ZipFile

from dsd_fast.judge.nouns import Noun, noun_by_id

PROPERTIES = "PluginFurnitureCatalog.properties"
IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)


@dataclass(frozen=True)
class Entry:
    """A usable model: its row of the table and where its OBJ lies."""

    noun: Noun
    archive: Path  # the .sh3f zip
    member: str  # OBJ path inside the zip
    rotation: tuple[float, ...]  # modelRotation, row-major 3x3, applied as v' = M v

    @property
    def id(self) -> str:
        return self.noun.id


def unpack(source: Path, folder: Path) -> list[Path]:
    """The `.sh3f` files of `source`: a `.deb` (unpacked into `folder`) or a folder.

    Raises FileNotFoundError when `source` holds none, ValueError when it is no Debian package.
    """
    if not source.exists():
        raise FileNotFoundError(
            f"{source} does not exist; on Debian, `apt-get download "
            "sweethome3d-furniture` fetches the package"
        )
    if source.is_file():
        with tarfile.open(fileobj=_deb_data(source)) as archive:
            for member in archive:
                file = archive.extractfile(member) if member.name.endswith(".sh3f") else None
                if file:
                    folder.mkdir(parents=True, exist_ok=True)
                    (folder / PurePosixPath(member.name).name).write_bytes(file.read())
        source = folder
    found = sorted(source.rglob("*.sh3f"))
    if not found:
        raise FileNotFoundError(
            f"no .sh3f file below {source}; expected the contents of Debian's "
            "package sweethome3d-furniture"
        )
    return found


def _deb_data(path: Path) -> io.BytesIO:
    """The data.tar.* member of a Debian package, which is an `ar` archive (see deb(5))."""
    with path.open("rb") as file:
        if file.read(8) != b"!<arch>\n":
            raise ValueError(f"{path}: expected a folder or a Debian package (an ar archive)")
        while header := file.read(60):
            size = int(header[48:58])
            if header[:16].strip().startswith(b"data.tar"):
                return io.BytesIO(file.read(size))
            file.seek(size + size % 2, 1)  # members start at even offsets
    raise ValueError(f"{path}: a Debian package without a data.tar member")


def parse_properties(text: str) -> dict[int, dict[str, str]]:
    """Java properties `key#number=value` as {number: {key: value}}; other lines are skipped."""
    items: dict[int, dict[str, str]] = {}
    for line in text.splitlines():
        match = re.match(r"\s*(\w+)#(\d+)\s*=\s*(.*?)\s*$", line)
        if match:
            key, number, value = match.groups()
            items.setdefault(int(number), {})[key] = value
    return items


def load(archives: list[Path], table: dict[str, Noun] | None = None) -> list[Entry]:
    """The usable models of `archives`, in the order of the table.

    `table` defaults to the committed one. Models that the table excludes or does not name are
    left out. Raises FileNotFoundError for a model whose OBJ is missing from its archive.
    """
    table = noun_by_id() if table is None else table
    found: dict[str, Entry] = {}
    for archive in archives:
        with ZipFile(archive) as file:
            members = set(file.namelist())
            text = file.read(PROPERTIES).decode("latin-1")  # the encoding of Java properties
        for item in parse_properties(text).values():
            noun = table.get(item.get("id", ""))
            if noun is None or noun.exclude:
                continue
            member = str(PurePosixPath(item["model"].lstrip("/")))
            if member not in members:
                raise FileNotFoundError(f"{archive}: {noun.id} names {member}, which is missing")
            values = item.get("modelRotation")
            rotation = tuple(float(v) for v in values.split()) if values else IDENTITY
            if len(rotation) != 9:
                raise ValueError(
                    f"{archive}: modelRotation of {noun.id} has {len(rotation)} numbers, expected 9"
                )
            found[noun.id] = Entry(noun, archive, member, rotation)
    return [found[id_] for id_ in table if id_ in found]
