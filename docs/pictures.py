"""The README's picture of its first command: images/first-run.jpg, of a run of that very command.

    python docs/pictures.py                 # runs it, with the settings of this computer's device
    python docs/pictures.py --run FOLDER    # takes a run that it has made elsewhere

The command is read from README.md, and stands in the picture's comment with what it was made by; a
test fails while README.md has another command. Flags behind `--` are for a trial: they go to the
command too, and are in the comment.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parent.parent
PICTURE = ROOT / "docs" / "images" / "first-run.jpg"
# Of the file: a README is read over the network.
MOST_BYTES = 60 * 1000
# Columns of the picture at most; a README shows about 900, and twice as many on fine screens.
WIDTH = 1600


def first_command() -> list[str]:
    """The flags of dsd_fast.train in the first command of README.md."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(r"^```sh\n.*? -m dsd_fast\.train (.*?)$", readme, re.DOTALL | re.MULTILINE)
    if found is None:
        raise SystemExit("README.md: expected a first block of sh that runs dsd_fast.train")
    return shlex.split(found[1])


def spelled(flags: list[str]) -> str:
    """The command of these flags, as the comment has it."""
    return f"python -m dsd_fast.train {shlex.join(flags)}"


def comment_of(picture: Path) -> str:
    """What a picture was made by: the command in the first line, device and versions below."""
    with Image.open(picture) as image:
        return image.info["comment"].decode()


def make_run(flags: list[str], folder: Path) -> Path:
    """Run the command; returns its run folder, the only one below `folder`."""
    command = [sys.executable, "-m", "dsd_fast.train", *flags, "--output", str(folder)]
    subprocess.run(command, check=True, cwd=ROOT)
    (config,) = folder.glob("*/*/config.json")
    return config.parent


def check_run(run: Path, flags: list[str]) -> None:
    """SystemExit for a run of another prompt or seed than the command's."""
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    for name in ("prompt", "seed"):
        given = flags[flags.index(f"--{name}") + 1] if f"--{name}" in flags else "0"
        if str(config[name]) != given:
            raise SystemExit(
                f"{run}: expected a run of README's first command, with --{name} {given}, got "
                f"{config[name]!r}"
            )


def write_picture(run: Path, flags: list[str], to: Path) -> None:
    """The run's contact sheet as a JPEG of at most MOST_BYTES, with the comment."""
    versions = json.loads((run / "versions.json").read_text(encoding="utf-8"))
    made_by = {name: versions.get(name) for name in ("device_name", "dsd_fast", "torch", "commit")}
    comment = f"{spelled(flags)}\n{json.dumps(made_by)}"
    with Image.open(run / "preview.png") as sheet:
        image = sheet.convert("RGB")
    width = min(image.width, WIDTH)
    while True:
        size = (width, max(round(image.height * width / image.width), 1))
        small = image.resize(size, Image.Resampling.LANCZOS)
        for quality in (92, 88, 84, 80, 75):
            content = io.BytesIO()
            small.save(content, "JPEG", quality=quality, optimize=True, comment=comment)
            if content.tell() <= MOST_BYTES:
                to.write_bytes(content.getvalue())
                print(f"wrote {to}: {size[0]} x {size[1]}, {content.tell() / 1000:.0f} KB")
                return
        width = width * 3 // 4


def main() -> None:
    """Make the picture."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--run", type=Path, help="folder of a run of the command")
    parser.add_argument("--out", type=Path, default=PICTURE, help="the picture to write")
    parser.add_argument("flags", nargs="*", help="behind --: more flags, for a trial")
    arguments = parser.parse_args()
    flags = [*first_command(), *arguments.flags]
    if arguments.run is not None:
        check_run(arguments.run, flags)
        write_picture(arguments.run, flags, arguments.out)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_picture(make_run(flags, Path(folder)), flags, arguments.out)


if __name__ == "__main__":
    main()
