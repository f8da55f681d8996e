"""Questions made from captions by rule: what captioned pictures, or captions alone, can teach about answering.

    a man in a red shirt is riding a horse on the beach

    color    what color is the shirt?      red          a single colour before a noun
    count    how many horses …             (two horses on …: two)
    exists   is there a horse? yes         is there a dog? no: a noun that no caption of the sample has
    action   what is the man doing?        riding
    object   what is the man riding?       horse        verb and object; also "what is on the beach?"
    place    where is the man?             on the beach

After COCO-QA (Ren, Kiros and Zemel, 2015), which needs a parser; here noun phrases are found by closed word classes and
counts over the captions themselves: a noun is a word that often ends what an article begins. That takes a second for
10,000 captions and misses much, but what it asks is nearly always right: nine in ten of Flickr8k's.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise, zip_longest

from metalm.data.sample import Question, Sample
from metalm.data.shards import read_samples
from metalm.errors import DataError


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


COLORS = _words("red green blue yellow purple orange black white brown gray grey pink tan")
NUMBERS = _words("one two three four five six seven eight nine ten")
SEVERAL = NUMBERS - {"one"} | {"some", "several", "many"}
OPENERS = NUMBERS | SEVERAL | _words("a an the his her its their another")
PLACES = _words("in on at near behind beside under through along across over inside")
FUNCTION_WORDS = _words(
    "of with by from to into onto around against between up down off out for next outside above below toward towards while as "
    "and or is are was were be that which who whose where but there has have it he she they them him front top"
)
CLOSED = OPENERS | PLACES | FUNCTION_WORDS
LINKS = _words("and while as , .")  # what may stand before the doer of something
PLURALS = _words("people men women children")
WORD = re.compile(r"[a-z'-]+|[.,;]")
LEAST = 3  # times that a noun must be seen as one


@dataclass(frozen=True)
class Phrase:
    """A noun phrase: the words `start` to `end` of a caption, the last of which is the noun."""

    start: int
    end: int
    words: tuple[str, ...]

    @property
    def noun(self) -> str:
        return self.words[-1]

    @property
    def is_plural(self) -> bool:
        return self.words[0] in SEVERAL or self.noun in PLURALS or (self.noun.endswith("s") and not self.noun.endswith("ss"))

    @property
    def colors(self) -> list[str]:
        return [word for word in self.words if word in COLORS]

    @property
    def be(self) -> str:
        return "are" if self.is_plural else "is"

    @property
    def is_one(self) -> bool:
        return self.words[0] in ("a", "an") and not self.is_plural


def words_of(caption: str) -> list[str]:
    return [*WORD.findall(caption.lower()), "."]


def is_boundary(word: str) -> bool:
    return word in CLOSED or not word[0].isalpha() or word.endswith("ing")


class Grammar:
    """What is a noun, and what is worn, by the captions of a corpus."""

    def __init__(self, captions: Iterable[str]):
        texts = [words_of(caption) for caption in captions]
        seen, opened, whole = Counter(), Counter(), Counter()
        for words in texts:
            seen.update(words)
            for before, word, after in zip(words, words[1:], words[2:]):
                if before in OPENERS or before in COLORS:
                    opened[word] += 1
                    whole[word] += is_boundary(after)
        self.nouns = {
            word
            for word, count in whole.items()
            if count >= LEAST and count >= 0.3 * opened[word] and opened[word] >= 0.1 * seen[word]
            if word[0].isalpha() and word not in CLOSED | COLORS
        }
        phrases, worn, self.frequency = Counter(), Counter(), Counter()
        for words in texts:
            for phrase in self.phrases(words):
                phrases[phrase.noun] += 1
                worn[phrase.noun] += words[phrase.start - 1] == "wearing"
                self.frequency[phrase.noun] += phrase.is_one
        self.worn = {noun for noun, count in worn.items() if count >= LEAST and count >= 0.03 * phrases[noun]}

    def phrases(self, words: list[str]) -> list[Phrase]:
        """The noun phrases in order: those that begin with an article, a number, a colour, or the caption."""
        found, start = [], 0
        while start < len(words):
            end = self._end(words, start)
            if end:
                found.append(Phrase(start, end, tuple(words[start:end])))
            start = end or start + 1
        return found

    def _end(self, words: list[str], start: int) -> int:
        """Where the noun phrase that begins at `start` ends, after the first run of nouns; 0 if none begins there."""
        end = start
        if words[start] in OPENERS or words[start] in COLORS:
            while end == start or words[end] in COLORS or (words[end] not in self.nouns and not is_boundary(words[end])):
                pair = words[end] in COLORS and words[end + 1] == "and" and words[end + 2] in COLORS  # black and white
                end += 3 if pair else 1
        elif start > 0:
            return 0
        first = end
        while words[end] in self.nouns:
            end += 1
        return end if end > first else 0

    def ask(self, caption: str) -> Iterator[tuple[str, str, str]]:
        """(type, question, answer) of all that the caption tells; "is there" only with yes."""
        words = words_of(caption)
        phrases = self.phrases(words)
        nouns = Counter(phrase.noun for phrase in phrases)
        phrases = [phrase for phrase in phrases if nouns[phrase.noun] == 1]  # "the dog" of two dogs is no question
        doers = [
            phrase for phrase in phrases if phrase.start == 0 or words[phrase.start - 1] in ("and", "while", "as", ",", ".")
        ]
        for phrase in phrases:
            noun, be = phrase.noun, phrase.be
            if len(phrase.colors) == 1:
                yield "color", f"what color {be} the {noun}?", phrase.colors[0]
            if phrase.words[0] in NUMBERS and (noun in PLURALS or noun.endswith("s")):
                yield "count", f"how many {noun} are there?", phrase.words[0]
            if phrase.is_one:
                yield "exists", f"is there {with_article(noun)}?", "yes"
        for phrase in doers:
            noun, be = phrase.noun, phrase.be
            verb = next((word for word in words[phrase.end : phrase.end + 2] if word.endswith("ing")), None)
            gap = words[phrase.end : words.index(verb, phrase.end)] if verb else []
            if verb and verb not in self.nouns and verb != "wearing" and gap in ([], ["is"], ["are"]):
                yield "action", f"what {be} the {noun} doing?", verb
        for first, second in pairwise(phrases):
            between = [word for word in words[first.end : second.start] if word not in ("is", "are")]
            worn = second.noun in self.worn
            if first not in doers:
                continue
            if len(between) == 1 and between[0].endswith("ing") and between[0] not in self.nouns:
                yield "object", f"what {first.be} the {first.noun} {between[0]}?", second.noun
            elif worn and between == ["in"] and first.noun not in self.worn:
                yield "object", f"what {first.be} the {first.noun} wearing?", second.noun
            elif between and between[-1] in PLACES and not worn and not set(between[:-1]) & CLOSED and len(between) < 4:
                yield "place", f"where {first.be} the {first.noun}?", f"{between[-1]} the {second.noun}"
                if len(between) == 1:
                    yield "object", f"what is {between[0]} the {second.noun}?", first.noun


def with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def ask_sample(grammar: Grammar, about: list[str], captions: list[str], rng: random.Random, number: int) -> list[Question]:
    """Up to `number` questions that the captions `about` answer, the types by turns.

    Questions with two answers are left out; half of "is there …?" asks for what none of the sample's `captions` names.
    """
    answers: dict[tuple[str, str], set[str]] = {}
    for caption in about:
        for kind, question, answer in grammar.ask(caption):
            answers.setdefault((kind, question), set()).add(answer)
    by_type: dict[str, list[tuple[str, str]]] = {}
    for (kind, question), said in answers.items():
        if len(said) == 1:
            by_type.setdefault(kind, []).append((question, *said))
    if "exists" in by_type:
        named = {word for caption in captions for word in words_of(caption)}
        drawn = rng.choices(list(grammar.frequency), list(grammar.frequency.values()), k=40)
        absent = [noun for noun in dict.fromkeys(drawn) if not named & {noun, noun + "s", noun + "es"}]
        for i in range(len(by_type["exists"])):
            if absent and rng.random() < 0.5:
                by_type["exists"][i] = f"is there {with_article(absent.pop(0))}?", "no"
    order = rng.sample(list(by_type), len(by_type))
    turns = zip_longest(*([(kind, *found) for found in rng.sample(by_type[kind], len(by_type[kind]))] for kind in order))
    picked = [one for turn in turns for one in turn if one][:number]
    return [Question(str(i), question, [answer], type=kind) for i, (kind, question, answer) in enumerate(picked)]


def questions(shards: str, about: str = "image", number: str = "8") -> Iterator[Sample]:
    """Questions on the captions, or on the images, of shards that have captions.

    Args:
        shards: shards of images with captions.
        about: "image": each image keeps its bytes and gets questions on it; "text": each caption becomes a sample of its own, a
            text without its image, with questions that it answers and the image's other captions as its captions.
        number: at most so many questions a sample.

    Raises:
        DataError: `about` or `number` is something else; there is no caption, or none tells anything that can be asked.
    """
    if about not in ("text", "image"):
        raise DataError(f"importer questions: --about {about!r}: one of text, image")
    if not number.isdigit() or not int(number):
        raise DataError(f"importer questions: --number {number!r}: a number from 1 on")
    grammar = Grammar(caption for sample in read_samples(shards) for caption in sample.captions)
    count = 0
    for sample in read_samples(shards):
        rng = random.Random(sample.key)
        pieces = [[caption] for caption in sample.captions] if about == "text" else [sample.captions]
        for i, piece in enumerate(pieces):
            asked = ask_sample(grammar, piece, sample.captions, rng, int(number))
            if not asked:
                continue
            count += 1
            if about == "text":
                others = [caption for caption in sample.captions if caption not in piece]
                yield Sample(f"{sample.key}-{i}", captions=others, text=piece[0], questions=asked)
            elif sample.image is not None:
                yield Sample(sample.key, sample.image, questions=asked)
    if not count:
        raise DataError(f"{shards}: no caption that the rules can ask about; do the samples have captions?")
