"""A step of decoding as one graph, by torch.compile: what the layers do between their products becomes a few fused kernels.

A graph is made at the first step, in half a minute or so for 8 layers: one for a single row and one for several, whatever their
number and the cache's capacity, and as many for the guesses of a draft. Prompts are read as always: each batch of them has
another length. On a GPU this was never tried.

On a CPU bfloat16's states are float32. One row's products with weights of bfloat16 or int8 are sums, which fuse with the rest
and read each weight once, as it is kept. Those of several rows are oneDNN's, of inputs rounded to bfloat16 and of weights that
each graph packs for itself (`freezing`).

Shapes: B rows, T tokens that are read at once, K positions of the cache, H heads, G key-value heads, R of H / G, D head width,
V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch._dynamo
import torch._inductor.config
from torch import Tensor

from metalm.decoder import CausalDecoder
from metalm.nn.attention import KVCache, by_window, soft_cap
from metalm.nn.positions import SinusoidalPositions

GRAPHS = 64  # that a process may make before torch gives up and runs what is new as it is; by default it does at 8

logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it would say that there is no CUDA


class Placed(KVCache):
    """A cache whose T new positions go to `place_T`, int64, and which shows all of its positions, read or not."""

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor], place_T: Tensor):
        self.keys, self.values, self.place_T = keys, values, place_T

    def append(self, layer: int, k_BGTD: Tensor, v_BGTD: Tensor) -> tuple[Tensor, Tensor]:
        for stored, new in ((self.keys[layer], k_BGTD), (self.values[layer], v_BGTD)):
            stored.index_copy_(2, self.place_T, new.to(stored.dtype))
        return self.keys[layer].to(k_BGTD.dtype), self.values[layer].to(v_BGTD.dtype)

    def advance(self, positions: int) -> None:
        """Left to the caller: a number that changes would ask for another graph."""


class Seen(NamedTuple):
    """Attention of few queries to what `seen_BTK` lets each see, as sums, for the compiler to fuse."""

    seen_BTK: Tensor

    def attend(self, q_BHTD: Tensor, k_BGKD: Tensor, v_BGKD: Tensor, dropout: float, softcap: float) -> Tensor:
        q_BGRTD = (q_BHTD * q_BHTD.shape[-1] ** -0.5).unflatten(1, (k_BGKD.shape[1], -1))
        scores_BGRTK = soft_cap((q_BGRTD[..., None, :] * k_BGKD[:, :, None, None]).sum(-1), softcap)
        weights_BGRTK = scores_BGRTK.masked_fill(~self.seen_BTK[:, None, None], float("-inf")).softmax(-1)
        return (weights_BGRTK[..., None] * v_BGKD[:, :, None, None]).sum(-2).flatten(1, 2)


@torch.compile
def _read(
    decoder: CausalDecoder,
    tokens_BT: Tensor,
    first: Tensor,
    document_BK: Tensor,
    position_BK: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
) -> Tensor:
    place_T = first + torch.arange(tokens_BT.shape[1], device=first.device)
    position_BT = position_BK.index_select(1, place_T)
    place_K = torch.arange(position_BK.shape[1], device=first.device)
    document_BT = document_BK.index_select(1, place_T)
    seen_BTK = (place_K <= place_T[:, None]) & (document_BK[:, None] == document_BT[..., None])

    def mask(window: int) -> Seen:
        near_BTK = (position_BT[..., None] - position_BK[:, None]).abs() < window
        return Seen(seen_BTK & near_BTK if window else seen_BTK)

    x_BTD = decoder.embed(tokens_BT)
    if x_BTD.device.type == "cpu" and x_BTD.dtype == torch.bfloat16:
        x_BTD = x_BTD.float()
    hidden = decoder(x_BTD, position_BT, by_window(decoder.config.windows, mask), Placed(keys, values, place_T))
    return decoder.logits(hidden).float()


def read(decoder: CausalDecoder, tokens_BT: Tensor, document_BK: Tensor, position_BK: Tensor, cache: KVCache) -> Tensor:
    """Logits [B, T, V] in float32 of what follows each of T tokens, read behind what the cache holds.

    Args:
        document_BK: of all positions of the cache, read or not; 0 is padding.
        cache: a whole one, from which the prompts were read.
    """
    if isinstance(decoder.transformer.positions, SinusoidalPositions):
        decoder.transformer.positions.reach(cache.capacity)
    first = torch.tensor(cache.length, device=tokens_BT.device)
    columns = [(x, 1) for x in (document_BK, position_BK)] + [(x, 2) for x in (*cache.keys, *cache.values)]
    for x, dim in columns:
        torch._dynamo.maybe_mark_dynamic(x, dim)
    if tokens_BT.shape[1] > 1:
        torch._dynamo.maybe_mark_dynamic(tokens_BT, 1)
    if len(tokens_BT) > 1:
        for x in (tokens_BT, *(x for x, _ in columns)):
            torch._dynamo.maybe_mark_dynamic(x, 0)
    packed = tokens_BT.device.type == "cpu" and tokens_BT.numel() > 1
    with torch._inductor.config.patch(freezing=packed), torch._dynamo.config.patch(recompile_limit=GRAPHS):
        logits_BTV = _read(decoder, tokens_BT, first, document_BK, position_BK, cache.keys, cache.values)
    cache.advance(tokens_BT.shape[1])
    return logits_BTV
