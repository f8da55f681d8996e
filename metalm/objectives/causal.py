"""Causal language modelling: every token is predicted from those before it."""

from __future__ import annotations

import random

from metalm.objectives.base import Objective, TextReader
from metalm.segments import Span, Text


class Causal(Objective):
    def lay_out(self, tokens: list[int], reader: TextReader, rng: random.Random) -> list[Text | Span]:
        return [Text(tokens)]
