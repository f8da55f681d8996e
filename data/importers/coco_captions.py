"""COCO Captions: photos with five captions each (Chen et al., 2015).

Two layouts: the official `captions_train2014.json`, `captions_val2017.json`, … with `images` (id, file_name) and
`annotations` (image_id, caption), where the file is the split; and Karpathy's `dataset_coco.json` (also of Flickr8k and
Flickr30k) with `images` that hold split (train, restval, val, test), filepath, filename and `sentences[].raw`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from metalm.data.importers.annotations import read_json
from metalm.data.importers.media import MediaSource, open_media, sample_key
from metalm.data.sample import Sample
from metalm.errors import DataError


def coco_captions(
    images: str | Path | MediaSource, annotations: str | Path, split: str = "", skip_missing: bool = False
) -> Iterator[Sample]:
    """COCO's captioned photos, each a sample with its captions.

    Args:
        images: folder or zip of the photos; with Karpathy's file the folder above `train2014` and `val2014`.
        annotations: the JSON file.
        split: only with Karpathy's file: one of its splits, or several as in `train+restval`, his training set.
        skip_missing: pass over photos that are not there.

    Raises:
        DataError: a file or photo is missing, the JSON is of another kind, or the split is not in it.
    """
    source = open_media(images, skip_missing)
    record = read_json(annotations, "images")
    karpathy = any("sentences" in image for image in record["images"])
    try:
        read = _karpathy if karpathy else _official
        captions = read(record, str(annotations), split)
    except (KeyError, TypeError) as error:
        raise DataError(f"{annotations}: an entry is malformed ({type(error).__name__}: {error})") from error
    keys: set[str] = set()
    for name, texts in captions.items():
        image = source.read(name)
        if image is not None:
            yield Sample(sample_key(name, keys), image, texts)
    source.report_missing()


def _official(record: dict, path: str, split: str) -> dict[str, list[str]]:
    if split:
        raise DataError(f"split {split!r}: {path} is one split by itself; give no split, or Karpathy's dataset_coco.json")
    names = {image["id"]: image["file_name"] for image in record["images"]}
    captions: dict[str, list[str]] = {}
    for annotation in record.get("annotations", []):
        if "caption" not in annotation:
            raise DataError(f"{path}: its annotations are no captions; take captions_*.json")
        captions.setdefault(names[annotation["image_id"]], []).append(annotation["caption"].strip())
    if not captions:
        raise DataError(f"{path}: no caption in it; take captions_*.json of train or val")
    return captions


def _karpathy(record: dict, path: str, split: str) -> dict[str, list[str]]:
    there = list(dict.fromkeys(image["split"] for image in record["images"]))
    wanted = split.split("+") if split else there
    unknown = [name for name in wanted if name not in there]
    if unknown:
        raise DataError(f"split {unknown[0]!r}: {path} has {', '.join(there)} (join several with +)")
    return {
        "/".join(filter(None, (image.get("filepath"), image["filename"]))): [s["raw"].strip() for s in image["sentences"]]
        for image in record["images"]
        if image["split"] in wanted
    }
