"""Evaluations of a trained model: figures do not depend on the batch size, demonstrations are laid out as the paper says."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path

import pytest
from typer.testing import CliRunner

from metalm.cli import app
from metalm.data.prompts import question_query
from metalm.data.sample import Question, Sample
from metalm.data.shards import read_samples, write_shards
from metalm.errors import ConfigError, DataError
from metalm.evaluation.blind import blank_image
from metalm.evaluation.captioning import evaluate_captioning
from metalm.evaluation.page import write_page
from metalm.evaluation.predictor import Predictor
from metalm.evaluation.shots import few_shot
from metalm.evaluation.vqa import evaluate_vqa, read_questions
from metalm.inference.generate import GenerationConfig
from metalm.segments import Span, Text
from metalm.training.config import load_run_config
from metalm.training.loop import train


@pytest.fixture(scope="module")
def run(tiny_yaml, tmp_path_factory) -> Path:
    """Trained long enough to answer in words rather than noise."""
    out = tmp_path_factory.mktemp("evaluated") / "run"
    steps = ["training.steps=60", "training.lr=5e-3", "training.checkpoint_every=0"]
    train(load_run_config(tiny_yaml, [f"out={out}", *steps]))
    return out


def predictor(run: Path, batch_size: int, **generation) -> Predictor:
    return Predictor.load(run, GenerationConfig(**{"max_new_tokens": 8, **generation}), batch_size)


@pytest.mark.parametrize("generation", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_vqa_does_not_depend_on_the_batch_size(run, scenes, generation):
    results = [
        evaluate_vqa(predictor(run, size, **generation), str(scenes / "vqa"), shots=shots)
        for size in (1, 3, 64)
        for shots in (0,)
    ]
    assert results[0].metrics == results[1].metrics == results[2].metrics
    answers = [[row.prediction for row in result.predictions] for result in results]
    assert answers[0] == answers[1] == answers[2]
    assert len(set(answers[0])) > 1


@pytest.mark.parametrize("same", [False, True])
def test_few_shot_vqa_does_not_depend_on_the_batch_size_either(run, scenes, same):
    results = [evaluate_vqa(predictor(run, size), str(scenes / "vqa"), shots=2, same_shots=same) for size in (1, 16)]
    assert [row.prediction for row in results[0].predictions] == [row.prediction for row in results[1].predictions]


def test_captioning_does_not_depend_on_the_batch_size(run, scenes):
    results = [evaluate_captioning(predictor(run, size), str(scenes / "captioning-val")) for size in (1, 64)]
    assert results[0].metrics == results[1].metrics
    assert {"bleu_4", "meteor", "rouge_l", "cider", "exact_match"} <= set(results[0].metrics)


def test_scores_by_type_majority_and_blind(run, scenes):
    sighted = evaluate_vqa(predictor(run, 64), str(scenes / "vqa"))
    blind = evaluate_vqa(predictor(run, 64), str(scenes / "vqa"), blind=True)
    rows = sighted.predictions
    assert sighted.metrics["accuracy"] == pytest.approx(sum(row.score for row in rows) / len(rows))
    types = {row.type for row in rows}
    assert {name for name in sighted.metrics if "/" in name} == {f"accuracy/{name}" for name in types}
    references = [row.references[0] for row in rows]
    assert sighted.metrics["majority"] == max(references.count(answer) for answer in references) / len(references)
    by_question = {}
    for row in blind.predictions:  # blind, the same question always gets the same answer
        assert by_question.setdefault(row.question, row.prediction) == row.prediction


def test_a_blank_picture_has_the_size_of_the_picture(scenes):
    import io

    from PIL import Image

    sample = next(iter(read_samples(str(scenes / "vqa"))))
    blank = Image.open(io.BytesIO(blank_image(sample.image)))
    assert blank.size == Image.open(io.BytesIO(sample.image)).size
    assert len(blank.getcolors()) == 1


@pytest.mark.parametrize("same", [False, True])
def test_demonstrations_stand_before_the_query_and_never_come_from_its_own_picture(run, scenes, same):
    interface = predictor(run, 1).interface
    asked = read_questions(str(scenes / "vqa"), 0)
    prompts = few_shot(
        asked,
        asked,
        3,
        query=lambda one: question_query(interface, *one),
        answer=lambda one: one[1].best_answer,
        key=lambda one: f"{one[0].key}/{one[1].id}",
        interface=interface,
        same=same,
    )
    beginnings = {tuple(map(id, prompt.segments[:-1])) for prompt in prompts}
    assert (len(beginnings) < len(prompts) / 2) == same
    for (sample, question), prompt in zip(asked, prompts):
        kinds = [type(segment) for segment in prompt.segments]
        assert kinds == [Span, Text] * 3 + [Span]
        assert prompt.segments[-1].inputs["image"] == sample.image
        assert all(span.inputs["image"] != sample.image for span in prompt.segments[:-1:2])
        assert all(text.tokens[-1] == interface.tokenizer.end for text in prompt.segments[1::2])
        assert prompt.key == f"{sample.key}/{question.id}"


def test_too_few_demonstrations_is_said(run, tmp_path):
    image = next(iter(read_samples_of_one())).image
    sample = Sample("only", image, questions=[Question("0", "what?", ["this"])])
    write_shards([sample], tmp_path / "one")
    with pytest.raises(DataError, match=r"2 shots need as many samples .* besides 'only'; there are 0"):
        evaluate_vqa(predictor(run, 1), str(tmp_path / "one"), shots=2)


def read_samples_of_one():
    from metalm.data.scenes import image_samples

    return image_samples(0, 1)


def test_data_without_questions_or_captions_is_said(run, scenes):
    with pytest.raises(DataError, match="no sample has a question with an answer"):
        evaluate_vqa(predictor(run, 1), str(scenes / "images"))
    with pytest.raises(DataError, match="no sample has both an image, a sound or a film, and captions"):
        evaluate_captioning(predictor(run, 1), str(scenes / "text"))


def test_the_result_is_written_with_its_predictions(run, scenes, tmp_path):
    result = evaluate_vqa(predictor(run, 64), str(scenes / "vqa"), model=str(run), limit=3)
    lines = result.write(tmp_path / "deep" / "out.json")
    record = json.loads((tmp_path / "deep" / "out.json").read_text())
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert record["predictions"] == str(lines) and record["num_samples"] == len(rows)
    assert all({"id", "prediction", "references", "score"} <= set(row) for row in rows)
    assert record["config"]["limit"] == 3 and record["model"] == str(run)


@pytest.mark.parametrize("task, part", [("vqa", "vqa"), ("captioning", "captioning-val")])
def test_the_page_shows_pictures_with_what_was_said(run, scenes, tmp_path, task, part):
    evaluation = {"vqa": evaluate_vqa, "captioning": evaluate_captioning}[task]
    result = evaluation(predictor(run, 64), str(scenes / part), str(run), limit=6)
    page = write_page(result, tmp_path / "out.json").read_text()
    assert page.count("data:image/png;base64,") == min(len(result.predictions), 24)
    assert escape(result.predictions[0].prediction) in page
    assert escape(next(iter(result.predictions[0].references))) in page
    assert "Training" in page and "<svg" in page  # the run's curve
    assert all(name in page for name in result.metrics)


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("transcription", ["--shots", "2"], "transcription has no use for --shots; its options are --beams"),
        ("vqa", ["--same-shots"], "say how many by --shots"),
        ("vqa", ["--spice"], "vqa has no use for --spice"),
        ("tagging", ["--draft", "1"], "tagging has no use for --draft"),
        (
            "infilling",
            ["--dtype", "int8"],
            "infilling has no use for --dtype; its options are --forward-only, --max-new-tokens",
        ),
    ],
)
def test_options_that_a_task_does_not_heed_are_refused(task, options, message):
    done = CliRunner().invoke(app, ["evaluate", task, "--model", "run", "--data", "shards", "--out", "out.json", *options])
    assert isinstance(done.exception, ConfigError) and message in str(done.exception)
