"""A sample: one record of a shard, with media still encoded as they were stored.

In a shard (a tar file) the members that share a name up to the first dot make one sample:

    000042.jpg | .png   the picture, never re-encoded; .1.jpg, .2.jpg, … are more of them
    000042.wav | .flac | .ogg | .mp3   the sound
    000042.mp4 | .webm | .mkv | .avi | .mov   the film
    000042.image.safetensors | .audio. | .video.   what a frozen encoder makes of these (`metalm.data.states`)
    000042.json         {"captions": ["a dog runs", …]} and/or {"text": "…"} and/or
                        {"questions": [{"id": "7", "question": "what runs?", "answers": ["dog"], "type": "what"}]}
                        and/or {"text": "New York", "tags": ["B-place", "I-place"]}
    000042.txt          plain text, in place of the JSON's "text"

A question's answers are either a list (one answer, or the ten of VQAv2) or `soft_answers`, {answer: score in [0, 1]}.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from metalm.data.states import SUFFIX, States, pack_states, unpack_states
from metalm.errors import DataError, about

EXTENSIONS = {
    "image": ("jpg", "jpeg", "png", "webp"),
    "audio": ("wav", "flac", "ogg", "mp3"),
    "video": ("mp4", "webm", "mkv", "avi", "mov"),
}
Media = Sequence[tuple[str, bytes | States]]  # each with its kind, image, audio or video; states stand for the medium


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
    """One record: encoded media (or none), captions, a text, questions; `key` names it in errors and results.

    `tags` are those of the text's words, as white space parts them; `states`, by kind, those of a frozen encoder for each of
    the media, which may themselves be left out then.
    """

    key: str
    image: bytes | None = None
    captions: list[str] = field(default_factory=list)
    text: str = ""
    questions: list[Question] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    more_images: list[bytes] = field(default_factory=list)
    audio: bytes | None = None
    video: bytes | None = None
    states: dict[str, list[States]] = field(default_factory=dict)

    @property
    def encoded(self) -> dict[str, list[bytes]]:
        """The encoded media themselves, by kind."""
        media = {"image": [self.image, *self.more_images], "audio": [self.audio], "video": [self.video]}
        return {kind: [data for data in found if data is not None] for kind, found in media.items()}

    @property
    def media(self) -> Media:
        """What the sample shows and lets hear, images first; states where it brings them."""
        return [(kind, data) for kind, found in self.encoded.items() for data in self.states.get(kind, found)]


def sample_to_members(sample: Sample) -> dict:
    """The tar members of a sample, keyed by extension, as webdataset's writer takes them.

    Raises:
        DataError: the key cannot name a member, a medium's format is unknown, or there is neither a medium nor text.
    """
    if not sample.key or "." in sample.key or "/" in sample.key:
        raise DataError(f"sample key {sample.key!r}: a key must be non-empty, without dots and slashes")
    _require_content(sample)
    members: dict = {"__key__": sample.key}
    for number, image in enumerate([sample.image, *sample.more_images] if sample.image is not None else []):
        members[f"{number}." * bool(number) + extension_of(image)] = image
    for kind, data in (("audio", sample.audio), ("video", sample.video)):
        if data is not None:
            if extension_of(data) not in EXTENSIONS[kind]:
                raise DataError(f"sample {sample.key!r}: its {kind} is of no known format ({', '.join(EXTENSIONS[kind])})")
            members[extension_of(data)] = data
    for kind, states in sample.states.items():
        members[kind + SUFFIX] = pack_states([one.tensor() for one in states], states[0].encoder)
    media = ("image", "more_images", "audio", "video", "states")
    record = {name: value for name, value in vars(sample).items() if name not in ("key", *media) and value}
    if sample.questions:
        record["questions"] = [{k: v for k, v in asdict(q).items() if v or k == "question"} for q in sample.questions]
    members["json"] = json.dumps(record, ensure_ascii=False).encode()
    return members


def sample_from_members(members: dict) -> Sample:
    """The sample that a tar's members make.

    Raises:
        DataError: the JSON does not parse, a field has the wrong type, or there is neither a medium nor text.
    """
    key = members["__key__"]
    extensions = {name.lower(): value for name, value in members.items() if not name.startswith("__")}
    media = {kind: next((extensions[e] for e in names if e in extensions), None) for kind, names in EXTENSIONS.items()}
    with about(f"sample {key!r}"):
        states = {kind: unpack_states(extensions[kind + SUFFIX]) for kind in EXTENSIONS if kind + SUFFIX in extensions}
    has_media = bool(states) or any(data is not None for data in media.values())
    try:
        record = json.loads(extensions["json"]) if "json" in extensions else {}
        if "txt" in extensions:
            # A picture's .txt is its caption, the convention of most public image-text shards.
            text = extensions["txt"].decode("utf-8")
            record.update({"captions": [text]} if has_media else {"text": text})
        captions = record.get("captions", record.get("caption", []))
        sample = Sample(
            key=key,
            **media,
            more_images=_more_images(extensions),
            captions=_strings(captions),
            text=_string(record.get("text", "")),
            questions=[_question(**q) for q in record.get("questions", [])],
            tags=_strings(record.get("tags", [])),
            states=states,
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"sample {key!r}: unreadable annotation ({type(error).__name__}: {error})") from error
    _require_content(sample)
    for kind, found in sample.states.items():
        if len(found) != len(sample.encoded[kind] or found):
            raise DataError(
                f"sample {key!r}: stored states of {len(found)} media ({kind}), and {len(sample.encoded[kind])} are there"
            )
    return sample


def _require_content(sample: Sample) -> None:
    if not (sample.media or sample.text or sample.captions or sample.questions):
        raise DataError(f"sample {sample.key!r}: neither a picture, a sound or a film nor text")


def _more_images(members: dict[str, bytes]) -> list[bytes]:
    """Members such as `1.jpg`, by their numbers."""
    numbered = {}
    for name, data in members.items():
        number, _, extension = name.partition(".")
        if number.isdecimal() and extension in EXTENSIONS["image"]:
            numbered[int(number)] = data
    return [numbered[number] for number in sorted(numbered)]


def extension_of(data: bytes) -> str:
    """The file extension of a medium, by its first bytes; `jpg` where they say nothing."""
    if data[:4] == b"RIFF":
        return {b"WEBP": "webp", b"WAVE": "wav", b"AVI ": "avi"}.get(data[8:12], "jpg")
    if data[4:8] == b"ftyp":
        return "mov" if data[8:10] == b"qt" else "mp4"
    if data[:4] == b"\x1aE\xdf\xa3":
        return "webm" if b"webm" in data[:64] else "mkv"
    if data[:3] == b"ID3" or (len(data) > 1 and data[0] == 0xFF and data[1] >= 0xE0):  # a JPEG's second byte is D8
        return "mp3"
    return {b"\x89PNG": "png", b"fLaC": "flac", b"OggS": "ogg"}.get(data[:4], "jpg")


def _question(id, question, answers=(), soft_answers=None, type="") -> Question:
    scores = {_string(answer): float(score) for answer, score in (soft_answers or {}).items()}
    return Question(str(id), _string(question), _strings(answers), scores, _string(type))


def _string(value) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a string was expected, found {value!r:.60}")
    return value


def _strings(value) -> list[str]:
    return [value] if isinstance(value, str) else [_string(item) for item in value]
