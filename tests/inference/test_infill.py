"""Infilling: oracles with known call counts, real models against recomputation without a cache."""

from __future__ import annotations

import math
import random

import pytest
import torch

from metalm.config import build
from metalm.errors import ConfigError, DataError
from metalm.inference.infill import CachedReadings, InfillConfig, Meetings, infill, meet
from metalm.objectives.mim import MIM, MIMConfig
from metalm.segments import Document, Text, make_batch

START, END, R2L, VOCABULARY = 0, 1, 2, 1200
PREFIX, SUFFIX = [10, 11, 12], [13, 14, 15, 16, 17]


class Oracle:
    """Sides that know what they would write: functions from the tokens read so far to the next one."""

    def __init__(self, forward, backward):
        self.next = (forward, backward)
        self.read: tuple[list[int], list[int]] = ([], [])
        self.verified: list[int] = []
        self.calls = 1
        self.logits_2V = self.predict()

    def logits(self, token: int) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.tensor(token), VOCABULARY) * 9.0

    def predict(self) -> torch.Tensor:
        return torch.stack([self.logits(say(read)) for say, read in zip(self.next, self.read)])

    def step(self, forward, backward):
        self.calls += 1
        for read, token in zip(self.read, (forward, backward)):
            read.extend([] if token is None else [token])
        self.logits_2V = self.predict()

    def verify(self, kept, tokens):
        self.calls += 1
        assert len(self.read[0]) == kept - 1
        self.verified = list(tokens)
        return torch.stack([self.logits(self.next[0](self.read[0] + self.verified[: i + 1])) for i in range(len(tokens))])

    def accept(self, count):
        self.read[0].extend(self.verified[:count])


def knows(text: list[int], then: int):
    """Writes the text, then `then` for ever."""
    return lambda read: text[len(read)] if len(read) < len(text) else then


def agreeing(middle: list[int]) -> Oracle:
    """Sides that know prefix, middle and suffix by heart."""
    return Oracle(knows(middle + SUFFIX, END), knows(middle[::-1] + PREFIX[::-1], START))


def run(oracle: Oracle, **config):
    result = meet(oracle, SUFFIX, START, END, InfillConfig(**config))
    assert result.calls == oracle.calls
    return result


@pytest.mark.parametrize("M", [4, 5, 8, 16, 63, 64, 65, 100])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_sides_that_agree_fill_the_hole_in_half_the_calls(M, n):
    middle = list(range(100, 100 + M))
    result = run(agreeing(middle), ngram=n, max_new_tokens=200)
    assert result.tokens == middle and result.ended == "met"
    verified = 1 if math.ceil((M + n) / 2) < M else 0  # nothing is left to verify where the forward side wrote it all
    assert result.calls == math.ceil((M + n) / 2) + verified
    if (M, n) == (64, 4):
        assert result.calls == 35


@pytest.mark.parametrize("M", [0, 1, 2, 3])
def test_a_hole_shorter_than_the_n_gram_is_met_in_the_suffix(M):
    result = run(agreeing(list(range(100, 100 + M))))
    assert result.tokens == list(range(100, 100 + M)) and result.ended == "met" and result.accepted == []


def test_what_the_forward_side_does_not_say_is_not_accepted():
    """The backward side is wrong right of the meeting: the forward side goes on from there, and writes what it would have."""
    middle = list(range(100, 130))
    wrong = [*middle[:25], 999, *middle[26:]]
    oracle = Oracle(knows(middle + SUFFIX, END), knows(wrong[::-1] + PREFIX[::-1], START))
    result = run(oracle)
    assert result.tokens == middle and result.ended == "met"
    assert result.accepted[0] == 25 - 17  # both had 17 tokens when they met: 18 .. 25 are right
    assert result.calls < len(middle)


def test_accepting_by_probability_takes_other_words():
    middle = list(range(100, 130))
    other = [*middle[:25], 999, *middle[26:]]
    oracle = Oracle(knows(middle + SUFFIX, END), knows(other[::-1] + PREFIX[::-1], START))
    oracle.logits = lambda token: (
        torch.nn.functional.one_hot(torch.tensor(token), VOCABULARY) * 9.0 + 8.9 * (torch.arange(VOCABULARY) == 999)
    )
    assert run(oracle, threshold=0.2).tokens == other


def test_the_suffix_may_have_to_be_predicted_too():
    """The forward side would write on after the hole: met, but for the suffix."""
    middle = list(range(100, 120))
    longer = [*middle, 500, 501, 502, 503]
    sides = knows(longer + SUFFIX, END), knows(middle[::-1] + PREFIX[::-1], START)
    assert run(Oracle(*sides)).tokens == middle
    assert run(Oracle(*sides), predict_suffix=True).tokens == longer


def test_sides_that_never_agree_end_and_the_likelier_text_is_taken():
    oracle = Oracle(knows([100] * 50, END), knows([200, 201], START))
    result = run(oracle, max_new_tokens=20)
    assert result.ended in ("forward", "backward") and result.calls <= 22
    unsure = Oracle(knows([100] * 50, END), knows([200, 201], START))
    plain = unsure.logits
    unsure.logits = lambda token: plain(token) * (0.1 if token == 100 else 1)
    unsure.logits_2V = unsure.predict()
    result = run(unsure, max_new_tokens=20)
    assert (result.tokens, result.ended) == ([201, 200], "backward")
    assert run(Oracle(knows([100, 101], END), knows([200] * 50, 200)), max_new_tokens=5).tokens in ([100, 101], [200] * 5)


def test_sides_that_always_seem_to_agree_end_too():
    """Adversarial: from the second call on there is always a match, and never is all that is right of it accepted."""
    oracle = Oracle(lambda read: 100, lambda read: 100 if read else 200)
    result = run(oracle, ngram=1, max_new_tokens=30)
    assert (result.tokens, result.ended) == ([100] * 30, "forward")
    assert len(result.accepted) > 5 and result.calls <= 60


@pytest.mark.parametrize("seed", range(20))
def test_what_is_met_on_is_what_the_forward_side_would_have_written(seed):
    rng = random.Random(seed)
    truth = [rng.randrange(100, 106) for _ in range(40)]
    noise = [token if rng.random() < 0.8 else rng.randrange(100, 106) for token in truth]
    result = run(Oracle(knows(truth + SUFFIX, END), knows(noise[::-1], START)), ngram=3, max_new_tokens=60)
    if result.ended == "met":
        assert result.tokens == (truth + SUFFIX)[: len(result.tokens)]


def test_the_newest_meeting_is_found():
    meetings = Meetings([7, 8, 9], 2)
    for token in (5, 4, 5, 4):  # from right to left: the text reads 4 5 4 5 | 7 8 9
        meetings.write(token)
    assert meetings.written == [4, 5, 4, 5]
    assert meetings.find([4, 5]) == ([4, 5], 0)
    assert meetings.find([5, 7]) == ([], 1)
    assert meetings.find([7, 8]) == ([], 2)
    assert meetings.find([8, 9]) is None  # inside the suffix nothing can be met
    assert meetings.find([5]) is None


# ---- real models ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["rotary", "sinusoidal", "learned"])
def model(request) -> MIM:
    torch.manual_seed(0)
    decoder = {"layers": 2, "width": 16, "heads": 2, "max_positions": 128, "vocab_size": 24, "positions": request.param}
    return MIM(build(MIMConfig, {"decoder": decoder, "r2l_token": R2L}, "test")).double().eval()


def logits_after(model: MIM, tokens: list[int]) -> torch.Tensor:
    return model.decoder.logits(model.hidden(make_batch([[Document([Text(tokens)])]], {})))[0].float()


@torch.inference_mode()
@pytest.mark.parametrize("suffix", [[5, 6, 7, 8, 9, 10, 11], [4], []])
def test_cached_readings_equal_reading_all_anew(model, suffix):
    prefix = [3, 4, 5]
    readings = CachedReadings(model, prefix, suffix, START, 40)
    rng = random.Random(0)
    sides = [[START, *prefix], [R2L, *reversed(suffix)]]

    def check():
        for side, logits in zip(sides, readings.logits_2V):
            assert torch.allclose(logits, logits_after(model, side)[-1], rtol=0, atol=1e-5)

    check()
    new = 0
    for turn in range(12):
        if turn % 3 == 2:  # some tokens are verified, a part of them is accepted
            tokens = [rng.randrange(3, 24) for _ in range(rng.randint(1, 5))]
            logits_TV = readings.verify(new + 1, tokens)
            expected = logits_after(model, sides[0] + tokens)[-len(tokens) :]
            assert torch.allclose(logits_TV, expected, rtol=0, atol=1e-5)
            count = rng.randint(1, len(tokens))
            readings.accept(count)
            sides[0] += tokens[:count]
            new += count
        pair = [rng.randrange(3, 24) if rng.random() < 0.8 else None for _ in sides]
        readings.step(*pair)
        for side, token in zip(sides, pair):
            side.extend([] if token is None else [token])
        new += pair[0] is not None
        read = [token is not None for token in pair]
        for side, logits, fresh in zip(sides, readings.logits_2V, read):
            if fresh:
                assert torch.allclose(logits, logits_after(model, side)[-1], rtol=0, atol=1e-5)


@torch.inference_mode()
def test_infilling_writes_what_greedy_decoding_writes(model):
    met = 0
    for seed in range(30):
        rng = random.Random(seed)
        prefix, suffix = ([rng.randrange(3, 24) for _ in range(rng.randint(0, 6))] for _ in range(2))
        result = infill(model, prefix, suffix, START, END, InfillConfig(max_new_tokens=24, ngram=1))
        greedy = [START, *prefix]
        for _ in range(24):
            greedy.append(int(logits_after(model, greedy)[-1].argmax()))
        if result.ended in ("met", "forward"):
            assert result.tokens == greedy[1 + len(prefix) :][: len(result.tokens)]
        met += result.ended == "met"
    assert met > 0


def test_bad_settings_and_too_long_texts():
    for config in ({"ngram": 0}, {"threshold": 1.5}, {"max_new_tokens": 0}):
        with pytest.raises(ConfigError, match=next(iter(config))):
            InfillConfig(**config)
    decoder = {"layers": 1, "width": 8, "heads": 1, "max_positions": 32, "vocab_size": 24, "positions": "learned"}
    small = MIM(build(MIMConfig, {"decoder": decoder, "r2l_token": R2L}, "test")).eval()
    with pytest.raises(DataError, match="leaves no room for 64 tokens in 32"):
        infill(small, [3, 4], [5], START, END, InfillConfig(max_new_tokens=64))
