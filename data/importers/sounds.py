"""Sounds with what is said or heard in them: JSON Lines that name files, their texts, and whatever else to choose rows by.

    {"audio": "7_theo_3.wav", "text": "seven", "speaker": "theo"}
    {"audio": "1-100032-A.ogg", "label": "Dog bark", "fold": 1}

With `join`, sounds are put one after another, and their texts too: "seven two nine".
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import torch

from metalm.data.audio import decode_audio, encode_wav
from metalm.data.importers.annotations import read_jsonl
from metalm.data.importers.media import MediaSource, sample_key
from metalm.data.sample import Sample
from metalm.errors import DataError

TEXT_COLUMNS = ("text", "transcript", "caption", "label")


def sounds(
    annotations: str | Path,
    audio: str | Path = "",
    audio_column: str = "audio",
    text_column: str = "",
    where: str = "",
    join: str = "",
    same: str = "",
    count: int | str = 1000,
    gap: float | str = 0.1,
    sample_rate: int | str = 16000,
    seed: int | str = 0,
    skip_missing: bool = False,
) -> Iterator[Sample]:
    """The samples of a JSON Lines file (or .gz): a sound, and its text as the caption.

    They come in random order, drawn with `seed`: such lists tend to be sorted by what is heard, and a model that meets one word
    after another learns which word is on, not what it sounds like.

    Args:
        annotations: the JSON Lines file.
        audio: folder or zip of the sounds; empty for the folder of the annotations.
        text_column: empty takes the first there of text, transcript, caption and label.
        where: keep only rows of which this holds, `fold=1` or `fold!=1`; several with commas between them.
        join: `2-5` makes `count` samples of two to five sounds each, drawn with `seed`, `gap` seconds apart, at `sample_rate`.
        same: of a joined sample all sounds have the same value in this column, such as the speaker.
        skip_missing: pass over sounds that are not there.

    Raises:
        DataError: a row lacks the sound or the text, a condition cannot be read or no row meets it, or a sound is missing.
    """
    path = Path(annotations)
    source = MediaSource(audio or path.parent, skip_missing, "sound")
    rows = read_rows(path, audio_column, text_column, where)
    keys: set[str] = set()
    if join:
        low, high = read_range(join)
        yield from joined(rows, source, same, low, high, int(count), float(gap), int(sample_rate), int(seed))
    else:
        random.Random(int(seed)).shuffle(rows)
        for name, text, _ in rows:
            data = source.read(name)
            if data is not None:
                yield Sample(sample_key(name, keys), captions=[text], audio=data)
    source.report_missing()


def read_rows(path: Path, audio_column: str, text_column: str, where: str) -> list[tuple[str, str, dict]]:
    """File name, text, and the whole row of each that is wanted."""
    conditions = [read_condition(condition) for condition in where.split(",") if condition.strip()]
    columns = (text_column,) if text_column else TEXT_COLUMNS
    rows, found = [], 0
    for number, row in read_jsonl(path):
        found += 1
        for column, _, _ in conditions:
            if column not in row:
                raise DataError(f"{path}, line {number}: no column {column!r} to choose by (columns: {', '.join(row)})")
        if not all((str(row[column]) == value) == wanted for column, wanted, value in conditions):
            continue
        text = next((row[column] for column in columns if isinstance(row.get(column), str)), "")
        if not isinstance(row.get(audio_column), str) or not text.strip():
            raise DataError(
                f"{path}, line {number}: it needs a sound in the column {audio_column!r} and a text in {' or '.join(columns)} "
                f"(columns: {', '.join(row)})"
            )
        rows.append((row[audio_column], text, row))
    if not rows:
        raise DataError(f"{path}: none of its {found:,} rows meets {where!r}" if found else f"{path}: no row in it")
    return rows


def read_condition(condition: str) -> tuple[str, bool, str]:
    """`column=value` or `column!=value`: the column, whether it shall be so, and the value."""
    column, equals, value = condition.partition("=")
    if not equals or not column.strip("! "):
        raise DataError(f"the condition {condition!r} is not written column=value or column!=value")
    return column.rstrip("!").strip(), not column.endswith("!"), value.strip()


def read_range(text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    if not (low.isdecimal() and (high or low).isdecimal()) or not 1 <= int(low) <= int(high or low):
        raise DataError(f"join {text!r} is no range such as 2-5")
    return int(low), int(high or low)


def joined(
    rows: list[tuple[str, str, dict]],
    source: MediaSource,
    same: str,
    low: int,
    high: int,
    count: int,
    gap: float,
    sample_rate: int,
    seed: int,
) -> Iterator[Sample]:
    """`count` samples of `low` to `high` sounds, one after another."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for name, text, row in rows:
        if same and same not in row:
            raise DataError(f"the sounds shall be of the same {same!r}, but {name!r} has no such column")
        groups.setdefault(str(row.get(same, "")), []).append((name, text))
    rng = random.Random(seed)
    silence = torch.zeros(round(gap * sample_rate))
    for number in range(count):
        group = groups[rng.choice(sorted(groups))]
        chosen = [rng.choice(group) for _ in range(rng.randint(low, high))]
        waves, texts = [], []
        for name, text in chosen:
            data = source.read(name)
            if data is not None:
                waves += [silence, decode(data, sample_rate, name)]
                texts.append(text)
        if texts:
            yield Sample(
                f"joined-{number:06d}", captions=[" ".join(texts)], audio=encode_wav(torch.cat(waves[1:]), sample_rate)
            )


def decode(data: bytes, sample_rate: int, name: str) -> torch.Tensor:
    """`decode_audio`, whose error names the file."""
    try:
        return decode_audio(data, sample_rate)
    except DataError as error:
        raise DataError(f"sound {name!r}: {error}") from error
