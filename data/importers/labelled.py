"""Texts, or pairs of texts, with labels: a table (GLUE's files are tab-separated) or JSON Lines.

A sample's text is the first text; its question is the second one, empty without one, and the label is the answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from metalm.data.importers.annotations import read_table
from metalm.data.sample import Question, Sample
from metalm.errors import DataError


def labelled(path: str | Path, text: str, label: str, second: str = "", names: str = "") -> Iterator[Sample]:
    """A sample for each row.

    Args:
        path: a .tsv, .csv or .jsonl file, or .gz of one.
        text, label: columns of the text and of its label.
        second: column of the second text of a pair.
        names: what labels are to be called: 0=negative,1=positive.

    Raises:
        DataError: a column is nowhere, a row has another number of cells than the header, or `names` does not parse.
    """
    called = {}
    for pair in filter(None, names.split(",")):
        found, equals, name = pair.partition("=")
        if not equals:
            raise DataError(f"importer labelled: --names {names!r}: write it as 0=negative,1=positive")
        called[found.strip()] = name.strip()
    number = -1
    for number, (_, row) in enumerate(read_table(path, [*filter(None, (text, label, second))])):
        answer = str(row[label]).strip()
        question = Question("0", str(row[second]).strip() if second else "", [called.get(answer, answer)])
        yield Sample(f"text-{number:08d}", text=str(row[text]).strip(), questions=[question])
    if number < 0:
        raise DataError(f"{path}: no row in it")
