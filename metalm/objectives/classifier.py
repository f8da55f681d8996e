"""Understanding: a label for a text, or for a pair of texts, read off a bidirectional encoder's states.

    <s>  the film is great  </d>  <s>             the last <s> only with pool: ends
    <s>  premise  </s>  hypothesis  </d>  <s>

    pool    first              the state at <s>: BERT's, and UniLMv2's
            ends               those at both <s>, side by side: cloze's, 2 D
            ends, separator    and the one at </s> between the texts, 3 D

    logits = W2 tanh(W1 pooled)

A sample's text is the premise; each of its questions is a hypothesis (or empty) with its label as the answer. Sources: UniLMv2
(arXiv 2002.12804); Baevski et al. 2019 (arXiv 1903.07785).

Shapes: B rows, T positions, N texts, P pooled states, D width, C labels.
"""

from __future__ import annotations

import difflib
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metalm.data.sample import Sample
from metalm.data.tokenizer import Tokenizer
from metalm.errors import DataError
from metalm.nn.transformer import init_weights
from metalm.objectives.encoder_model import HeadConfig, HeadModel
from metalm.segments import Batch, Document, Text, make_batch

Pool = Literal["first", "ends", "ends, separator"]
POOLED = {"first": 1, "ends": 2, "ends, separator": 3}


@dataclass(kw_only=True)
class ClassifierConfig(HeadConfig):
    """An encoder of text, the labels, and which states they are read off."""

    type: str = "classifier"
    labels: list[str]
    pool: Pool = "first"

    def __post_init__(self):
        self.check_head(self.labels, "labels")


@dataclass(frozen=True)
class LabelledDocument(Document):
    """A text with the number of its label; `pooled` are the positions that it is read off."""

    label: int = -1
    pooled: tuple[int, ...] = ()


@dataclass(kw_only=True)
class LabelledBatch(Batch):
    """`pooled_NP`: flat places in [B * T]; `targets_L` are the labels of the N texts."""

    pooled_NP: Tensor


@dataclass
class ClassifierLayout:
    """Texts and pairs of texts with their labels."""

    labels: list[str]
    pool: Pool
    s_token: int
    max_positions: int
    task: ClassVar[str] = "classification"

    def documents(
        self, sample: Sample, tokenizer: Tokenizer, length: int, rng: random.Random | None = None
    ) -> Iterator[Document]:
        """A document for each hypothesis on the sample's text; texts too long for a row lose the end of the longer one.

        Raises:
            DataError: there is no text, or no such label.
        """
        if not sample.text or not sample.questions:
            raise DataError(
                f"sample {sample.key!r}: classification needs a text with a label (see metalm data import labelled)"
            )
        for question in sample.questions:
            texts = [tokenizer.encode(text) for text in (sample.text, question.question) if text]
            yield self.lay_out(texts, tokenizer, length, self.number(question.best_answer, sample.key), sample.key)

    def number(self, label: str, key: str) -> int:
        if label in self.labels:
            return self.labels.index(label)
        near = difflib.get_close_matches(label, self.labels, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise DataError(f"sample {key!r}: its label {label!r} is none of model.labels ({', '.join(self.labels)}){hint}")

    def lay_out(self, texts: list[list[int]], tokenizer: Tokenizer, length: int, label: int, key: str) -> LabelledDocument:
        room = min(length, self.max_positions) - len(texts) - 1 - (self.pool != "first")
        while sum(map(len, texts)) > room:
            max(texts, key=len).pop()
        tokens = [self.s_token, *texts[0]]
        separator = len(tokens)
        if len(texts) == 2:
            tokens += [tokenizer.end, *texts[1]]
        tokens += [tokenizer.document_end] + [self.s_token] * (self.pool != "first")
        pooled = (0, len(tokens) - 1, separator)[: POOLED[self.pool]]
        return LabelledDocument([Text(tokens, target=False)], key, (), label, pooled)

    def collate(self, rows: list[list[LabelledDocument]], length: int) -> LabelledBatch:
        batch = make_batch(rows, {}, length)
        places, start = [], 0
        for number, row in enumerate(rows):
            start = number * batch.tokens_BT.shape[1]
            for document in row:
                places.append([start + place for place in document.pooled])
                start += len(document)
        pooled_NP = torch.tensor(places, dtype=torch.long).reshape(-1, POOLED[self.pool])
        labels = torch.tensor([document.label for row in rows for document in row], dtype=torch.long)
        return LabelledBatch(**vars(replace(batch, places_L=pooled_NP[:, 0], targets_L=labels)), pooled_NP=pooled_NP)


class Classifier(HeadModel):
    """An encoder with a head; `parts` hold how many of the last batch's texts were labelled right."""

    Config = ClassifierConfig

    def __init__(self, config: ClassifierConfig):
        super().__init__(config)
        width = self.encoder.width
        self.head = nn.Sequential(
            nn.Dropout(config.dropout),
            nn.Linear(POOLED[config.pool] * width, width),
            nn.Tanh(),
            nn.Dropout(config.dropout),
            nn.Linear(width, len(config.labels)),
        )
        self.head.apply(init_weights)
        self.layout = ClassifierLayout(config.labels, config.pool, config.s_token, config.encoder.max_positions)

    def logits(self, batch: LabelledBatch) -> Tensor:
        """[N, C]."""
        return self.head(self.hidden(batch).flatten(0, 1)[batch.pooled_NP].flatten(1))

    def forward(self, batch: LabelledBatch) -> Tensor:
        """Cross-entropy summed over the texts, in nats."""
        logits_NC = self.logits(batch).float()
        right = (logits_NC.argmax(-1) == batch.targets_L).sum()
        self.parts = {"accuracy": (right, batch.num_targets)}
        return F.cross_entropy(logits_NC, batch.targets_L, reduction="sum")
