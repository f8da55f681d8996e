"""Texts and what they become, for sequence to sequence: a table or JSON Lines, E2E NLG's CSV for example.

    mr,ref
    "name[Alimentum], area[riverside]",Alimentum is by the river.
    "name[Alimentum], area[riverside]","By the river, there is Alimentum."

A sample's text is the source, its captions are the targets, of all rows with that source.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from metalm.data.importers.annotations import read_table
from metalm.data.sample import Sample
from metalm.errors import DataError


def pairs(path: str | Path, source: str = "source", target: str = "target") -> Iterator[Sample]:
    """A sample for each source, in the order in which they come first.

    Args:
        path: a .csv, .tsv or .jsonl file, or .gz of one.
        source, target: columns of a text and of what it becomes: mr and ref for E2E NLG.

    Raises:
        DataError: a column is nowhere, a row has another number of cells than the header or an empty one, or there is none.
    """
    samples: dict[str, Sample] = {}
    for line, row in read_table(path, (source, target)):
        text, becomes = (str(row[column]).strip() for column in (source, target))
        if not text or not becomes:
            raise DataError(f"{path}, line {line}: nothing in column {target if text else source!r}")
        sample = samples.setdefault(text, Sample(f"text-{len(samples):08d}", text=text))
        sample.captions.append(becomes)
    if not samples:
        raise DataError(f"{path}: no row in it")
    yield from samples.values()
