"""A run's report: one HTML page that stands alone.

    write_report("runs/demo/report.html", "Demo", [
        Text("Trained for 1,000 steps.", title="Summary"),
        Table("Results", ["metric", "value"], [["accuracy", 0.72]]),
        loss_curve("runs/demo/metrics.jsonl"),
        vqa_gallery(rows, image_of),
    ])

Pictures and figures are inside the page and there is no script, so it can be mailed, and opened without a network.
It follows the reader's light or dark setting and fits a phone. All text is escaped.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO, StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageOps

from metalm.errors import DataError

if TYPE_CHECKING:
    import matplotlib.figure

LARGEST_SIDE = 512  # pixels; larger pictures are shrunk, so that a page of photos stays a few megabytes
_WEB_FORMATS = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp", "GIF": "image/gif"}


@dataclass(frozen=True)
class Text:
    """A paragraph; blank lines part it into several."""

    paragraph: str
    title: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of cells; numbers are aligned right and floats shown to four significant digits."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Figure:
    """A matplotlib figure, drawn as inline SVG; black and white become the page's own ink and paper."""

    title: str
    figure: matplotlib.figure.Figure
    caption: str = ""


@dataclass(frozen=True)
class GalleryItem:
    """A picture (encoded bytes, or None) over lines of (label, text), with a badge that may be right or wrong.

    `mark` is "right", "partly", "wrong", or "" for a neutral badge; `badge` is its text ("" for no badge).
    """

    image: bytes | None
    lines: Sequence[tuple[str, str]]
    badge: str = ""
    mark: str = ""


@dataclass(frozen=True)
class Gallery:
    """Pictures with what the model said about them."""

    title: str
    items: Sequence[GalleryItem]
    note: str = ""


Section = Text | Table | Figure | Gallery


def write_report(path: str | Path, title: str, sections: Iterable[Section]) -> Path:
    """Write the page, creating its folder; returns its path.

    Raises:
        TypeError: a section of another class.
        ValueError: a table's row that has not one cell a column.
    """
    parts, links = [], []
    for number, section in enumerate(sections, 1):
        body = _body(section)
        heading = f"<h2>{escape(section.title)}</h2>" if section.title else ""
        if section.title:
            links.append(f'<a href="#s{number}">{escape(section.title)}</a>')
        width = ' class="half"' if isinstance(section, (Table, Figure)) else ""
        parts.append(f'<section id="s{number}"{width}>{heading}{body}</section>')
    page = _PAGE.format(title=escape(title), style=_STYLE, links="".join(links), sections="\n".join(parts))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(page.encode("utf-8", "replace"))
    return path


def loss_curve(metrics: str | Path | Iterable[Mapping], title: str = "Training") -> Figure:
    """Loss and tokens/s against the step.

    Args:
        metrics: rows {"step", "loss", "tokens_per_second", …}, or the JSON Lines file that holds them. Rows without a
            finite loss and lines that do not parse (a killed run leaves one) are passed over; of a step that a resumed
            run repeated, the last counts.

    Raises:
        DataError: the file is missing, or no row has a loss.
    """
    from matplotlib.figure import Figure as Canvas

    rows = {row["step"]: row for row in _metric_rows(metrics) if _is_number(row.get("loss")) and "step" in row}
    if not rows:
        where = metrics if isinstance(metrics, (str, Path)) else "the metrics given"
        raise DataError(f"{where}: no row with a step and a finite loss, so there is no curve to draw")
    steps = sorted(rows)
    losses = [rows[step]["loss"] for step in steps]
    speeds = [(step, rows[step]["tokens_per_second"]) for step in steps if _is_number(rows[step].get("tokens_per_second"))]

    canvas = Canvas(figsize=(5.4, 4 if speeds else 2.8), layout="constrained")
    axes = canvas.subplots(2 if speeds else 1, sharex=True, squeeze=False, height_ratios=[2, 1] if speeds else [1])
    loss_axis = axes[0][0]
    if len(losses) < 50:
        loss_axis.plot(steps, losses, color=_BLUE, marker="." if len(losses) < 10 else None)
    else:
        loss_axis.plot(steps, losses, color=_BLUE, alpha=0.3, linewidth=0.8)
        loss_axis.plot(steps, _smooth(losses), color=_BLUE)
    loss_axis.set_ylabel("loss")
    if speeds:
        axes[1][0].plot(*zip(*speeds), color=_ORANGE, marker="." if len(speeds) < 10 else None, linewidth=1)
        axes[1][0].set_ylim(0, 1.15 * max(speed for _, speed in speeds) or 1)
        axes[1][0].set_ylabel("tokens/s")
        axes[1][0].yaxis.set_major_formatter("{x:,.0f}")
    axes[-1][0].set_xlabel("step")
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.15, color="black")
    return Figure(title, canvas, f"Loss {losses[0]:.3f} at step {steps[0]:,}, {losses[-1]:.3f} at step {steps[-1]:,}.")


def vqa_gallery(
    rows: Iterable[Mapping], image_of: Callable[[str], bytes | None], title: str = "Questions", count: int = 12
) -> Gallery:
    """Questions with answers, marked right (score 1), partly, or wrong (score 0).

    Args:
        rows: predictions {"id", "question", "prediction", "references", "score" in [0, 1], "image": key}; the picture's
            key is the id where "image" is absent; references are a list, or {answer: score}.
        image_of: the encoded picture of a key, or None.
        count: how many to show: evenly spaced over the rows, so that nobody picks the nice ones.
    """

    def item(row: Mapping) -> GalleryItem:
        score = float(row["score"])
        mark = "right" if score >= 1 else "partly" if score > 0 else "wrong"
        lines = [
            ("question", str(row.get("question", ""))),
            ("prediction", row["prediction"]),
            ("answers", _answers(row["references"])),
        ]
        badge = mark if mark != "partly" else f"partly, {score:.2f}"
        return GalleryItem(_image(row, image_of), [line for line in lines if line[0] != "question" or line[1]], badge, mark)

    return _gallery(rows, item, title, count)


def caption_gallery(
    rows: Iterable[Mapping],
    image_of: Callable[[str], bytes | None],
    title: str = "Captions",
    count: int = 12,
    metric: str = "CIDEr",
) -> Gallery:
    """Captions with their references and the sample's score, right where the caption equals a reference.

    Args: as `vqa_gallery`, without a question; `metric` names what the rows' score is.
    """

    def item(row: Mapping) -> GalleryItem:
        right = row["prediction"].strip().lower() in {reference.strip().lower() for reference in row["references"]}
        references = [("references" if i == 0 else "", reference) for i, reference in enumerate(row["references"])]
        badge = f"{metric} {float(row['score']):.1f}" + (", equals a reference" if right else "")
        return GalleryItem(
            _image(row, image_of), [("prediction", row["prediction"]), *references], badge, "right" if right else ""
        )

    return _gallery(rows, item, title, count)


def _gallery(rows: Iterable[Mapping], item: Callable[[Mapping], GalleryItem], title: str, count: int) -> Gallery:
    rows = list(rows)
    shown = [rows[i * len(rows) // count] for i in range(count)] if len(rows) > count else rows
    note = f"{len(shown)} of {len(rows):,}, evenly spaced, not chosen by score." if len(rows) > count else ""
    return Gallery(title, [item(row) for row in shown], note)


def _image(row: Mapping, image_of: Callable[[str], bytes | None]) -> bytes | None:
    return image_of(row.get("image", row["id"]))


def _answers(references: Sequence[str] | Mapping[str, float]) -> str:
    """ "red × 7, blue × 3" of a list, "vine 1, climbing 0.667" of soft scores; the weightiest first."""
    if isinstance(references, Mapping):
        ranked = sorted(references.items(), key=lambda pair: -pair[1])
        return ", ".join(f"{answer} {score:g}" for answer, score in ranked)
    counts = Counter(references).most_common()
    return ", ".join(f"{answer} × {count}" if count > 1 else answer for answer, count in counts)


def _metric_rows(metrics: str | Path | Iterable[Mapping]) -> Iterable[Mapping]:
    if not isinstance(metrics, (str, Path)):
        yield from metrics
        return
    try:
        lines = Path(metrics).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise DataError(
            f"{metrics}: cannot read the training metrics ({error.strerror}): is this a run's metrics file?"
        ) from error
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _smooth(values: Sequence[float]) -> list[float]:
    """Mean over a centred window of a twentieth of the run, narrower at its ends."""
    half = len(values) // 40
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _body(section: Section) -> str:
    if isinstance(section, Text):
        paragraphs = re.split(r"\n\s*\n", section.paragraph.strip())
        return "".join(f"<p>{escape(paragraph)}</p>" for paragraph in paragraphs)
    if isinstance(section, Table):
        return _table(section)
    if isinstance(section, Figure):
        caption = f"<figcaption>{escape(section.caption)}</figcaption>" if section.caption else ""
        return f"<figure>{_svg(section)}{caption}</figure>"
    if isinstance(section, Gallery):
        note = f'<p class="note">{escape(section.note)}</p>' if section.note else ""
        return f'{note}<div class="gallery">{"".join(map(_card, section.items))}</div>'
    raise TypeError(f"a report's section is a Text, Table, Figure, or Gallery, not {type(section).__name__}")


def _table(table: Table) -> str:
    for row in table.rows:
        if len(row) != len(table.columns):
            raise ValueError(f"table {table.title!r}: row {list(row)!r} has not {len(table.columns)} cells")

    def is_numeric(column: int) -> bool:
        cells = [row[column] for row in table.rows if row[column] is not None]
        return bool(cells) and all(isinstance(cell, (int, float)) and not isinstance(cell, bool) for cell in cells)

    classes = [' class="number"' if is_numeric(column) else "" for column in range(len(table.columns))]
    head = "".join(f"<th{style}>{escape(str(column))}</th>" for style, column in zip(classes, table.columns))
    rows = (
        "<tr>" + "".join(f"<td{style}>{escape(_cell(cell))}</td>" for style, cell in zip(classes, row)) + "</tr>"
        for row in table.rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if math.isfinite(value) and abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def _card(item: GalleryItem) -> str:
    uri = _data_uri(item.image) if item.image is not None else None
    picture = f'<img src="{uri}" alt="" loading="lazy">' if uri else '<div class="no-image">no picture</div>'
    sign = {"right": "✓ ", "wrong": "✗ ", "partly": "◐ "}.get(item.mark, "")
    badge = f'<span class="badge {escape(item.mark)}">{sign}{escape(item.badge)}</span>' if item.badge else ""
    lines = "".join(f"<dt>{escape(label)}</dt><dd>{escape(str(text)) or '<i>empty</i>'}</dd>" for label, text in item.lines)
    return f'<article class="{escape(item.mark)}">{picture}<div class="said">{badge}<dl>{lines}</dl></div></article>'


def _data_uri(image: bytes) -> str | None:
    """The picture as a data URI, shrunk to `LARGEST_SIDE`; None if it cannot be decoded."""
    try:
        with Image.open(BytesIO(image)) as picture:
            mime = _WEB_FORMATS.get(picture.format)
            if mime is None or max(picture.size) > LARGEST_SIDE:
                picture.draft("RGB", (LARGEST_SIDE, LARGEST_SIDE))
                small = ImageOps.exif_transpose(picture).convert("RGB")
                small.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
                buffer = BytesIO()
                small.save(buffer, "JPEG", quality=85)
                image, mime = buffer.getvalue(), "image/jpeg"
            else:
                picture.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    return f"data:{mime};base64,{base64.b64encode(image).decode('ascii')}"


def _svg(section: Figure) -> str:
    """The figure as an <svg> element that inherits the page's colours; the same figure gives the same text."""
    import matplotlib

    buffer = StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": section.title}):
        section.figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace("#000000", "currentColor").replace("#ffffff", "var(--card)")
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(section.title)}"', 1)


_BLUE, _ORANGE = "#3b82f6", "#f08c2e"  # legible on light and on dark paper

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header><h1>{title}</h1><nav>{links}</nav></header>
<main>
{sections}
</main>
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light dark; --paper: #f6f7f9; --card: #fff; --ink: #1c2430; --soft: #5d6b7e; --line: #dfe4ea;
  --blue: #2563eb; --right: #15803d; --wrong: #c02626; --partly: #a16207; }
@media (prefers-color-scheme: dark) { :root { --paper: #11151b; --card: #1a2029; --ink: #e4e9f0; --soft: #94a1b3;
  --line: #2c3542; --blue: #7aa7ff; --right: #4ade80; --wrong: #f87171; --partly: #fbbf24; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 2.5rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }
h1 { margin: 0 0 .5rem; font-size: 1.9rem; line-height: 1.2; letter-spacing: -.01em; }
h2 { margin: 0 0 .8rem; font-size: 1.15rem; }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; font-size: .9rem; }
a { color: var(--blue); text-decoration: none; }
a:hover { text-decoration: underline; }
main { display: flex; flex-wrap: wrap; gap: 1.1rem; margin-top: 1.5rem; }
section { flex: 1 1 100%; min-width: 0; padding: 1.25rem 1.4rem; background: var(--card);
  border: 1px solid var(--line); border-radius: 12px; }
section.half { flex: 1 1 26rem; }
p { margin: 0 0 .8rem; max-width: 70ch; }
p:last-child { margin-bottom: 0; }
.note, figcaption { color: var(--soft); font-size: .88rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; min-width: min(100%, 22rem); font-size: .95rem; }
th, td { padding: .45rem 1.2rem .45rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { color: var(--soft); font-weight: 600; font-size: .85rem; white-space: nowrap; }
tbody tr:last-child td { border-bottom: 0; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
figure { margin: 0; }
figure svg { display: block; width: 100%; max-width: 640px; height: auto; fill: currentColor; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(210px, 1fr)); gap: 1rem; }
article { display: flex; flex-direction: column; overflow: hidden; border: 1px solid var(--line); border-radius: 10px;
  border-top: 3px solid var(--line); }
article.right { border-top-color: var(--right); }
article.wrong { border-top-color: var(--wrong); }
article.partly { border-top-color: var(--partly); }
article img, .no-image { display: block; width: 100%; aspect-ratio: 4 / 3; object-fit: contain;
  background: var(--paper); }
.no-image { display: grid; place-items: center; color: var(--soft); font-size: .88rem; }
.said { padding: .7rem .85rem .85rem; font-size: .92rem; line-height: 1.4; overflow-wrap: anywhere; }
.badge { font-size: .82rem; font-weight: 600; color: var(--soft); }
.badge.right { color: var(--right); }
.badge.wrong { color: var(--wrong); }
.badge.partly { color: var(--partly); }
dl { margin: .25rem 0 0; }
dt { margin-top: .4rem; color: var(--soft); font-size: .76rem; }
dt:empty { display: none; }
dd { margin: 0; }
@media (max-width: 520px) { body { padding: 1.4rem .8rem 3rem; }
  section, section.half { flex-basis: 100%; padding: 1rem; }
  .gallery { grid-template-columns: 1fr 1fr; gap: .7rem; } .said { padding: .55rem .6rem .7rem; font-size: .86rem; } }
@media print { section { border: 0; padding: 0; } article { break-inside: avoid; } }
"""
