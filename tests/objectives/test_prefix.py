"""The causal layout, and the layout of a random prefix."""

from __future__ import annotations

import random

import pytest
from layouts import inputs_and_targets

from metalm.objectives import OBJECTIVES
from metalm.objectives.base import ObjectiveConfig
from metalm.objectives.causal import Causal
from metalm.objectives.prefix import Prefix
from metalm.segments import IGNORE, Document, Span, Text


class Reader:
    def __init__(self, text_room: int = 64):
        self.text_room = text_room

    def read_tokens(self, tokens: list[int], first_target: int = IGNORE) -> Span:
        assert len(tokens) <= self.text_room
        return Span("text", {"tokens": tokens}, len(tokens), first_target)


def test_causal_predicts_every_token_but_the_first():
    segments = Causal(ObjectiveConfig("causal")).lay_out([1, 7, 8, 9], Reader(), random.Random(0))
    assert inputs_and_targets(Document(segments)) == ([1, 7, 8, 9], [7, 8, 9, IGNORE])


@pytest.mark.parametrize("room", [3, 64])
def test_a_prefix_is_read_and_the_rest_predicted(room):
    tokens = list(range(100, 112))
    seen = set()
    for seed in range(300):
        span, rest = Prefix(ObjectiveConfig("prefix")).lay_out(tokens, Reader(room), random.Random(seed))
        read = span.inputs["tokens"]
        assert [100, *read, *rest.tokens] == tokens  # `<s>` alone is left out
        inputs, targets = inputs_and_targets(Document([span, rest]))
        assert inputs == [0] * len(read) + list(rest.tokens)
        # The rest's first token is predicted at the prefix's last state.
        assert targets == [IGNORE] * (len(read) - 1) + list(rest.tokens) + [IGNORE]
        seen.add(len(read))
    assert seen == set(range(1, min(room, 10) + 1))


def test_the_shortest_text_still_predicts_a_token():
    span, rest = Prefix(ObjectiveConfig("prefix")).lay_out([1, 5, 2], Reader(), random.Random(0))
    assert span.inputs == {"tokens": [5]} and rest == Text([2])


def test_objectives_are_found_by_name():
    assert {"causal", "prefix", "semicausal"} <= set(OBJECTIVES.names())
    assert OBJECTIVES["prefix"] is Prefix
