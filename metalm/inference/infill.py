"""Infilling by meeting in the middle: one model writes on from the prefix and back from the suffix until the two meet.

    prefix  the cat |  sat   on   the   mat  ->
                                        mat   and  slept | suffix
    1. Each call writes a token on either side: both directions are one batch of two rows.
    2. Met: the last n tokens that the forward side wrote stand in what the backward side wrote, or begin the suffix. A table of
       n-grams finds it at once.
    3. The forward side reads all tokens right of the match in one call, and what it would have written itself is accepted:
       all of it, and the hole is filled; a part, and it goes on from the first token where it disagrees.
    4. Where both sides end without having met, the likelier text, each by its own side, is taken.

M missing tokens on which the sides agree cost ceil((M + n) / 2) + 1 calls instead of M. What the forward side accepts is what
it would have written, so a text that was met on is a prefix of its greedy text (with `threshold` 0).

Rows keep one cache: a slot that only one row has filled, or that was given up again, is dead for the other, which the mask
leaves out. Source: "Meet in the Middle" (arXiv 2303.07295), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from metalm.errors import ConfigError, DataError
from metalm.nn.attention import KVCache, Mask, all_of, causal
from metalm.objectives.mim import MIM

FORWARD, BACKWARD = 0, 1  # rows


@dataclass
class InfillConfig:
    """How long, and when the sides have met.

    Attributes:
        max_new_tokens: of either side.
        ngram: tokens that must agree before anything is verified.
        threshold: 0 accepts the forward side's likeliest tokens alone, else all those of at least this probability.
        predict_suffix: the forward side must also predict the first token of the suffix.
    """

    max_new_tokens: int = 64
    ngram: int = 4
    threshold: float = 0.0
    predict_suffix: bool = False

    def __post_init__(self):
        if self.max_new_tokens < 1 or self.ngram < 1:
            raise ConfigError("max_new_tokens and ngram must be at least 1")
        if not 0 <= self.threshold <= 1:
            raise ConfigError(f"threshold {self.threshold} is not a probability")


@dataclass
class Infilling:
    """What fills a hole, and at what cost.

    Attributes:
        tokens: between prefix and suffix.
        ended: "met", or the side whose text was taken: "forward" or "backward".
        calls: of the model, one after another, the reading of prefix and suffix included.
        accepted: how many tokens each verification accepted.
    """

    tokens: list[int]
    ended: str
    calls: int
    accepted: list[int] = field(default_factory=list)


class Readings(Protocol):
    """A forward and a backward reading of prefix and suffix, going on token by token.

    `logits_2V` predicts the next token of either side; a side that is not to go on is fed None.
    """

    logits_2V: Tensor

    def step(self, forward: int | None, backward: int | None) -> None:
        """Reads a token on either side, in one call."""

    def verify(self, kept: int, tokens: Sequence[int]) -> Tensor:
        """Forward logits [len(tokens), V] after each of `tokens`, read in one call after the first `kept` new tokens."""

    def accept(self, count: int) -> None:
        """The forward side has read the first `count` of the verified tokens, and goes on after them."""


class Meetings:
    """Finds where the forward side's last n-gram stands among what is right of the hole: O(1) a step."""

    def __init__(self, suffix: Sequence[int], n: int):
        self.n = n
        self.right = list(reversed(suffix))  # from the far end of the suffix to the newest backward token
        self.suffix = len(self.right)
        self.ends: dict[tuple[int, ...], int] = {}
        self._remember()

    def _remember(self) -> None:
        if len(self.right) >= self.n:
            self.ends[tuple(self.right[: -self.n - 1 : -1])] = len(self.right)

    def write(self, token: int) -> None:
        self.right.append(token)
        self._remember()

    @property
    def written(self) -> list[int]:
        """The backward side's tokens in the order of the text."""
        return self.right[self.suffix :][::-1]

    def find(self, last: Sequence[int]) -> tuple[list[int], int] | None:
        """What the backward side wrote right of the n-gram `last`, and how many of its tokens are the suffix's."""
        end = self.ends.get(tuple(last)) if len(last) == self.n else None
        if end is None:
            return None
        after = end - self.n  # tokens right of the n-gram
        return self.right[self.suffix : after][::-1], max(0, self.suffix - after)


@torch.inference_mode()
def meet(readings: Readings, suffix: Sequence[int], start: int, end: int, config: InfillConfig) -> Infilling:
    """Fills the hole between what `readings` have read.

    Args:
        start, end: the tokens that end a backward and a forward reading, as sides that found no way to the other.
    """
    forward: list[int] = []
    meetings = Meetings(suffix, config.ngram)
    scores = [0.0, 0.0]
    open_sides = [True, True]
    calls, accepted = 1, []

    def write(side: int, logits_V: Tensor) -> int | None:
        length = len(forward) if side == FORWARD else len(meetings.right) - meetings.suffix
        token = int(logits_V.argmax())
        scores[side] += float(logits_V.log_softmax(-1)[token])
        if length >= config.max_new_tokens or token == (end, start)[side]:
            open_sides[side] = False
            return None
        forward.append(token) if side == FORWARD else meetings.write(token)
        return token

    while True:
        pair = [write(side, readings.logits_2V[side]) if open_sides[side] else None for side in (FORWARD, BACKWARD)]
        while open_sides[FORWARD] and (met := meetings.find(forward[-config.ngram :])):
            rest, overlap = met
            expected = [*rest, suffix[0]] if config.predict_suffix and suffix and not overlap else rest
            if not expected:
                return Infilling(forward[: len(forward) - overlap], "met", calls, accepted)
            calls += 1
            logits_TV = readings.verify(len(forward), [forward[-1], *rest])
            agreed = agreement(logits_TV, expected, config.threshold)
            accepted.append(min(agreed, len(rest)))
            if agreed == len(expected):
                return Infilling(forward + rest, "met", calls, accepted)
            forward += rest[:agreed]
            readings.accept(1 + accepted[-1])
            pair[FORWARD] = write(FORWARD, logits_TV[accepted[-1]])
        if not any(open_sides):
            return fall_back(forward, meetings.written, scores, calls, accepted)
        readings.step(*pair)
        calls += 1


def agreement(logits_TV: Tensor, tokens: Sequence[int], threshold: float) -> int:
    """How many of the tokens, from the first on, are accepted."""
    expected_T = torch.tensor(tokens, device=logits_TV.device)
    logits_TV = logits_TV[: len(tokens)]
    right_T = logits_TV.argmax(-1) == expected_T
    if threshold:
        right_T |= logits_TV.softmax(-1).gather(1, expected_T[:, None])[:, 0] >= threshold
    return int(right_T.long().cumprod(0).sum())


def fall_back(forward: list[int], backward: list[int], scores: list[float], calls: int, accepted: list[int]) -> Infilling:
    """The text of the side that finds its own likelier, by token (its end counts as one)."""
    means = [score / (len(text) + 1) for score, text in zip(scores, (forward, backward))]
    if means[FORWARD] >= means[BACKWARD]:
        return Infilling(forward, "forward", calls, accepted)
    return Infilling(backward, "backward", calls, accepted)


class CachedReadings:
    """The readings of a MIM model over one key-value cache of two rows."""

    def __init__(self, model: MIM, prefix: Sequence[int], suffix: Sequence[int], start: int, max_new_tokens: int):
        self.model, self.device = model, next(model.parameters()).device
        rows = [[start, *prefix], [model.config.r2l_token, *reversed(suffix)]]
        longest = max(map(len, rows))
        # Slots of tokens of either side, and of those that are being verified; what is not accepted gives its slot up again.
        self.cache = KVCache(model.config.decoder.layers, longest + 3 * max_new_tokens + 2)
        self.alive_2S = torch.zeros(2, self.cache.capacity, dtype=torch.bool, device=self.device)
        self.lengths = [len(row) for row in rows]  # tokens read
        self.prefix = len(rows[FORWARD])
        tokens_2T = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=self.device)
        position_2T = torch.arange(longest, device=self.device) - torch.tensor([[longest - len(row)] for row in rows]).to(
            self.device
        )
        self.logits_2V = self._read(tokens_2T, position_2T.clamp(min=0), position_2T >= 0)[:, -1]
        self.verified_TV: Tensor | None = None

    def _read(self, tokens: Tensor, positions: Tensor, alive: Tensor) -> Tensor:
        """Logits [2, T, V]; one row alone is the forward one."""
        rows, T = tokens.shape
        first = self.cache.length
        self.alive_2S[:rows, first : first + T] = alive
        alive_2S = self.alive_2S
        # A dead slot sees itself, so that no query is without a key.
        predicate = all_of(causal, lambda b, h, q, k: alive_2S[b, k] | (q == k))
        mask = Mask(predicate, rows, T, first + T, self.device, first_query=first)
        cache = self.cache if rows == 2 else self.cache.first_rows(rows)
        hidden = self.model.decoder(self.model.decoder.embed(tokens), positions, mask, cache)
        self.cache.length = first + T
        return self.model.decoder.logits(hidden).float()

    def step(self, forward: int | None, backward: int | None) -> None:
        tokens = [forward, backward]
        self.logits_2V = self._read(
            torch.tensor([[token or 0] for token in tokens], device=self.device),
            torch.tensor([[length] for length in self.lengths], device=self.device),
            torch.tensor([[token is not None] for token in tokens], device=self.device),
        )[:, -1]
        self.lengths = [length + (token is not None) for length, token in zip(self.lengths, tokens)]

    def verify(self, kept: int, tokens: Sequence[int]) -> Tensor:
        assert self.lengths[FORWARD] == self.prefix + kept - 1, "the newest token is the first to be verified"
        first = self.lengths[FORWARD]
        positions = torch.arange(first, first + len(tokens), device=self.device)[None]
        tokens_1T = torch.tensor([list(tokens)], device=self.device)
        self.verified_TV = self._read(tokens_1T, positions, torch.ones_like(tokens_1T, dtype=torch.bool))[0]
        return self.verified_TV

    def accept(self, count: int) -> None:
        verified = len(self.verified_TV)
        self.cache.length -= verified - count  # the slots of what was not accepted are written again
        self.alive_2S[:, self.cache.length :] = False
        self.lengths[FORWARD] += count


def infill(
    model: MIM, prefix: Sequence[int], suffix: Sequence[int], start: int, end: int, config: InfillConfig | None = None
) -> Infilling:
    """Fills the hole between prefix and suffix, tokens without special ones.

    Raises:
        DataError: prefix, suffix and what is to be written do not fit the model's positions.
    """
    config = config or InfillConfig()
    decoder = model.config.decoder
    longest = max(len(prefix), len(suffix)) + 1 + 2 * config.max_new_tokens
    if decoder.positions == "learned" and longest > decoder.max_positions:
        raise DataError(f"a prefix or suffix leaves no room for {config.max_new_tokens} tokens in {decoder.max_positions}")
    readings = CachedReadings(model, prefix, suffix, start, config.max_new_tokens)
    return meet(readings, suffix, start, end, config)
