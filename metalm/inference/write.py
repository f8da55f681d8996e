"""Greedy decoding of a sequence-to-sequence model (`metalm.objectives.seq2seq`).

Each step reads [last token, P] and keeps the last token alone in its cache, so its predictions are those of training.
Source: UniLMv2 (arXiv 2002.12804).

Shapes: B rows, C columns, T new columns, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from metalm.data.tokenizer import Tokenizer
from metalm.errors import ConfigError, DataError
from metalm.inference.generate import batched
from metalm.nn.attention import KVCache, Mask, attend
from metalm.nn.transformer import Section
from metalm.objectives.seq2seq import Seq2Seq


class Writing:
    """Sources with a cache of what they and the tokens written so far became; `step` gives the next token's logits.

    Sources lie at the right end of their rows, so that all go on at the same column; the padding before them is never seen.
    """

    def __init__(self, model: Seq2Seq, sources: Sequence[Sequence[int]], max_new_tokens: int):
        self.model, stack = model, model.encoder.transformer
        device = model.encoder.embedding.weight.device
        T = max(map(len, sources))
        self.cache = KVCache(len(stack.blocks), T + max_new_tokens + 2)
        tokens_BT = torch.tensor([[0] * (T - len(source)) + list(source) for source in sources], device=device)
        length_B = torch.tensor([len(source) for source in sources], device=device)
        column = torch.arange(self.cache.capacity, device=device)
        self.position_BC = (column - (T - length_B[:, None])).clamp(min=0)
        self.seen_BC = column >= T - length_B[:, None]  # bool, which columns are no padding
        self._read(tokens_BT, causal=False)

    def _read(self, tokens_BT: Tensor, causal: bool) -> Tensor:
        """States of new columns: of the source among themselves, then of [token, P], where each sees what is before it."""
        encoder, first = self.model.encoder, self.cache.length
        B, T = tokens_BT.shape
        seen_BC = self.seen_BC

        def predicate(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            visible = seen_BC[b, k] | (q == k)
            return visible & (k <= q) if causal else visible

        mask = Mask(predicate, B, T, first + T, tokens_BT.device, first_query=first)
        positions = self.position_BC[:, first : first + T]
        bias = None
        if encoder.transformer.relative_bias is not None:
            bias = encoder.transformer.relative_bias(positions, self.position_BC[:, : first + T])
        return encoder.transformer(encoder.embedding(tokens_BT), positions, NewColumns(mask, bias), self.cache)

    def step(self, tokens_B: Tensor | None) -> Tensor:
        """Logits [B, V] of the next token after `tokens_B`, the last one of each row; None at the start."""
        pseudo_B = torch.full_like(self.seen_BC[:, 0], self.model.config.pseudo_token, dtype=torch.long)
        read = [pseudo_B] if tokens_B is None else [tokens_B, pseudo_B]
        states = self._read(torch.stack(read, dim=1), causal=True)
        self.cache.length -= 1  # the pseudo mask is forgotten, its column is written again
        return F.linear(states[:, -1], self.model.encoder.embedding.weight).float()


class NewColumns(Section):
    """Queries that are all of the new columns, over the cached keys and their own."""

    def attend(self, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, dropout: float, softcap: float) -> Tensor:
        return attend(q_BHTD, k_BGTD, v_BGTD, self.mask, self.bias_BHQK, dropout, softcap)


def write_texts(
    model: Seq2Seq, tokenizer: Tokenizer, texts: Sequence[str], max_new_tokens: int = 64, batch_size: int = 64
) -> list[str]:
    """What each text becomes; of a text too long for the encoder its beginning is read.

    Raises:
        ConfigError: `max_new_tokens` leave no room for a source.
    """
    positions = model.config.encoder.max_positions
    if positions - max_new_tokens < 3:
        raise ConfigError(
            f"max_new_tokens {max_new_tokens} leave no room for a text among the encoder's {positions} positions: "
            f"at most {positions - 3}"
        )
    sources = [model.layout.source(text, tokenizer, positions - max_new_tokens) for text in texts]
    written = [""] * len(texts)
    for numbers in batched(sources, batch_size):
        outputs = write(model, [sources[n] for n in numbers], tokenizer.end, max_new_tokens)
        for n, tokens in zip(numbers, outputs):
            written[n] = tokenizer.decode(tokens).strip()
    return written


@torch.inference_mode()
def write(model: Seq2Seq, sources: Sequence[Sequence[int]], end: int, max_new_tokens: int = 64) -> list[list[int]]:
    """What each source becomes, greedily, without the end token."""
    longest = max(map(len, sources)) + max_new_tokens
    if longest > model.config.encoder.max_positions:
        raise DataError(
            f"a source and {max_new_tokens} tokens exceed the encoder's {model.config.encoder.max_positions} positions"
        )
    writing = Writing(model, sources, max_new_tokens)
    outputs: list[list[int]] = [[] for _ in sources]
    open_rows = [True] * len(sources)
    tokens_B = None
    for _ in range(max_new_tokens):
        tokens_B = writing.step(tokens_B).argmax(-1)
        for b, token in enumerate(tokens_B.tolist()):
            open_rows[b] = open_rows[b] and token != end
            if open_rows[b]:
                outputs[b].append(token)
        if not any(open_rows):
            break
    return outputs
