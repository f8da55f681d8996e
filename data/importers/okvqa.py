"""OK-VQA: questions on COCO photos that need outside knowledge (Marino et al., 2019), in VQA's layout.

`OpenEnded_mscoco_val2014_questions.json` and `mscoco_val2014_annotations.json`: five people's answers, each entered
twice, make the ten. An answer has `raw_answer`, as it was typed, and `answer`, its form standardised by stemming. The
official evaluation is VQA's on `answer`, so that is what the samples hold by default. `raw=True` takes the typed
answers, which read better as targets of training; scores on them are not comparable with published ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from metalm.data.importers.annotations import read_json
from metalm.data.importers.media import MediaSource
from metalm.data.importers.vqav2 import vqa_samples
from metalm.data.sample import Sample


def okvqa(
    images: str | Path | MediaSource,
    questions: str | Path,
    annotations: str | Path,
    raw: bool = False,
    skip_missing: bool = False,
) -> Iterator[Sample]:
    """OK-VQA's photos, each a sample with its questions, their ten answers, and the knowledge category as their type.

    Args:
        images: folder or zip of the photos.
        questions: the questions' JSON file.
        annotations: the answers' JSON file.
        raw: the answers as they were typed, in place of those that the official evaluation compares with.
        skip_missing: pass over photos (with their questions) that are not there.

    Raises:
        DataError: a file or photo is missing, or questions and annotations do not belong together.
    """
    answers = read_json(annotations, "annotations")
    categories = answers.get("question_types") or {}
    yield from vqa_samples(
        images,
        questions,
        annotations,
        answers,
        skip_missing,
        question_type=lambda annotation: categories.get(annotation["question_type"], annotation["question_type"]),
        answer_field="raw_answer" if raw else "answer",
    )
