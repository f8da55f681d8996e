"""Flickr8k: 8,000 photos with five captions each (Hodosh, Young and Hockenmaier, 2013).

Two layouts are in circulation. The authors': `Flickr8k.token.txt` with lines `image.jpg#0<TAB>caption`, and split lists
`Flickr_8k.trainImages.txt`, `….devImages.txt`, `….testImages.txt` with an image name a line. Kaggle's: `captions.txt`,
a CSV with the columns image and caption and no splits (the authors' lists may lie beside it).
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from metalm.data.importers.annotations import read_lines
from metalm.data.importers.media import MediaSource, open_media, sample_key
from metalm.data.sample import Sample
from metalm.errors import DataError

SPLITS = {"train": "train", "dev": "dev", "val": "dev", "test": "test"}


def flickr8k(
    images: str | Path | MediaSource, annotations: str | Path, split: str = "", skip_missing: bool = False
) -> Iterator[Sample]:
    """Flickr8k's photos, each a sample with its captions.

    Args:
        images: folder or zip of the photos.
        annotations: the folder with the text files, or one caption file itself.
        split: train, dev (or val), test; empty for all photos.
        skip_missing: pass over photos that are not there.

    Raises:
        DataError: a file or photo is missing, a line is malformed, or the split has no list.
    """
    source = open_media(images, skip_missing)
    path = Path(annotations)
    folder = path if path.is_dir() else path.parent
    captions = read_captions(_caption_file(path))
    names = _split_names(folder, split) if split else list(captions)
    keys: set[str] = set()
    for name in names:
        if name not in captions:
            raise DataError(f"{folder}: {name!r} of split {split!r} has no caption")
        image = source.read(name)
        if image is not None:
            yield Sample(sample_key(name, keys), image, captions[name])
    source.report_missing()


def read_captions(path: Path) -> dict[str, list[str]]:
    """The captions by image name, in the order of the file, of either layout."""
    captions: dict[str, list[str]] = {}
    lines = read_lines(path)
    if path.name.endswith(".token.txt"):
        for number, line in lines:
            name, tab, caption = line.partition("\t")
            if not line.strip():
                continue
            if not tab or "#" not in name:
                raise DataError(f"{path}, line {number}: expected image.jpg#0<TAB>caption, found {line[:60]!r}")
            name = name.rpartition("#")[0]
            # The published file captions one image, 2258277193_586949ec62.jpg.1, that the archive does not have.
            if not name.endswith(".jpg.1"):
                captions.setdefault(name, []).append(caption.strip())
        return captions
    rows = csv.DictReader(line for _, line in lines)
    if not {"image", "caption"} <= set(rows.fieldnames or []):
        raise DataError(f"{path}, line 1: expected the CSV header image,caption, found {rows.fieldnames}")
    for row in rows:
        if not row["image"] or row["caption"] is None:
            raise DataError(f"{path}, line {rows.line_num}: expected image,caption, found {list(row.values())}")
        captions.setdefault(row["image"].strip(), []).append(row["caption"].strip())
    return captions


def _caption_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in ("Flickr8k.token.txt", "captions.txt"):
        if (path / name).is_file():
            return path / name
    raise DataError(f"{path}: neither Flickr8k.token.txt nor captions.txt is there")


def _split_names(folder: Path, split: str) -> list[str]:
    if split not in SPLITS:
        raise DataError(f"split {split!r}: flickr8k has {', '.join(SPLITS)}")
    path = folder / f"Flickr_8k.{SPLITS[split]}Images.txt"
    if not path.is_file():
        raise DataError(f"split {split!r}: {path} is missing; put it beside the captions, or import without a split")
    return [line.strip() for _, line in read_lines(path) if line.strip()]
