"""Plain text: each document a sample.

In a text file a blank line ends a document. WikiText is the exception: there a blank line stands around every heading,
so once a paragraph is a title of the first level (` = Robert Boulter = `), the document runs from title to title and
keeps its inner headings and blank lines. `per` says otherwise: a whole file or each line is one. In a .jsonl file each row
is, and program text (.py) is one document, blank lines and all. Any of these may be .gz; a folder is searched for .txt, .md,
.py and .jsonl files, in the order of their paths.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from metalm.data.importers.annotations import read_jsonl, read_lines
from metalm.data.sample import Sample
from metalm.errors import DataError

TITLE = re.compile(r"\s*= [^=].* =\s*")
FOLDER_FILES = re.compile(r".*\.(txt|md|py|jsonl)(\.gz)?")


def text(path: str | Path, text_column: str = "text", per: str = "document") -> Iterator[Sample]:
    """The documents of a file or folder, each a sample without an image.

    Args:
        path: a text file, a .jsonl file, either as .gz, or a folder of these.
        text_column: the field of a .jsonl row that holds the text.
        per: what of a text file is one sample: document, line, or file (blank lines and all).

    Raises:
        DataError: `per` is none of these, there is no such file or folder, no document in it, or a row without the field.
    """
    if per not in ("document", "line", "file"):
        raise DataError(f"importer text: --per {per!r}: one of document, line, file")
    number = 0
    for file in _files(Path(path)):
        stem = re.sub(r"[^\w-]+", "_", file.name.removesuffix(".gz").rpartition(".")[0] or file.name)
        for document in _documents(file, text_column, per):
            number += 1
            yield Sample(f"{stem}-{number:08d}", text=document)
    if not number:
        raise DataError(f"{path}: no text in it")


def split_documents(lines: Iterator[str]) -> Iterator[str]:
    """Documents by blank lines, or from title to title in WikiText (see the module's docstring)."""
    document: list[str] = []
    article = False
    for paragraph in _paragraphs(lines):
        title = TITLE.fullmatch(paragraph) is not None
        if document and (title or not article):
            yield "\n\n".join(document)
            document = []
        article = article or title
        document.append(paragraph)
    if document:
        yield "\n\n".join(document)


def _paragraphs(lines: Iterator[str]) -> Iterator[str]:
    paragraph: list[str] = []
    for line in lines:
        if line.strip():
            paragraph.append(line.rstrip())
        elif paragraph:
            yield "\n".join(paragraph)
            paragraph = []
    if paragraph:
        yield "\n".join(paragraph)


def _documents(file: Path, text_column: str, per: str) -> Iterator[str]:
    if file.name.removesuffix(".gz").endswith(".jsonl"):
        for number, row in read_jsonl(file):
            if not isinstance(row.get(text_column), str):
                raise DataError(f"{file}, line {number}: no text in column {text_column!r}; columns: {', '.join(row)}")
            if row[text_column].strip():
                yield row[text_column].strip()
    elif per == "line":
        yield from (line.strip() for _, line in read_lines(file) if line.strip())
    elif per == "file" or file.name.removesuffix(".gz").endswith(".py"):
        document = "\n".join(line for _, line in read_lines(file)).strip()
        if document:
            yield document
    else:
        yield from split_documents(line for _, line in read_lines(file))


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.rglob("*") if file.is_file() and FOLDER_FILES.fullmatch(file.name))
    if not files:
        raise DataError(f"{path}: no .txt, .md, .py or .jsonl file (or .gz of one) in this folder")
    return files
