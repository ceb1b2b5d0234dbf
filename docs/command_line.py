"""The page reference/command-line.md, from what the commands themselves say to --help.

    python docs/command_line.py

A test fails while the page is another one than this would write.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

PAGE = Path(__file__).parent / "reference" / "command-line.md"

# Command -> flags before --help, and a line on what its page should say first.
COMMANDS: dict[str, tuple[tuple[str, ...], str]] = {
    "dsd_fast.train": (
        ("--preset", "dsd"),
        "Defaults are those of `--preset dsd`, the official ones; other presets, tasks and methods "
        "have others ([settings](../guides/settings.md#presets)).",
    ),
    "dsd_fast.export": ((), "See [assets](../guides/assets.md)."),
    "dsd_fast.refine": ((), "See [crisper textures](../tutorials/texture.md#crisper-textures)."),
    "dsd_fast.sample": ((), "See [samples](../tutorials/image.md#beside-samples-of-the-model)."),
    "dsd_fast.evaluate": ((), "See [comparing](../guides/compare.md)."),
    "dsd_fast.evaluate.truth": (
        (),
        "See [single views](../tutorials/picture.md#score-against-the-true-object).",
    ),
    "dsd_fast.convert": ((), "See [one file](../tutorials/stable-diffusion.md#one-file)."),
    "dsd_fast.build_engine": ((), "See [engines](../guides/engines.md#building-ahead-of-time)."),
}
# Its commands have flags of their own.
PRIOR = "dsd_fast.prior"

INTRODUCTION = """\
# Command line

Written by `python docs/command_line.py` from what the commands say to `--help`; do not edit.

Every command is a module, `python -m dsd_fast.train`; `dsd-fast train` is the same, and
`python -m dsd_fast` lists them. A switch has a form with `no-` before its last part that turns it
off. A value `None` stands for none. Two commands have no flags: `dsd_fast.info` says what was built
and found, and `dsd_fast.prior` without a word lists its own commands
([making the models](../results/prior.md#remake-it)).
"""

# Defaults that another computer has others of.
BY_COMPUTER = {"--workers INT": "one a core"}

# Boxes of --help stand beside each other on a wider terminal, and break values on a narrower one.
_COLUMNS = "120"


@dataclass
class Group:
    """A box of --help."""

    title: str
    # (flags with their values, what they mean).
    rows: list[tuple[str, str]] = field(default_factory=list)


def entry_point(module: str) -> Callable[[], object]:
    """What `python -m module` calls; it reads sys.argv."""
    if importlib.util.find_spec(module).submodule_search_locations is not None:
        module += ".__main__"
    return importlib.import_module(module).main


def run(module: str, arguments: Sequence[str]) -> int:
    """Run `python -m module arguments` in this process; returns the exit code."""
    with mock.patch.object(sys, "argv", [module, *arguments]):
        try:
            return int(entry_point(module)() or 0)
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else int(end.code is not None)


def help_of(module: str, arguments: Sequence[str] = ()) -> str:
    """What a command says to --help."""
    # Boxes are drawn where the output can take their characters.
    output = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    with (
        mock.patch.dict(os.environ, {"COLUMNS": _COLUMNS}),
        contextlib.redirect_stdout(output),
    ):
        run(module, [*arguments, "--help"])
    output.seek(0)
    return output.read()


def groups(text: str) -> list[Group]:
    """The boxes of a --help."""
    found: list[Group] = []
    for box in re.findall(r"^╭─ (.+?) ─*╮\n(.*?)^╰", text, re.DOTALL | re.MULTILINE):
        title, body = box
        lines = [line[2:-1].rstrip() for line in body.splitlines()]
        # A description of the group ends with a rule.
        rules = [i for i, line in enumerate(lines) if set(line) == {"─"}]
        lines = lines[rules[-1] + 1 if rules else 0 :]
        found.append(Group(title, _rows(lines)))
    return found


def _rows(lines: Sequence[str]) -> list[tuple[str, str]]:
    """Entries of a box: what is not indented begins one, and its meaning may stand on its line."""
    rows: list[tuple[str, str]] = []
    for line in lines:
        if line.startswith(" "):
            flags, meaning = rows.pop()
            rows.append((flags, f"{meaning} {line.strip()}".strip()))
        else:
            flags, _, meaning = line.partition("  ")
            rows.append((flags, meaning.strip()))
    return rows


def flags_of(module: str, arguments: Sequence[str] = ()) -> set[str]:
    """All flags that a command's --help names."""
    return {
        flag
        for group in groups(help_of(module, arguments))
        for flags, _ in group.rows
        for flag in re.findall(r"(?<![\w-])--?[a-z][\w.-]*", flags)
    }


def prior_commands() -> list[str]:
    """The commands of dsd_fast.prior, by its own list."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        end = _exit_message(entry_point(PRIOR))
    return re.search(r"expected one of: (.+)", output.getvalue() + end).group(1).split(", ")


def _exit_message(main: Callable[[], object]) -> str:
    with mock.patch.object(sys, "argv", [PRIOR]):
        try:
            main()
        except SystemExit as end:
            return str(end)
    return ""


def page() -> str:
    """The page."""
    parts = [INTRODUCTION]
    for module, (arguments, first) in COMMANDS.items():
        parts += [f"\n## {module}\n\n{first}\n", *_tables(help_of(module, arguments))]
    for command in prior_commands():
        parts += [f"\n## {PRIOR} {command}\n", *_tables(help_of(PRIOR, [command]))]
    return "".join(parts)


def _tables(text: str) -> list[str]:
    parts = []
    for group in groups(text):
        rows = [row for row in group.rows if "--help" not in row[0]]
        if not rows:
            continue
        if group.title not in ("options", "positional arguments"):
            parts.append(f"\n### {group.title}\n")
        parts.append("\n| flag | meaning | default |\n|---|---|---|\n")
        parts += [_table_row(flags, meaning) for flags, meaning in rows]
    return parts


def _table_row(flags: str, meaning: str) -> str:
    # The last brackets: the text may have some of its own.
    meaning, _, default = meaning.rpartition(" (")
    default = default.removesuffix(")")
    if default.startswith("default: "):
        default = f"`{default.removeprefix('default: ')}`"
    default = BY_COMPUTER.get(flags, default)
    # A switch is listed in both forms; the introduction has the rule.
    cells = (f"`{flags.split(', --')[0]}`", meaning, "" if default == "``" else default)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
