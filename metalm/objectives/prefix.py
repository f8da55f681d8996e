"""A random-length prefix goes to the encoder, the decoder predicts the rest: the paper's text-only batches for
vision-language, prepared like its image-text pairs."""

from __future__ import annotations

import random

from metalm.objectives.base import Objective, TextReader
from metalm.segments import Span, Text


class Prefix(Objective):
    def lay_out(self, tokens: list[int], reader: TextReader, rng: random.Random) -> list[Text | Span]:
        """The encoder reads tokens[1:p] (`<s>` is for the decoder), p uniform so that at least one token is predicted."""
        p = rng.randint(2, max(2, min(len(tokens) - 1, reader.text_room + 1)))
        return [reader.read_tokens(tokens[1:p]), Text(tokens[p:])]
