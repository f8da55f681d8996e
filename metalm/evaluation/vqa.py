"""Visual question answering, zero-shot and k-shot: `[image] "question: … answer:" -> answer`, greedily, scored officially.

A model that does not look at the picture is the first thing to beat, so `blind` asks the same with the picture blanked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from metalm.data.prompts import question_query
from metalm.data.sample import Question, Sample
from metalm.data.shards import read_samples
from metalm.errors import DataError
from metalm.evaluation.blind import blank
from metalm.evaluation.predictor import Predictor
from metalm.evaluation.result import Prediction, Result
from metalm.evaluation.shots import few_shot
from metalm.evaluation.vqa_accuracy import score_question, summarize

Asked = tuple[Sample, Question]


def evaluate_vqa(
    predictor: Predictor,
    data: str,
    model: str = "",
    shots: int = 0,
    shots_data: str = "",
    same_shots: bool = False,
    blind: bool = False,
    limit: int = 0,
    seed: int = 0,
) -> Result:
    """Answers every question of the shards.

    Args:
        shots_data: where demonstrations come from; empty: the evaluated shards themselves, other pictures only.
        same_shots: the same demonstrations before every question, which a batch then reads once.
        blind: blank every picture.
        limit: stop after so many samples; 0 takes all.

    Returns a result whose metrics are accuracy, majority (always giving the commonest answer), and accuracy/<type>.
    """
    asked = read_questions(data, limit)
    pool = read_questions(shots_data, 0) if shots and shots_data else asked
    if blind:
        asked, pool = blanked(asked), blanked(pool)
    prompts = few_shot(
        asked,
        pool,
        shots,
        query=lambda one: question_query(predictor.interface, *one),
        answer=lambda one: one[1].best_answer,
        key=lambda one: f"{one[0].key}/{one[1].id}",
        interface=predictor.interface,
        seed=seed,
        same=same_shots,
    )
    answers = predictor(prompts, "answering, blind" if blind else "answering")
    rows = [
        Prediction(
            f"{sample.key}/{question.id}",
            answer,
            question.soft_answers or question.answers,
            score_question(answer, question),
            question.question,
            question.type,
            sample.key,
        )
        for (sample, question), answer in zip(asked, answers)
    ]
    summary = summarize([row.score for row in rows], [row.type for row in rows])
    metrics = {"accuracy": summary["accuracy"], "majority": majority([question for _, question in asked])}
    metrics |= {f"accuracy/{name}": value for name, value in summary["by_type"].items()}
    config = {"shots": shots, "shots_data": shots_data, "same_shots": same_shots, "blind": blind, "limit": limit, "seed": seed}
    return Result("vqa", metrics, model, data, config | vars(predictor.generation), rows)


def read_questions(data: str, limit: int) -> list[Asked]:
    """Every answered question with its sample."""
    asked: list[Asked] = []
    for number, sample in enumerate(read_samples(data)):
        if limit and number == limit:
            break
        asked += [(sample, question) for question in sample.questions if question.answers or question.soft_answers]
    if not asked:
        raise DataError(f"{data}: no sample has a question with an answer")
    return asked


def majority(questions: Sequence[Question]) -> float:
    """The accuracy of giving the commonest answer to every question."""
    commonest = Counter(question.best_answer for question in questions).most_common(1)[0][0]
    return sum(score_question(commonest, question) for question in questions) / len(questions)


def blanked(asked: Sequence[Asked]) -> list[Asked]:
    """The same questions on media without content."""
    samples = {id(sample): blank(sample) for sample, _ in asked if sample.media}
    return [(samples.get(id(sample), sample), question) for sample, question in asked]
