"""Readings of many texts, forwards and backwards, that go on side by side: one call of the model, rows of unequal length.

    row 2n        <s>    prefix   ->      of hole n the forward side
    row 2n + 1    <r2l>  suffix   <-      and the backward side, whose text is reversed

A token lies in its row's key-value cache in the slot of its position, and a query sees the slots up to its own. So nothing
has to be taken back: what a side was not to keep lies beyond its end, unseen, until it is written over. Padding goes to the
last slot, which no token has.

With synchronous attention (`metalm.nn.synchronous`) a row's keys are followed by those of the hole's other row.

Shapes: R rows, T tokens that each of them reads in a call, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from metalm.model import MetaLM
from metalm.nn.attention import KVCache, LayerMasks, Mask, by_window
from metalm.nn.synchronous import PLAIN, Synchronous, synchronous


class Reading(NamedTuple):
    """Tokens that a side reads, from its position `first` on, and how many of the last of them shall predict.

    With synchronous attention the last token sees the other side up to its position `across`, which may be read in the same
    call.
    """

    first: int
    tokens: list[int]
    predict: int = 1
    across: int = PLAIN


Request = tuple[Reading | None, Reading | None]  # of a hole's forward and of its backward side
Reply = tuple[Tensor | None, Tensor | None]  # the logits [predict, V] of their next tokens


class RowCache(KVCache):
    """A cache in which every call says where its tokens go.

    Attributes:
        num_rows: that it is made with.
        rows: of the cache that the call's are; None: all of them, in their order.
        slot_RT: int64, where their tokens go.
        end: of the slots that the call's queries may see.
        both_sides: a row sees its own slots, and after them those of the hole's other row.
    """

    num_rows: int
    both_sides: bool
    rows: list[int] | None
    slot_RT: Tensor
    end: int

    def append(self, layer: int, k_RGTD: Tensor, v_RGTD: Tensor) -> tuple[Tensor, Tensor]:
        """Stores the call's keys and values of a layer, and returns all that its rows have."""
        if self.keys[layer] is None:
            _, G, _, D = k_RGTD.shape
            shape, dtype = (self.num_rows, G, self.capacity, D), self.kept_in(k_RGTD)
            self.keys[layer], self.values[layer] = (x.new_zeros(shape, dtype=dtype) for x in (k_RGTD, v_RGTD))
        every = torch.arange(len(self.keys[layer]), device=k_RGTD.device)
        row_R = every if self.rows is None else every[self.rows]
        kept = []
        for stored, new in ((self.keys[layer], k_RGTD), (self.values[layer], v_RGTD)):
            stored[row_R[:, None], :, self.slot_RT] = new.transpose(1, 2).to(stored.dtype)
            seen = stored[:, :, : self.end]
            own = seen if self.rows is None else seen[row_R]
            kept.append(torch.cat([own, seen[row_R ^ 1]], dim=2) if self.both_sides else own)
        return kept[0], kept[1]


class Readings:
    """The two readings of each of `holes`, by a model's decoder. `calls` counts those of the model.

    Args:
        longest: positions of a side, at most.
    """

    def __init__(self, model: MetaLM, holes: int, longest: int):
        self.model, self.device = model, next(model.parameters()).device
        self.holes = list(range(holes))  # those that are still read
        self.cache = RowCache(model.config.decoder.layers, longest + 1)
        self.cache.num_rows = 2 * holes
        self.cache.both_sides = self.synchronous = getattr(model.config, "synchronous", 0) > 0
        self.calls = 0

    def __call__(self, requests: Mapping[int, Request]) -> dict[int, Reply]:
        """Reads what holes, by their numbers, ask for, in one call."""
        self.calls += 1
        place = {hole: n for n, hole in enumerate(self.holes)}
        read = {2 * place[hole] + side: r for hole, request in requests.items() for side, r in enumerate(request) if r}
        T = max(len(reading.tokens) for reading in read.values())
        # To let a row read a token of padding costs less than to copy the others' keys and values away from it.
        rows = sorted(read) if T > 1 else list(range(2 * len(self.holes)))
        tokens, positions, slots, looks, predicting = [], [], [], [], []
        for r, row in enumerate(rows):
            first, own, predict, across = read.get(row, Reading(0, [], 0))
            padding, place_T = T - len(own), list(range(first, first + len(own)))
            tokens.append([*own, *[0] * padding])
            positions.append([*place_T, *[0] * padding])
            slots.append([*place_T, *[self.cache.capacity - 1] * padding])
            looks.append([*[PLAIN] * (len(own) - 1), *[across] * bool(own), *[PLAIN] * padding])
            predicting += range(r * T + len(own) - predict, r * T + len(own))
        self.cache.rows = None if len(rows) == 2 * len(self.holes) else rows
        self.cache.end = 1 + max(max(row) for row in (*positions, *looks))
        token_RT, position_RT, self.cache.slot_RT, across_RT = torch.tensor(
            [tokens, positions, slots, looks], device=self.device
        )
        decoder = self.model.decoder
        attention = self.attention(position_RT, across_RT)
        hidden = decoder(decoder.embed(token_RT), position_RT, attention, self.cache).flatten(0, 1)
        logits = decoder.logits(hidden[torch.tensor(predicting, device=self.device)]).float().cpu()
        replies = dict(zip(sorted(read), logits.split([read[row].predict for row in sorted(read)])))
        return {hole: (replies.get(2 * place[hole]), replies.get(2 * place[hole] + 1)) for hole in requests}

    def attention(self, position_RT: Tensor, across_RT: Tensor) -> Mask | LayerMasks | Synchronous:
        """A row sees its slots up to the query's own; and looks across where it is asked to."""
        (R, T), end = position_RT.shape, self.cache.end
        keys = 2 * end if self.synchronous else end

        def make(window: int) -> Mask:
            first_RT = position_RT - (window or end)
            return Mask(lambda b, h, q, k: (k <= position_RT[b, q]) & (k > first_RT[b, q]), R, T, keys, self.device)

        own = by_window(self.model.config.decoder.windows, make)
        if not self.synchronous:
            return own

        def other(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (k >= end) & (k - end <= across_RT[b, q])

        weight, rotary = self.model.config.synchronous, self.model.decoder.transformer.rotary
        return synchronous(own, other, position_RT, across_RT, weight, rotary)

    def drop(self, hole: int) -> None:
        """The hole is not read any more."""
        place = self.holes.index(hole)
        self.holes.remove(hole)
        rows = [row for row in range(2 * len(self.holes) + 2) if row // 2 != place]
        self.cache.reorder(torch.tensor(rows, dtype=torch.long, device=self.device))
