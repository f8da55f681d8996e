"""Cloze: every token of a text is predicted from all the others at once, without a mask token.

    L = sum_i  -log p(t_i | t_<i, t_>i)                                     cloze, from the combined state h_i
    L = sum_i  -log p(t_i | t_<i) - log p(t_i | t_>i)                       two-direction, from F_{i-1} and from B_{i+1}

    row         <s>  a   b   c  </d> <s>       the same document on both sides of every target
    predicts     -   a   b   c  </d>  -        h_i its own token; F_{i-1} and B_{i+1} that of their neighbour

One softmax, tied with the embeddings, serves all three. Whatever `encoder.combination` says, pretraining masks it in `full`;
the result is the encoder, which docks in METALM as it is. Every token is a target, at the cost of reading it twice.
Source: Baevski et al. 2019 (arXiv 1903.07785), section 3; the two-direction model is that of its ablation.

Shapes: B rows, T positions, L targets, D width.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor

from metalm.encoders.two_tower import TwoTowerConfig, TwoTowerEncoder
from metalm.errors import ConfigError
from metalm.hub import PretrainedModel
from metalm.nn.losses import linear_cross_entropy
from metalm.nn.words import AdaptiveSoftmax
from metalm.objectives.encoder_model import EncoderModelConfig
from metalm.segments import Batch, Document, Text, make_batch


@dataclass(kw_only=True)
class ClozeConfig(EncoderModelConfig):
    """An encoder, and what it is trained on.

    Attributes:
        cloze, two_direction: weights of the two losses.
        cutoffs: where clusters of an adaptive softmax end, which is not tied; none for the flat softmax.
        s_token: filled in from the tokenizer.
    """

    type: str = "cloze"
    encoder: TwoTowerConfig
    cloze: float = 1.0
    two_direction: float = 0.0
    cutoffs: list[int] = field(default_factory=list)
    s_token: int = -1
    special_tokens: ClassVar[tuple[str, ...]] = ("<s>",)

    def __post_init__(self):
        if min(self.cloze, self.two_direction) < 0 or self.cloze + self.two_direction == 0:
            raise ConfigError(
                f"cloze {self.cloze} and two_direction {self.two_direction} are weights: not negative, not both 0"
            )
        self.check_pretraining("two_tower")
        if self.encoder.characters and not self.cutoffs:
            raise ConfigError("encoder.characters needs cutoffs: there are no embeddings to tie the softmax with")


@dataclass
class ClozeLayout:
    """A text between two `<s>`, the first in the place of what came before it."""

    s_token: int
    max_positions: int
    task: ClassVar[str] = "text"

    def room(self, length: int) -> int:
        return min(length, self.max_positions) - 1

    def lay_out(self, tokens: list[int], rng: random.Random, key: str) -> Document:
        return Document([Text([self.s_token, *tokens[1:]]), Text([self.s_token], target=False)], key)

    def collate(self, rows: list[list[Document]], length: int) -> Batch:
        """`places_L` hold the targets themselves, not the positions before them."""
        batch = make_batch(rows, {}, length)
        return replace(batch, places_L=batch.places_L + 1)


class Cloze(PretrainedModel):
    """A two-tower encoder with a softmax on it.

    Attributes:
        encoder: docks in METALM as it is.
        parts: of the last batch, sums in nats and counts of "cloze", "forward" and "backward", as far as they have weight.
    """

    Config = ClozeConfig

    def __init__(self, config: ClozeConfig):
        super().__init__()
        self.encoder = TwoTowerEncoder(config.encoder)
        if not 0 <= config.s_token < config.encoder.vocab_size:
            raise ConfigError(f"s_token is {config.s_token}, it must be a token of the encoder's vocabulary")
        self.config = config
        self.layout = ClozeLayout(config.s_token, config.encoder.max_positions)
        self.processors: dict = {}
        self.parts: dict[str, tuple[Tensor, int]] = {}
        if config.cutoffs:
            self.softmax = AdaptiveSoftmax(config.encoder.width, config.encoder.vocab_size, config.cutoffs)

    def hidden(self, batch: Batch) -> tuple[Tensor | None, Tensor, Tensor]:
        """Combined states (None where cloze has no weight), forward and backward ones, [B, T, D] each."""
        forward_BTD, backward_BTD = self.encoder.towers(batch.tokens_BT, batch.document_BT, batch.position_BT)
        if not self.config.cloze:
            return None, forward_BTD, backward_BTD
        return self.encoder.combination(forward_BTD, backward_BTD, batch.document_BT, "full"), forward_BTD, backward_BTD

    def num_predictions(self, batch: Batch) -> int:
        return batch.num_targets * ((self.config.cloze > 0) + 2 * (self.config.two_direction > 0))

    def forward(self, batch: Batch) -> Tensor:
        """The weighted losses, summed over the batch's targets, in nats."""
        combined_BTD, forward_BTD, backward_BTD = self.hidden(batch)
        read: dict[str, tuple[float, Tensor, Tensor]] = {}  # weight, states, and which of them predict
        if self.config.cloze:
            read["cloze"] = self.config.cloze, combined_BTD, batch.places_L
        if self.config.two_direction:
            read["forward"] = self.config.two_direction, forward_BTD, batch.places_L - 1
            read["backward"] = self.config.two_direction, backward_BTD, batch.places_L + 1
        loss = 0.0
        self.parts = {}
        for name, (weight, states_BTD, places_L) in read.items():
            nats = self.cross_entropy(states_BTD.flatten(0, 1)[places_L], batch.targets_L)
            self.parts[name] = nats.detach(), batch.num_targets
            loss = loss + weight * nats
        return loss

    def cross_entropy(self, hidden_LD: Tensor, targets_L: Tensor) -> Tensor:
        if self.config.cutoffs:
            return self.softmax(hidden_LD, targets_L)
        return linear_cross_entropy(hidden_LD, self.encoder.embedding.weight, targets_L)
