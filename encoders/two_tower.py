"""Two towers, one reading forwards and one backwards, and the attention that combines them: the cloze model's encoder.

    F_i of t_<=i, B_i of t_>=i               pre-norm stacks with weights and a final norm of their own, embeddings shared
    q_i = F_{i-1} + B_{i+1}                  or W [F_{i-1}; B_{i+1}]; zero off the document's ends
    c_i = attention(q_i; {F_j, B_k})         scores without 1 / sqrt(d), no residual around it
    h_i = c_i + mlp(norm(c_i))

    combination    full: j < i, k > i        h_i knows nothing of t_i: pretraining (`metalm.objectives.cloze`)
                   curr: j <= i, k >= i
                   none: all j and k         fine-tuning, and docked on a decoder

The backward tower reads every document reversed by its own length, after positions are added: both towers are causal and
share one mask. The combination is one masked attention over the 2 S states, which skips the empty blocks under FlexAttention.
Two attentions, strictly causal and strictly anticausal, merged by their logsumexp give the same (the tests' reference); forward
and backward on one CPU core, 4,096 positions, 8 heads of 64, in ms:

    S                     128    256    512
    bfloat16   masked      79    204    394
               merged      78    139    457
    float32    masked     119    215    425
               merged     158    301  1,252

Source: Baevski et al. 2019 (arXiv 1903.07785), section 3, and the released code, which alone says where norms, residuals and
the learned keys are.

Shapes: R rows, S positions of a row, D width, H heads, G key-value heads, K keys, W head width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metalm.encoders.base import Encoder, EncoderConfig
from metalm.encoders.text import TextProcessor
from metalm.errors import ConfigError
from metalm.nn.attention import Mask, Predicate, all_of, attend, causal, everywhere, same_document
from metalm.nn.transformer import (
    MLP,
    Attention,
    Transformer,
    TransformerConfig,
    init_weights,
    make_norm,
    make_positions,
    start_blocks,
)
from metalm.nn.words import CharacterConfig, CharacterEmbedding

Sight = Literal["full", "curr", "none"]


@dataclass(kw_only=True)
class TwoTowerConfig(TransformerConfig, EncoderConfig):
    """Two stacks of `layers` each over a vocabulary (0: the tokenizer's).

    `combination` is what a docked or fine-tuned encoder's states see; pretraining always goes by `full`. `bias_kv` gives every
    attention one more key and value, learned and the same everywhere. With `characters`, tokens are read by their spelling, be
    they words or pieces of words.
    """

    type: str = "two_tower"
    mlp: Literal["gelu", "relu", "swiglu"] = "relu"
    positions: Literal["sinusoidal", "learned"] = "sinusoidal"
    max_positions: int = 512
    vocab_size: int = 0
    query: Literal["sum", "concat"] = "sum"
    combination: Sight = "none"
    bias_kv: bool = True
    characters: CharacterConfig | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.relative_bias:
            raise ConfigError("relative_bias is not for two towers: their positions are added once, to what both read")
        if self.qk_norm:
            raise ConfigError("qk_norm is not for two towers: the scores that combine them are not scaled, by definition")


def before(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """A query sees the keys to its left."""
    return k < q


def after(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """A query sees the keys to its right."""
    return k > q


def anticausal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """A query sees its own key and those to its right."""
    return k >= q


# What a position sees of the forward and of the backward states.
SIGHTS = {"full": (before, after), "curr": (causal, anticausal), "none": (everywhere, everywhere)}


def any_of(one: Predicate, other: Predicate) -> Predicate:
    return lambda b, h, q, k: one(b, h, q, k) | other(b, h, q, k)


def side_by_side(forward: Predicate, backward: Predicate, length: int) -> Predicate:
    """Of 2 x `length` keys the first half is seen by one predicate, the second by the other."""
    return lambda b, h, q, k: torch.where(k < length, forward(b, h, q, k % length), backward(b, h, q, k % length))


def make_mask(predicate: Predicate, span_RS: Tensor, keys: int, bias_kv: bool) -> Mask:
    """The mask of a predicate over `keys` and, after them, the learned one, which every query sees."""

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k == keys) | predicate(b, h, q, k.clamp(max=keys - 1))

    R, S = span_RS.shape
    if bias_kv:
        return Mask(seen, R, S, keys + 1, span_RS.device)
    return Mask(predicate, R, S, keys, span_RS.device)


def combination_mask(span_RS: Tensor, sight: Sight, bias_kv: bool) -> Mask:
    """What each position sees of the forward states, of the backward ones after them, and the learned key.

    Without that key a token alone in its document has nothing to see in `full`: it sees itself, and `Combination` forgets it.
    """
    first_RS, last_RS = document_edges(span_RS)
    S, same, alone_RS = span_RS.shape[1], same_document(span_RS), first_RS & last_RS
    forward, backward = SIGHTS[sight]
    if sight == "full" and not bias_kv:
        forward = any_of(forward, lambda b, h, q, k: alone_RS[b, q])
    return make_mask(side_by_side(all_of(forward, same), all_of(backward, same), S), span_RS, 2 * S, bias_kv)


def append_bias(k_RGKW: Tensor, v_RGKW: Tensor, bias_2G1W: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values with the learned ones after them."""
    key_G1W, value_G1W = (bias.expand(len(k_RGKW), -1, -1, -1) for bias in bias_2G1W)
    return torch.cat([k_RGKW, key_G1W], dim=2), torch.cat([v_RGKW, value_G1W], dim=2)


def document_edges(span_RS: Tensor) -> tuple[Tensor, Tensor]:
    """bool [R, S] each: whether a position is its document's first, and whether it is its last.

    Documents are runs of one number; padding counts as one.
    """
    turn = span_RS[:, 1:] != span_RS[:, :-1]
    return F.pad(turn, (1, 0), value=True), F.pad(turn, (0, 1), value=True)


def mirrored_columns(span_RS: Tensor) -> Tensor:
    """Where each position lands when every document is reversed in its place, int64 [R, S]; its own inverse.

    span      1  1  1  2  2  0
    column    2  1  0  4  3  5
    """
    first_RS, last_RS = document_edges(span_RS)
    column_S = torch.arange(span_RS.shape[1], device=span_RS.device)
    start_RS = torch.where(first_RS, column_S, 0).cummax(dim=1).values
    end_RS = torch.where(last_RS, column_S, len(column_S)).flip(1).cummin(dim=1).values.flip(1)
    return start_RS + end_RS - column_S


class BiasedAttention(Attention):
    """Self-attention with one more key and value, which are learned: an empty memory that every query may look at."""

    def __init__(self, config: TransformerConfig):
        super().__init__(config)
        self.bias_2G1W = nn.Parameter(torch.zeros(2, self.kv_heads, 1, self.head_width))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, bias_1HQK=None, cache=None, layer=0) -> Tensor:
        return super().forward(q, k, v, mask, bias_1HQK, cache=self)  # in a cache's place, for `append`

    def append(self, layer: int, k_RGKW: Tensor, v_RGKW: Tensor) -> tuple[Tensor, Tensor]:
        return append_bias(k_RGKW, v_RGKW, self.bias_2G1W)


class Tower(Transformer):
    """A stack whose inputs have their positions already; with `bias_kv` its attentions have the learned key and value."""

    def __init__(self, config: TwoTowerConfig):
        super().__init__(replace(config, positions="none"))
        if config.bias_kv:
            for block in self.blocks:
                block.attention = BiasedAttention(config)
            self.apply(init_weights)
            start_blocks(self.blocks)


class Combination(nn.Module):
    """Attention over the states of both towers, from the query of a token's two neighbours, then the feed-forward network.

    Scores are not scaled by 1 / sqrt(W); the query's matrix starts smaller by as much, so that they start at the usual size.
    """

    def __init__(self, config: TwoTowerConfig):
        super().__init__()
        self.concat, self.bias_kv = config.query == "concat", config.bias_kv
        self.head_width = config.head_width
        bias = config.bias if config.qkv_bias is None else config.qkv_bias
        self.query = nn.Linear(config.width * (2 if self.concat else 1), config.heads * self.head_width, bias=bias)
        self.key_value = nn.Linear(config.width, 2 * config.kv_heads * self.head_width, bias=bias)
        if self.bias_kv:
            self.bias_2G1W = nn.Parameter(torch.zeros(2, config.kv_heads, 1, self.head_width))
        self.out = nn.Linear(config.heads * self.head_width, config.width, bias=config.bias)
        self.mlp_norm = make_norm(config)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)
        self.apply(init_weights)
        with torch.no_grad():
            self.query.weight.div_(self.head_width**0.5)

    def forward(self, forward_RSD: Tensor, backward_RSD: Tensor, span_RS: Tensor, sight: Sight) -> Tensor:
        """States [R, S, D] from those of the towers."""
        first_RS, last_RS = document_edges(span_RS)
        left_RSD = F.pad(forward_RSD, (0, 0, 1, -1)).masked_fill(first_RS[..., None], 0)
        right_RSD = F.pad(backward_RSD, (0, 0, -1, 1)).masked_fill(last_RS[..., None], 0)
        query = self.query(torch.cat([left_RSD, right_RSD], dim=-1) if self.concat else left_RSD + right_RSD)
        key_value = self.key_value(torch.cat([forward_RSD, backward_RSD], dim=1))
        q_RHSW = self.split_heads(query) * self.head_width**0.5  # undoes what `attend` does
        k_RGKW, v_RGKW = self.split_heads(key_value).chunk(2, dim=1)
        if self.bias_kv:
            k_RGKW, v_RGKW = append_bias(k_RGKW, v_RGKW, self.bias_2G1W)
        mask = combination_mask(span_RS, sight, self.bias_kv)
        attended_RHSW = attend(q_RHSW, k_RGKW, v_RGKW, mask, dropout=self.dropout.p if self.training else 0.0)
        if sight == "full" and not self.bias_kv:  # a token without any other sees nothing
            attended_RHSW = attended_RHSW.masked_fill((first_RS & last_RS)[:, None, :, None], 0)
        x_RSD = self.dropout(self.out(attended_RHSW.transpose(1, 2).flatten(2)))
        return x_RSD + self.dropout(self.mlp(self.mlp_norm(x_RSD)))

    def split_heads(self, x_RKD: Tensor) -> Tensor:
        return x_RKD.unflatten(-1, (-1, self.head_width)).transpose(1, 2)


class TwoTowerEncoder(Encoder):
    Config = TwoTowerConfig

    def __init__(self, config: TwoTowerConfig):
        super().__init__()
        if config.vocab_size < 1:
            raise ConfigError("the two-tower encoder's vocab_size is not set and there is no tokenizer to take it from")
        self.config = config
        self.width = config.width
        self.processor = TextProcessor(config.max_positions)
        self.scale = 1.0
        if config.characters:
            self.embedding = CharacterEmbedding(config.characters, config.vocab_size, config.width)
        else:
            self.embedding = nn.Embedding(config.vocab_size, config.width)
            init_weights(self.embedding)
            if config.positions == "sinusoidal":  # of size 1, as what is added to them must be; see `CausalDecoder`
                self.scale = config.width**0.5
        self.positions = make_positions(config)
        init_weights(self.positions)
        self.left_to_right = Tower(config)
        self.right_to_left = Tower(config)
        self.combination = Combination(config)

    def towers(self, tokens_RS: Tensor, span_RS: Tensor, position_RS: Tensor) -> tuple[Tensor, Tensor]:
        """Forward and backward states, [R, S, D] each."""
        mask = make_mask(all_of(causal, same_document(span_RS)), span_RS, span_RS.shape[1], self.config.bias_kv)
        x_RSD = self.embedding(tokens_RS) * self.scale
        x_RSD = x_RSD + self.positions(position_RS).to(x_RSD.dtype)
        mirror_RS1 = mirrored_columns(span_RS)[..., None]
        forward_RSD = self.left_to_right(x_RSD, position_RS, mask)
        backward_RSD = self.right_to_left(x_RSD.take_along_dim(mirror_RS1, dim=1), position_RS, mask)
        return forward_RSD, backward_RSD.take_along_dim(mirror_RS1, dim=1)

    def forward(self, tokens_RS: Tensor, span_RS: Tensor, position_RS: Tensor) -> Tensor:
        return self.combination(*self.towers(tokens_RS, span_RS, position_RS), span_RS, self.config.combination)

    def layers(self) -> list[nn.Module]:
        pairs = [nn.ModuleList(pair) for pair in zip(self.left_to_right.blocks, self.right_to_left.blocks)]
        top = [self.left_to_right.norm, self.right_to_left.norm, self.combination]
        return [*pairs[:-1], nn.ModuleList([pairs[-1], *top])]
