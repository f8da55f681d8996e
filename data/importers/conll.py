"""Words with tags, a word a line and a blank line after each text: CoNLL's format and its many relatives (or .gz)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from metalm.data.importers.annotations import read_lines
from metalm.data.sample import Sample
from metalm.errors import DataError


def conll(path: str | Path, word: str = "0", tag: str = "-1") -> Iterator[Sample]:
    """A sample for each text, with a tag for every word.

    Args:
        word, tag: columns of the word and of its tag, from 0 on; -1 is the last. Columns are parted by tabs or spaces.

    Raises:
        DataError: a line has too few columns, or there is no text.
    """
    path = Path(path)
    try:
        columns = int(word), int(tag)
    except ValueError as error:
        raise DataError(f"importer conll: columns are numbers, not --word {word} --tag {tag}") from error
    words: list[str] = []
    tags: list[str] = []
    count = 0
    for number, line in [*read_lines(path), (0, "")]:
        cells = line.split()
        if cells and cells[0] == "-DOCSTART-":
            continue
        if cells:
            if len(cells) < 2 or not all(-len(cells) <= column < len(cells) for column in columns):
                raise DataError(f"{path}, line {number}: no word and tag in columns {word} and {tag}: {line[:60]!r}")
            words.append(cells[columns[0]])
            tags.append(cells[columns[1]])
        elif words:
            yield Sample(f"text-{count:08d}", text=" ".join(words), tags=tags)
            words, tags, count = [], [], count + 1
    if not count:
        raise DataError(f"{path}: no text in it")
