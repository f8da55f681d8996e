"""Captioning: `[image, sound or film] "caption:" -> caption`, scored by pycocoevalcap."""

from __future__ import annotations

from metalm.data.prompts import caption_query
from metalm.data.sample import Sample
from metalm.data.shards import read_samples
from metalm.errors import DataError
from metalm.evaluation.blind import blank
from metalm.evaluation.caption_metrics import caption_metrics
from metalm.evaluation.predictor import Predictor
from metalm.evaluation.result import Prediction, Result
from metalm.evaluation.shots import few_shot


def evaluate_captioning(
    predictor: Predictor,
    data: str,
    model: str = "",
    shots: int = 0,
    shots_data: str = "",
    same_shots: bool = False,
    blind: bool = False,
    spice: bool = False,
    limit: int = 0,
    seed: int = 0,
) -> Result:
    """Captions every picture of the shards; arguments as in `evaluate_vqa`.

    Returns a result whose metrics are those of `caption_metrics`, times 100 as the papers print them.
    """
    samples = read_captioned(data, limit)
    pool = read_captioned(shots_data, 0) if shots and shots_data else samples
    if blind:
        samples, pool = [blank(sample) for sample in samples], [blank(sample) for sample in pool]
    prompts = few_shot(
        samples,
        pool,
        shots,
        query=lambda sample: caption_query(predictor.interface, sample),
        answer=lambda sample: sample.captions[0],
        key=lambda sample: sample.key,
        interface=predictor.interface,
        seed=seed,
        same=same_shots,
    )
    captions = predictor(prompts, "captioning, blind" if blind else "captioning")
    metrics, scores = caption_metrics(
        {sample.key: caption for sample, caption in zip(samples, captions)},
        {sample.key: sample.captions for sample in samples},
        spice=spice,
    )
    rows = [
        Prediction(sample.key, caption, sample.captions, scores[sample.key]["cider"], image=sample.key)
        for sample, caption in zip(samples, captions)
    ]
    config = {"shots": shots, "shots_data": shots_data, "same_shots": same_shots, "blind": blind, "limit": limit, "seed": seed}
    return Result("captioning", metrics, model, data, config | vars(predictor.generation), rows)


def read_captioned(data: str, limit: int) -> list[Sample]:
    """Every sample with an image, a sound or a film, and captions."""
    samples = []
    for number, sample in enumerate(read_samples(data)):
        if limit and number == limit:
            break
        if sample.media and sample.captions:
            samples.append(sample)
    if not samples:
        raise DataError(f"{data}: no sample has both an image, a sound or a film, and captions")
    return samples
