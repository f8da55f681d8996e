"""A tag for every word, named entities for example: encoder -> projection -> biLSTM -> conditional random field.

    <s>  New  York  is  big  </d>  <s>       a word is read off the state of its first token; the last <s> with a two_tower
         B    I     O   O

    log p(tags | text) = score(tags) - logsumexp over all tag sequences,  score = sum of emissions and transitions

Source: Baevski et al. 2019 (arXiv 1903.07785). The random field is `pytorch-crf`'s.

Shapes: B rows, T positions, N texts, W words of the longest, D width, C tags.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from metalm.data.sample import Sample
from metalm.data.tokenizer import Tokenizer
from metalm.errors import ConfigError, DataError
from metalm.nn.transformer import init_weights
from metalm.objectives.encoder_model import HeadConfig, HeadModel
from metalm.registry import did_you_mean
from metalm.segments import Batch, Document, Text, make_batch


@dataclass(kw_only=True)
class TaggerConfig(HeadConfig):
    """An encoder of text, the tags, and the widths of the projection and of each direction of the LSTM."""

    type: str = "tagger"
    tags: list[str]
    projection: int = 256
    lstm: int = 256

    def __post_init__(self):
        self.check_head(self.tags, "tags")


@dataclass(frozen=True)
class TaggedDocument(Document):
    """A text, the position of each of its words, and the numbers of their tags."""

    words: tuple[int, ...] = ()
    tags: tuple[int, ...] = ()


@dataclass(kw_only=True)
class TaggedBatch(Batch):
    """`words_NW`: flat places in [B * T] of the words of each text, `mask_NW` says which there are, `tags_NW` their tags."""

    words_NW: Tensor
    mask_NW: Tensor
    tags_NW: Tensor


@dataclass
class TaggerLayout:
    """Texts, word by word, with their tags."""

    tags: list[str]
    s_token: int
    max_positions: int
    both_ends: bool
    task: ClassVar[str] = "tagging"

    def documents(
        self, sample: Sample, tokenizer: Tokenizer, length: int, rng: random.Random | None = None
    ) -> Iterator[Document]:
        """The sample's words with their tags; of a text too long for a row the words that fit.

        Raises:
            DataError: there are no tags, not as many as words, or one that the model does not know.
        """
        words = sample.text.split()
        if not words or len(words) != len(sample.tags):
            raise DataError(
                f"sample {sample.key!r}: tagging needs a tag for every word, found {len(sample.tags)} for {len(words)} words "
                "(see metalm data import conll)"
            )
        for tag in sample.tags:
            if tag not in self.tags:
                raise DataError(f"sample {sample.key!r}: its tag {tag!r} is none of model.tags{did_you_mean(tag, self.tags)}")
        room = min(length, self.max_positions) - 1 - self.both_ends
        tokens, places = [self.s_token], []
        for word in words:
            pieces = tokenizer.encode(" " + word)
            if len(tokens) + len(pieces) > room:
                break
            places.append(len(tokens))
            tokens += pieces
        if not places:
            raise DataError(f"sample {sample.key!r}: its first word, {words[0][:40]!r}, does not fit {room} tokens")
        tokens += [tokenizer.document_end] + [self.s_token] * self.both_ends
        numbers = tuple(self.tags.index(tag) for tag in sample.tags[: len(places)])
        yield TaggedDocument([Text(tokens, target=False)], sample.key, (), tuple(places), numbers)

    def collate(self, rows: list[list[TaggedDocument]], length: int) -> TaggedBatch:
        batch = make_batch(rows, {}, length)
        documents = [document for row in rows for document in row]
        shape = len(documents), max((len(document.words) for document in documents), default=0)
        words_NW, tags_NW = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        mask_NW = torch.zeros(shape, dtype=torch.bool)
        n = 0
        for b, row in enumerate(rows):
            start = b * batch.tokens_BT.shape[1]
            for document in row:
                count = len(document.words)
                words_NW[n, :count] = start + torch.tensor(document.words, dtype=torch.long)
                tags_NW[n, :count] = torch.tensor(document.tags, dtype=torch.long)
                mask_NW[n, :count] = True
                start, n = start + len(document), n + 1
        batch = replace(batch, places_L=words_NW[mask_NW], targets_L=tags_NW[mask_NW])
        return TaggedBatch(**vars(batch), words_NW=words_NW, mask_NW=mask_NW, tags_NW=tags_NW)


class Tagger(HeadModel):
    """An encoder with a biLSTM and a conditional random field on the states of words."""

    Config = TaggerConfig

    def __init__(self, config: TaggerConfig):
        super().__init__(config)
        try:
            from torchcrf import CRF
        except ImportError as error:
            raise ConfigError("the model 'tagger' needs pytorch-crf: pip install 'metalm[tagging]'") from error
        self.dropout = nn.Dropout(config.dropout)
        self.projection = nn.Linear(self.encoder.width, config.projection)
        self.lstm = nn.LSTM(config.projection, config.lstm, batch_first=True, bidirectional=True)
        self.emission = nn.Linear(2 * config.lstm, len(config.tags))
        for layer in (self.projection, self.emission):
            init_weights(layer)
        self.crf = CRF(len(config.tags), batch_first=True)
        both_ends = config.encoder.type == "two_tower"
        self.layout = TaggerLayout(config.tags, config.s_token, config.encoder.max_positions, both_ends)

    def emissions(self, batch: TaggedBatch) -> Tensor:
        """Scores of each word's tags, [N, W, C], float32 or better."""
        words_NWD = self.hidden(batch).flatten(0, 1)[batch.words_NW]
        projected = self.projection(self.dropout(words_NWD))
        counts_N = batch.mask_NW.sum(1).cpu()
        packed = pack_padded_sequence(projected, counts_N, batch_first=True, enforce_sorted=False)
        states, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=batch.words_NW.shape[1])
        scores = self.emission(self.dropout(states))
        return scores.to(torch.promote_types(scores.dtype, torch.float32))

    def forward(self, batch: TaggedBatch) -> Tensor:
        """Negative log-likelihood of the tag sequences, in nats, summed over the texts (and so over their words)."""
        return -self.crf(self.emissions(batch), batch.tags_NW, mask=batch.mask_NW, reduction="sum")
