"""Sequence to sequence: `text -> text`, against one or more references, scored by pycocoevalcap.

The metrics are those of `metalm.evaluation.caption_metrics`, without case and punctuation: figures of scorers that keep
these (E2E NLG's own) are lower.
"""

from __future__ import annotations

import torch

from metalm.data.shards import read_samples
from metalm.errors import ConfigError, DataError
from metalm.evaluation.caption_metrics import caption_metrics
from metalm.evaluation.result import Prediction, Result
from metalm.inference.write import write_texts
from metalm.objectives.seq2seq import Seq2Seq
from metalm.pretrained import load_pretrained


def evaluate_seq2seq(name: str, data: str, max_new_tokens: int = 64, batch_size: int = 64, limit: int = 0) -> Result:
    """Writes what the texts become that `metalm data import pairs` makes samples of; a prediction's score is its ROUGE-L.

    Args:
        name: an export, a run, or a Hub id.
        data: shards of samples with a text and, as captions, what it may become.
        limit: stop after so many samples; 0 takes all.

    Raises:
        ConfigError: the model is not one of sequence to sequence, or `max_new_tokens` leave no room for a text.
        DataError: no sample has both a text and what it becomes.
        MetricError: Java is missing.
    """
    model, tokenizer = load_pretrained(name)
    if not isinstance(model, Seq2Seq):
        raise ConfigError(f"{name} holds the model {model.config.type!r}: this evaluation is for 'seq2seq'")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    samples = [sample for number, sample in enumerate(read_samples(data)) if not limit or number < limit]
    samples = [sample for sample in samples if sample.text and sample.captions]
    if not samples:
        raise DataError(f"{data}: no sample has both a text and what it becomes (see metalm data import pairs)")
    written = write_texts(model, tokenizer, [sample.text for sample in samples], max_new_tokens, batch_size)
    metrics, scores = caption_metrics(
        {sample.key: text for sample, text in zip(samples, written)}, {sample.key: sample.captions for sample in samples}
    )
    rows = [
        Prediction(sample.key, text, sample.captions, scores[sample.key]["rouge_l"] / 100, question=sample.text)
        for sample, text in zip(samples, written)
    ]
    config = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "limit": limit}
    return Result("seq2seq", metrics, name, data, config, rows)
