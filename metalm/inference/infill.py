"""Infilling by meeting in the middle: one model writes on from the prefix and back from the suffix until the two meet.

    prefix  the cat |  sat   on   the   mat  ->
                                        mat   and  slept | suffix
    1. Each call writes a token on either side.
    2. Met: the last n tokens that the forward side wrote stand in what the backward side wrote, or begin the suffix. A table of
       n-grams finds it at once.
    3. The forward side reads all tokens right of the match in one call, and what it would have written itself is accepted:
       all of it, and the hole is filled; a part, and it goes on from the first token where it disagrees.
    4. Where both sides end without having met, the likelier text, each by its own side, is taken.

With `forward_only`, for any decoder, the forward side writes alone, until it meets the suffix: what infilling is compared with.

M missing tokens on which the sides agree cost ceil((M + n) / 2) + 1 calls instead of M. What the forward side accepts is what
it would have written, so a text that was met on is a prefix of its greedy text (with `threshold` 0).

With synchronous attention each side sees what the other has written while it writes (step 1), so what they write is not what
either would alone. What is verified (step 3) the forward side reads again from the end of the prefix on, on its own: it must
not see what it is to confirm.

Many holes are filled side by side, each of them at its own step: what they want to read next goes into one call. What fills
a hole, and the calls that it takes part in, are those of the hole alone. Cost: with 11 million parameters on one thread,
16 holes at a time take an eighth of the calls of one by one and about half the time (1.8 to 2.3 times as fast), more than half
of which is reading the contexts (`python -m benchmarks.infilling`). Source: "Meet in the Middle" (arXiv 2303.07295), section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from metalm.errors import ConfigError, DataError
from metalm.inference.readings import Reading, Readings, Reply, Request
from metalm.model import MetaLM
from metalm.objectives.mim import MIM

FORWARD, BACKWARD = 0, 1  # sides


@dataclass
class InfillConfig:
    """How long, and when the sides have met.

    Attributes:
        max_new_tokens: of either side.
        ngram: tokens that must agree before anything is verified.
        threshold: 0 accepts the forward side's likeliest tokens alone, else all those of at least this probability.
        predict_suffix: the forward side must also predict the first token of the suffix.
        forward_only: nothing is written from the suffix back.
    """

    max_new_tokens: int = 64
    ngram: int = 4
    threshold: float = 0.0
    predict_suffix: bool = False
    forward_only: bool = False

    def __post_init__(self):
        if self.max_new_tokens < 1 or self.ngram < 1:
            raise ConfigError("max_new_tokens and ngram must be at least 1")
        if not 0 <= self.threshold <= 1:
            raise ConfigError(f"threshold {self.threshold} is not a probability")


@dataclass(frozen=True)
class Hole:
    """The tokens before and after it, without special ones."""

    prefix: Sequence[int]
    suffix: Sequence[int]

    def __len__(self) -> int:
        """Tokens of the longer side."""
        return max(len(self.prefix), len(self.suffix))


@dataclass
class Infilling:
    """What fills a hole, and at what cost.

    Attributes:
        tokens: between prefix and suffix.
        ended: "met", or the side whose text was taken: "forward" or "backward".
        calls: of the model, one after another, that the hole took part in, the reading of prefix and suffix included.
        accepted: how many tokens each verification accepted.
    """

    tokens: list[int]
    ended: str
    calls: int
    accepted: list[int] = field(default_factory=list)


class Meetings:
    """Finds where the forward side's last n-gram stands among what is right of the hole: O(1) a step."""

    def __init__(self, suffix: Sequence[int], n: int):
        self.n = n
        self.right = list(reversed(suffix))  # from the far end of the suffix to the newest backward token
        self.suffix = len(suffix)
        self.ends: dict[tuple[int, ...], int] = {}
        self._remember()

    def _remember(self) -> None:
        if len(self.right) >= self.n:
            self.ends[tuple(self.right[: -self.n - 1 : -1])] = len(self.right)

    def write(self, token: int) -> None:
        self.right.append(token)
        self._remember()

    @property
    def length(self) -> int:
        """Tokens that the backward side wrote."""
        return len(self.right) - self.suffix

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


class Filling:
    """A hole that is being filled.

    Args:
        ends: the tokens that end a forward and a backward reading, as sides that found no way to the other; the backward one
            is where the forward side starts.
        synchronous: the sides look at each other while they write.
    """

    def __init__(self, hole: Hole, ends: tuple[int, int], r2l_token: int, config: InfillConfig, synchronous: bool = False):
        self.hole, self.ends, self.config, self.synchronous = hole, ends, config, synchronous
        self.contexts = [ends[BACKWARD], *hole.prefix], [r2l_token, *reversed(hole.suffix)]
        self.forward: list[int] = []
        self.meetings = Meetings(hole.suffix, config.ngram)
        self.scores = [0.0, 0.0]
        self.open_sides = [True, not config.forward_only]

    def steps(self) -> Generator[Request, Reply, Infilling]:
        """Yields what the sides read next, is sent what that predicts, and returns what fills the hole."""
        hole, config, forward, meetings, open_sides = self.hole, self.config, self.forward, self.meetings, self.open_sides
        reads = [Reading(0, context) if is_open else None for context, is_open in zip(self.contexts, open_sides)]
        replies = yield self.request(*reads)
        calls, accepted = 1, []
        while True:
            reads = [self.write(side, replies[side][-1]) if open_sides[side] else None for side in (FORWARD, BACKWARD)]
            while open_sides[FORWARD] and (met := meetings.find(forward[-config.ngram :])):
                rest, overlap = met
                expected = [*rest, hole.suffix[0]] if config.predict_suffix and hole.suffix and not overlap else rest
                if not expected:
                    return Infilling(forward[: len(forward) - overlap], "met", calls, accepted)
                logits_TV, _ = yield self.verification(rest), None
                calls += 1
                agreed = agreement(logits_TV, expected, config.threshold)
                accepted.append(min(agreed, len(rest)))
                if agreed == len(expected):
                    return Infilling(forward + rest, "met", calls, accepted)
                forward += rest[:agreed]
                reads[FORWARD] = self.write(FORWARD, logits_TV[agreed])
            if not any(open_sides) and config.forward_only:
                return Infilling(forward, "forward", calls, accepted)
            if not any(open_sides):
                return fall_back(forward, meetings.written, self.scores, calls, accepted)
            replies = yield self.request(*reads)
            calls += 1

    def written(self, side: int) -> int:
        return (len(self.forward), self.meetings.length)[side]

    def write(self, side: int, logits_V: Tensor) -> Reading | None:
        """A side's next token, which it then has to read; None where it ends."""
        length = self.written(side)
        token = int(logits_V.argmax())
        self.scores[side] += float(logits_V.log_softmax(-1)[token])
        if length >= self.config.max_new_tokens or token == self.ends[side]:
            self.open_sides[side] = False
            return None
        self.forward.append(token) if side == FORWARD else self.meetings.write(token)
        return Reading(len(self.contexts[side]) + length, [token])

    def request(self, forward: Reading | None, backward: Reading | None) -> Request:
        """The sides' readings, which look across up to their own step, or to where the other side has come."""
        if not self.synchronous:
            return forward, backward
        step = min(map(self.written, (FORWARD, BACKWARD)))
        ends = [len(context) - 1 + step for context in self.contexts]
        return forward and forward._replace(across=ends[BACKWARD]), backward and backward._replace(across=ends[FORWARD])

    def verification(self, rest: list[int]) -> Reading:
        """The forward side's newest token, which it has to read anyway, and what shall follow it; after looking across it reads
        all that it wrote again."""
        start = len(self.contexts[FORWARD]) - 1
        read = 0 if self.synchronous else len(self.forward)
        return Reading(start + read, [self.contexts[FORWARD][-1], *self.forward][read:] + rest, 1 + len(rest))


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


@torch.inference_mode()
def side_by_side(
    fillings: Sequence[Generator[Request, Reply, Infilling]],
    read: Callable[[Mapping[int, Request]], Mapping[int, Reply]],
    drop: Callable[[int], None],
) -> list[Infilling]:
    """Takes fillings to their ends, those that can go on together in one call.

    Args:
        read: what the holes' requests predict, by the holes' numbers, in one call.
        drop: told which hole is filled.
    """
    found: dict[int, Infilling] = {}
    requests = {n: next(filling) for n, filling in enumerate(fillings)}
    while requests:
        for n, reply in read(together(requests)).items():
            try:
                requests[n] = fillings[n].send(reply)
            except StopIteration as end:
                found[n] = end.value
                del requests[n]
                drop(n)
    return [found[n] for n in range(len(fillings))]


def together(requests: Mapping[int, Request]) -> dict[int, Request]:
    """Those that share the next call: rows that read one token or rows that read many, so that the former are not padded to
    the latter's length; those that are more."""
    kinds: tuple[dict[int, Request], dict[int, Request]] = ({}, {})
    for n, request in requests.items():
        kinds[max(len(reading.tokens) for reading in request if reading) > 1][n] = request
    return max(kinds, key=len)


def infill(
    model: MetaLM, holes: Sequence[Hole], start: int, end: int, config: InfillConfig | None = None
) -> tuple[list[Infilling], int]:
    """What fills each hole, and how many calls of the model all of them took together.

    Raises:
        ConfigError: the model reads in one direction only, and shall write from both sides.
        DataError: prefix, suffix and what is to be written do not fit the model's positions.
    """
    config = config or InfillConfig()
    if not (config.forward_only or isinstance(model, MIM)):
        raise ConfigError(
            f"the model {model.config.type!r} reads from left to right only: infilling from both sides needs one that was "
            "trained as 'mim'; with forward_only it goes on from the prefix until it meets the suffix"
        )
    decoder = model.config.decoder
    longest = max(map(len, holes), default=0) + 1 + 2 * config.max_new_tokens
    if decoder.positions == "learned" and longest > decoder.max_positions:
        raise DataError(f"a prefix or suffix leaves no room for {config.max_new_tokens} tokens in {decoder.max_positions}")
    readings = Readings(model, len(holes), longest)
    r2l_token = getattr(model.config, "r2l_token", -1)
    synchronous = getattr(model.config, "synchronous", 0) > 0 and not config.forward_only
    fillings = [Filling(hole, (end, start), r2l_token, config, synchronous).steps() for hole in holes]
    return side_by_side(fillings, readings, readings.drop), readings.calls
