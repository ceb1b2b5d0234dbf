"""The report as one HTML file: figures in a table, and of every prompt seeds by views."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from importlib import resources

import numpy as np

from dsd_fast.evaluate.assets import Asset
from dsd_fast.evaluate.report import COLUMNS, Column

# Side of a thumbnail, and the quality of its jpeg: about 2 KB a view.
THUMBNAIL = 128
QUALITY = 82


def thumbnail(image: np.ndarray, size: int = THUMBNAIL) -> np.ndarray:
    """A view [H,W,3] uint8 fitted into a square [size,size,3] uint8 of grey."""
    from PIL import Image

    tile = Image.new("RGB", (size, size), (179, 179, 179))
    scale = size / max(image.shape[:2])
    height, width = (max(round(side * scale), 1) for side in image.shape[:2])
    small = Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS)
    tile.paste(small, ((size - width) // 2, (size - height) // 2))
    return np.asarray(tile)


def _jpeg(pixels: np.ndarray) -> str:
    """Pixels [H,W,3] uint8 as a data: address."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _text(column: Column, value: float) -> str:
    return f"{value:,.{column.decimals}f}"


def _best(column: Column, entries: list[dict[str, float]]) -> float | None:
    """The best of the values as they are shown, where there are several and they differ."""
    values = [round(e[column.key], column.decimals) for e in entries if column.key in e]
    if not column.better or len(set(values)) < 2:
        return None
    return max(values) if column.better > 0 else min(values)


def table(figures: dict[str, dict[str, float]]) -> str:
    """Methods by metrics; columns that nobody has are left out, the best of each is marked."""
    entries = list(figures.values())
    columns = [c for c in COLUMNS if any(c.key in entry for entry in entries)]
    best = {c.key: _best(c, entries) for c in columns}
    arrows = {1: " ↑", -1: " ↓", 0: ""}
    heads = "".join(
        f'<th scope="col" title="{escape(c.meaning)}">{escape(c.title)}{arrows[c.better]}</th>'
        for c in columns
    )
    lines = []
    for method, entry in figures.items():
        cells = [f'<th scope="row">{escape(method)}</th>']
        for c in columns:
            value = entry.get(c.key)
            is_best = value is not None and round(value, c.decimals) == best[c.key]
            cells.append(
                f"<td{' class=best' if is_best else ''}>"
                f"{'–' if value is None else _text(c, value)}</td>"
            )
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<div class="wide"><table><thead><tr><th scope="col">method</th>{heads}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _img(image: np.ndarray, alt: str, title: str) -> str:
    return (
        f'<img alt="{escape(alt)}" title="{escape(title)}" width="{THUMBNAIL}" '
        f'height="{THUMBNAIL}" src="{_jpeg(thumbnail(image))}">'
    )


def _row(asset: Asset) -> str:
    """The seed of an asset and its views."""
    source = asset.source
    pictures = "".join(
        _img(image, f"{source.prompt}, seed {source.seed}, {azimuth:.0f}°", f"{azimuth:.0f}°")
        for image, azimuth in zip(asset.images, asset.azimuths)
    )
    views = len(asset.images)
    style = f"--views:{views};--lines:{-(-views // 4)}"
    return f'<div class="row" style="{style}"><span>{source.seed}</span>{pictures}</div>'


def _seeds(assets: Sequence[Asset]) -> str:
    """Single images, seed beside seed."""
    figures = []
    for asset in assets:
        source = asset.source
        img = _img(asset.images[0], f"{source.prompt}, seed {source.seed}", f"seed {source.seed}")
        figures.append(f"<figure>{img}<figcaption>{source.seed}</figcaption></figure>")
    return f'<div class="seeds">{"".join(figures)}</div>'


def _method_block(method: str, entry: dict, assets: Sequence[Asset]) -> str:
    """One method's pictures of one prompt: a seed a row, a view a column; of single images a row of
    seeds."""
    told = [
        f"{c.title} {_text(c, entry['figures'][c.key])}"
        for c in COLUMNS
        if c.key in entry["figures"]
    ]
    single = all(len(asset.images) == 1 for asset in assets)
    rows = [_seeds(assets)] if single else [_row(asset) for asset in assets]
    return (
        f'<section class="method"><h3>{escape(method)}</h3>'
        f'<p class="figures">{escape(" · ".join(told))}</p>{"".join(rows)}</section>'
    )


def page(report: dict, assets: Sequence[Asset], title: str = "Comparison of methods") -> str:
    """The whole page of a report (see `report.evaluate`) and the assets that it is about."""
    methods = report["methods"]
    prompts = sorted({prompt for method in methods.values() for prompt in method["prompts"]})
    parts = []
    for prompt in prompts:
        blocks = [
            _method_block(
                name,
                method["prompts"][prompt],
                [a for a in assets if (a.source.method, a.source.prompt) == (name, prompt)],
            )
            for name, method in methods.items()
            if prompt in method["prompts"]
        ]
        parts.append(f'<h2>{escape(prompt)}</h2><div class="prompt">{"".join(blocks)}</div>')
    shown = {key for method in methods.values() for key in method["figures"]}
    meanings = "".join(
        f"<dt>{escape(c.title)}</dt><dd>{escape(c.meaning)}</dd>" for c in COLUMNS if c.key in shown
    )
    notes = "".join(f"<li>{escape(note)}</li>" for note in report["notes"])
    figures = {name: method["figures"] for name, method in methods.items()}
    single = report["views"] == 1
    views = "one image" if single else f"{report['views']} views"
    layout = "Rows are seeds; columns are views from the front around the object."
    style = resources.files("dsd_fast.evaluate").joinpath("page.css").read_text(encoding="utf-8")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>
{style}</style></head><body>
<h1>{escape(title)}</h1>
<p class="notes">{len(methods)} methods, {len(prompts)} prompts, {len(assets)} assets,
{views} of each. Of a method: the mean over its prompts. Arrows point to the better
end; the best value is marked.</p>
{table(figures)}
<ul class="notes">{notes}</ul>
{"".join(parts)}
<footer><p>{"Numbers are seeds." if single else layout}</p>
<dl>{meanings}</dl></footer>
</body></html>
"""
