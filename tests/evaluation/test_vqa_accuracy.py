"""VQA accuracy: hand-worked official cases, and a slow obvious leave-one-out beside it."""

from __future__ import annotations

import json
import random

import pytest

from metalm.data.sample import Question
from metalm.errors import DataError
from metalm.evaluation.vqa_accuracy import (
    CONTRACTIONS,
    normalize_answer,
    score_question,
    soft_accuracy,
    summarize,
    vqa_accuracy,
)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("A dog.", "dog"),
        ("the Dog", "dog"),
        ("two", "2"),
        ("Ten dogs", "10 dogs"),
        ("none", "0"),
        ("eleven", "eleven"),
        ("dont know", "don't know"),
        ("Couldn'tve", "couldn't've"),
        ("couldnt've", "couldn't've"),
        ("couldntve", "couldntve"),  # two apostrophes missing: not in the official table
        ("twas", "'twas"),
        ("oclock", "o'clock"),
        ("yalld've", "yalld've"),
        ("y'alld've", "y'all'd've"),
        ("ow's'at", "'ow's'at"),
        ("somebody'd", "somebodyd"),  # the official table's own slip
        ("lets", "lets"),  # "let's" and "she's" map to themselves there
        ("Im", "im"),  # the official table's capitalised keys never match
        ("girl's", "girl's"),
        ("10:30", "10:30"),  # apostrophes and colons stay
        ("2.5", "2.5"),
        ("2.5.", "2.5"),
        ("u.s.a.", "usa"),
        (".5", ".5"),
        ("1,000", "1000"),
        ("1,000/year", "1000year"),  # a comma in a number closes up all punctuation
        ("$1,000.50", "$1000.50"),
        ("red,blue", "red blue"),
        ("red, blue", "red blue"),
        ("red/blue", "red blue"),
        ("red/blue / green", "redblue green"),  # a mark beside a space anywhere vanishes everywhere
        ("t-shirt", "t shirt"),
        ('"stop"', "stop"),
        ("yes!", "yes"),
        ("a\nb\tc\n", "b c"),
        ("  spaced   out ", "spaced out"),
        ("the", ""),
        ("", ""),
        (". " * 40, ". . . . . . . ."),  # re.UNICODE as the count: 32 periods go, 8 stay
    ],
)
def test_answer_processing_is_the_official_one(text, normal):
    assert normalize_answer(text) == normal


def test_contractions_have_the_official_number_of_live_keys():
    # The official table has 120 keys; 4 are capitalised and 2 map to themselves, so 114 can change an answer.
    assert len(CONTRACTIONS) == 114
    assert all(key.replace("'", "") == value.replace("'", "") for key, value in CONTRACTIONS.items())


@pytest.mark.parametrize(("agree", "accuracy"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (9, 1)])
def test_accuracy_by_number_of_agreeing_people(agree, accuracy):
    # 3 of 10: leaving out one of the three leaves 2 (2/3 each), leaving out another leaves 3: (3 * 2/3 + 7 * 1) / 10.
    answers = ["red"] * agree + [f"other {i}" for i in range(10 - agree)]
    assert vqa_accuracy("red", answers) == pytest.approx(accuracy, abs=1e-12)


def test_case_of_the_official_authors():
    # 8 x yes, 2 x no: 1.0 for "yes" and 1/10 (8 * 2/3 + 2 * 1/3) = 0.6 for "no".
    answers = ["yes"] * 8 + ["no"] * 2
    assert vqa_accuracy("Yes.", answers) == pytest.approx(1)
    assert vqa_accuracy("no", answers) == pytest.approx(0.6)


def test_both_sides_are_normalised_where_people_differ():
    answers = ["two"] * 5 + ["2"] * 3 + ["a couple", "Three."]
    assert vqa_accuracy("2", answers) == 1
    assert vqa_accuracy("two.", answers) == 1
    assert vqa_accuracy("couple", answers) == pytest.approx(0.3)
    assert vqa_accuracy("3", answers) == pytest.approx(0.3)


def test_unanimous_answers_are_compared_as_written():
    assert vqa_accuracy("black", ["black"] * 10) == 1
    assert vqa_accuracy(" black\n", ["black\t"] * 10) == 1
    assert vqa_accuracy("Black.", ["black"] * 10) == 0
    assert vqa_accuracy("2", ["two"] * 10) == 0
    assert vqa_accuracy("the end", ["the end"] * 10) == 1


def leave_one_out(prediction, answers):
    """The rule as the paper states it, on answers already normal."""
    scores = []
    for left_out in range(len(answers)):
        rest = [answer for i, answer in enumerate(answers) if i != left_out]
        scores.append(min(1, sum(answer == prediction for answer in rest) / 3))
    return sum(scores) / len(scores)


def test_equals_the_slow_obvious_loop_on_random_panels():
    generator = random.Random(0)
    words = ["red", "blue", "green", "yellow"]
    for _ in range(5000):
        count = generator.choice([4, 5, 9, 10, 10, 10, 12])
        answers = [generator.choice(words) for _ in range(count)]
        prediction = generator.choice(words)
        assert vqa_accuracy(prediction, answers) == pytest.approx(leave_one_out(prediction, answers), abs=1e-12)


def test_a_few_plain_answers_are_matched_exactly_after_normalisation():
    assert vqa_accuracy("A dog.", ["dog"]) == 1
    assert vqa_accuracy("2", ["Two"]) == 1
    assert vqa_accuracy("cat", ["dog"]) == 0
    assert vqa_accuracy("sofa", ["couch", "a sofa"]) == 1


def test_soft_answers_give_their_score():
    soft = {"vine": 1, "climbing": 0.667, "Two vines": 0.667, "2 vines": 0.333}
    assert soft_accuracy("A vine.", soft) == 1
    assert soft_accuracy("climbing", soft) == 0.667
    assert soft_accuracy("fern", soft) == 0
    assert soft_accuracy("two vines", soft) == 1  # 2 and 1 people wrote it: 3 agree
    assert soft_accuracy("x", {"x": 0.667, "X": 0.667}) == 1


def test_a_question_is_scored_by_what_it_carries():
    panel = Question("1", "what color?", answers=["red"] * 3 + ["blue"] * 7)
    assert score_question("red", panel) == pytest.approx(0.9)
    assert score_question("a red", Question("2", "what color?", answers=["red"])) == 1
    assert score_question("red", Question("3", "what color?", soft_answers={"red": 0.667})) == 0.667
    with pytest.raises(DataError, match=r"'9'.*neither answers nor soft_answers"):
        score_question("red", Question("9", "what color?"))
    with pytest.raises(DataError, match="without answers"):
        vqa_accuracy("red", [])


def test_summary_overall_and_by_type():
    assert summarize([1, 0, 0.5, 0.3], ["color", "count", "color", ""]) == {
        "accuracy": pytest.approx(0.45),
        "by_type": {"color": 0.75, "count": 0.0},
    }
    with pytest.raises(DataError, match="no question was scored"):
        summarize([], [])
    with pytest.raises(DataError, match="2 scores but 1"):
        summarize([1, 1], ["color"])


def test_best_soft_answer_of_real_questions_scores_full(shared):
    path = shared / "data" / "coco_vqa" / "okvqa_val.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is missing")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        question = Question(str(row["question_id"]), row["question"], soft_answers=row["soft_answers"])
        highest = max(question.soft_answers.values())
        assert score_question(question.best_answer, question) >= highest
        assert score_question(question.best_answer.upper() + ".", question) >= highest
