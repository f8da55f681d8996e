"""The demo end to end, at full size: the figures that the README promises."""

from __future__ import annotations

import json

import pytest


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_demo_answers_questions_on_pictures_that_it_was_never_asked_before(tmp_path):
    from metalm.demo import run_demo

    summary = run_demo(tmp_path)
    vqa = summary["vqa_zero_shot"]
    assert vqa["accuracy"] >= 0.70
    assert vqa["accuracy"] >= vqa["blind"] + 0.25
    assert vqa["accuracy"] >= vqa["majority"] + 0.25
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    page = (tmp_path / "report.html").read_text()
    assert page.count("<img") >= 24 and "http" not in page.split("<body")[1].split("xmlns")[0]


def test_no_picture_of_training_shows_a_held_out_pair_and_every_evaluated_one_does(scenes):
    """Read from the captions that list all things, which the drawing is made from."""
    import random

    from metalm.data.scenes import HELD_OUT, random_scene

    for held_out in (False, True):
        for seed in range(300):
            scene = random_scene(random.Random(seed), held_out)
            assert any((thing.color, thing.shape) in HELD_OUT for thing in scene) == held_out


def test_no_pretraining_picture_comes_with_a_question(scenes):
    from metalm.data.shards import read_samples

    for sample in read_samples(str(scenes / "images")):
        assert not sample.questions and not any("?" in caption or "question" in caption for caption in sample.captions)
    for part in ("text", "questions"):
        assert all(sample.image is None for sample in read_samples(str(scenes / part)))


def test_answers_are_true_of_the_scene():
    """Questions answered by an independent, obvious reading of the scene."""
    import random

    from metalm.data.scenes import NUMBERS, ask, random_scene

    for seed in range(200):
        rng = random.Random(seed)
        scene = random_scene(rng, None)
        for question in ask(scene, rng, 9):
            words, answer = question.question.rstrip("?").split(), question.answers[0]
            named = [thing for thing in scene if thing.shape == words[-1]]
            if question.type == "color":
                assert [thing.color for thing in named] == [answer]
            elif question.type == "place":
                assert [thing.place for thing in named] == [answer]
            elif question.type == "shape":
                assert [thing.shape for thing in scene if thing.color == words[-2]] == [answer]
            elif question.type == "exists":
                assert (f"{words[-2]} {words[-1]}" in {thing.name for thing in scene}) == (answer == "yes")
            elif question.type == "count":
                counted = [t for t in scene if words[2] == "things" or words[2].startswith(t.shape)]
                assert NUMBERS[len(counted)] == answer
            else:
                before = {"left": lambda a, b: a.column < b.column, "right": lambda a, b: a.column > b.column}
                before |= {"above": lambda a, b: a.row < b.row, "below": lambda a, b: a.row > b.row}
                assert [t.name for t in scene if before[words[2]](t, named[0])] == [answer]


def test_scenes_are_the_same_for_the_same_seed_and_others_for_another(tmp_path):
    from metalm.data.scenes import write_scenes

    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_scenes(tmp_path / name, seed, size=16)
    tars = {name: [path.read_bytes() for path in sorted((tmp_path / name).rglob("*.tar"))] for name in ("a", "b", "c")}
    assert tars["a"] == tars["b"] != tars["c"]
