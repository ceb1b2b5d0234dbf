"""From assets to the figures of a report: methods by metrics, and the same of every prompt."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from dsd_fast.evaluate import metrics
from dsd_fast.evaluate.assets import IMAGES, Asset, EvaluateError, over_grey, read_image
from dsd_fast.evaluate.eyes import FRONT, HEAD_WIDTH, Clip, Encoder, Verdict, judge_asset
from dsd_fast.evaluate.surfaces import Surface
from dsd_fast.files import replacing
from dsd_fast.judge.captions import COUNTED_NOUNS, VIEWS, noun_of
from dsd_fast.judge.judge import Judge
from dsd_fast.judge.truth import read_npz

log = logging.getLogger("dsd_fast.evaluate")

# Reference images that go through the encoder together.
BATCH = 64


@dataclass(frozen=True)
class Column:
    """A metric in the table."""

    key: str
    title: str
    meaning: str
    # Whether more is better: 1, -1, or 0 where neither is.
    better: int
    decimals: int = 2


COLUMNS = (
    Column("cosine", "cosine distance", "mean between seeds, of features of the same view", 1, 3),
    Column("euclidean", "Euclidean distance", "mean between seeds, as the cosine distance", 1),
    Column("silhouette", "silhouettes apart", "1 - overlap of outlines, mean between seeds", 1, 3),
    Column("vendi", "Vendi score", "effective number of different seeds, 1 to the seeds made", 1),
    Column("nearest", "nearest models", "different training models nearest to the seeds", 1, 1),
    Column("frechet", "Fréchet distance", "of all views to the reference images", -1, 1),
    Column("clip", "CLIP score", "of the views with the prompt, 0 to 100", 1, 1),
    Column("noun", "prompt accuracy", "share of views whose noun the judge names", 1),
    Column("view", "view accuracy", "share of views whose side the judge names", 1),
    Column("janus", "false fronts", "views of an asset judged a front that are none", -1),
    Column("roughness", "roughness", "degrees between normals of neighbouring pixels, mean", -1, 1),
    Column("fog", "fog", "mean of 4a(1 - a) where a view's opacity a is not zero", -1, 3),
    Column("specks", "specks", "per cent of an object's pixels in floating pieces", -1),
    Column("seconds", "seconds", "of training an asset, mean", -1, 0),
    Column("memory_mib", "peak MiB", "of memory, the highest of the runs", -1, 0),
)


@dataclass(frozen=True)
class Features:
    """Features [N,D] of images, and the name of what each shows: an asset or a training model."""

    features: np.ndarray
    names: np.ndarray


def of_assets(assets: Sequence[Asset], features: Sequence[np.ndarray]) -> Features:
    """The features [V,D] of all assets, named by the assets' folders."""
    names = [a.source.path.resolve().name for a, x in zip(assets, features) for _ in x]
    return Features(np.concatenate(features), np.array(names))


def write_features(features: Features, path: Path) -> None:
    """Features in half precision, and their names, as .npz."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, features=features.features.astype(np.float16), names=features.names)


def read_features(path: Path) -> Features:
    """What `write_features` wrote: also the reference of `nearest_models`.

    Raises:
        EvaluateError: it is not such a file.
    """
    try:
        file = read_npz(path, ("features", "names"))
        found = Features(file["features"].astype(np.float32), file["names"])
    except ValueError as error:
        raise EvaluateError(
            f"{path}: expected an .npz of features and names, as --save-features writes: {error}"
        ) from error
    if found.features.ndim != 2 or found.names.shape != found.features.shape[:1]:
        raise EvaluateError(
            f"{path}: features {list(found.features.shape)} and names "
            f"{list(found.names.shape)} do not belong together"
        )
    if not np.isfinite(found.features).all():
        raise EvaluateError(f"{path}: features that are not finite: make it again")
    return found


def reference_features(path: Path, encoder: Encoder, limit: int) -> Features:
    """Features of reference images, each named by what it shows.

    Args:
        path: a file of `write_features`; a folder that `python -m dsd_fast.prior render` wrote,
            whose views are named by their models and laid over grey; or any other folder, whose
            images, at any depth, are named by the folder they lie in.
        limit: of more images than this, so many are taken, evenly over all.
    Raises:
        EvaluateError: it is none of these, or holds fewer than metrics.MIN_FRECHET images.
    """
    if path.suffix == ".npz":
        return read_features(path)
    if not path.is_dir():
        raise EvaluateError(f"{path}: expected a folder of images, or an .npz of their features")
    images, names = _rendered(path, limit) or _images_below(path, limit)
    if len(names) < metrics.MIN_FRECHET:
        raise EvaluateError(
            f"{path}: expected at least {metrics.MIN_FRECHET} images, found {len(names)}"
        )
    log.info("%s: looking at %d images", path, len(names))
    rows: list[np.ndarray] = []
    waiting: list[np.ndarray] = []
    for image in images:
        # Images of one size go through the encoder together.
        if waiting and (image.shape != waiting[0].shape or len(waiting) == BATCH):
            rows.append(encoder(np.stack(waiting)))
            waiting = []
        waiting.append(image)
    return Features(np.concatenate([*rows, encoder(np.stack(waiting))]), np.array(names))


def _evenly(count: int, limit: int) -> list[int]:
    """At most ``limit`` of ``count`` numbers."""
    return [i * count // min(count, limit) for i in range(min(count, limit))]


def _images_below(folder: Path, limit: int) -> tuple[Iterator[np.ndarray], list[str]]:
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGES)
    chosen = [paths[i] for i in _evenly(len(paths), limit)]
    return map(read_image, chosen), [path.resolve().parent.name for path in chosen]


def _rendered(folder: Path, limit: int) -> tuple[Iterator[np.ndarray], list[str]] | None:
    """Views of the prior's training models; None of a folder that holds none."""
    if not (folder / "rgba.npy").is_file():
        return None
    try:
        rgba = np.load(folder / "rgba.npy", mmap_mode="r", allow_pickle=False)
        if rgba.ndim != 4 or rgba.shape[-1] != 4 or rgba.dtype != np.uint8:
            raise ValueError(f"rgba.npy: expected [N,S,S,4] uint8, got {list(rgba.shape)}")
        models = json.loads((folder / "index.json").read_text(encoding="utf-8"))["models"]
        model = read_npz(folder / "meta.npz", ("model",))["model"]
        rows = _evenly(len(rgba), limit)
        names = [str(models[model[row]]) for row in rows]
    except Exception as error:  # files that anybody may have made bring all kinds
        raise EvaluateError(
            f"{folder}: expected rgba.npy, meta.npz and index.json of "
            f"`python -m dsd_fast.prior render`: {error}"
        ) from error
    return (over_grey(rgba[row]) for row in rows), names


def head(features: np.ndarray) -> np.ndarray:
    """The part [..., at most HEAD_WIDTH] of features that distances are taken of."""
    return features[..., -HEAD_WIDTH:]


@dataclass(frozen=True)
class Eyes:
    """What looks at the views; the last four are optional."""

    encoder: Encoder
    judge: Judge | None = None
    clip: Clip | None = None
    # Images for the Fréchet distance, and training models for the nearest ones.
    reference: Features | None = None
    nearest: Features | None = None


@dataclass(frozen=True)
class Look:
    """What is said of one asset; None of what nobody looked for, or cannot be told."""

    asset: Asset
    features: np.ndarray  # [V,D]
    verdict: Verdict | None
    clip: float | None  # score of the views with the prompt
    nearest: str | None  # training model


def evaluate(
    assets: Sequence[Asset], eyes: Eyes, features: Sequence[np.ndarray] | None = None
) -> dict:
    """The figures of assets that have as many views each.

    A figure of a method is the mean over its prompts of those of the prompt, but for the Fréchet
    distance, which takes all of the method's views together, and the memory, of which the highest
    counts. What cannot be told is left out; `notes` say why.

    Args:
        features: [V,D] of each asset, where they are there already.
    Returns:
        {"views", "notes", "methods": {method: {"figures", "prompts": {prompt: {"seeds",
        "figures"}}}}, "assets": [...]}, all plain numbers and strings.
    """
    looks = _look(assets, eyes, features or [eyes.encoder(a.images) for a in assets])
    by_method: dict[str, dict[str, list[Look]]] = defaultdict(lambda: defaultdict(list))
    for look in looks:
        by_method[look.asset.source.method][look.asset.source.prompt].append(look)
    notes = _remarks(assets, eyes)
    methods = {}
    for method, prompts in by_method.items():
        by_prompt = {
            prompt: {"seeds": [m.asset.source.seed for m in members], "figures": _figures(members)}
            for prompt, members in prompts.items()
        }
        figures = _mean_of_prompts([entry["figures"] for entry in by_prompt.values()])
        if eyes.reference is not None:
            every = np.concatenate([m.features for members in prompts.values() for m in members])
            frechet = _frechet(method, head(every), head(eyes.reference.features), notes)
            if frechet is not None:
                figures["frechet"] = frechet
        methods[method] = {"figures": figures, "prompts": by_prompt}
    notes += _unequal(methods)
    entries = [_asset_entry(look) for look in looks]
    return {"views": len(assets[0].images), "notes": notes, "methods": methods, "assets": entries}


def _look(assets: Sequence[Asset], eyes: Eyes, features: Sequence[np.ndarray]) -> list[Look]:
    for given in (eyes.reference, eyes.nearest):
        if given is not None and given.features.shape[1] != features[0].shape[1]:
            raise EvaluateError(
                f"the reference has features of width {given.features.shape[1]}, "
                f"this version's have {features[0].shape[1]}: make it again"
            )
    nearest: Sequence[str | None] = [None] * len(assets)
    if eyes.nearest is not None:
        reference = head(eyes.nearest.features), eyes.nearest.names
        nearest = metrics.nearest_models(head(np.stack(features)), *reference)
    looks = []
    for asset, x, model in zip(assets, features, nearest, strict=True):
        verdict = judge_asset(eyes.judge, asset, x) if eyes.judge else None
        clip = None
        if eyes.clip:
            clip = metrics.clip_score(*eyes.clip.embed(asset.images, asset.source.prompt))
        looks.append(Look(asset, x, verdict, clip, model))
    return looks


def _figures(looks: list[Look]) -> dict[str, float]:
    """The figures of one method and prompt."""
    figures: dict[str, float] = {}
    if len(looks) > 1:
        x = head(np.stack([look.features for look in looks]))
        figures["cosine"] = metrics.pairwise_cosine(x)
        figures["euclidean"] = metrics.pairwise_euclidean(x)
        figures["vendi"] = metrics.vendi(x)
        masks = [look.asset.masks for look in looks if look.asset.masks is not None]
        if len(masks) == len(looks) and len({m.shape for m in masks}) == 1:
            figures["silhouette"] = metrics.silhouettes_apart(np.stack(masks))
    # What was looked for was looked for in all.
    if looks[0].nearest is not None:
        figures["nearest"] = len({look.nearest for look in looks})
    if scores := [look.clip for look in looks if look.clip is not None]:
        figures["clip"] = float(np.mean(scores))
    # One prompt has one noun: all of its assets are judged, or none.
    if judged := [look.verdict for look in looks if look.verdict is not None]:
        said = np.stack([v.said_noun for v in judged])
        figures["noun"] = metrics.share_right(said, np.full_like(said, judged[0].noun))
    if seen := [v for v in judged if v.said_view is not None]:
        said, asked = (np.stack([getattr(v, n) for v in seen]) for n in ("said_view", "view"))
        figures["view"] = metrics.share_right(said, asked)
        figures["janus"] = metrics.janus(said == FRONT, asked == FRONT)
    for key in (f.name for f in fields(Surface)):
        surfaces = [look.asset.surface for look in looks if look.asset.surface is not None]
        if told := [v for surface in surfaces if (v := getattr(surface, key)) is not None]:
            figures[key] = float(np.mean(told))
    for key, over in (("seconds", np.mean), ("memory_mib", np.max)):
        if told := [v for look in looks if (v := getattr(look.asset, key)) is not None]:
            figures[key] = float(over(told))
    return figures


def _mean_of_prompts(entries: list[dict[str, float]]) -> dict[str, float]:
    over: dict[str, Callable] = defaultdict(lambda: np.mean, memory_mib=np.max)
    return {
        column.key: float(over[column.key](told))
        for column in COLUMNS
        if (told := [entry[column.key] for entry in entries if column.key in entry])
    }


def _frechet(
    method: str, features: np.ndarray, reference: np.ndarray, notes: list[str]
) -> float | None:
    try:
        value, shrunk = metrics.frechet_distance(features, reference)
    except ValueError as error:
        notes.append(f"{method}: {error}.")
        return None
    if shrunk:
        notes.append(
            f"{method}: Fréchet distance of {len(features)} views to {len(reference)} images with "
            "shrunk covariances: compare methods of as many views alone."
        )
    return value


def _remarks(assets: Sequence[Asset], eyes: Eyes) -> list[str]:
    """Lines on the metrics that were left out, and on runs that are unfinished."""
    notes = [
        f"No {name}: pass {flag}."
        for name, flag, given in (
            ("prompt accuracy, view accuracy and false fronts", "--judge FILE", eyes.judge),
            ("CLIP score", "--clip FOLDER", eyes.clip),
            ("Fréchet distance", "--reference PATH", eyes.reference),
            ("nearest models", "--nearest PATH", eyes.nearest),
        )
        if given is None
    ]
    for asset in assets:
        if asset.unfinished is not None:
            step, last = asset.unfinished
            notes.append(f"{asset.source.path}: unfinished, at step {step} of {last}.")
    if eyes.judge is not None:
        prompts = dict.fromkeys(a.source.prompt for a in assets)
        unknown = [f'"{prompt}"' for prompt in prompts if noun_of(prompt) is None]
        if unknown:
            notes.append(f"Not judged, as the judge knows no noun in them: {', '.join(unknown)}.")
    return notes


def _unequal(methods: dict) -> list[str]:
    """A line where methods were not given the same work."""
    notes = []
    work = [
        {prompt: len(entry["seeds"]) for prompt, entry in method["prompts"].items()}
        for method in methods.values()
    ]
    if any(one.keys() != work[0].keys() for one in work):
        notes.append("Methods have different prompts: their figures do not compare.")
    elif any(one != work[0] for one in work):
        notes.append(
            "Methods have different numbers of seeds: Vendi score, nearest models and Fréchet "
            "distance depend on them."
        )
    if any(count == 1 for one in work for count in one.values()):
        notes.append("Where a prompt has one seed, there is no distance between seeds.")
    return notes


def _asset_entry(look: Look) -> dict:
    source = look.asset.source
    entry = {
        "method": source.method,
        "prompt": source.prompt,
        "seed": source.seed,
        "path": str(source.path),
        "azimuths": None if source.is_picture else look.asset.azimuths.tolist(),
        "seconds": look.asset.seconds,
        "memory_mib": look.asset.memory_mib,
        "clip": look.clip,
        "nearest": look.nearest,
    }
    if look.asset.surface is not None:
        entry |= asdict(look.asset.surface)
    if (verdict := look.verdict) is not None:
        entry["said_noun"] = [COUNTED_NOUNS[k] for k in verdict.said_noun.tolist()]
        if verdict.said_view is not None:
            entry["said_view"] = [VIEWS[k] for k in verdict.said_view.tolist()]
    return {key: value for key, value in entry.items() if value is not None}
