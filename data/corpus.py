"""A corpus given by path (`data.path`): imported once into the run's own folder, its end held out for validation.

RUN/data/train    the first 1 - held_out of the documents, or of the characters where there is one document
RUN/data/val      the rest
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

from metalm.data.importers.text import text
from metalm.data.sample import Sample
from metalm.data.shards import write_shards
from metalm.errors import DataError

PIECE = 1 << 16  # characters of a sample; a longer document becomes several
SHARDS = 32  # of the training part, as far as there are samples


def split(documents: list[str], held_out: float) -> tuple[list[str], list[str]]:
    """Documents to train on, and the last ones to validate on; a single document is cut in two.

    Raises:
        DataError: there is too little text to hold anything out.
    """
    if len(documents) == 1:
        cut = math.floor(len(documents[0]) * (1 - held_out))
        parts = [documents[0][:cut]], [documents[0][cut:]]
    else:
        cut = math.floor(len(documents) * (1 - held_out))
        parts = documents[:cut], documents[cut:]
    if not any(parts[0]) or (held_out and not any(parts[1])):
        raise DataError(f"data.path: too little text to hold out {held_out:.0%} of it: {len(documents)} documents")
    return parts


def pieces(documents: Iterable[str]) -> Iterator[Sample]:
    for number, document in enumerate(documents):
        for start in range(0, len(document), PIECE):
            yield Sample(f"text-{number:08d}-{start // PIECE:04d}", text=document[start : start + PIECE])


def write_corpus(path: str, per: str, held_out: float, out: Path) -> None:
    """Imports the text at `path` (see `metalm data import text`) into `out/train` and `out/val`.

    Raises:
        DataError: there is no such file, no text in it, or too little.
    """
    documents = [sample.text for sample in text(path, per=per)]
    for name, part in zip(("train", "val"), split(documents, held_out)):
        samples = [sample for sample in pieces(part) if sample.text.strip()]
        if samples:
            write_shards(samples, out / name, math.ceil(len(samples) / SHARDS), source=path)
