"""The page of an evaluation: `out.html` beside `out.json`, with the figures and pictures with what the model said."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from metalm.data.shards import read_samples
from metalm.evaluation.report import Section, Table, Text, caption_gallery, loss_curve, vqa_gallery, write_report
from metalm.evaluation.result import Result

SHOWN = 24


def write_page(result: Result, out: str | Path) -> Path:
    """Writes `<out>.html` from a result and the shards it was made on; returns its path.

    Where the model is a run, the curve of its training is on the page too.
    """
    rows = [asdict(prediction) for prediction in result.predictions]
    images = {sample.key: sample.image for sample in read_samples(result.data)}
    gallery = vqa_gallery if result.task == "vqa" else caption_gallery
    settings = ", ".join(f"{name} {value}" for name, value in result.config.items() if value not in ("", None))
    sections: list[Section] = [
        Text(f"{result.model} on {result.data}, {len(rows):,} predictions.\n\n{settings}."),
        Table("Figures", ["", "figure"], [[name, float(value)] for name, value in result.metrics.items()]),
    ]
    metrics = Path(result.model) / "metrics.jsonl"
    if metrics.is_file():
        sections.append(loss_curve(metrics))
    note = " (the model saw them blanked)" if result.config.get("blind") else ""
    sections.append(gallery(rows, images.get, f"Pictures{note}", SHOWN))
    return write_report(Path(out).with_suffix(".html"), f"METALM {result.task}", sections)
