"""Meet in the Middle: one decoder reads every text in both directions, and its two readings shall agree.

    L = sum_i  -log p(x_i | x_<i) - log q(x_i | x_>i) + beta TV(p, q)

    row        <s>  a  b  c </d>  <r2l> </d> c  b  a          two branches of a document, which do not see each other
    predicts    a   b  c </d> -    </d>  c   b  a <s>
    pairs       a   b  c </d>      </d>  c   b  a             the same token, from the left and from the right

The backward branch is the text reversed by its own length, so packing cannot put padding before it. Both directions share
every parameter; `<r2l>` alone says which way it goes. Reading from `<s>` on, the result is an ordinary causal language
model, and METALM's decoder. What comes before the first token is predicted from the right alone: `<s>`, at which a backward
reading ends. Cost: twice a causal model's a token. Source: arXiv 2303.07295, section 2.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from metalm.errors import ConfigError
from metalm.model import MetaLM, MetaLMConfig
from metalm.nn.agreement import agreement_loss
from metalm.nn.losses import linear_cross_entropy
from metalm.segments import Batch, Document, Text, make_batch

FORWARD, BACKWARD = 1, 2  # branches


@dataclass
class MIMConfig(MetaLMConfig):
    """`beta` is the weight of the agreement; `r2l_token` is filled in from the tokenizer."""

    type: str = "mim"
    beta: float = 0.1
    r2l_token: int = -1
    special_tokens: ClassVar[tuple[str, ...]] = ("<r2l>",)

    def __post_init__(self):
        super().__post_init__()
        if self.encoders:
            raise ConfigError("the model 'mim' has no encoders: dock them on its result, by decoder.init_from")
        if self.beta < 0:
            raise ConfigError(f"beta {self.beta} must not be negative")


@dataclass
class MIMLayout:
    """A text and its reverse, as two branches of a document."""

    r2l_token: int
    task: ClassVar[str] = "text"

    def room(self, length: int) -> int:
        return (length - 1) // 2

    def lay_out(self, tokens: list[int], rng: random.Random, key: str) -> Document:
        return Document([], key, [[Text(tokens)], [Text([self.r2l_token, *tokens[:0:-1]]), Text(tokens[:1])]])

    def collate(self, rows: list[list[Document]], length: int) -> Batch:
        return make_batch(rows, {}, length)


def pair_targets(branch_L: Tensor, document_L: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which targets are the same token, read from the left and from the right.

    Args:
        branch_L, document_L: of the places that predict; those of a document are together, n forward ones before n + 1
            backward ones.

    Returns:
        forward_N, backward_N: indices among the L targets, pair by pair.
        first_M: indices of what the backward branches predict last, the token before the text.
    """
    index_L = torch.arange(len(branch_L), device=branch_L.device)
    _, document, count = torch.unique_consecutive(document_L, return_inverse=True, return_counts=True)
    end = count.cumsum(0)[document]  # one past the document's last target
    start = end - count[document]
    forward_N = index_L[branch_L == FORWARD]
    backward_N = (start + end - 2 - index_L)[forward_N]
    first_M = index_L[index_L == end - 1]
    return forward_N, backward_N, first_M


class MIM(MetaLM):
    """A decoder that learns both directions; generates, docks and is exported as any METALM."""

    Config = MIMConfig

    def __init__(self, config: MIMConfig):
        super().__init__(config)
        self.layout = MIMLayout(config.r2l_token)

    def forward(self, batch: Batch) -> Tensor:
        """Both cross-entropies and `beta` times the total variation, summed over the tokens, in nats."""
        B, T = batch.tokens_BT.shape
        hidden_LD = self.hidden(batch).flatten(0, 1)[batch.places_L]
        documents = batch.document_BT + torch.arange(B, device=batch.document_BT.device)[:, None] * (T + 1)
        branch_L, document_L = (x.flatten()[batch.places_L] for x in (batch.branch_BT, documents))
        forward_N, backward_N, first_M = pair_targets(branch_L, document_L)
        weight_VD = self.decoder.embedding.weight
        loss, sums = agreement_loss(
            hidden_LD[forward_N], hidden_LD[backward_N], weight_VD, batch.targets_L[forward_N], self.config.beta
        )
        first = linear_cross_entropy(hidden_LD[first_M], weight_VD, batch.targets_L[first_M])
        N = len(forward_N)
        self.parts = {"forward": (sums[0], N), "backward": (sums[1], N), "total_variation": (sums[2], N)}
        return loss + first
