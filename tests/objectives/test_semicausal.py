"""The semi-causal layout: which spans are drawn, and what becomes of the text around them."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise

import pytest
from layouts import inputs_and_targets

from metalm.errors import ConfigError
from metalm.objectives.semicausal import SemiCausal, SemiCausalConfig, sample_spans
from metalm.segments import IGNORE, Document, Span, Text

PAPER = SemiCausalConfig("semicausal")


class Reader:
    """The text encoder as a layout sees it, one state a token."""

    text_room = 512

    def read_tokens(self, tokens: list[int], first_target: int = IGNORE) -> Span:
        return Span("text", {"tokens": tokens}, len(tokens), first_target)


def check(spans: list[tuple[int, int]], length: int) -> int:
    """Checks that spans are in order, apart from each other and inside the document; returns their total."""
    assert all(1 <= s < e <= length - 1 for s, e in spans)
    assert all(before < s for (_, before), (s, _) in pairwise(spans))
    return sum(e - s for s, e in spans)


def test_the_papers_2048_tokens():
    """512 tokens in 4 to 8 spans of 64 to 128."""
    for seed in range(200):
        spans = sample_spans(2048, PAPER, random.Random(seed))
        assert check(spans, 2048) == 512
        assert 4 <= len(spans) <= 8
        assert all(64 <= e - s <= 128 for s, e in spans)


def test_any_length_gets_its_quarter():
    for seed in range(300):
        rng = random.Random(seed)
        length = rng.randint(0, 3000)
        spans = sample_spans(length, PAPER, rng)
        assert check(spans, length) == round(0.25 * length)
        if length >= 4 * 64:
            assert all(64 <= e - s <= 128 for s, e in spans)
        else:  # too short for one: a single, shorter span
            assert len(spans) == (1 if round(0.25 * length) else 0)


def test_any_configuration():
    for seed in range(200):
        rng = random.Random(seed)
        shortest = rng.randint(1, 20)
        config = SemiCausalConfig("semicausal", shortest, rng.randint(shortest, 60), rng.uniform(0.01, 0.99))
        length = rng.randint(2, 400)
        spans = sample_spans(length, config, rng)
        total = check(spans, length)
        assert total <= round(config.ratio * length)
        assert all(e - s <= config.max_length for s, e in spans)
        assert sum(e - s < config.min_length for s, e in spans) <= 1
        if config.ratio < 0.5 and config.min_length > 1:  # there is room for the gaps
            assert total == round(config.ratio * length)


def test_lengths_are_uniform():
    """Of 16 spans or more the last two alone are bound by the exact total."""
    lengths = Counter()
    for seed in range(1500):
        lengths.update(e - s for s, e in sample_spans(8 * 2048, PAPER, random.Random(seed)))
    total = sum(lengths.values())
    assert set(lengths) == set(range(64, 129))
    for low in range(64, 128, 13):
        share = sum(lengths[n] for n in range(low, low + 13)) / total
        assert 0.18 < share < 0.22, (low, share)


def test_positions_are_spread_over_the_document():
    covered = [0] * 2048
    draws = 2000
    for seed in range(draws):
        for s, e in sample_spans(2048, PAPER, random.Random(seed)):
            for position in range(s, e):
                covered[position] += 1
    assert covered[0] == covered[-1] == 0
    for start in range(64, 2048 - 64, 64):  # near the ends there are fewer ways to lie
        share = sum(covered[start : start + 64]) / (64 * draws)
        assert 0.2 < share < 0.32, (start, share)


def test_the_layout_is_the_papers():
    """Read at the decoder: embeddings outside the spans, the boundary tokens of each span predicted, its inner ones not."""
    config = SemiCausalConfig("semicausal", min_length=2, max_length=4, ratio=0.3)
    for seed in range(50):
        tokens = list(range(100, 130))
        segments = SemiCausal(config).lay_out(tokens, Reader(), random.Random(seed))
        inputs, targets = inputs_and_targets(Document(segments))
        spans = sample_spans(30, config, random.Random(seed))
        assert [(len(s), s.inputs["tokens"]) for s in segments if isinstance(s, Span)] == [
            (e - s, tokens[s:e]) for s, e in spans
        ]
        inside = {t for s, e in spans for t in range(s, e)}
        inner = {t for s, e in spans for t in range(s + 1, e)}
        assert inputs == [0 if t in inside else tokens[t] for t in range(30)]
        assert targets == [IGNORE if t + 1 in inner else tokens[t + 1] for t in range(29)] + [IGNORE]


def test_a_text_too_short_for_a_span_is_causal():
    assert SemiCausal(PAPER).lay_out([1, 2], Reader(), random.Random(0)) == [Text([1, 2])]


def test_a_span_longer_than_the_encoder_is_refused():
    reader = Reader()
    reader.text_room = 60
    with pytest.raises(ConfigError, match=r"a span of \d+ tokens exceeds the text encoder's 60 positions"):
        SemiCausal(PAPER).lay_out(list(range(2048)), reader, random.Random(0))


@pytest.mark.parametrize("change", [{"min_length": 0}, {"min_length": 9, "max_length": 8}, {"ratio": 0.0}, {"ratio": 1.0}])
def test_impossible_settings_are_refused(change):
    with pytest.raises(ConfigError, match="|".join(change)):
        SemiCausalConfig("semicausal", **change)
