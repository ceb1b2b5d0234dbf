"""The credits that ship beside the weights: every model the prior saw, its creator and licence."""

from __future__ import annotations

from collections.abc import Sequence

from dsd_fast.judge.nouns import Noun, nouns

LICENSES = {
    "CC-BY-3.0": (
        "Creative Commons Attribution 3.0 Unported",
        "https://creativecommons.org/licenses/by/3.0/",
    ),
    "CC-BY-3.0-US": (
        "Creative Commons Attribution 3.0 United States",
        "https://creativecommons.org/licenses/by/3.0/us/",
    ),
    "CC0-1.0": (
        "CC0 1.0 Universal (public domain dedication)",
        "https://creativecommons.org/publicdomain/zero/1.0/",
    ),
}

# Library -> the attribution that its LICENSE.TXT asks for.
LIBRARIES = {
    "Scopia": "Emmanuel PUYBARET / eTeks <info@eteks.com> and Scopia Visual Interfaces Systems, "
    "s.l. (http://www.scopia.es)",
    "Kator Legaz": "Andrew Kator & Jennifer Legaz (2003-2008)",
    "Reallusion": "Reallusion (http://www.reallusion.com/), 2008-2016",
    "Blend Swap CC-BY": "the author named with each model, by way of https://www.blendswap.com",
    "Blend Swap CC-0": "the authors, with gratitude (CC0 models ask for no credit), by way of "
    "https://www.blendswap.com",
}

HEADER = """# Credits of the embedded prior

The weights in this folder, and those in the folder `view_prior` beside it, were trained on images
of the {count} 3D models listed below. They come from the Sweet Home 3D furniture libraries 1.8
(https://www.sweethome3d.com), packaged by Debian as `sweethome3d-furniture` 1.8-1, where Emmanuel
Puybaret / eTeks collected and converted them.

Changes made to the models: they were turned to common axes, centred, scaled to one size and
quantised; textures were made smaller; they were rendered as images from many views, under many
lights and over plain backgrounds, and in a part of the images their main part was painted in
another colour. No creator endorses this project.

Licences:

"""


def _cell(text: str) -> str:
    """Text that stays inside one cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")


def credits(rows: Sequence[Noun] | None = None) -> str:
    """CREDITS.md: licences, libraries, and one line a model, of `rows` or all usable models.

    Raises ValueError for a model whose library or licence is unknown here.
    """
    rows = [row for row in nouns() if not row.exclude] if rows is None else rows
    for row in rows:
        if row.license not in LICENSES or row.library not in LIBRARIES:
            raise ValueError(
                f"{row.id}: no credit text for library {row.library!r} under "
                f"{row.license!r}; add it to LIBRARIES or LICENSES"
            )
    text = HEADER.format(count=len(rows))
    for license_ in sorted({row.license for row in rows}):
        name, link = LICENSES[license_]
        text += f"- {license_}: {name}, {link}\n"
    for library, attribution in LIBRARIES.items():
        mine = [row for row in rows if row.library == library]
        if not mine:
            continue
        text += (
            f"\n## {library}\n\nCredit: {attribution}\n\n"
            "| model | name | creator | licence |\n| --- | --- | --- | --- |\n"
        )
        for row in mine:
            model = row.id.partition("#")[2]
            text += (
                f"| {_cell(model)} | {_cell(row.name)} | {_cell(row.creator)} | {row.license} |\n"
            )
    return text
