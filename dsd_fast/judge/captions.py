"""Captions of the training renders: article, true colour and material, noun, and view suffixes.

The suffixes and the thresholds of the four views are those of DSD's prompt processor, so that the
prior learns the very words that guidance appends to a prompt.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

import numpy as np

from dsd_fast.judge.nouns import Noun, nouns

# The order of diffusion.text.VIEWS, said again so that render workers need not import torch.
VIEWS = ("side", "front", "back", "overhead")

# fmt: off
# Colours that recolouring can give; the order is the colour index of the renders.
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black",
           "white", "gray")

# Chances of the caption variants.
SUFFIX_SHARE = 0.9
COLOUR_SHARE = 0.8  # a repainted object is called by its colour this often
MATERIAL_SHARE = 0.5  # an unpainted object of known material is called by it this often
GROUP_SHARE = 0.1  # "a person" for "a woman"
SYNONYM_SHARE = 0.2
PREFIX_SHARE = 0.1
PREFIXES = ("a photo of ", "a DSLR photo of ")

# Below this share of its visible pixels a model's own colour is not named, and gray never is:
# under light it cannot be told from white and black.
OWN_COLOUR_SHARE = 0.6

SYNONYMS: dict[str, tuple[str, ...]] = {
    "airplane": ("plane",),
    "bicycle": ("bike",),
    "bookcase": ("bookshelf",),
    "cabinet": ("cupboard",),
    "camera": ("photo camera",),
    "computer": ("desktop computer",),
    "deck chair": ("sun lounger",),
    "glass": ("drinking glass",),
    "lamp": ("table lamp",),
    "motorcycle": ("motorbike",),
    "parasol": ("sun umbrella",),
    "phone": ("telephone",),
    "plant": ("potted plant",),
    "refrigerator": ("fridge",),
    "sofa": ("couch",),
    "speaker": ("loudspeaker",),
    "television": ("tv",),
    "trash can": ("garbage can",),
    "flowers": ("bunch of flowers",),
    "shoes": ("pair of shoes",),
}

# Words that take no article. Those of SYNONYMS that name one thing ("pair of shoes") do.
NO_ARTICLE = frozenset({
    "bread", "butter", "clothes", "cutlery", "flowers", "food", "french fries", "glasses",
    "headphones", "oil servers", "pliers", "roast chicken", "scissors", "shoes", "steak",
    "sushi", "wood logs",
})

# Things that look alike, or have no agreed front, from all around. Their suffixes follow the
# azimuth of the source like all others, which keeps the views of one model consistent.
NO_FRONT = frozenset({
    "aquarium", "ashtray", "bag", "ball", "barrel", "basin", "basket", "bathtub", "bench",
    "book", "bottle", "bowl", "bowl of food", "box", "bread", "bush", "butter", "cactus",
    "cake", "candle", "ceiling lamp", "chessboard", "chimney", "christmas tree", "clothes",
    "clothes rack", "column", "comb", "container", "cosmetic jar", "crib", "cup", "cutlery",
    "dart board", "flashlight", "flowers", "folding screen", "food", "foosball table",
    "fountain", "french fries", "gift box", "glass", "glasses", "glove", "hamburger", "hammer",
    "hammock", "hot dog", "house", "hydrant", "key", "kitchen tool", "knife stand", "ladder",
    "lamp", "lantern", "lipstick", "mailbox", "marker", "milk carton", "oil servers", "pallet",
    "palm tree", "pan", "paper towel", "parasol", "pen holder", "ping pong table", "pitcher",
    "plant", "plate", "playground", "pliers", "pool table", "pot", "punching bag", "radiator",
    "ring", "roast chicken", "rock", "rubik cube", "salt shaker", "saw", "scissors",
    "screwdriver", "shovel", "skateboard", "soap dispenser", "sponge", "squeezer", "stapler",
    "steak", "stool", "street lamp", "sushi", "swimming pool", "table", "tape", "teapot",
    "tennis racket", "tent", "toilet brush", "towel", "traffic cone", "trampoline", "trash can",
    "tray", "tree", "umbrella", "vase", "water heater", "wood logs", "xylophone",
})

# Living and grown things keep their own colours, and no colour is named for them.
NATURAL = frozenset({"animal", "bush", "flowers", "food", "person", "plant", "tree"})
# fmt: on


def view_index(azimuth_deg: np.ndarray, elevation_deg: np.ndarray) -> np.ndarray:
    """Index into VIEWS by DSD's thresholds; any azimuth in degrees, strict inequalities."""
    import torch

    from dsd_fast.guidance.conditions.text import direction

    angles = [torch.from_numpy(np.asarray(a, np.float64)) for a in (elevation_deg, azimuth_deg)]
    return direction(*angles).numpy()


def own_colour(noun: Noun) -> str:
    """The colour word that is true of the model as it comes, "" when none is safe."""
    if noun.group in NATURAL or noun.colour_share < OWN_COLOUR_SHARE or noun.colour == "gray":
        return ""
    return noun.colour


def with_article(words: str, noun: str) -> str:
    """`words` (which end in `noun`) with "a" or "an" where the noun takes one."""
    if noun in NO_ARTICLE:
        return words
    return ("an " if words[0] in "aeiou" else "a ") + words


def caption(noun: Noun, view: int, colour: int, rng: np.random.Generator) -> str:
    """A caption that is true of one render.

    view: index into VIEWS. colour: index into COLOURS when the object was repainted, else -1.
    No material is named for a repainted object: paint hides it.
    Deterministic from the state of `rng`, of which it always draws six numbers.
    """
    name_draw, synonym_draw, colour_draw, material_draw, prefix_draw, suffix_draw = rng.random(6)
    name = noun.group if name_draw < GROUP_SHARE else noun.noun
    # A group is wider than its synonyms: a street lamp is a lamp, but no table lamp.
    synonyms = SYNONYMS.get(name, ()) if name == noun.noun else ()
    if synonyms and synonym_draw < SYNONYM_SHARE:
        name = synonyms[int(synonym_draw / SYNONYM_SHARE * len(synonyms))]
    word = COLOURS[colour] if colour >= 0 else own_colour(noun)
    share = COLOUR_SHARE if colour >= 0 else COLOUR_SHARE / 2
    words = name
    if colour < 0 and noun.material and material_draw < MATERIAL_SHARE:
        words = f"{noun.material} {words}"
    if word and colour_draw < share:
        words = f"{word} {words}"
    text = with_article(words, name)
    if prefix_draw < PREFIX_SHARE:
        text = PREFIXES[int(prefix_draw / PREFIX_SHARE * len(PREFIXES))] + text
    if suffix_draw < SUFFIX_SHARE:
        text += f", {VIEWS[view]} view"
    return text


def caption_set(
    rows: Iterable[tuple[Noun, int, int]], variants: int, rng: np.random.Generator
) -> tuple[list[str], np.ndarray]:
    """`variants` captions for each (noun, view, colour): the distinct texts and [N, variants].

    The second value holds int32 indices into the first, so that each text is encoded once.
    """
    number: dict[str, int] = {}
    index = [
        [number.setdefault(caption(noun, view, colour, rng), len(number)) for _ in range(variants)]
        for noun, view, colour in rows
    ]
    return list(number), np.array(index, np.int32).reshape(-1, variants)


def noun_list() -> list[str]:
    """All fine nouns of the usable models, sorted; the order is the noun index of the renders."""
    return sorted({row.noun for row in nouns() if not row.exclude})


def frequent_nouns(at_least: int = 4) -> list[str]:
    """Fine nouns with that many usable models or more, most frequent first."""
    counts = Counter(row.noun for row in nouns() if not row.exclude)
    return [noun for noun, count in counts.most_common() if count >= at_least]


# The nouns that judges know and figures count.
COUNTED_NOUNS = frequent_nouns()
# After these a prompt tells of other things. "Of" is not among them: "a photo of a chair".
_PREPOSITION = re.compile(r"\b(?:with|on|in|at|beside|near|under|behind|holding|wearing|made)\b")


def noun_of(prompt: str) -> int | None:
    """The noun that a prompt is about, as an index into COUNTED_NOUNS, or None.

    It is looked for before the first preposition, then in the whole prompt. The longest known noun
    or synonym counts ("a street lamp" is no lamp), of as long ones the last, where English has the
    head of a compound.
    """
    text = re.sub(r"[^a-z]+", " ", prompt.lower())
    for part in (_PREPOSITION.split(text)[0], text):
        found = [
            (len(name.split()), match.end(), index)
            for index, noun in enumerate(COUNTED_NOUNS)
            for name in (noun, *SYNONYMS.get(noun, ()))
            for match in re.finditer(rf"\b{re.escape(name)}s?\b", part)
        ]
        if found:
            return max(found)[2]
    return None


def has_front(noun: str) -> bool:
    """Whether things of that noun have a front that a viewer can tell."""
    return noun not in NO_FRONT
