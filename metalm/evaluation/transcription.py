"""Transcription: `[sound] "caption:" -> text`, scored by exact match, word and character error rate (jiwer's).

Texts are compared without case and punctuation. Labels of sounds are texts too: their exact match is the accuracy.
`commonest_…` are the figures of always giving the commonest text.
"""

from __future__ import annotations

import re
from collections import Counter

from metalm.data.prompts import caption_query
from metalm.data.shards import read_samples
from metalm.errors import DataError
from metalm.evaluation.blind import blank
from metalm.evaluation.predictor import Predictor
from metalm.evaluation.result import Prediction, Result
from metalm.segments import Document


def evaluate_transcription(predictor: Predictor, data: str, model: str = "", blind: bool = False, limit: int = 0) -> Result:
    """Writes down every sound of the shards whose samples have one caption or more; the first is what is right.

    Args:
        blind: with silence in place of the sounds.

    Raises:
        DataError: no sample has both a sound and a caption.
    """
    samples = [sample for number, sample in enumerate(read_samples(data)) if not limit or number < limit]
    samples = [sample for sample in samples if sample.audio is not None and sample.captions]
    if not samples:
        raise DataError(f"{data}: no sample has both a sound and its text (see metalm data import sounds)")
    for sample in samples:
        if not plain(sample.captions[0]):
            raise DataError(f"sample {sample.key!r}: its text {sample.captions[0]!r} has no word to be right or wrong")
    heard = [blank(sample) for sample in samples] if blind else samples
    prompts = [Document(caption_query(predictor.interface, sample), sample.key) for sample in heard]
    texts = predictor(prompts, "transcription, blind" if blind else "transcription")
    references = [plain(sample.captions[0]) for sample in samples]
    hypotheses = [plain(text) for text in texts]
    rows = [
        Prediction(sample.key, text, sample.captions, float(hypothesis == reference))
        for sample, text, hypothesis, reference in zip(samples, texts, hypotheses, references)
    ]
    commonest = Counter(references).most_common(1)[0][0]
    metrics = transcription_metrics(references, hypotheses)
    baseline = transcription_metrics(references, [commonest] * len(references))
    metrics |= {f"commonest_{name}": value for name, value in baseline.items()}
    return Result("transcription", metrics, model, data, {"blind": blind, "limit": limit} | vars(predictor.generation), rows)


def transcription_metrics(references: list[str], hypotheses: list[str]) -> dict[str, float]:
    """Exact match, word error rate and character error rate of plain texts; the latter two may exceed 1.

    Raises:
        DataError: a reference is empty, so that it cannot be wrong by words.
    """
    import jiwer

    if not all(references):
        raise DataError("a reference without words: word error rates are undefined")
    exact = sum(a == b for a, b in zip(references, hypotheses)) / len(references)
    return {
        "exact_match": exact,
        "word_error_rate": jiwer.wer(references, hypotheses),
        "character_error_rate": jiwer.cer(references, hypotheses),
    }


def plain(text: str) -> str:
    """Lower case words, single spaces between them."""
    return " ".join(re.sub(r"[^\w\s']", " ", text.lower()).split())
