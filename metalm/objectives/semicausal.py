"""Semi-causal language modelling: random spans are read bidirectionally, the text between them is predicted causally.

    max  sum_{i=0..k} sum_{t=e_i..s_{i+1}} log P(x_t | x_<t, {h(span j)}_{j<=i})

Spans are drawn as in the paper, 64 to 128 tokens long and a quarter of the document in total, inside one document. Where a
document is too short for that, lengths shrink with it. Cost: O(n) a document. Source: METALM, section 2.3 and figure 3d.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from metalm.errors import ConfigError
from metalm.objectives.base import Objective, ObjectiveConfig, TextReader
from metalm.segments import Span, Text


@dataclass
class SemiCausalConfig(ObjectiveConfig):
    """Span lengths are uniform in [min_length, max_length] and take `ratio` of the tokens."""

    min_length: int = 64
    max_length: int = 128
    ratio: float = 0.25

    def __post_init__(self):
        if not 0 < self.min_length <= self.max_length:
            raise ConfigError(f"min_length {self.min_length} and max_length {self.max_length} must satisfy 0 < min <= max")
        if not 0 < self.ratio < 1:
            raise ConfigError(f"ratio {self.ratio} is not between 0 and 1")


def sample_spans(length: int, config: SemiCausalConfig, rng: random.Random) -> list[tuple[int, int]]:
    """Disjoint half-open spans (s, e) with 1 <= s < e <= length - 1, in order; they never touch.

    The first token stays outside so that something predicts a span's first token, and the last so that something follows.
    Their total is round(ratio x length), exactly: lengths are uniform among those that leave either nothing or room for
    another span. Only where no such length exists is the last span shorter than `min_length`: in a document shorter than
    min_length / ratio, which gets one span of ratio x length tokens, or where max_length < 2 x min_length. Spans for which
    a large ratio leaves no gap are dropped.
    """
    budget = round(config.ratio * length)
    lengths: list[int] = []
    while budget:
        choices = range(config.min_length, min(config.max_length, budget) + 1)
        exact = [n for n in choices if budget - n == 0 or budget - n >= config.min_length]
        lengths.append(rng.choice(exact) if exact else min(config.max_length, budget))
        budget -= lengths[-1]
    rng.shuffle(lengths)
    # Gaps between spans hold at least one token: draw where the remaining free tokens go.
    while lengths and (free := length - sum(lengths) - (len(lengths) + 1)) < 0:
        lengths.pop()
    cuts = sorted(rng.randint(0, free) for _ in lengths)
    spans, shift = [], 1
    for cut, span in zip(cuts, lengths):
        spans.append((cut + shift, cut + shift + span))
        shift += span + 1
    return spans


class SemiCausal(Objective):
    Config = SemiCausalConfig

    def lay_out(self, tokens: list[int], reader: TextReader, rng: random.Random) -> list[Text | Span]:
        segments: list[Text | Span] = []
        end = 0
        for s, e in sample_spans(len(tokens), self.config, rng):
            if e - s > reader.text_room:
                raise ConfigError(f"a span of {e - s} tokens exceeds the text encoder's {reader.text_room} positions")
            segments += [Text(tokens[end:s]), reader.read_tokens(tokens[s:e], tokens[s])]
            end = e
        return [*segments, Text(tokens[end:])]
