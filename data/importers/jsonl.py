"""One's own data: JSON Lines whose columns are found by name.

    {"image": "a.jpg", "split": "train", "captions": ["a dog runs", "a brown dog"]}
    {"image": "a.jpg", "split": "train", "question_id": 7, "question": "what runs?", "answer": "dog"}
    {"text": "a page without an image"}

A caption or answer is a string or a list of strings; `soft_answers` maps an answer to its score in [0, 1]. Rows that
name the same image, wherever they stand in the file, make one sample; a row without an image is one by itself. The
annotations are held in memory, the images are not.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from metalm.data.importers.annotations import read_jsonl
from metalm.data.importers.media import MediaSource, open_media, sample_key
from metalm.data.sample import Question, Sample
from metalm.errors import DataError

Names = str | tuple[str, ...] | list[str]
DEFAULT_COLUMNS: dict[str, Names] = {
    "image": "image",
    "caption": ("caption", "captions"),
    "question": "question",
    "answer": ("answer", "answers"),
    "soft_answers": "soft_answers",
    "question_id": "question_id",
    "type": ("type", "question_type"),
    "text": "text",
    "split": "split",
}


def jsonl(
    annotations: str | Path,
    images: str | Path | MediaSource = "",
    split: str = "",
    image_column: Names = DEFAULT_COLUMNS["image"],
    caption_column: Names = DEFAULT_COLUMNS["caption"],
    question_column: Names = DEFAULT_COLUMNS["question"],
    answer_column: Names = DEFAULT_COLUMNS["answer"],
    soft_answers_column: Names = DEFAULT_COLUMNS["soft_answers"],
    question_id_column: Names = DEFAULT_COLUMNS["question_id"],
    type_column: Names = DEFAULT_COLUMNS["type"],
    text_column: Names = DEFAULT_COLUMNS["text"],
    split_column: Names = DEFAULT_COLUMNS["split"],
    skip_missing: bool = False,
) -> Iterator[Sample]:
    """The samples of a JSON Lines file (or .gz). A column option is a name, or several of which the first there counts.

    Args:
        annotations: the JSON Lines file.
        images: folder or zip of the images; empty for the folder of the annotations.
        split: keep only rows whose split column says this; empty for all.
        question_id_column: the question's id; a question without one takes its line number.
        skip_missing: pass over images that are not there.

    Raises:
        DataError: a line is no JSON, has nothing to learn from or a value of the wrong type (file and line are named);
            a column that was asked for is nowhere in the file; no row is of the split; an image is missing.
    """
    chosen = {
        "image": image_column,
        "caption": caption_column,
        "question": question_column,
        "answer": answer_column,
        "soft_answers": soft_answers_column,
        "question_id": question_id_column,
        "type": type_column,
        "text": text_column,
        "split": split_column,
    }
    path = Path(annotations)
    source = open_media(images or path.parent, skip_missing)
    keys: set[str] = set()
    texts = 0
    for image_name, sample in _merge_rows(path, split, chosen).items():
        if isinstance(image_name, str):
            sample.image = source.read(image_name)
            if sample.image is None:
                continue
            sample.key = sample_key(image_name, keys)
        else:
            texts += 1
            sample.key = sample_key(f"text-{texts:08d}", keys)
        yield sample
    source.report_missing()


def _merge_rows(path: Path, split: str, columns: dict[str, Names]) -> dict[str | int, Sample]:
    """Samples, still without image and key, by image name or, for rows without an image, by line number."""
    names = {what: (column,) if isinstance(column, str) else tuple(column) for what, column in columns.items()}
    samples: dict[str | int, Sample] = {}
    columns_there: dict[str, None] = {}
    splits_there: dict[str, None] = {}
    for number, row in read_jsonl(path):
        columns_there.update(dict.fromkeys(row))
        values = {what: next((row[name] for name in names[what] if name in row), None) for what in names}
        splits_there[str(values["split"])] = None
        if split and str(values["split"]) != split:
            continue
        try:
            image = _string(values["image"], "image")
            _add_row(samples.setdefault(image or number, Sample("")), values, str(number))
        except DataError as error:
            raise DataError(f"{path}, line {number}: {error} (columns: {', '.join(row)})") from error
    for what in names:
        # A column that was asked for must be somewhere; the customary ones need not.
        if columns[what] != DEFAULT_COLUMNS[what] and not columns_there.keys() & set(names[what]):
            near = difflib.get_close_matches(names[what][0], columns_there, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            there = ", ".join(columns_there)
            raise DataError(f"{path}: no row has the {what} column {names[what][0]!r} (columns: {there}){hint}")
    if not samples:
        found = ", ".join(splits_there)
        raise DataError(f"{path}: no row of split {split!r} (found: {found})" if split else f"{path}: no row in it")
    return samples


def _add_row(sample: Sample, values: dict[str, Any], default_id: str) -> None:
    """Adds a row's captions, text and question to the sample of its image."""
    captions = _strings(values["caption"], "caption")
    text = _string(values["text"], "text")
    asked = _string(values["question"], "question")
    if not (captions or text or asked):
        raise DataError("neither a caption, nor a text, nor a question in this row; name the column that holds it")
    sample.captions += captions
    sample.text = "\n\n".join(filter(None, (sample.text, text)))
    if asked:
        soft = values["soft_answers"] or {}
        if not isinstance(soft, dict):
            raise DataError(f"soft answers must map an answer to its score, found {soft!r}")
        sample.questions.append(
            Question(
                id=_string(values["question_id"], "question id") or default_id,
                question=asked,
                answers=_strings(values["answer"], "answer"),
                soft_answers={answer: _score(score) for answer, score in soft.items()},
                type=_string(values["type"], "type"),
            )
        )


def _string(value: Any, what: str) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or isinstance(value, str | int | float):
        return "" if value is None else str(value).strip()
    raise DataError(f"the {what} must be a string, found {value!r:.60}")


def _score(value: Any) -> float:
    if isinstance(value, int | float) and 0 <= value <= 1:
        return float(value)
    raise DataError(f"the score of an answer must be between 0 and 1, found {value!r:.60}")


def _strings(value: Any, what: str) -> list[str]:
    strings = [_string(item, what) for item in (value if isinstance(value, list) else [value])]
    return [string for string in strings if string]
