"""UniLMv2's pseudo-masked language model: one pass learns to fill in masked blocks at once and one after another.

    AE   -sum_{m in M}            log p(x_m | x without M)          read at [M], as BERT's
    PAR  -sum_i sum_{m in M_i}    log p(x_m | x without M_{>=i})    read at [P]; the tokens of a block do not see each other

M = <M_1 .. M_k> are disjoint blocks of one to six tokens, in the order in which they were drawn, which is the order of
factorisation. Both losses are over the same masked tokens, with the same weight. `metalm.nn.pseudo_masked` says who sees
whom. A kept token in the [M] slot is seen by its own [P]: the log tells PAR's loss apart by what stands in the slot.

The result is a text encoder of METALM. Cost: 1 + 2 x ratio plain passes. Source: UniLMv2 (arXiv 2002.12804), section 3.

Shapes: B rows, T positions of a row, K slots for masked tokens of a row, N = T + 2K, L masked tokens, D width.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from metalm.encoders.text import TextEncoder, TextEncoderConfig
from metalm.errors import ConfigError
from metalm.hub import PretrainedModel
from metalm.nn.losses import linear_cross_entropy
from metalm.nn.pseudo_masked import one_pass
from metalm.objectives.encoder_model import EncoderModelConfig
from metalm.segments import Batch

REPLACEMENTS = ("mask", "random", "kept")  # what stands in the slot of a masked token, by its number
SLOTS = 16  # the number of slots of a row is a multiple of this, so that few shapes occur


@dataclass(kw_only=True)
class PMLMConfig(EncoderModelConfig):
    """An encoder, and how its texts are masked.

    Attributes:
        ratio: of the tokens that are masked, at least.
        span_probability: of a block of 2 to `max_block` tokens; the others are single tokens.
        replacement: shares of [M], of a random token, and of the token itself in the slots of masked tokens.
        ae, par: which of the two losses there are.
        order: "token" predicts masked tokens one at a time from left to right, instead of block after block.
        mask_token, pseudo_token: filled in from the tokenizer.
    """

    type: str = "pmlm"
    encoder: TextEncoderConfig
    ratio: float = 0.15
    span_probability: float = 0.4
    max_block: int = 6
    replacement: list[float] = field(default_factory=lambda: [1.0, 0.0, 0.0])
    ae: bool = True
    par: bool = True
    order: Literal["block", "token"] = "block"
    mask_token: int = -1
    pseudo_token: int = -1
    special_tokens: ClassVar[tuple[str, ...]] = ("<mask>", "<pseudo>")

    def __post_init__(self):
        if not 0 < self.ratio < 1:
            raise ConfigError(f"ratio {self.ratio} is not between 0 and 1")
        if not 0 <= self.span_probability < 1:
            raise ConfigError(f"span_probability {self.span_probability} is not in [0, 1): a last hole may take a single token")
        if self.max_block < 2:
            raise ConfigError(f"max_block is {self.max_block}, it must be at least 2; span_probability=0 masks single tokens")
        if len(self.replacement) != 3 or min(self.replacement) < 0 or abs(sum(self.replacement) - 1) > 1e-6:
            raise ConfigError(f"replacement {self.replacement} must be the shares of [M], random and kept tokens, with sum 1")
        if not (self.ae or self.par):
            raise ConfigError("ae and par are both false: nothing is left to learn")
        self.check_pretraining("text")
        if self.encoder.window:
            raise ConfigError("encoder.window: pseudo masks see the whole text, a window is for what docks or reads it")


def sample_blocks(length: int, config: PMLMConfig, rng: random.Random) -> list[list[int]]:
    """Disjoint blocks of neighbouring positions, in the order of factorisation: the paper's algorithm 1.

    They hold ratio x length positions at least, and max_block - 1 more at most. The first and the last position, `<s>` and
    the end token, stay outside; a text without any other has no block.
    """
    budget = min(config.ratio * length, length - 2)
    blocks: list[list[int]] = []
    masked: set[int] = set()
    while len(masked) < budget:
        start = rng.randint(1, length - 2)
        size = rng.randint(2, config.max_block) if rng.random() < config.span_probability else 1
        block = range(start, start + size)
        if block.stop < length and masked.isdisjoint(block):
            blocks.append(list(block))
            masked.update(block)
    return [[place] for place in sorted(masked)] if config.order == "token" else blocks


@dataclass
class PMLMDocument:
    """A masked text.

    Attributes:
        tokens: what the base reads, one a position.
        places: the masked positions, block after block.
        originals: their tokens.
        steps: the number of their block, from 1 on.
        replacements: what stands in their slots, by its number in `REPLACEMENTS`.
        key: of the sample.
    """

    tokens: list[int]
    places: list[int]
    originals: list[int]
    steps: list[int]
    replacements: list[int]
    key: str = ""

    def __len__(self) -> int:
        return len(self.tokens)


def lay_out(tokens: list[int], config: PMLMConfig, rng: random.Random) -> PMLMDocument:
    """Masks a text that starts with `<s>` and ends with its end token. Random tokens are any of the vocabulary, as BERT's."""
    blocks = sample_blocks(len(tokens), config, rng)
    places = [place for block in blocks for place in block]
    steps = [step for step, block in enumerate(blocks, start=1) for _ in block]
    replacements = rng.choices(range(len(REPLACEMENTS)), config.replacement, k=len(places))
    base = list(tokens)
    for place, replacement in zip(places, replacements):
        base[place] = (config.mask_token, rng.randrange(config.encoder.vocab_size), tokens[place])[replacement]
    return PMLMDocument(base, places, [tokens[place] for place in places], steps, replacements)


@dataclass(kw_only=True)
class PMLMBatch(Batch):
    """The base rows as a `Batch`, and the slots of their masked tokens, each of which appends an original and a [P].

    Attributes:
        original_BK: int64, the masked token.
        position_BK, document_BK: int64, its position in its document, and that document's number in the row; 0 is padding.
        step_BK: int64, the number of its block in its document from 1 on; 0 is padding.
        slots_L: int64, flat places in [B * K] of the targets, in their order.
        replacement_L: int64, what stands in the base at the targets' places, by its number in `REPLACEMENTS`.
    """

    original_BK: Tensor
    position_BK: Tensor
    document_BK: Tensor
    step_BK: Tensor
    slots_L: Tensor
    replacement_L: Tensor

    def columns(self, encoder: TextEncoder, pseudo_token: int) -> tuple[Tensor, Tensor, Tensor]:
        """Input vectors [B, N, D], positions and documents [B, N] of the base, the originals and the pseudo masks."""
        pseudo_BK = torch.full_like(self.original_BK, pseudo_token)
        x_BND = encoder.embedding(torch.cat([self.tokens_BT, self.original_BK, pseudo_BK], dim=1))
        position_BN = torch.cat([self.position_BT, self.position_BK, self.position_BK], dim=1)
        return x_BND, position_BN, torch.cat([self.document_BT, self.document_BK, self.document_BK], dim=1)


def make_pmlm_batch(rows: list[list[PMLMDocument]], length: int) -> PMLMBatch:
    """Rows of documents side by side as a batch with rows of `length` positions."""
    masked = max(sum(len(document.places) for document in row) for row in rows)
    B, K = len(rows), SLOTS * max(1, math.ceil(masked / SLOTS))
    tokens, documents, branches, positions = (np.zeros((B, length), dtype=np.int64) for _ in range(4))
    originals, slot_positions, slot_documents, steps = (np.zeros((B, K), dtype=np.int64) for _ in range(4))
    slots: list[int] = []
    places: list[int] = []
    for b, row in enumerate(rows):
        start = slot = 0
        for d, document in enumerate(row, start=1):
            end, last = start + len(document), slot + len(document.places)
            if end > length:
                raise ValueError(f"row {b}: {end} positions do not fit {length}")
            tokens[b, start:end] = document.tokens
            documents[b, start:end] = d
            positions[b, start:end] = range(len(document))
            originals[b, slot:last] = document.originals
            slot_positions[b, slot:last] = document.places
            slot_documents[b, slot:last] = d
            steps[b, slot:last] = document.steps
            slots += range(b * K + slot, b * K + last)
            places += [b * length + start + place for place in document.places]
            start, slot = end, last
    replacements = [replacement for row in rows for document in row for replacement in document.replacements]
    return PMLMBatch(
        *map(torch.from_numpy, (tokens, documents, branches, positions)),
        places_L=torch.tensor(places, dtype=torch.long),
        targets_L=torch.from_numpy(originals.reshape(-1)[slots]),
        keys=[document.key for row in rows for document in row],
        original_BK=torch.from_numpy(originals),
        position_BK=torch.from_numpy(slot_positions),
        document_BK=torch.from_numpy(slot_documents),
        step_BK=torch.from_numpy(steps),
        slots_L=torch.tensor(slots, dtype=torch.long),
        replacement_L=torch.tensor(replacements, dtype=torch.long),
    )


@dataclass
class PMLMLayout:
    """Texts to documents and documents to batches: a `metalm.objectives.base.TextLayout`."""

    config: PMLMConfig
    task: ClassVar[str] = "text"

    def room(self, length: int) -> int:
        return min(length, self.config.encoder.max_positions)

    def lay_out(self, tokens: list[int], rng: random.Random, key: str) -> PMLMDocument:
        document = lay_out(tokens, self.config, rng)
        document.key = key
        return document

    def collate(self, rows: list[list[PMLMDocument]], length: int) -> PMLMBatch:
        return make_pmlm_batch(rows, length)


class PMLM(PretrainedModel):
    """A text encoder with a tied softmax at its masked positions.

    Attributes:
        encoder: docks in METALM as it is.
        parts: of the last batch, sums in nats and counts of "ae", of "par", and of PAR by what stands in the slot: "par/mask",
            "par/random", "par/kept", as far as the configuration has them.
    """

    Config = PMLMConfig

    def __init__(self, config: PMLMConfig):
        super().__init__()
        self.encoder = TextEncoder(config.encoder)
        for name in ("mask_token", "pseudo_token"):
            if not 0 <= getattr(config, name) < config.encoder.vocab_size:
                raise ConfigError(f"{name} is {getattr(config, name)}, it must be a token of the encoder's vocabulary")
        self.config = config
        self.layout = PMLMLayout(config)
        self.processors: dict = {}
        self.parts: dict[str, tuple[Tensor, int]] = {}

    def hidden(self, batch: PMLMBatch) -> tuple[Tensor, Tensor | None]:
        """States [B, T, D] of the base, and [B, K, D] of the pseudo masks where there is PAR."""
        if not self.config.par:
            return self.encoder(batch.tokens_BT, batch.document_BT, batch.position_BT), None
        x_BND = one_pass(self.encoder.transformer, *batch.columns(self.encoder, self.config.pseudo_token), batch.step_BK)
        T, K = batch.tokens_BT.shape[1], batch.step_BK.shape[1]
        return x_BND[:, :T], x_BND[:, T + K :]

    def num_predictions(self, batch: PMLMBatch) -> int:
        return batch.num_targets * (self.config.ae + self.config.par)

    def forward(self, batch: PMLMBatch) -> Tensor:
        """AE + PAR in nats, summed over the masked tokens."""
        base_BTD, pseudo_BKD = self.hidden(batch)
        read: dict[str, tuple[Tensor, Tensor]] = {}  # states and what they predict
        if self.config.ae:
            read["ae"] = base_BTD.flatten(0, 1)[batch.places_L], batch.targets_L
        if self.config.par:
            par_LD = pseudo_BKD.flatten(0, 1)[batch.slots_L]
            for number, name in enumerate(REPLACEMENTS):
                if self.config.replacement[number]:
                    chosen_L = batch.replacement_L == number
                    read[f"par/{name}"] = par_LD[chosen_L], batch.targets_L[chosen_L]
        weight_VD = self.encoder.embedding.weight
        nats = {name: linear_cross_entropy(hidden, weight_VD, targets) for name, (hidden, targets) in read.items()}
        self.parts = {name: (nats[name].detach(), len(targets)) for name, (_, targets) in read.items()}
        if self.config.par:
            par = sum(total for name, (total, _) in self.parts.items() if name != "ae")
            self.parts["par"] = par, batch.num_targets
        return sum(nats.values())
