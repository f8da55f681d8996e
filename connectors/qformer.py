"""Querying Transformer: learned queries attend to each other, then to a span's states, layer by layer.

    queries = queries + attention(norm(queries))
    queries = queries + attention(norm(queries) -> states)
    queries = queries + mlp(norm(queries))

Source: BLIP-2 (arXiv 2301.12597), section 3, without its text side. Against `perceiver`, whose queries read states and each
other in one attention, it has attention of its own for either.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metalm.connectors.base import Connector, ConnectorConfig
from metalm.errors import ConfigError
from metalm.nn.transformer import init_weights


@dataclass
class QFormerConfig(ConnectorConfig):
    """`queries` vectors a span, by `layers` layers of `heads` heads, `width` wide (0: as the decoder)."""

    queries: int = 32
    layers: int = 2
    heads: int = 8
    width: int = 0

    def __post_init__(self):
        if min(self.queries, self.layers, self.heads) < 1:
            raise ConfigError("queries, layers and heads must be at least 1")

    def num_vectors(self, num_states: int) -> int:
        return self.queries


class QFormerLayer(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.self_norm, self.cross_norm, self.mlp_norm = (nn.LayerNorm(width) for _ in range(3))
        self.self_query, self.self_out, self.cross_query, self.cross_out = (nn.Linear(width, width) for _ in range(4))
        self.self_key_value, self.cross_key_value = (nn.Linear(width, 2 * width) for _ in range(2))
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def attend(self, query: Tensor, key_value: Tensor, mask_N11S: Tensor | None) -> Tensor:
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (query, *key_value.chunk(2, dim=-1)))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_N11S).transpose(1, 2).flatten(2)

    def forward(self, queries_NQD: Tensor, states_NSD: Tensor, mask_NS: Tensor) -> Tensor:
        x = self.self_norm(queries_NQD)
        queries_NQD = queries_NQD + self.self_out(self.attend(self.self_query(x), self.self_key_value(x), None))
        x = self.cross_query(self.cross_norm(queries_NQD))
        read = self.attend(x, self.cross_key_value(states_NSD), mask_NS[:, None, None, :])
        queries_NQD = queries_NQD + self.cross_out(read)
        return queries_NQD + self.mlp(self.mlp_norm(queries_NQD))


class QFormerConnector(Connector):
    Config = QFormerConfig
    pointwise = False

    def __init__(self, config: QFormerConfig, encoder_width: int, decoder_width: int):
        super().__init__()
        width = config.width or decoder_width
        if width % config.heads:
            raise ConfigError(f"connector.heads {config.heads} does not divide its width {width}")
        self.project = nn.Sequential(nn.Linear(encoder_width, width), nn.LayerNorm(width))
        self.queries = nn.Parameter(torch.randn(config.queries, width) * width**-0.5)
        self.layers = nn.ModuleList(QFormerLayer(width, config.heads) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width)
        self.map = nn.Linear(width, decoder_width)
        self.apply(init_weights)

    def forward(self, states_NSD: Tensor, mask_NS: Tensor | None = None) -> Tensor:
        states_NSD = self.project(states_NSD)
        if mask_NS is None:
            mask_NS = states_NSD.new_ones(states_NSD.shape[:2], dtype=torch.bool)
        queries = self.queries.expand(len(states_NSD), -1, -1)
        for layer in self.layers:
            queries = layer(queries, states_NSD, mask_NS)
        return self.map(self.norm(queries))
