"""The table of the prior's 3D models, `nouns.tsv`: which one is what, and whom to credit."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any


@dataclass(frozen=True)
class Noun:
    """One row of `nouns.tsv`: what is known about a model without its files."""

    id: str  # "Library#model", unique
    noun: str  # fine noun: "armchair"
    group: str  # coarser noun: "person" for "woman"
    exclude: str  # reason to leave the model out, "" when it is used
    front_az: float  # azimuth in degrees from which the source model is seen from its front
    colour: str  # name of the main colour, "" when unknown
    colour_share: float  # share of the visible pixels that have the main colour
    material: str  # adjective of what it evidently is made of: "wooden"; "" when unsure
    name: str  # name in the library
    creator: str
    license: str  # SPDX-like: CC-BY-3.0, CC-BY-3.0-US, CC0-1.0

    @property
    def library(self) -> str:
        return self.id.partition("#")[0]


@cache
def nouns() -> tuple[Noun, ...]:
    """All rows of the committed table, excluded ones too, in library order."""
    with resources.files("dsd_fast.judge").joinpath("nouns.tsv").open(encoding="utf-8") as file:
        return tuple(map(_noun, csv.DictReader(file, delimiter="\t")))


def _noun(row: dict[str, Any]) -> Noun:
    for name in ("front_az", "colour_share"):
        row[name] = float(row[name] or 0.0)
    return Noun(**row)


@cache
def noun_by_id() -> dict[str, Noun]:
    """The table as a dictionary from model id to row."""
    return {row.id: row for row in nouns()}
