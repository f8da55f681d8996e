"""Prompts that a decoder has read into its key-value cache, and goes on from.

Prompts are laid out at the right end of their rows, so all rows go on at the same place; the padding before them is a document
of its own, which they neither see nor count in their positions.

Shapes: B rows (prompts x beams), T new tokens, K positions of the cache, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from metalm.model import MetaLM
from metalm.nn.attention import KVCache, LayerMasks, Mask, all_of, by_window, causal, same_document, within
from metalm.segments import Document, load_spans, make_batch


class Decoding:
    """A batch of prompts with its cache: `logits_BV` after the prompts, then `step` by step.

    Args:
        capacity: tokens that may follow the prompts.
    """

    def __init__(self, model: MetaLM, prompts: Sequence[Document], beams: int, capacity: int):
        self.model = model
        device = next(model.parameters()).device
        loaded = [load_spans(prompt, model.processors) for prompt in prompts]
        batch = make_batch([[prompt] for prompt in loaded], model.processors, pad_left=True).to(device)
        B, self.prompt_length = batch.tokens_BT.shape
        self.padded = bool((batch.document_BT == 0).any())
        self.cache = KVCache(model.config.decoder.layers, self.prompt_length + capacity)
        hidden = model.hidden(batch, self.cache)
        self.logits_BV = model.decoder.logits(hidden[:, -1]).float()
        new = torch.ones(B, capacity, dtype=torch.long, device=device)
        self.document_BK = torch.cat([batch.document_BT, new], dim=1)
        self.position_BK = torch.cat([batch.position_BT, batch.position_BT[:, -1:] + new.cumsum(1)], dim=1)
        if beams > 1:
            self.keep_rows(torch.arange(B, device=device).repeat_interleave(beams))

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
        first, T = self.cache.length, tokens_BT.shape[1]
        positions_BT = self.position_BK[:, first : first + T]
        x_BTD = self.model.decoder.embed(tokens_BT)
        hidden_BTD = self.model.decoder(x_BTD, positions_BT, self.mask(first, *tokens_BT.shape), self.cache)
        return self.model.decoder.logits(hidden_BTD).float()

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
