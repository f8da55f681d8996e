"""A sample: one record of a shard, with media still encoded as they were stored.

In a shard (a tar file) the members that share a name up to the first dot make one sample:

    000042.jpg | .png   the picture, never re-encoded
    000042.json         {"captions": ["a dog runs", …]} and/or {"text": "…"} and/or
                        {"questions": [{"id": "7", "question": "what runs?", "answers": ["dog"], "type": "what"}]}
                        and/or {"text": "New York", "tags": ["B-place", "I-place"]}
    000042.txt          plain text, in place of the JSON's "text"

A question's answers are either a list (one answer, or the ten of VQAv2) or `soft_answers`, {answer: score in [0, 1]}.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

from metalm.errors import DataError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")


@dataclass
class Question:
    """A question on a sample; `answers` are human answers, `soft_answers` maps an answer to its score in [0, 1]."""

    id: str
    question: str
    answers: list[str] = field(default_factory=list)
    soft_answers: dict[str, float] = field(default_factory=dict)
    type: str = ""

    @property
    def best_answer(self) -> str:
        """The most frequent (or highest-scored) answer: the one to train on."""
        if self.soft_answers:
            return max(self.soft_answers, key=self.soft_answers.get)
        return max(self.answers, key=self.answers.count)


@dataclass
class Sample:
    """One record: an encoded image (or none), captions, a text, questions; `key` names it in errors and results.

    `tags` are those of the text's words, as white space parts them.
    """

    key: str
    image: bytes | None = None
    captions: list[str] = field(default_factory=list)
    text: str = ""
    questions: list[Question] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)


def sample_to_members(sample: Sample) -> dict:
    """The tar members of a sample, keyed by extension, as webdataset's writer takes them.

    Raises:
        DataError: the key cannot name a member, or there is neither an image nor text.
    """
    if not sample.key or "." in sample.key or "/" in sample.key:
        raise DataError(f"sample key {sample.key!r}: a key must be non-empty, without dots and slashes")
    _require_content(sample)
    members: dict = {"__key__": sample.key}
    if sample.image is not None:
        members[_image_extension(sample.image)] = sample.image
    record = {name: value for name, value in asdict(sample).items() if name not in ("key", "image") and value}
    if sample.questions:
        record["questions"] = [{k: v for k, v in asdict(q).items() if v or k == "question"} for q in sample.questions]
    members["json"] = json.dumps(record, ensure_ascii=False).encode()
    return members


def sample_from_members(members: dict) -> Sample:
    """The sample that a tar's members make.

    Raises:
        DataError: the JSON does not parse, a field has the wrong type, or there is neither image nor text.
    """
    key = members["__key__"]
    extensions = {name.lower(): value for name, value in members.items() if not name.startswith("__")}
    image = next((extensions[ext] for ext in IMAGE_EXTENSIONS if ext in extensions), None)
    try:
        record = json.loads(extensions["json"]) if "json" in extensions else {}
        if "txt" in extensions:
            # An image's .txt is its caption, the convention of most public image-text shards.
            text = extensions["txt"].decode("utf-8")
            record.update({"captions": [text]} if image is not None else {"text": text})
        captions = record.get("captions", record.get("caption", []))
        sample = Sample(
            key=key,
            image=image,
            captions=_strings(captions),
            text=_string(record.get("text", "")),
            questions=[_question(**q) for q in record.get("questions", [])],
            tags=_strings(record.get("tags", [])),
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"sample {key!r}: unreadable annotation ({type(error).__name__}: {error})") from error
    _require_content(sample)
    return sample


def _require_content(sample: Sample) -> None:
    if sample.image is None and not (sample.text or sample.captions or sample.questions):
        raise DataError(f"sample {sample.key!r}: neither an image nor text")


def _image_extension(image: bytes) -> str:
    if image[:4] == b"\x89PNG":
        return "png"
    return "webp" if image[:4] == b"RIFF" and image[8:12] == b"WEBP" else "jpg"


def _question(id, question, answers=(), soft_answers=None, type="") -> Question:
    scores = {_string(answer): float(score) for answer, score in (soft_answers or {}).items()}
    return Question(str(id), _string(question), _strings(answers), scores, _string(type))


def _string(value) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a string was expected, found {value!r:.60}")
    return value


def _strings(value) -> list[str]:
    return [value] if isinstance(value, str) else [_string(item) for item in value]
