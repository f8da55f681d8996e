"""The contract of a text objective: tokens of one document in, segments out; the loss is the model's.

A pretraining mode with a model of its own (MIM, PMLM, cloze) lays out its texts itself, by a `TextLayout`.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Protocol

from metalm.segments import IGNORE, Batch, Document, Span, Text


class TextReader(Protocol):
    """The model's encoder of text, as a layout sees it."""

    text_room: int  # tokens that the encoder takes at once

    def read_tokens(self, tokens: list[int], first_target: int = IGNORE) -> Span:
        """The span in which the encoder reads the tokens."""


class TextLayout(Protocol):
    """Host side of a text-side pretraining mode; small and picklable, for it travels to every data worker.

    Attributes:
        task: of the data's sources that it lays out.
    """

    task: ClassVar[str] = "text"

    def room(self, length: int) -> int:
        """The most tokens that one document can have in a row of `length` positions."""

    def lay_out(self, tokens: list[int], rng: random.Random, key: str) -> Document:
        """A document from its tokens, the first of which is `<s>` or, where a text goes on, the token before."""

    def collate(self, rows: list[list[Document]], length: int) -> Batch:
        """Rows of documents as a batch with rows of `length` positions."""


@dataclass
class ObjectiveConfig:
    """What every objective's `Config` has."""

    type: str


class Objective(ABC):
    Config: ClassVar[type[ObjectiveConfig]] = ObjectiveConfig

    def __init__(self, config: ObjectiveConfig):
        self.config = config

    @abstractmethod
    def lay_out(self, tokens: list[int], reader: TextReader, rng: random.Random) -> list[Text | Span]:
        """Segments of a document that starts with `<s>` and ends with its end token."""
