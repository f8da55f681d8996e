"""VQA accuracy by the official rules, plain answers, and soft-scored answers.

The official measure (Antol et al. 2015, Goyal et al. 2017; where prose and evaluation code differ, the code) asks ten
people. Each is left out in turn, and the prediction is right to the degree that three of the other nine agree with it:

    accuracy = mean over left-out answers of  min(agreeing among the rest / 3, 1)

    people who agree   0    1    2    3    4 or more
    accuracy           0   0.3  0.6  0.9   1

Both sides pass through `normalize_answer` first, EXCEPT where all ten people wrote the very same string: there the
official code compares the bare strings (questions that ask to read a sign should keep its spelling, its authors say).
An answer "Black." to ten times "black" hence scores 0. Early versions of that code, and libraries that descend from
them, normalise the prediction always and the answers only in part; the rules' prose normalises everything. The current
code is followed here, to the letter.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

from metalm.data.sample import Question
from metalm.errors import DataError

ARTICLES = frozenset({"a", "an", "the"})
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBER_WORDS)}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'

# The official table has, for each contraction below, every spelling that lacks exactly one of its apostrophes ("aint";
# "couldn'tve" and "couldnt've"). Its capitalised keys ("Im", "Ive") cannot match lower-cased words and are left out.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word for word in _CONTRACTIONS.split() for i, character in enumerate(word) if character == "'"
} | {"somebody'd": "somebodyd"}

_NUMBER_WITH_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")  # the official pattern's look-behind is misspelt and never holds: this is its effect
_MAX_PERIODS = 32  # the official code passes the flag re.UNICODE (32) where re.sub expects a count
_MIN_PANEL = 4  # leaving one out of fewer answers could never reach 3 agreeing


def normalize_answer(text: str) -> str:
    """The official answer processing: punctuation, lower case, number words, articles, contractions.

        "A dog."   -> "dog"         a period goes, unless a digit follows ("2.5")
        "two"      -> "2"           number words to ten; "none" is 0
        "dont know" -> "don't know"
        "red/blue" -> "red blue"    punctuation becomes a space …
        "red, blue" -> "red blue"   … or nothing, where that mark stands beside a space anywhere in the text
        "1,000"    -> "1000"        … or where a comma stands between two digits: then all punctuation closes up

    Apostrophes and colons stay.
    """
    original = _one_line(text)
    closes_up = _NUMBER_WITH_COMMA.search(original) is not None
    text = original
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in original or f" {mark}" in original
        text = text.replace(mark, "" if beside_space or closes_up else " ")
    text = _PERIOD.sub("", text, count=_MAX_PERIODS)
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Accuracy in [0, 1] of a prediction against human answers.

    Four answers or more (ten in VQAv2) are a panel: the official leave-one-out measure of the module's docstring.
    One to three answers are plain right answers: 1 if the prediction equals one of them after normalisation, else 0.

    Raises:
        DataError: there are no answers.
    """
    if not answers:
        raise DataError("a question without answers cannot be scored: give its answers, or leave it out")
    if len(answers) < _MIN_PANEL:
        return float(normalize_answer(prediction) in map(normalize_answer, answers))
    prediction, answers = _one_line(prediction), [_one_line(answer) for answer in answers]
    if len(set(answers)) > 1:
        prediction, answers = normalize_answer(prediction), [normalize_answer(answer) for answer in answers]
    agree = answers.count(prediction)
    left_out_agrees = agree * min((agree - 1) / 3, 1)
    left_out_differs = (len(answers) - agree) * min(agree / 3, 1)
    return (left_out_agrees + left_out_differs) / len(answers)


def soft_accuracy(prediction: str, soft_answers: Mapping[str, float]) -> float:
    """The score in [0, 1] that the data set gives to the prediction, both normalised; 0 for an unknown answer.

    Answers that become one by normalisation add up to at most 1, as their counts would in min(count / 3, 1).
    """
    wanted = normalize_answer(prediction)
    return min(1.0, float(sum(score for answer, score in soft_answers.items() if normalize_answer(answer) == wanted)))


def score_question(prediction: str, question: Question) -> float:
    """Score in [0, 1] of a prediction, by what the question carries: soft answers, or plain or panel answers.

    Raises:
        DataError: the question has neither, named by its id.
    """
    if question.soft_answers:
        return soft_accuracy(prediction, question.soft_answers)
    if not question.answers:
        raise DataError(
            f"question {question.id!r} ({question.question!r}) has neither answers nor soft_answers: "
            "it cannot be scored; give its answers, or leave it out"
        )
    return vqa_accuracy(prediction, question.answers)


def summarize(scores: Sequence[float], types: Sequence[str]) -> dict:
    """Mean score over all questions and by question type: {"accuracy": …, "by_type": {type: …}}, all in [0, 1].

    Args:
        scores: one score a question.
        types: the type of the same question; "" counts in the overall figure only.

    Raises:
        DataError: no scores, or as many types as scores are not given.
    """
    if not scores:
        raise DataError("no question was scored: the data holds no questions with answers")
    if len(scores) != len(types):
        raise DataError(f"{len(scores)} scores but {len(types)} question types: give one type a score")
    by_type: dict[str, list[float]] = defaultdict(list)
    for score, type_ in zip(scores, types):
        if type_:
            by_type[type_].append(score)
    return {"accuracy": _mean(scores), "by_type": {type_: _mean(by_type[type_]) for type_ in sorted(by_type)}}


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _mean(scores: Sequence[float]) -> float:
    return float(sum(scores) / len(scores))
