"""Lint of a data set: reads every shard, decodes every picture, and says what training would trip over.

Found: shards that are no tar, empty, or cut short; samples whose annotation does not parse, that have no text, or whose
pictures, sound or film do not decode (a truncated JPEG; damage inside a JPEG's data that the decoder can draw over is not
noticed); keys used twice; an index.json that does not fit; too few shards for the processes that are to read them. Cost: one
decoding of everything, a shard a thread; the keys of all samples are held in memory.
"""

from __future__ import annotations

import io
import json
import os
import statistics
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from metalm.data.audio import decode_audio, num_samples
from metalm.data.sample import Sample, sample_from_members
from metalm.data.shards import INDEX, list_shards, read_members
from metalm.data.video import decode_frames
from metalm.errors import ConfigError, DataError

SMALL_SIDE = 8  # pixels
LONG_ASPECT = 20  # longer to shorter side
RATE = 8000  # at which sounds are decoded
FRAMES = 4  # of a film, up to its last
SHOWN = 20  # problems printed


@dataclass
class Finding:
    """Something wrong or odd with a sample, or with a whole shard or data set, whose `key` is empty."""

    where: str
    key: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: " + (f"sample {self.key!r}: " if self.key else "") + self.reason


@dataclass
class ShardContent:
    """What is in one shard; sizes are listed sample by sample."""

    url: str
    keys: list[str] = field(default_factory=list)
    texts: int = 0
    questions: int = 0
    image_sizes: list[tuple[int, int]] = field(default_factory=list)
    image_bytes: list[int] = field(default_factory=list)
    sound_seconds: list[float] = field(default_factory=list)
    films: int = 0
    states: int = 0  # media of which there are stored ones
    caption_words: list[int] = field(default_factory=list)
    problems: list[Finding] = field(default_factory=list)
    oddities: list[Finding] = field(default_factory=list)


@dataclass
class Spread:
    """The least, the median, and the largest of some numbers."""

    min: float
    median: float
    max: float

    @classmethod
    def of(cls, numbers: Iterable[float]) -> Spread | None:
        """The spread of these numbers, None if there are none."""
        numbers = list(numbers)
        return cls(min(numbers), statistics.median(numbers), max(numbers)) if numbers else None

    def __str__(self) -> str:
        return f"{self.min:,.0f} / {self.median:,.0f} / {self.max:,.0f}"


@dataclass
class CheckReport:
    """What a data set holds, its problems, which training would trip over or skip, and its oddities, worth a look.

    Widths and heights are in pixels, sounds in seconds; captions are counted in words.
    """

    ranks: int
    workers: int
    shards: int
    samples: int
    images: int
    sounds: int
    films: int
    stored_states: int
    captions: int
    texts: int
    questions: int
    image_width: Spread | None
    image_height: Spread | None
    image_bytes: Spread | None
    sound_seconds: Spread | None
    caption_words: Spread | None
    problems: list[Finding]
    oddities: list[Finding]

    @property
    def ok(self) -> bool:
        """Whether there is no problem (oddities do not count)."""
        return not self.problems

    def render(self):
        """The report as a rich renderable."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(title="shards", show_header=False)
        for name in ("shards", "samples", "images", "sounds", "films", "captions", "texts", "questions"):
            table.add_row(name, f"{getattr(self, name):,}")
        if self.stored_states:
            table.add_row("media with stored states", f"{self.stored_states:,}")
        for name in ("image_width", "image_height", "image_bytes", "sound_seconds", "caption_words"):
            if getattr(self, name):
                table.add_row(f"{name.replace('_', ' ')}, min / median / max", str(getattr(self, name)))
        lines = [Text(line, style) for line, style in self._lines()]
        return Group(table, *lines)

    def _lines(self) -> Iterable[tuple[str, str]]:
        for name, findings, style in (("oddities", self.oddities, "yellow"), ("problems", self.problems, "red")):
            if findings:
                yield f"{name} ({len(findings):,}):", f"bold {style}"
                yield from ((f"  {finding}", style) for finding in findings[:SHOWN])
            if len(findings) > SHOWN:
                yield f"  … and {len(findings) - SHOWN:,} more", style
        if self.ok:
            yield f"no problem found; enough shards for {self.ranks} ranks x {self.workers} workers", "green"


def check_shards(spec: str | list[str], ranks: int = 1, workers: int = 1) -> CheckReport:
    """Reads a whole data set and reports on it.

    Args:
        spec: a folder, a tar, a brace pattern, a URL, or a list of these, as training takes them.
        ranks: processes that are to train on it.
        workers: data-loading workers of each; every worker of every rank needs a shard of its own.

    Raises:
        DataError: there are no shards at all. Everything else that is wrong is in the report.
    """
    urls = list_shards(spec)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        contents = list(pool.map(check_shard, urls))
    samples = sum(len(content.keys) for content in contents)
    sizes = [size for content in contents for size in content.image_sizes]
    image_bytes = [size for content in contents for size in content.image_bytes]
    seconds = [length for content in contents for length in content.sound_seconds]
    words = [count for content in contents for count in content.caption_words]
    index_problems, index_oddities = _check_index([spec] if isinstance(spec, str) else spec, contents)
    return CheckReport(
        ranks=ranks,
        workers=workers,
        shards=len(urls),
        samples=samples,
        images=len(image_bytes),
        sounds=len(seconds),
        films=sum(content.films for content in contents),
        stored_states=sum(content.states for content in contents),
        captions=len(words),
        texts=sum(content.texts for content in contents),
        questions=sum(content.questions for content in contents),
        image_width=Spread.of(width for width, _ in sizes),
        image_height=Spread.of(height for _, height in sizes),
        image_bytes=Spread.of(image_bytes),
        sound_seconds=Spread.of(seconds),
        caption_words=Spread.of(words),
        problems=[finding for content in contents for finding in content.problems]
        + _duplicate_keys(contents)
        + index_problems
        + _too_few_shards(len(urls), samples, ranks, workers),
        oddities=[finding for content in contents for finding in content.oddities] + index_oddities,
    )


def check_shard(url: str) -> ShardContent:
    """Reads one shard to its end and decodes its pictures, sounds and films."""
    content = ShardContent(url)
    members = read_members(url)
    while True:
        try:
            sample_members = next(members, None)
        except DataError as error:
            content.problems.append(Finding(url, "", str(error).removeprefix(f"shard {url}: ")))
            return content
        if sample_members is None:
            return content
        key = sample_members["__key__"]
        content.keys.append(key)
        try:
            _check_sample(sample_from_members(sample_members), content)
        except DataError as error:
            content.problems.append(Finding(url, key, str(error).removeprefix(f"sample {key!r}: ")))


def _check_sample(sample: Sample, content: ShardContent) -> None:
    content.texts += bool(sample.text.strip())
    content.questions += len(sample.questions)
    content.caption_words += [len(caption.split()) for caption in sample.captions]

    def problem(reason: str) -> None:
        content.problems.append(Finding(content.url, sample.key, reason))

    def oddity(reason: str) -> None:
        content.oddities.append(Finding(content.url, sample.key, reason))

    if not any(text.strip() for text in (sample.text, *sample.captions, *(q.question for q in sample.questions))):
        problem("no text: neither a caption, nor a text, nor a question")
    elif not all(caption.strip() for caption in sample.captions):
        problem("a caption is empty")
    for question in sample.questions:
        if not question.answers and not question.soft_answers:
            oddity(f"question {question.id!r} has no answer: it can be asked, but not be trained on or scored")
    content.states += sum(map(len, sample.states.values()))
    for kind, data in [(kind, data) for kind, found in sample.encoded.items() for data in found]:
        try:
            if kind == "image":
                content.image_bytes.append(len(data))
                width, height = _decode(data)
                content.image_sizes.append((width, height))
                if min(width, height) < SMALL_SIDE:
                    oddity(f"the image is tiny ({width} x {height} pixels)")
                if max(width, height) > LONG_ASPECT * min(width, height):
                    oddity(f"the image is very long ({width} x {height} pixels)")
            elif kind == "audio":
                content.sound_seconds.append(_seconds(data))
            else:
                content.films += 1
                decode_frames(data, FRAMES)
        except DataError as error:
            problem(str(error))
        except ConfigError as error:  # PyAV is not installed
            oddity(f"the film was not opened: {error}")


def _seconds(data: bytes) -> float:
    """The length of a sound that decodes to its last sample."""
    found, announced = len(decode_audio(data, RATE)), num_samples(data, RATE)
    if found != announced:
        raise DataError(f"a sound that breaks off: {found / RATE:.1f} of {announced / RATE:.1f} seconds are there")
    return found / RATE


def _decode(data: bytes) -> tuple[int, int]:
    """Width and height of a picture that decodes to its last row."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return image.size
    except Exception as error:  # decoders raise whatever their parsing trips over
        raise DataError(f"the image does not decode ({len(data):,} bytes; {error})") from error


def _duplicate_keys(contents: list[ShardContent]) -> list[Finding]:
    shard_of: dict[str, str] = {}
    found = []
    for content in contents:
        for key in content.keys:
            if key in shard_of:
                found.append(Finding(content.url, key, f"the key is also in {shard_of[key]}; make keys unique"))
            shard_of.setdefault(key, content.url)
    return found


def _check_index(spec: list[str], contents: list[ShardContent]) -> tuple[list[Finding], list[Finding]]:
    """Where the index.json of the folders in `spec` does not fit their shards."""
    problems: list[Finding] = []
    oddities: list[Finding] = []
    counts = Counter({content.url: len(content.keys) for content in contents})
    for folder in (Path(entry) for entry in spec if os.path.isdir(entry)):
        path = folder / INDEX
        if not path.is_file():
            oddities.append(Finding(str(folder), "", f"no {INDEX}: not written by METALM, or the writing was broken off"))
            continue
        try:
            listed = {str(folder / name): int(count) for name, count in json.loads(path.read_bytes())["shards"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            problems.append(Finding(str(path), "", f"not an index of shards ({type(error).__name__}: {error})"))
            continue
        there = {url for url in counts if Path(url).parent == folder}
        for url, count in listed.items():
            if url not in there:
                problems.append(Finding(str(path), "", f"lists {Path(url).name}, which is missing; write the data again"))
            elif counts[url] != count:
                reason = f"{counts[url]:,} samples, but {INDEX} says {count:,}; write the data again"
                problems.append(Finding(url, "", reason))
        for url in sorted(there - listed.keys()):
            problems.append(Finding(str(path), "", f"does not list {Path(url).name}: is it a shard of other data?"))
    return problems, oddities


def _too_few_shards(shards: int, samples: int, ranks: int, workers: int) -> list[Finding]:
    needed = ranks * workers
    if shards >= needed:
        return []
    if samples >= needed:
        remedy = f"write them again with at most {samples // needed:,} samples a shard, or take fewer workers"
    else:
        remedy = f"there are only {samples:,} samples, so take fewer ranks or workers"
    reason = f"{shards} shards for {ranks} ranks x {workers} workers, which need {needed}: {remedy}"
    return [Finding("data set", "", reason)]
