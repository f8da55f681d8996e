"""Classification: the label of every text, or pair of texts, of the shards; accuracy, and that of the commonest label."""

from __future__ import annotations

from collections import Counter

import torch

from metalm.data.shards import read_samples
from metalm.errors import ConfigError, DataError
from metalm.evaluation.result import Prediction, Result
from metalm.inference.generate import batched
from metalm.objectives.classifier import Classifier, LabelledDocument
from metalm.pretrained import load_pretrained


def evaluate_classification(name: str, data: str, batch_size: int = 64, limit: int = 0) -> Result:
    """Labels the samples that `metalm data import labelled` makes.

    Args:
        name: an export, a run, or a Hub id.
        limit: stop after so many samples; 0 takes all.

    Raises:
        ConfigError: the model is no classifier.
        DataError: there is no labelled text, or a label that the model does not know.
    """
    model, tokenizer = load_pretrained(name)
    if not isinstance(model, Classifier):
        raise ConfigError(f"{name} holds the model {model.config.type!r}: this evaluation is for 'classifier'")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    labels = model.config.labels
    documents, rows = [], []
    for number, sample in enumerate(read_samples(data)):
        if limit and number == limit:
            break
        found = list(model.layout.documents(sample, tokenizer, model.config.encoder.max_positions))
        for document, question in zip(found, sample.questions):
            text = f"{sample.text} | {question.question}" if question.question else sample.text
            rows.append(Prediction(f"{sample.key}/{question.id}", "", [labels[document.label]], 0.0, question=text))
        documents += found
    if not documents:
        raise DataError(f"{data}: no text with a label")
    for row, number in zip(rows, classify(model, documents, batch_size)):
        row.prediction = labels[number]
        row.score = float(row.prediction == row.references[0])
    commonest = Counter(row.references[0] for row in rows).most_common(1)[0][1]
    metrics = {"accuracy": sum(row.score for row in rows) / len(rows), "majority": commonest / len(rows)}
    return Result("classification", metrics, name, data, {"batch_size": batch_size, "limit": limit}, rows)


@torch.inference_mode()
def classify(model: Classifier, documents: list[LabelledDocument], batch_size: int = 64) -> list[int]:
    """The number of each document's likeliest label."""
    device = next(model.parameters()).device
    labels = [0] * len(documents)
    for numbers in batched(documents, batch_size):
        batch = model.layout.collate([[documents[n]] for n in numbers], 0).to(device)
        for n, label in zip(numbers, model.logits(batch).argmax(-1).tolist()):
            labels[n] = label
    return labels
