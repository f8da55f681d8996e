"""Infilling: oracles with known call counts, real models against recomputation without a cache."""

from __future__ import annotations

import copy
import math
import random

import pytest
import torch

from metalm.config import build
from metalm.errors import ConfigError, DataError
from metalm.inference.infill import BACKWARD, FORWARD, Filling, Hole, InfillConfig, Infilling, Meetings, infill, side_by_side
from metalm.inference.readings import Reading, Readings
from metalm.model import MetaLM, MetaLMConfig
from metalm.objectives.mim import MIM, MIMConfig
from metalm.segments import Document, Text, make_batch

START, END, R2L, VOCABULARY = 0, 1, 2, 1200
PREFIX, SUFFIX = [10, 11, 12], [13, 14, 15, 16, 17]


class Oracle:
    """Sides that know what they would write: functions from the tokens written so far to the next one."""

    def __init__(self, forward, backward):
        self.next = (forward, backward)
        self.read: tuple[list[int], list[int]] = ([], [])
        self.calls = 0

    def logits(self, token: int) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.tensor(token), VOCABULARY) * 9.0

    def reply(self, request):
        """Logits of both sides, which read what they are asked to and forget what they had after it."""
        self.calls += 1
        return tuple(reading and self.go_on(side, reading) for side, reading in enumerate(request))

    def go_on(self, side: int, reading: Reading) -> torch.Tensor:
        read = self.read[side]
        assert reading.first <= len(read), "nothing is skipped"
        read[reading.first :] = reading.tokens
        context = 1 + len((PREFIX, SUFFIX)[side])
        ends = range(len(read) - reading.predict + 1, len(read) + 1)
        return torch.stack([self.logits(self.next[side](read[context:end])) for end in ends])


def fill(oracles: list[Oracle], **config) -> tuple[list[Infilling], int]:
    """What fills the holes, and in how many calls that all share."""
    calls = 0

    def read(requests):
        nonlocal calls
        calls += 1
        return {n: oracles[n].reply(request) for n, request in requests.items()}

    hole, config = Hole(PREFIX, SUFFIX), InfillConfig(**config)
    filled: list[int] = []
    found = side_by_side([Filling(hole, (END, START), R2L, config).steps() for _ in oracles], read, filled.append)
    assert sorted(filled) == list(range(len(oracles)))
    assert [one.calls for one in found] == [oracle.calls for oracle in oracles]
    return found, calls


def knows(text: list[int], then: int):
    """Writes the text, then `then` for ever."""
    return lambda read: text[len(read)] if len(read) < len(text) else then


def agreeing(middle: list[int]) -> Oracle:
    """Sides that know prefix, middle and suffix by heart."""
    return Oracle(knows(middle + SUFFIX, END), knows(middle[::-1] + PREFIX[::-1], START))


def run(oracle: Oracle, **config) -> Infilling:
    [result], calls = fill([oracle], **config)
    assert result.calls == calls
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


def noisy(seed: int) -> Oracle:
    rng = random.Random(seed)
    truth = [rng.randrange(100, 106) for _ in range(rng.randint(0, 50))]
    noise = [token if rng.random() < 0.9 else rng.randrange(100, 106) for token in truth]
    return Oracle(knows(truth + SUFFIX, END), knows(noise[::-1] + PREFIX[::-1], START))


@pytest.mark.parametrize("config", [{}, {"ngram": 1}, {"ngram": 2, "predict_suffix": True}, {"max_new_tokens": 12}])
def test_holes_side_by_side_are_filled_as_each_alone(config):
    alone = [run(noisy(seed), **config) for seed in range(24)]
    together, calls = fill([noisy(seed) for seed in range(24)], **config)
    assert together == alone
    assert {one.ended for one in alone} >= {"met"} and len({one.calls for one in alone}) > 5
    assert max(one.calls for one in alone) <= calls < sum(one.calls for one in alone) / 4


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
def test_cached_readings_equal_reading_all_anew(model):
    rng = random.Random(0)
    words = lambda low, high: [rng.randrange(3, 24) for _ in range(rng.randint(low, high))]  # noqa: E731
    sides = {n: ([START, *words(0, 9)], [R2L, *words(0, 9)]) for n in range(5)}
    readings = Readings(model, 5, longest=80)

    def check(requests):
        for n, replies in readings(requests).items():
            for side, reading, logits in zip(sides[n], requests[n], replies):
                assert (reading is None) == (logits is None)
                if reading:
                    side[reading.first :] = reading.tokens
                    expected = logits_after(model, side)[-reading.predict :]
                    assert torch.allclose(logits, expected, rtol=0, atol=1e-6)

    check({n: (Reading(0, list(forward)), Reading(0, list(backward))) for n, (forward, backward) in sides.items()})
    for turn in range(40):
        if turn in (15, 25):
            gone = rng.choice(sorted(sides))
            readings.drop(gone)
            del sides[gone]
        requests = {}
        for n in rng.sample(sorted(sides), rng.randint(1, len(sides))):
            request = [None, None]
            for side in rng.sample((FORWARD, BACKWARD), rng.randint(1, 2)):
                tokens = words(1, 6) if turn % 3 == 2 else words(1, 1)
                first = len(sides[n][side]) - (rng.randint(0, 2) if turn % 4 == 3 and len(sides[n][side]) > 3 else 0)
                request[side] = Reading(first, tokens, rng.randint(1, len(tokens)))
            requests[n] = tuple(request)
        check(requests)
    assert readings.calls == 41


@torch.inference_mode()
def greedy(model: MIM, prefix: list[int], length: int) -> list[int]:
    text = [START, *prefix]
    for _ in range(length):
        text.append(int(logits_after(model, text)[-1].argmax()))
    return text[1 + len(prefix) :]


def make_holes(number: int) -> list[Hole]:
    rng = random.Random(0)
    return [Hole(*([rng.randrange(3, 24) for _ in range(rng.randint(0, 6))] for _ in range(2))) for _ in range(number)]


def test_infilling_writes_what_greedy_decoding_writes(model):
    holes = make_holes(30)
    found, _ = infill(model, holes, START, END, InfillConfig(max_new_tokens=24, ngram=1))
    for hole, one in zip(holes, found):
        if one.ended in ("met", "forward"):
            assert one.tokens == greedy(model, hole.prefix, 24)[: len(one.tokens)]
    assert any(one.ended == "met" for one in found)


def test_the_forward_side_alone_writes_until_it_meets_the_suffix(model):
    """Greedily, one token a call: what infilling from both sides is compared with; any decoder does."""
    decoder = MetaLM(MetaLMConfig(model.config.decoder)).double().eval()
    decoder.load_state_dict(model.state_dict())
    holes = make_holes(30)
    # Every second one meets its suffix after three tokens, if not before.
    holes = [Hole(h.prefix, [greedy(model, h.prefix, 4)[3]] if n % 2 else h.suffix or [5]) for n, h in enumerate(holes)]
    found, _ = infill(decoder, holes, START, END, InfillConfig(max_new_tokens=24, ngram=1, forward_only=True))
    for hole, one in zip(holes, found):
        written = greedy(model, hole.prefix, 25)
        stop = next((n for n, token in enumerate(written[:24]) if token in (hole.suffix[0], END)), 24)
        ended = "met" if stop < 24 and written[stop] == hole.suffix[0] else "forward"
        assert (one.tokens, one.ended, one.calls) == (written[:stop], ended, min(stop, 24) + 1)
    assert "met" in {one.ended for one in found}
    with pytest.raises(ConfigError, match="reads from left to right only"):
        infill(decoder, holes, START, END)


@pytest.mark.parametrize("config", [{"ngram": 1}, {"ngram": 2}, {"ngram": 1, "threshold": 0.03, "predict_suffix": True}])
def test_a_model_fills_holes_side_by_side_as_each_alone(model, config):
    holes, config = make_holes(20), InfillConfig(max_new_tokens=24, **config)
    alone = [infill(model, [hole], START, END, config) for hole in holes]
    together, calls = infill(model, holes, START, END, config)
    assert together == [one for [one], _ in alone]
    assert all(one.calls == own_calls for [one], own_calls in alone)
    assert any(one.accepted for one in together), "some of them verify while others go on"
    assert max(one.calls for one in together) <= calls < sum(one.calls for one in together) / 4
    assert infill(model, [], START, END, config) == ([], 0)


def test_bad_settings_and_too_long_texts():
    for config in ({"ngram": 0}, {"threshold": 1.5}, {"max_new_tokens": 0}):
        with pytest.raises(ConfigError, match=next(iter(config))):
            InfillConfig(**config)
    decoder = {"layers": 1, "width": 8, "heads": 1, "max_positions": 32, "vocab_size": 24, "positions": "learned"}
    small = MIM(build(MIMConfig, {"decoder": decoder, "r2l_token": R2L}, "test")).eval()
    with pytest.raises(DataError, match="leaves no room for 64 tokens in 32"):
        infill(small, [Hole([3, 4], [5])], START, END, InfillConfig(max_new_tokens=64))


@torch.inference_mode()
def test_in_bfloat16_laid_out_for_inference_a_cache_gives_what_none_gives(model):
    """Contexts are read in bfloat16, single tokens in float32, into the same cache: logits to bfloat16's rounding."""
    rounded = copy.deepcopy(model).bfloat16()
    exact = copy.deepcopy(rounded).double()
    rounded.decoder.prepare_for_inference()
    sides = [START, *range(3, 15)], [R2L, *range(4, 16)]
    readings = Readings(rounded, 1, longest=40)
    requests = Reading(0, list(sides[0])), Reading(0, list(sides[1]))
    for token in (5, 9, 20):
        for side, logits in zip(sides, readings({0: requests})[0]):
            expected = logits_after(exact, side)[-1]
            assert (logits[-1] - expected).abs().mean() < 0.05 * expected.abs().mean()
        requests = tuple(Reading(len(side), [token]) for side in sides)
        for side in sides:
            side.append(token)
