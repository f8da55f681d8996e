"""VQAv2: open-ended questions with ten human answers on COCO photos (Goyal et al., 2017).

Layout: `v2_OpenEnded_mscoco_val2014_questions.json` with `data_subtype` and `questions` (question_id, image_id,
question); `v2_mscoco_val2014_annotations.json` with `annotations` (question_id, answers[].answer, answer_type,
question_type); photos `COCO_val2014_000000000042.jpg` or, as COCO 2017 names them, `000000000042.jpg`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from metalm.data.importers.annotations import read_json
from metalm.data.importers.media import MediaSource, open_media, sample_key
from metalm.data.sample import Question, Sample
from metalm.errors import DataError


def vqav2(
    images: str | Path | MediaSource,
    questions: str | Path,
    annotations: str | Path = "",
    skip_missing: bool = False,
) -> Iterator[Sample]:
    """VQAv2's photos, each a sample with all its questions, their ten answers, and the answer type as their type.

    All ten answers are kept in their order, whatever their confidence, as the official evaluation uses them. The type
    is `answer_type` (yes/no, number, other), by which the official figures are broken down.

    Args:
        images: folder or zip of the photos.
        questions: the questions' JSON file.
        annotations: the answers' JSON file; empty for the test set, whose answers are not public.
        skip_missing: pass over photos (with their questions) that are not there.

    Raises:
        DataError: a file or photo is missing, or questions and annotations do not belong together.
    """
    answers = read_json(annotations, "annotations") if annotations else {}
    yield from vqa_samples(images, questions, annotations, answers, skip_missing, lambda annotation: annotation["answer_type"])


def vqa_samples(
    images: str | Path | MediaSource,
    questions: str | Path,
    annotations: str | Path,
    answers: dict,
    skip_missing: bool,
    question_type: Callable[[dict], str],
    answer_field: str = "answer",
) -> Iterator[Sample]:
    """Samples from the VQA family's layout; `answers` is the content of the file `annotations`, empty without one."""
    source = open_media(images, skip_missing)
    asked = read_json(questions, "questions")
    by_id = {annotation["question_id"]: annotation for annotation in answers.get("annotations", [])}
    by_image: dict[int, list[Question]] = {}
    for row in asked["questions"]:
        question = Question(str(row["question_id"]), row["question"].strip())
        if answers:
            if row["question_id"] not in by_id:
                raise DataError(f"question {row['question_id']} of {questions} is not in {annotations}: do they match?")
            annotation = by_id[row["question_id"]]
            try:
                question.answers = [answer[answer_field] for answer in annotation["answers"]]
                question.type = question_type(annotation)
            except KeyError as error:
                raise DataError(f"{annotations}, question {row['question_id']}: no field {error} in it") from error
        by_image.setdefault(row["image_id"], []).append(question)
    subtype = asked.get("data_subtype") or answers.get("data_subtype") or ""
    subtype = subtype.replace("test-dev", "test")  # whose questions are on photos of test2015
    keys: set[str] = set()
    for image_id, image_questions in by_image.items():
        names = (f"COCO_{subtype}_{image_id:012d}.jpg", f"{image_id:012d}.jpg")
        image = source.read(*names)
        if image is not None:
            yield Sample(sample_key(names[0], keys), image, questions=image_questions)
    source.report_missing()
