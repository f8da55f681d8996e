"""Tagging: entities found, scored as CoNLL does, by seqeval: an entity counts where both its ends and its kind are right."""

from __future__ import annotations

import torch

from metalm.data.shards import read_samples
from metalm.errors import ConfigError, DataError
from metalm.evaluation.result import Prediction, Result
from metalm.inference.generate import batched
from metalm.objectives.tagger import TaggedDocument, Tagger
from metalm.pretrained import load_pretrained


def evaluate_tagging(name: str, data: str, batch_size: int = 64, limit: int = 0) -> Result:
    """Tags the words of the samples that `metalm data import conll` makes; precision, recall and F1 of entities.

    Words for which a text was too long count as tagged O.

    Raises:
        ConfigError: the model is no tagger, or seqeval is missing.
        DataError: there is no tagged text, or a tag that the model does not know.
    """
    try:
        from seqeval.metrics import f1_score, precision_score, recall_score
    except ImportError as error:
        raise ConfigError("tagging is scored by seqeval: pip install 'metalm[tagging]'") from error
    model, tokenizer = load_pretrained(name)
    if not isinstance(model, Tagger):
        raise ConfigError(f"{name} holds the model {model.config.type!r}: this evaluation is for 'tagger'")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    samples = [sample for number, sample in enumerate(read_samples(data)) if not limit or number < limit]
    if not samples:
        raise DataError(f"{data}: no text in it")
    documents = [next(model.layout.documents(sample, tokenizer, model.config.encoder.max_positions)) for sample in samples]
    found = [tags + ["O"] * (len(sample.tags) - len(tags)) for tags, sample in zip(tag(model, documents, batch_size), samples)]
    right = [sample.tags for sample in samples]
    scores = {"precision": precision_score, "recall": recall_score, "f1": f1_score}
    metrics = {name: float(score(right, found, zero_division=0)) for name, score in scores.items()}
    words = sum(map(len, right))
    metrics["word_accuracy"] = sum(a == b for pair in zip(found, right) for a, b in zip(*pair)) / words
    rows = [
        Prediction(sample.key, " ".join(tags), [" ".join(sample.tags)], float(tags == sample.tags), question=sample.text)
        for sample, tags in zip(samples, found)
    ]
    return Result("tagging", metrics, name, data, {"batch_size": batch_size, "limit": limit}, rows)


@torch.inference_mode()
def tag(model: Tagger, documents: list[TaggedDocument], batch_size: int = 64) -> list[list[str]]:
    """The likeliest tags of each document's words."""
    device = next(model.parameters()).device
    tags: list[list[str]] = [[] for _ in documents]
    for numbers in batched(documents, batch_size):
        batch = model.layout.collate([[documents[n]] for n in numbers], 0).to(device)
        for n, found in zip(numbers, model.crf.decode(model.emissions(batch), mask=batch.mask_NW)):
            tags[n] = [model.config.tags[number] for number in found]
    return tags
