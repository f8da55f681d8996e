"""Prompts that a decoder has read into its key-value cache, and goes on from.

Prompts are laid out at the right end of their rows, so all rows go on at the same place; the padding before them is a document
of its own, which they neither see nor count in their positions. What all prompts of a batch begin with, such as worked examples
or an instruction, is read once.

    shared      an example and its answer        one row, whose keys and values go to all
    rests       .  .  one  question
                another  longer  question

Shapes: B rows (prompts x beams), T new tokens, K positions of the cache, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile

import torch
from torch import Tensor

from metalm.model import MetaLM
from metalm.nn.attention import KVCache, LayerMasks, Mask, all_of, by_window, causal, same_document, within
from metalm.segments import Document, Text, load_spans, make_batch

SHARED = 64  # positions that must be spared to be worth a pass of their own


class Decoding:
    """A batch of prompts with its cache: `logits_BV` after the prompts, then `step` by step.

    Args:
        capacity: tokens that may follow the prompts.
    """

    def __init__(self, model: MetaLM, prompts: Sequence[Document], beams: int, capacity: int):
        self.model = model
        shared, rests = split_beginning(prompts)
        self.prompt_length = len(shared) + max(map(len, rests))
        self.cache = KVCache(model.config.decoder.layers, self.prompt_length + capacity, model.decoder.compiled)
        row_B = torch.arange(len(prompts), device=next(model.parameters()).device)
        self.document_BK = self.position_BK = row_B.new_empty((1 if len(shared) else len(rests), 0))
        if len(shared):
            self.read_prompts([shared])
            self.keep_rows(torch.zeros_like(row_B))
        self.read_prompts(rests, capacity)
        if beams > 1:
            self.keep_rows(row_B.repeat_interleave(beams))

    def read_prompts(self, prompts: Sequence[Document], capacity: int = 0) -> None:
        """Reads a prompt a row behind what was read already; `logits_BV` then predicts what follows.

        Args:
            capacity: tokens that may follow.
        """
        loaded = [load_spans(prompt, self.model.processors) for prompt in prompts]
        batch = make_batch([[prompt] for prompt in loaded], self.model.processors, pad_left=True).to(self.document_BK.device)
        new = self.document_BK.new_ones(len(prompts), capacity)
        positions_BT = self.cache.length + batch.position_BT
        self.document_BK = torch.cat([self.document_BK, batch.document_BT, new], dim=1)
        self.position_BK = torch.cat([self.position_BK, positions_BT, positions_BT[:, -1:] + new.cumsum(1)], dim=1)
        self.padded = bool((self.document_BK == 0).any())
        B, T = batch.tokens_BT.shape
        last_B = torch.arange(1, B + 1, device=new.device) * T - 1
        self.logits_BV = self.model.decoder.logits(self.go_on(self.model.embed(batch), last_B)).float()

    def keep_rows(self, rows: Tensor) -> None:
        """Row b becomes old row `rows[b]`, of as many rows as are listed."""
        self.cache.reorder(rows)
        self.document_BK, self.position_BK = self.document_BK[rows], self.position_BK[rows]
        self.logits_BV = self.logits_BV[rows]

    def reorder_beams(self, rows: Tensor) -> None:
        """Row b becomes old row `rows[b]`, another beam of the same prompt."""
        self.cache.reorder(rows, self.prompt_length)

    def read(self, tokens_BT: Tensor) -> Tensor:
        """Reads tokens; the logits [B, T, V] of what follows each."""
        if self.model.decoder.compiled:
            from metalm.inference.compiled import read  # torch.compile takes a second to be imported

            return read(self.model.decoder, tokens_BT, self.document_BK, self.position_BK, self.cache)
        return self.model.decoder.logits(self.go_on(self.model.decoder.embed(tokens_BT))).float()

    def go_on(self, x_BTD: Tensor, places_N: Tensor | None = None) -> Tensor:
        """The decoder's states [B, T, D] at the next T positions, which read these vectors; or [N, D] at some of [B x T]."""
        first, (B, T, _) = self.cache.length, x_BTD.shape
        positions_BT = self.position_BK[:, first : first + T]
        return self.model.decoder(x_BTD, positions_BT, self.mask(first, B, T), self.cache, places_N)

    def step(self, tokens_B: Tensor) -> None:
        """Reads one token a row; `logits_BV` then predicts the next."""
        self.logits_BV = self.read(tokens_B[:, None])[:, -1]

    def rewind(self, length: int) -> None:
        """Forgets what was read after the cache's first `length` positions: it will be written over."""
        self.cache.length = length

    def mask(self, first: int, B: int, T: int) -> Mask | LayerMasks | str:
        """What T queries from position `first` on see; none is built where a row has no padding and no window."""
        windows = self.model.config.decoder.windows
        if not self.padded and not any(windows):
            return "causal" if T > 1 else "full"
        seen = causal, same_document(self.document_BK)

        def make(window: int) -> Mask:
            predicate = all_of(*seen, within(self.position_BK, window))
            return Mask(predicate, B, T, first + T, self.document_BK.device, first_query=first)

        return by_window(windows, make)


def split_beginning(prompts: Sequence[Document]) -> tuple[Document, list[Document]]:
    """What all prompts begin with, empty where that is little, and what is left of each, which is a position at least.

    Spans are alike if they are the same object; the beginning ends behind a text, for spans side by side may read each other.
    """
    segments = prompts[0].segments
    room = min(map(len, prompts)) - 1
    whole = part = length = 0  # segments that are alike, tokens of the next one that are; positions of the text that ends last
    for number, column in enumerate(zip(*(prompt.segments for prompt in prompts))):
        if all(isinstance(segment, Text) for segment in column):
            same = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*(segment.tokens for segment in column)))
            before = sum(map(len, segments[:number]))
            alike = min(sum(1 for _ in same), room - before)
            if alike > 0:
                whole, part, length = number, alike, before + alike
            if not all(len(segment) == alike for segment in column):
                break
        elif any(segment is not column[0] for segment in column):
            break
    if length * (len(prompts) - 1) < SHARED:
        return Document([]), list(prompts)
    shared = Document([*segments[:whole], Text(segments[whole].tokens[:part])], prompts[0].key)
    rests = [[Text(p.segments[whole].tokens[part:]), *p.segments[whole + 1 :]] for p in prompts]
    return shared, [replace(prompt, segments=rest) for prompt, rest in zip(prompts, rests)]
