"""Reading annotation files: lines, tables, JSON and JSON Lines, plain or .gz, with errors that name the file and the line."""

from __future__ import annotations

import csv
import difflib
import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from metalm.errors import DataError


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file with their number from 1, without line ends; a name in .gz is decompressed.

    Raises:
        DataError: the file is missing, is no UTF-8, or its gzip data are cut short.
    """
    path = Path(path)
    number = 0
    try:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                yield number, line.rstrip("\r\n")
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such file") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, after line {number}: not UTF-8 text ({error.reason}); convert it to UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}, after line {number}: cannot be read ({error})") from error


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSON Lines file with their line number; blank lines are passed over.

    Raises:
        DataError: a line is no JSON object (named by file and line number), or the file cannot be read.
    """
    for number, line in read_lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error}): {line[:60]!r}") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: a JSON object was expected, found {line[:60]!r}")
        yield number, row


def read_table(path: str | Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a table with their line number: .csv and .tsv with a header line, or JSON Lines, each or .gz of it.

    Cells of a .csv may be quoted; those of a .tsv are as they stand (GLUE's files hold single quotation marks).

    Args:
        columns: those that every row must have.

    Raises:
        DataError: a row has another number of cells than the header, or lacks a column, or the file cannot be read.
    """
    path = Path(path)
    kind = Path(path.name.removesuffix(".gz")).suffix
    rows = read_jsonl(path) if kind == ".jsonl" else _read_cells(path, quoted=kind == ".csv")
    for number, row in rows:
        for column in columns:
            if column not in row:
                near = difflib.get_close_matches(column, row, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise DataError(f"{path}, line {number}: no column {column!r} (columns: {', '.join(row)}){hint}")
        yield number, row


def _read_cells(path: Path, quoted: bool) -> Iterator[tuple[int, dict[str, str]]]:
    lines = read_lines(path)
    if quoted:
        reader = csv.reader((line + "\n" for _, line in lines), strict=True)
        table = ((reader.line_num, cells) for cells in reader if cells)
    else:
        table = ((number, line.split("\t")) for number, line in lines)
    header: list[str] = []
    try:
        for number, cells in table:
            if not header:
                header = cells
            elif len(cells) != len(header):
                start = cells[0][:60]
                raise DataError(f"{path}, line {number}: {len(cells)} cells under a header of {len(header)}: {start!r}")
            else:
                yield number, dict(zip(header, cells))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not a table ({error})") from error


def read_json(path: str | Path, *fields: str) -> dict[str, Any]:
    """A JSON file (or .json.gz) that holds one object with the named fields.

    Raises:
        DataError: not JSON, or a field is missing (often another of the data set's files was given).
    """
    try:
        record = json.loads("\n".join(line for _, line in read_lines(path)))
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}); download it again") from error
    found = list(record) if isinstance(record, dict) else [f"a {type(record).__name__}"]
    for name in fields:
        if name not in found:
            raise DataError(f"{path}: no {name!r} in it (found: {', '.join(found)}): is it the right file?")
    return record
