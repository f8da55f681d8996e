"""Data sets from their published file formats to samples, one file each; `IMPORTERS` is the register.

An importer is a generator function of `Sample`s with keyword options. It reads annotations up front and images one by
one, whose bytes are never re-encoded. To add one: write its file, name it here, test it on a small copy of its layout.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from metalm.data.importers.coco_captions import coco_captions
from metalm.data.importers.conll import conll
from metalm.data.importers.daquar import daquar
from metalm.data.importers.flickr8k import flickr8k
from metalm.data.importers.jsonl import jsonl
from metalm.data.importers.labelled import labelled
from metalm.data.importers.okvqa import okvqa
from metalm.data.importers.pairs import pairs
from metalm.data.importers.questions import questions
from metalm.data.importers.sounds import sounds
from metalm.data.importers.text import text
from metalm.data.importers.vqav2 import vqav2
from metalm.data.sample import Sample
from metalm.errors import DataError


class Importer(NamedTuple):
    """A generator function of samples, and a line of help on it."""

    function: Callable[..., Iterator[Sample]]
    help: str


IMPORTERS: dict[str, Importer] = {
    "flickr8k": Importer(flickr8k, "Flickr8k: Flickr8k.token.txt with the split lists, or Kaggle's captions.txt"),
    "coco-captions": Importer(coco_captions, "COCO Captions: captions_*.json, or Karpathy's dataset_coco.json"),
    "vqav2": Importer(vqav2, "VQAv2: v2_OpenEnded_mscoco_*_questions.json and v2_mscoco_*_annotations.json"),
    "okvqa": Importer(okvqa, "OK-VQA: OpenEnded_mscoco_*_questions.json and mscoco_*_annotations.json"),
    "daquar": Importer(daquar, "DAQUAR: qa.*.txt, questions and answers on alternate lines"),
    "conll": Importer(conll, "words with tags, a word a line, as CoNLL's and WNUT's files"),
    "labelled": Importer(labelled, "texts, or pairs of texts, with labels: .tsv or .csv with a header, or JSON Lines"),
    "pairs": Importer(pairs, "texts and what they become (E2E NLG's CSV): .csv or .tsv with a header, or JSON Lines"),
    "questions": Importer(questions, "questions made by rule from the captions of shards, on texts or on images"),
    "sounds": Importer(sounds, "sounds with their texts or labels, named in JSON Lines; joined to sequences, if wanted"),
    "text": Importer(text, "plain text or JSON Lines, .gz of either, or a folder of these"),
    "jsonl": Importer(jsonl, "your own data: JSON Lines with image, caption(s), question, answer(s) columns by name"),
}


def import_dataset(name: str, **options: Any) -> Iterator[Sample]:
    """The samples of a data set; `options` are the arguments of its importer.

    Raises:
        DataError: there is no such importer, it has no such option, or a required option is missing (at once); what the
            importer finds wrong with the files (while iterating).
    """
    if name not in IMPORTERS:
        raise DataError(f"no importer {name!r}{_hint(name, IMPORTERS)}; there are {', '.join(IMPORTERS)}")
    function = IMPORTERS[name].function
    parameters = inspect.signature(function).parameters
    for option in options:
        if option not in parameters:
            raise DataError(f"importer {name}: no option {option!r}{_hint(option, parameters)}; it has {', '.join(parameters)}")
    for option, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and option not in options:
            raise DataError(f"importer {name}: the option {option!r} is missing")
    return function(**options)


def _hint(name: str, names: Any) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
