"""Questions made from captions by rule."""

from __future__ import annotations

import random

import pytest

from metalm.data.importers import import_dataset
from metalm.data.importers.questions import COLORS, Grammar, ask_sample, words_of
from metalm.data.sample import Sample
from metalm.data.shards import read_samples, write_shards
from metalm.errors import DataError

# Enough about each thing for the counts to find the nouns, and what is worn.
CORPUS = [
    f"{article} {noun} {rest} ."
    for noun in ("man", "dog", "horse", "beach", "shirt", "hat", "ball", "field", "table")
    for article, rest in (("a", "in the park"), ("the", "with a dog"), ("a", "and a man"), ("a young", "on a table"))
] + [f"a man wearing a {thing} in a field" for thing in ("shirt", "hat", "red shirt", "hat", "shirt", "hat")]


@pytest.fixture(scope="module")
def grammar() -> Grammar:
    return Grammar(CORPUS)


def test_nouns_and_clothes_are_found_by_counting(grammar):
    assert {"man", "dog", "horse", "beach", "shirt", "hat", "ball"} <= grammar.nouns
    assert not grammar.nouns & {"young", "a", "the", "in", "wearing", *COLORS}
    assert grammar.worn == {"shirt", "hat"}


@pytest.mark.parametrize(
    ("caption", "phrases"),
    [
        ("A man in a red shirt rides a big brown horse .", ["a man", "a red shirt", "a big brown horse"]),
        ("a black and white dog", ["a black and white dog"]),
        ("Man with the table ball", ["man", "the table ball"]),
        ("two running and a", []),
        ("the", []),
        ("", []),
    ],
)
def test_noun_phrases(grammar, caption, phrases):
    assert [" ".join(phrase.words) for phrase in grammar.phrases(words_of(caption))] == phrases


@pytest.mark.parametrize(
    ("caption", "asked"),
    [
        (
            "A man in a red shirt is riding a horse on the beach .",
            {
                ("color", "what color is the shirt?", "red"),
                ("exists", "is there a man?", "yes"),
                ("exists", "is there a shirt?", "yes"),
                ("exists", "is there a horse?", "yes"),
                ("object", "what is the man wearing?", "shirt"),
            },
        ),
        (
            "a dog chasing a ball",
            {
                ("exists", "is there a dog?", "yes"),
                ("exists", "is there a ball?", "yes"),
                ("action", "what is the dog doing?", "chasing"),
                ("object", "what is the dog chasing?", "ball"),
            },
        ),
        (
            "two dogs on the beach",
            {
                ("count", "how many dogs are there?", "two"),
                ("place", "where are the dogs?", "on the beach"),
                ("object", "what is on the beach?", "dogs"),
            },
        ),
        ("a black and white dog", {("exists", "is there a dog?", "yes")}),  # no single colour
        ("a dog looks at a dog", set()),  # which of the two?
    ],
)
def test_what_a_caption_tells_is_asked(caption, asked):
    corpus = [*CORPUS, *["some dogs , and the dogs on a table with the dogs ."] * 3]
    assert set(Grammar(corpus).ask(caption)) == asked


def test_colliding_answers_are_left_out_and_half_of_existence_is_no(grammar):
    captions = ["a red shirt", "a blue shirt on a man"]
    said = set()
    for seed in range(60):
        questions = ask_sample(grammar, captions, captions, random.Random(seed), 4)
        assert all(question.type != "color" for question in questions)  # red to one, blue to another
        assert len({question.question for question in questions}) == len(questions) <= 4
        for question in questions:
            if question.type == "exists":
                noun = question.question.removesuffix("?").split()[-1]
                assert (question.answers == ["yes"]) == (noun in ("shirt", "man"))
                said.add(question.answers[0])
    assert said == {"yes", "no"}
    assert ask_sample(grammar, [], [], random.Random(0), 4) == []


@pytest.fixture(scope="module")
def captioned(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("captioned") / "shards"
    image = b"\xff\xd8 not decoded here"
    samples = [Sample(f"s{i}", image, captions=[caption, CORPUS[-1 - i]]) for i, caption in enumerate(CORPUS)]
    write_shards(samples, folder, 16)
    return str(folder)


def test_questions_on_texts_never_carry_an_image(captioned):
    samples = list(import_dataset("questions", shards=captioned, about="text", number="4"))
    sources = {sample.key: sample for sample in read_samples(captioned)}
    assert len(samples) > len(CORPUS)
    for sample in samples:
        key, _, number = sample.key.rpartition("-")
        assert sample.image is None
        assert sample.text == sources[key].captions[int(number)]
        assert sample.text not in sample.captions and set(sample.captions) <= set(sources[key].captions)
        assert 1 <= len(sample.questions) <= 4


def test_questions_on_images_keep_their_bytes_and_hide_the_captions(captioned):
    samples = list(import_dataset("questions", shards=captioned, number="2"))
    sources = {sample.key: sample for sample in read_samples(captioned)}
    for sample in samples:
        assert sample.image == sources[sample.key].image
        assert not sample.captions and not sample.text and 1 <= len(sample.questions) <= 2
    assert samples == list(import_dataset("questions", shards=captioned, number="2"))


def test_bad_options_and_shards_without_captions(captioned, tmp_path):
    with pytest.raises(DataError, match="--about 'pictures': one of text, image"):
        list(import_dataset("questions", shards=captioned, about="pictures"))
    with pytest.raises(DataError, match="--number '0'"):
        list(import_dataset("questions", shards=captioned, number="0"))
    write_shards([Sample("a", text="no caption here")], tmp_path / "texts", 1)
    with pytest.raises(DataError, match="no caption that the rules can ask about"):
        list(import_dataset("questions", shards=str(tmp_path / "texts")))


def test_real_captions_make_questions_of_every_type(shared, tmp_path):
    folder = shared / "data/flickr8k"
    captions = import_dataset("jsonl", annotations=folder / "captions.jsonl", images=folder / "images.zip", split="dev")
    write_shards(captions, tmp_path / "dev", 250)
    samples = list(import_dataset("questions", shards=str(tmp_path / "dev"), number="4"))
    assert len(samples) > 900
    answers = {}
    for sample in samples:
        for question in sample.questions:
            answers.setdefault(question.type, []).append(question.answers[0])
    assert set(answers) == {"color", "count", "exists", "action", "object", "place"}
    assert all(len(said) > 150 and len(set(said)) > 1 for said in answers.values())
    assert 0.4 < answers["exists"].count("yes") / len(answers["exists"]) < 0.6
    assert set(answers["color"]) <= COLORS
