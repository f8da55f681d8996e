"""DAQUAR: questions on indoor photos (Malinowski and Fritz, 2014).

Layout: `qa.37.raw.train.txt`, `qa.894.raw.test.txt`, … alternate a question with its answer; the question ends by
naming its picture; `image3.png` (or .jpg) lies in the images' folder.

    what is on the desk in the image3 ?
    book, scissor, papers

The reference to the picture goes ("what is on the desk ?"), as is usual. An answer that lists things stays one string,
as the authors' evaluation takes it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from metalm.data.importers.annotations import read_lines
from metalm.data.importers.media import MediaSource, open_media, sample_key
from metalm.data.sample import Question, Sample
from metalm.errors import DataError

REFERENCE = re.compile(r"\s*\b(?:(?:in|on|of|at|from) )?(?:(?:the|this) )?image ?(\d+)\b", re.IGNORECASE)


def daquar(images: str | Path | MediaSource, annotations: str | Path, skip_missing: bool = False) -> Iterator[Sample]:
    """DAQUAR's photos, each a sample with all its questions, which are numbered by their place in the file.

    Args:
        images: folder or zip of the photos.
        annotations: the text file of questions and answers.
        skip_missing: pass over photos (with their questions) that are not there.

    Raises:
        DataError: a question names no picture or has no answer, or a photo is missing.
    """
    source = open_media(images, skip_missing)
    lines = [(number, line.strip()) for number, line in read_lines(annotations) if line.strip()]
    if len(lines) % 2:
        raise DataError(f"{annotations}, line {lines[-1][0]}: the last question has no answer line")
    by_image: dict[str, list[Question]] = {}
    for pair, ((number, asked), (_, answer)) in enumerate(zip(lines[::2], lines[1::2]), 1):
        image, question = split_reference(asked)
        if not image:
            raise DataError(f"{annotations}, line {number}: this question names no picture (image3): {asked[:80]!r}")
        by_image.setdefault(image, []).append(Question(str(pair), question, [answer]))
    keys: set[str] = set()
    for name, questions in by_image.items():
        image = source.read(f"{name}.png", f"{name}.jpg")
        if image is not None:
            yield Sample(sample_key(name, keys), image, questions=questions)
    source.report_missing()


def split_reference(question: str) -> tuple[str, str]:
    """The picture that a question names, and the question without it.

    >>> split_reference("what is on the desk in the image3 ?")
    ('image3', 'what is on the desk ?')
    """
    found = REFERENCE.findall(question)
    image = f"image{found[-1]}" if found else ""
    return image, REFERENCE.sub("", question).strip()
