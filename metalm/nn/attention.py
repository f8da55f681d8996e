"""Attention: masks as predicates, one `attend`, and the key-value cache.

A mask is a predicate (batch, head, query, key) -> bool on index tensors, composed with `all_of`. The same
predicate makes the dense boolean mask of `scaled_dot_product_attention` (CPU, short sequences, decoding) and the block
mask of FlexAttention (CUDA; FlexAttention has no backward on CPU). Plain causal or full attention takes the kernel's
own fast path and builds no mask.

Shapes: B rows, H heads, G key-value heads, Q queries, K keys, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Seeing = TypeVar("Seeing")  # a mask, or another way of attending
Predicate = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
CHUNK_SCORES = 1 << 26  # of soft-capped attention, held at a time: 256 MiB in float32
CHUNK, LONG_CHUNK = 96, 512  # queries that the CPU reads together where a mask lets them see few of the keys, or many
SHORT = 640  # keys up to which plain matrix products train faster than the CPU's fused kernel, and their weights fit


def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """A query sees the keys up to and including its own position."""
    return q >= k


def same_document(document_BT: Tensor) -> Predicate:
    """A query sees the keys of its own document only; padding (document 0) sees padding, so no row is empty."""
    return lambda b, h, q, k: document_BT[b, q] == document_BT[b, k]


def same_branch(branch_BT: Tensor) -> Predicate:
    """A query sees the keys of the trunk (branch 0) and of its own branch."""
    return lambda b, h, q, k: (branch_BT[b, k] == 0) | (branch_BT[b, q] == branch_BT[b, k])


def everywhere(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """A query sees all keys; `all_of` leaves it out."""
    return k >= 0


def within(position_BT: Tensor, window: int) -> Predicate:
    """A query sees keys less than `window` positions away; all, where it is 0."""
    if not window:
        return everywhere
    return lambda b, h, q, k: (position_BT[b, q] - position_BT[b, k]).abs() < window


def all_of(*predicates: Predicate) -> Predicate:
    predicates = tuple(predicate for predicate in predicates if predicate is not everywhere) or (everywhere,)

    def predicate(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        allowed = predicates[0](b, h, q, k)
        for other in predicates[1:]:
            allowed = allowed & other(b, h, q, k)
        return allowed

    return predicate


class Mask:
    """A predicate over `rows` x `queries` x `keys`, made dense or into blocks once and shared by all layers.

    Args:
        first_query: index of the first query among the keys; > 0 when a cache holds the keys before it.
    """

    def __init__(self, predicate: Predicate, rows: int, queries: int, keys: int, device: torch.device, first_query: int = 0):
        self.predicate = predicate
        self.rows, self.queries, self.keys = rows, queries, keys
        self.device = device
        self.first_query = first_query
        self._additive: dict[tuple[int, ...], Tensor] = {}

    @cached_property
    def dense(self) -> Tensor:
        """bool [B, 1, Q, K], True where the query sees the key."""
        b = torch.arange(self.rows, device=self.device)[:, None, None, None]
        h = torch.zeros(1, dtype=torch.long, device=self.device)
        q = torch.arange(self.first_query, self.first_query + self.queries, device=self.device)[:, None]
        k = torch.arange(self.keys, device=self.device)
        return self.predicate(b, h, q, k).expand(self.rows, 1, self.queries, self.keys)

    def additive(self, queries: slice, keys: slice) -> Tensor:
        """bfloat16 [B, 1, Q, K] of some queries and keys: 0 where the query sees the key, -inf elsewhere."""
        part = queries.start, queries.stop, keys.start, keys.stop
        if part not in self._additive:
            seen = self.dense[:, :, queries, keys]
            zeros = torch.zeros(seen.shape, dtype=torch.bfloat16, device=self.device)
            self._additive[part] = zeros.masked_fill(~seen, float("-inf"))
        return self._additive[part]

    @cached_property
    def chunks(self) -> list[tuple[slice, slice]]:
        """Every `CHUNK` queries in turn, with the stretch of keys that any of them sees, or `LONG_CHUNK` where a stretch is
        above `SHORT`; empty where that spares less than a quarter of all pairs, as without a window or documents."""
        if self.queries <= CHUNK:  # as in every step of decoding
            return []
        seen_QK = self.dense.any(0)[0]
        for size in (CHUNK, LONG_CHUNK):
            found = []
            for start, part_QK in zip(range(0, self.queries, size), seen_QK.split(size)):
                key_S = part_QK.any(0).nonzero()[:, 0].tolist()
                found.append((slice(start, start + len(part_QK)), slice(key_S[0], key_S[-1] + 1)))
            if max(keys.stop - keys.start for _, keys in found) <= SHORT:
                break
        pairs = sum((q.stop - q.start) * (k.stop - k.start) for q, k in found)
        return found if pairs < 0.75 * self.queries * self.keys else []

    @cached_property
    def block(self):
        """FlexAttention's block mask of the same predicate (queries and keys start together)."""
        from torch.nn.attention.flex_attention import create_block_mask

        assert self.first_query == 0, "decoding with a cache uses the dense mask"
        return create_block_mask(self.predicate, self.rows, None, self.queries, self.keys, device=self.device)


class LayerMasks(NamedTuple):
    """A mask for each layer, of a stack whose layers see differently far."""

    masks: tuple  # of masks, or of other ways of attending


def by_window(windows: Sequence[int], make: Callable[[int], Seeing]) -> Seeing | LayerMasks:
    """The mask of all layers where their windows are the same, else one for each; those of one window share theirs.

    Args:
        make: the mask that goes with a window, 0 for none.
    """
    masks = {window: make(window) for window in dict.fromkeys(windows)}
    return masks[windows[0]] if len(masks) == 1 else LayerMasks(tuple(masks[window] for window in windows))


@lru_cache(maxsize=1)
def compiled_flex_attention():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def attend(
    q_BHQD: Tensor,
    k_BGKD: Tensor,
    v_BGKD: Tensor,
    mask: Mask | Literal["causal", "full"] = "full",
    bias_1HQK: Tensor | None = None,
    dropout: float = 0.0,
    softcap: float = 0.0,
) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v over the keys that the mask allows: [B, H, Q, D].

    Under "causal" the queries are the last of the keys. A query that the mask leaves without any key is an error of the
    mask, not handled here.

    Args:
        softcap: s > 0 makes scores x into s tanh(x / s), for which there is no kernel; see `_soft_capped`.
    """
    H, G = q_BHQD.shape[1], k_BGKD.shape[1]
    if softcap:
        return _soft_capped(q_BHQD, k_BGKD, v_BGKD, mask, bias_1HQK, dropout, softcap)
    # Short rows do not repay FlexAttention's blocks of 128, and it takes neither dropout nor a dense bias.
    if isinstance(mask, Mask) and q_BHQD.is_cuda and mask.first_query == 0 and mask.queries >= 256:
        if bias_1HQK is None and dropout == 0.0:
            return compiled_flex_attention()(q_BHQD, k_BGKD, v_BGKD, block_mask=mask.block, enable_gqa=H != G)
    if H != G:
        k_BGKD, v_BGKD = (x.repeat_interleave(H // G, dim=1) for x in (k_BGKD, v_BGKD))
    Q, K = q_BHQD.shape[2], k_BGKD.shape[2]
    if q_BHQD.device.type == "cpu" and bias_1HQK is None and mask != "causal":
        parts = mask.chunks if isinstance(mask, Mask) else []
        longest = max((keys.stop - keys.start for _, keys in parts), default=K)
        plain = trains_faster_plain(q_BHQD, longest)
        if plain or parts:
            return _in_parts(q_BHQD, k_BGKD, v_BGKD, mask, parts or [(slice(0, Q), slice(0, K))], dropout, plain)
    attn_mask = mask.dense if isinstance(mask, Mask) else None
    is_causal = mask == "causal"
    if is_causal and (Q != K or bias_1HQK is not None):  # the kernel would count the queries from the first key on
        attn_mask = torch.ones(Q, K, dtype=torch.bool, device=q_BHQD.device).tril(K - Q)
        is_causal = False
    if bias_1HQK is not None:
        bias = bias_1HQK.to(q_BHQD.dtype)
        attn_mask = bias if attn_mask is None else bias.masked_fill(~attn_mask, float("-inf"))
    return F.scaled_dot_product_attention(q_BHQD, k_BGKD, v_BGKD, attn_mask=attn_mask, dropout_p=dropout, is_causal=is_causal)


def trains_faster_plain(x: Tensor, keys: int) -> bool:
    """Whether attention from such inputs to so many keys trains faster by plain matrix products: in bfloat16 the CPU's fused
    kernel is slow backwards, 32 ms against 7 for 40 rows of 65, 102 against 51 for 4 of 512."""
    return (
        x.device.type == "cpu" and x.dtype == torch.bfloat16 and torch.is_grad_enabled() and x.requires_grad and keys <= SHORT
    )


def _in_parts(
    q_BHQD: Tensor,
    k_BHKD: Tensor,
    v_BHKD: Tensor,
    mask: Mask | Literal["full"],
    parts: Sequence[tuple[slice, slice]],
    dropout: float,
    plain: bool,
) -> Tensor:
    """Attention of some queries at a time to the keys that any of them sees, by matrix products or the fused kernel."""
    outputs = []
    for queries, keys in parts:
        q, k, v = q_BHQD[:, :, queries], k_BHKD[:, :, keys], v_BHKD[:, :, keys]
        if plain:
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
            if isinstance(mask, Mask):
                scores = scores + mask.additive(queries, keys)
            outputs.append(F.dropout(scores.softmax(-1), dropout) @ v)
        else:
            seen = mask.dense[:, :, queries, keys] if isinstance(mask, Mask) else None
            outputs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=dropout))
    return torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """cap tanh(x / cap): what is small stays as it is, nothing gets beyond the cap; 0 is none. Source: Gemma 2 (arXiv
    2408.00118), section 2."""
    return cap * torch.tanh(x / cap) if cap else x


def _soft_capped(
    q_BHQD: Tensor,
    k_BGKD: Tensor,
    v_BGKD: Tensor,
    mask: Mask | Literal["causal", "full"],
    bias_1HQK: Tensor | None,
    dropout: float,
    cap: float,
) -> Tensor:
    """Attention by plain matrix products, some queries at a time, softmax in float32.

    Backwards the weights of all queries are kept, O(B H Q K): `activation_checkpointing` holds those of one layer alone.
    """
    H, G, Q, K, D = q_BHQD.shape[1], k_BGKD.shape[1], q_BHQD.shape[2], k_BGKD.shape[2], q_BHQD.shape[3]
    k_BHKD, v_BHKD = (x.repeat_interleave(H // G, dim=1) for x in (k_BGKD, v_BGKD))
    if isinstance(mask, Mask):
        allowed = mask.dense
    else:
        allowed = torch.ones(1, 1, Q, K, dtype=torch.bool, device=q_BHQD.device).tril(K - Q if mask == "causal" else K)
    step = max(1, CHUNK_SCORES // (len(q_BHQD) * H * K))
    outputs = []
    for start in range(0, Q, step):
        part = slice(start, start + step)
        scores = soft_cap(q_BHQD[:, :, part] * D**-0.5 @ k_BHKD.transpose(-1, -2), cap)
        if bias_1HQK is not None:
            scores = scores + bias_1HQK[:, :, part].to(scores.dtype)
        scores = scores.masked_fill(~allowed[:, :, part], float("-inf"))
        exact = torch.promote_types(scores.dtype, torch.float32)
        weights = F.dropout(scores.softmax(-1, dtype=exact).to(v_BHKD.dtype), dropout)
        outputs.append(weights @ v_BHKD)
    return torch.cat(outputs, dim=2)


class KVCache:
    """Keys and values of the positions decoded so far, preallocated: per layer [B, G, capacity, D].

    Those of bfloat16 are held in float32 on CPU, whose attention of few queries is five times as fast there.

    Args:
        whole: for readers that see all of it: held as they come, and zero where nothing was stored.
    """

    def __init__(self, layers: int, capacity: int, whole: bool = False):
        self.capacity, self.whole = capacity, whole
        self.length = 0
        self.keys: list[Tensor | None] = [None] * layers
        self.values: list[Tensor | None] = [None] * layers

    def append(self, layer: int, k_BGTD: Tensor, v_BGTD: Tensor) -> tuple[Tensor, Tensor]:
        """Stores T new positions of a layer and returns all of its keys and values so far.

        `length` moves on with `advance`, once all layers have appended.
        """
        if self.keys[layer] is None:
            B, G, _, D = k_BGTD.shape
            shape, dtype = (B, G, self.capacity, D), self.kept_in(k_BGTD)
            make = k_BGTD.new_zeros if self.whole else k_BGTD.new_empty
            self.keys[layer], self.values[layer] = make(shape, dtype=dtype), make(shape, dtype=dtype)
        end = self.length + k_BGTD.shape[2]
        assert end <= self.capacity, f"a cache of {self.capacity} positions cannot hold {end}"
        self.keys[layer][:, :, self.length : end] = k_BGTD
        self.values[layer][:, :, self.length : end] = v_BGTD
        if self.length == 0:  # as they came: many queries are faster in bfloat16
            return k_BGTD, v_BGTD
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def kept_in(self, x: Tensor) -> torch.dtype:
        """The type in which such keys and values are held."""
        wider = x.device.type == "cpu" and x.dtype == torch.bfloat16 and not self.whole
        return torch.float32 if wider else x.dtype

    def advance(self, positions: int) -> None:
        self.length += positions

    def reorder(self, rows: Tensor, first: int = 0) -> None:
        """Row b becomes old row `rows[b]`.

        Args:
            first: the position from which on they differ: those of beams of one prompt share the prompt, which stays.
        """
        for kept in (self.keys, self.values):
            for layer, stored in enumerate(kept):
                if first:
                    stored[:, :, first : self.length] = stored[rows, :, first : self.length]
                else:
                    kept[layer] = stored[rows]
