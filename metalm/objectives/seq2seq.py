"""Sequence to sequence by a pseudo-masked encoder: the target's tokens are blocks of one, predicted from left to right.

    base        <s> name [ Alimentum ] </s>     the source, read in both directions
    originals   There  is   a   place  </s>     T_i sees the source and T_<=i
    pseudo      P      P    P   P      P        P_i sees the source, T_<i and itself, and predicts T_i

That is the layout of `metalm.nn.pseudo_masked` with a step for each token of the target. The loss has its labels smoothed.
`metalm.inference.write` decodes.
Source: UniLMv2 (arXiv 2002.12804).

Shapes: B rows, K slots of a row, N columns, L target tokens, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from metalm.data.sample import Sample
from metalm.data.tokenizer import Tokenizer
from metalm.encoders.text import TextEncoder, TextEncoderConfig
from metalm.errors import ConfigError, DataError
from metalm.hub import PretrainedModel
from metalm.nn.freezing import set_trainable
from metalm.nn.pseudo_masked import one_pass
from metalm.objectives.encoder_model import EncoderModelConfig
from metalm.objectives.pmlm import PMLMBatch, PMLMDocument, make_pmlm_batch


@dataclass(kw_only=True)
class Seq2SeqConfig(EncoderModelConfig):
    """An encoder, of pseudo-masked pretraining best (`encoder.init_from`); `label_smoothing` is spread over the vocabulary.

    `s_token` and `pseudo_token` are filled in from the tokenizer.
    """

    type: str = "seq2seq"
    encoder: TextEncoderConfig
    label_smoothing: float = 0.1
    s_token: int = -1
    pseudo_token: int = -1
    special_tokens: ClassVar[tuple[str, ...]] = ("<s>", "<pseudo>")

    def __post_init__(self):
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"label_smoothing {self.label_smoothing} is not in [0, 1)")
        if self.encoder.type != "text":
            raise ConfigError(f"encoder.type is {self.encoder.type!r}, sequence to sequence takes 'text'")
        if self.encoder.window:
            raise ConfigError("encoder.window: what is written sees the whole source, sequence to sequence takes no window")

    def check_row_length(self, length: int) -> None:
        """Raises `ConfigError` where rows are too short for a source token between its ends."""
        if length < 3:
            raise ConfigError(f"data.row_length {length} has no room for a source, it must be at least 3")


@dataclass
class Seq2SeqLayout:
    """A sample's text as the source, one of its captions as the target."""

    s_token: int
    max_positions: int
    task: ClassVar[str] = "seq2seq"

    def documents(self, sample: Sample, tokenizer: Tokenizer, length: int, rng: random.Random) -> Iterator[PMLMDocument]:
        """The source with a target drawn by chance; the source gives way where both do not fit the encoder's positions.

        Raises:
            DataError: there is no source or no target.
        """
        if not sample.text or not sample.captions:
            raise DataError(f"sample {sample.key!r}: the task seq2seq needs a text and what it shall become, as its captions")
        target = [*tokenizer.encode(rng.choice(sample.captions)), tokenizer.end][: self.max_positions // 2]
        source = self.source(sample.text, tokenizer, min(length, self.max_positions - len(target)))
        places = list(range(len(source), len(source) + len(target)))
        steps = list(range(1, len(target) + 1))
        yield PMLMDocument(source, places, target, steps, [0] * len(target), sample.key)

    def source(self, text: str, tokenizer: Tokenizer, room: int) -> list[int]:
        return [self.s_token, *tokenizer.encode(text)[: room - 2], tokenizer.end]

    def collate(self, rows: list[list[PMLMDocument]], length: int) -> PMLMBatch:
        """`places_L` are those of the slots: the base predicts nothing."""
        batch = make_pmlm_batch(rows, length)
        return replace(batch, places_L=batch.slots_L)


class Seq2Seq(PretrainedModel):
    """A text encoder that writes what its source becomes."""

    Config = Seq2SeqConfig

    def __init__(self, config: Seq2SeqConfig):
        super().__init__()
        self.config = config
        self.encoder = TextEncoder(config.encoder)
        set_trainable(self.encoder, self.encoder.layers(), config.encoder.trainable, "encoder")
        self.layout = Seq2SeqLayout(config.s_token, config.encoder.max_positions)
        self.processors: dict = {}
        self.parts: dict[str, tuple[Tensor, int]] = {}

    def hidden(self, batch: PMLMBatch) -> Tensor:
        """States [B, K, D] of the pseudo masks."""
        x_BND = one_pass(self.encoder.transformer, *batch.columns(self.encoder, self.config.pseudo_token), batch.step_BK)
        return x_BND[:, -batch.step_BK.shape[1] :]

    def num_predictions(self, batch: PMLMBatch) -> int:
        return batch.num_targets

    def logits(self, batch: PMLMBatch) -> Tensor:
        """[L, V], of the target's tokens in their order."""
        return F.linear(self.hidden(batch).flatten(0, 1)[batch.slots_L], self.encoder.embedding.weight)

    def forward(self, batch: PMLMBatch) -> Tensor:
        """Cross-entropy with smoothed labels, summed over the targets' tokens, in nats; `parts` have it unsmoothed."""
        logits_LV = self.logits(batch).float()
        self.parts = {"nats": (F.cross_entropy(logits_LV.detach(), batch.targets_L, reduction="sum"), batch.num_targets)}
        return F.cross_entropy(logits_LV, batch.targets_L, reduction="sum", label_smoothing=self.config.label_smoothing)
