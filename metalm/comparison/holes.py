"""Holes in held-out texts, as a file for `metalm evaluate infilling`: a few words are taken out of the middle of a text."""

from __future__ import annotations

import json
import random
from pathlib import Path

from metalm.data.shards import read_samples
from metalm.errors import DataError


def write_holes(shards: str, path: str | Path, count: int = 500, words: int = 3, context: int = 40, seed: int = 0) -> int:
    """Writes `count` holes of one to `words` words, with `context` words on either side, as JSON Lines of
    {"task_id", "prompt", "suffix", "canonical_solution"}; returns how many there are.

    A hole begins with the space before its first word, and what comes after it with a space, so that the parts add up to the
    text. Texts too short for a hole with its context are passed over.

    Raises:
        DataError: no text is long enough.
    """
    rng = random.Random(seed)
    texts = [
        words_of
        for words_of in (sample.text.split(" ") for sample in read_samples(shards))
        if len(words_of) > 2 * context + words
    ]
    if not texts:
        raise DataError(f"{shards}: no text of more than {2 * context + words} words to make a hole in")
    weights = [len(text) for text in texts]
    with open(path, "w") as file:
        for number in range(count):
            (text,) = rng.choices(texts, weights)
            length = rng.randint(1, words)
            start = rng.randint(context, len(text) - context - length)
            end = start + length
            row = {
                "task_id": str(number),
                "prompt": " ".join(text[start - context : start]),
                "canonical_solution": "".join(" " + word for word in text[start:end]),
                "suffix": "".join(" " + word for word in text[end : end + context]),
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return count
