"""Meet in the Middle: one decoder reads every text in both directions, and its two readings shall agree.

    L = sum_i  -log p(x_i | x_<i) - log q(x_i | x_>i) + beta TV(p, q)

    row        <s>  a  b  c </d>  <r2l> </d> c  b  a          two branches of a document, which do not see each other
    predicts    a   b  c </d> -    </d>  c   b  a <s>
    pairs       a   b  c </d>      </d>  c   b  a             the same token, from the left and from the right

The backward branch is the text reversed by its own length, so packing cannot put padding before it. Both directions share
every parameter; `<r2l>` alone says which way it goes. Reading from `<s>` on, the result is an ordinary causal language
model, and METALM's decoder. What comes before the first token is predicted from the right alone: `<s>`, at which a backward
reading ends. Cost: twice a causal model's a token. Source: arXiv 2303.07295, section 2.

With `synchronous` above 0 the sides of a hole look at each other while they fill it. That is a second stage, on top of a
trained model, for a target must not be seen in the other side's input: half of the texts are cut in the middle of a hole, and
each side reads its own part,

    row        <s>  a  b | c  d      <r2l> </d> g  f | e        the hole is c d e; at `|` and after, a side looks across,
    step                 0  1  2                      0  1      up to its own step
    predicts    a   b    c  d -       </d>  g   f   e -

so that what both have written up to a step is never what they write next. The other texts are read as above, and the forward
reading stays an ordinary language model.
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
from metalm.nn.attention import Mask, Predicate, all_of, same_document
from metalm.nn.losses import linear_cross_entropy
from metalm.nn.synchronous import PLAIN, Synchronous, synchronous
from metalm.segments import Batch, Document, Text, make_batch

FORWARD, BACKWARD = 1, 2  # branches
SYNCHRONOUS_SHARE = 0.5  # of the texts, where there is synchronous attention


@dataclass
class MIMConfig(MetaLMConfig):
    """`beta` is the weight of the agreement, `synchronous` that of what a side sees of the other one while both fill a hole
    (the paper's lambda, 0.3; for a second stage of training); `r2l_token` is filled in from the tokenizer."""

    type: str = "mim"
    beta: float = 0.1
    synchronous: float = 0.0
    r2l_token: int = -1
    special_tokens: ClassVar[tuple[str, ...]] = ("<r2l>",)

    def __post_init__(self):
        super().__post_init__()
        if self.encoders:
            raise ConfigError("the model 'mim' has no encoders: dock them on its result, by decoder.init_from")
        if self.decoder.logit_softcap:
            raise ConfigError("decoder.logit_softcap: the agreement of two readings is over plain logits; set it to 0")
        if self.synchronous and (isinstance(self.decoder.window, list) or self.decoder.local_rotary_base):
            raise ConfigError("synchronous: sides look at each other through one window and by one rotary base for all layers")
        for name in ("beta", "synchronous"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} {getattr(self, name)} must not be negative")


@dataclass(frozen=True, kw_only=True)
class HoleDocument(Document):
    """A text cut in the middle of a hole, before which it has `before` tokens and after which `after` of them."""

    before: int
    after: int

    @property
    def across(self) -> list[int]:
        """Of each position, the one that it sees the other side up to; `PLAIN` before step 0."""
        sides = []
        for [text], own, other in zip(self.branches, (self.before, 1 + self.after), (1 + self.after, self.before)):
            sides += [PLAIN] * (own - 1) + [other - 1 + step for step in range(len(text) - own + 1)]
        return sides


@dataclass(kw_only=True)
class HoleBatch(Batch):
    """Texts in both directions, and texts with holes.

    Attributes:
        across_BT: int64, `HoleDocument.across`, or `PLAIN`.
        in_hole_text_L: bool, whether a target is of a text with a hole.
    """

    across_BT: Tensor
    in_hole_text_L: Tensor


@dataclass
class MIMLayout:
    """A text and its reverse, as two branches of a document; of `hole_share` of the texts, two parts that fill a hole."""

    r2l_token: int
    hole_share: float = 0.0
    task: ClassVar[str] = "text"

    def room(self, length: int) -> int:
        return (length - 1) // 2

    def lay_out(self, tokens: list[int], rng: random.Random, key: str) -> Document:
        if self.hole_share and len(tokens) > 2 and rng.random() < self.hole_share:
            return self.lay_out_hole(tokens, *sorted(rng.sample(range(1, len(tokens) + 1), 2)), key)
        return Document([], key, [[Text(tokens)], [Text([self.r2l_token, *tokens[:0:-1]]), Text(tokens[:1])]])

    def lay_out_hole(self, tokens: list[int], start: int, end: int, key: str = "") -> HoleDocument:
        """The hole is `tokens[start:end]`; the forward side writes the first half of it, and the middle one."""
        middle = (start + end + 1) // 2
        sides = [[Text(tokens[:middle])], [Text([self.r2l_token, *reversed(tokens[middle:])])]]
        return HoleDocument([], key, sides, before=start, after=len(tokens) - end)

    def collate(self, rows: list[list[Document]], length: int) -> Batch:
        batch = make_batch(rows, {}, length)
        if not self.hole_share:
            return batch
        across_BT = torch.full_like(batch.tokens_BT, PLAIN)
        in_hole_text_BT = torch.zeros_like(batch.tokens_BT, dtype=torch.bool)
        for b, row in enumerate(rows):
            start = 0
            for document in row:
                end = start + len(document)
                if isinstance(document, HoleDocument):
                    across_BT[b, start:end] = torch.tensor(document.across)
                    in_hole_text_BT[b, start:end] = True
                start = end
        return HoleBatch(**vars(batch), across_BT=across_BT, in_hole_text_L=in_hole_text_BT.flatten()[batch.places_L])


def other_side(batch: HoleBatch) -> Predicate:
    """A position sees the other branch of its document up to `across_BT`."""

    def across(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (batch.branch_BT[b, q] != batch.branch_BT[b, k]) & (batch.position_BT[b, k] <= batch.across_BT[b, q])

    return all_of(same_document(batch.document_BT), across)


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
        self.layout = MIMLayout(config.r2l_token, SYNCHRONOUS_SHARE if config.synchronous else 0.0)

    def attention(self, batch: Batch) -> Mask | Synchronous:
        own = super().attention(batch)
        if not isinstance(batch, HoleBatch):
            return own
        weight, rotary = self.config.synchronous, self.decoder.transformer.rotary
        return synchronous(own, other_side(batch), batch.position_BT, batch.across_BT, weight, rotary)

    def forward(self, batch: Batch) -> Tensor:
        """Both cross-entropies and `beta` times the total variation, summed over the tokens, in nats; in texts with holes the
        cross-entropy of each token by its own side."""
        B, T = batch.tokens_BT.shape
        hidden_LD = self.hidden(batch, places_N=batch.places_L)
        weight_VD = self.decoder.softmax_weight
        documents = batch.document_BT + torch.arange(B, device=batch.document_BT.device)[:, None] * (T + 1)
        branch_L, document_L = (x.flatten()[batch.places_L] for x in (batch.branch_BT, documents))
        both_L, hole_L = self.kinds(batch)
        forward_N, backward_N, first_M = (both_L[chosen] for chosen in pair_targets(branch_L[both_L], document_L[both_L]))
        loss, sums = agreement_loss(
            hidden_LD[forward_N], hidden_LD[backward_N], weight_VD, batch.targets_L[forward_N], self.config.beta
        )
        first, hole = (linear_cross_entropy(hidden_LD[n], weight_VD, batch.targets_L[n]) for n in (first_M, hole_L))
        N = len(forward_N)
        self.parts = {"forward": (sums[0], N), "backward": (sums[1], N), "total_variation": (sums[2], N)}
        if self.config.synchronous:
            self.parts["with_hole"] = (hole.detach(), len(hole_L))
        return loss + first + hole

    @staticmethod
    def kinds(batch: Batch) -> tuple[Tensor, Tensor]:
        """Indices of the targets in texts read in both directions, and of those in texts with holes."""
        if isinstance(batch, HoleBatch):
            return (~batch.in_hole_text_L).nonzero()[:, 0], batch.in_hole_text_L.nonzero()[:, 0]
        every_L = torch.arange(batch.num_targets, device=batch.places_L.device)
        return every_L, every_L[:0]
