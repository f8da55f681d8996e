"""In-context demonstrations: k worked examples before the query, as the paper lays them out.

k x ( [Span(input)] Text(answer </s>) ) [Span(input)] -> answer

Where all queries come after the same demonstrations, a batch reads those once (`metalm.inference.decoding`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TypeVar

from metalm.data.prompts import Interface
from metalm.errors import DataError
from metalm.segments import Document, Span, Text

Example = TypeVar("Example")


def few_shot(
    examples: Sequence[Example],
    pool: Sequence[Example],
    shots: int,
    query: Callable[[Example], list[Text | Span]],
    answer: Callable[[Example], str],
    key: Callable[[Example], str],
    interface: Interface,
    seed: int = 0,
    same: bool = False,
) -> list[Document]:
    """A prompt for each example, after `shots` demonstrations drawn from the pool, never of the example's own sample.

    The draw depends on the seed and the example's key alone, or with `same` on the seed and the pool. With `shots` 0 the pool
    is not used.

    Args:
        key: names an example; up to the first "/" it names the sample (the picture).
        same: draw once, for all; an example whose own sample was drawn gets the next one in its place.

    Raises:
        DataError: the pool is too small.
    """
    prompts = []
    ordered = random.Random(seed).sample(pool, len(pool)) if same else pool
    owners = [key(one).split("/")[0] for one in ordered] if shots else []

    def draw(example: Example) -> list[Example]:
        own = key(example).split("/")[0]
        others = [other for other, owner in zip(ordered, owners) if owner != own]
        if len(others) < shots:
            raise DataError(f"{shots} shots need as many samples to draw from besides {own!r}; there are {len(others)}")
        return others[:shots] if same else random.Random(f"{seed} {key(example)}").sample(others, shots)

    turns: dict[str, list[Text | Span]] = {}  # a demonstration is one object wherever it stands
    for example in examples:
        segments: list[Text | Span] = []
        for demo in draw(example) if shots else []:
            if key(demo) not in turns:
                turns[key(demo)] = interface.answer(query(demo), answer(demo))
            segments += turns[key(demo)]
        prompts.append(Document([*segments, *query(example)], key(example)))
    return prompts
