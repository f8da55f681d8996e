"""Texts, or pairs of texts, with labels: tab-separated with a header line (GLUE's files), or JSON Lines, each or .gz.

A sample's text is the first text; its question is the second one, empty without one, and the label is the answer.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path

from metalm.data.importers.annotations import read_jsonl, read_lines
from metalm.data.sample import Question, Sample
from metalm.errors import DataError


def labelled(path: str | Path, text: str, label: str, second: str = "", names: str = "") -> Iterator[Sample]:
    """A sample for each row.

    Args:
        path: a .tsv or .jsonl file, or .gz of one.
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
    for number, (line, row) in enumerate(_rows(Path(path))):
        for column in filter(None, (text, label, second)):
            if column not in row:
                near = difflib.get_close_matches(column, row, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise DataError(f"{path}, line {line}: no column {column!r} (columns: {', '.join(row)}){hint}")
        answer = str(row[label]).strip()
        question = Question("0", str(row[second]).strip() if second else "", [called.get(answer, answer)])
        yield Sample(f"text-{number:08d}", text=str(row[text]).strip(), questions=[question])
    if number < 0:
        raise DataError(f"{path}: no row in it")


def _rows(path: Path) -> Iterator[tuple[int, dict]]:
    if path.name.removesuffix(".gz").endswith(".jsonl"):
        yield from read_jsonl(path)
        return
    header: list[str] = []
    for number, line in read_lines(path):
        cells = line.split("\t")
        if not header:
            header = cells
        elif len(cells) != len(header):
            raise DataError(f"{path}, line {number}: {len(cells)} cells under a header of {len(header)}: {line[:60]!r}")
        else:
            yield number, dict(zip(header, cells))
