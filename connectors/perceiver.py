"""Perceiver resampler: a fixed number of learned latents read a span's states by cross-attention.

    latents = latents + attention(norm(latents) -> [norm(states); norm(latents)]);  latents = latents + mlp(norm(latents))

Cost: `latents` decoder positions a span, however many states it has. Source: Flamingo (arXiv 2204.14198), section 3.1.
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
class PerceiverConfig(ConnectorConfig):
    """`latents` vectors a span, by `layers` rounds of reading with `heads` heads at the decoder's width."""

    latents: int = 64
    layers: int = 2
    heads: int = 8

    def __post_init__(self):
        if min(self.latents, self.layers, self.heads) < 1:
            raise ConfigError("latents, layers and heads must be at least 1")

    def num_vectors(self, num_states: int) -> int:
        return self.latents


class PerceiverLayer(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.states_norm, self.latents_norm, self.mlp_norm = (nn.LayerNorm(width) for _ in range(3))
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, latents_NLD: Tensor, states_NSD: Tensor, mask_NS: Tensor) -> Tensor:
        N, L, _ = latents_NLD.shape
        latents = self.latents_norm(latents_NLD)
        keys = torch.cat([self.states_norm(states_NSD), latents], dim=1)
        q, k, v = (
            x.view(N, -1, self.heads, x.shape[-1] // self.heads).transpose(1, 2)
            for x in (self.query(latents), *self.key_value(keys).chunk(2, dim=-1))
        )
        mask = torch.cat([mask_NS, mask_NS.new_ones(N, L)], dim=1)[:, None, None, :]
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(N, L, -1)
        latents_NLD = latents_NLD + self.out(read)
        return latents_NLD + self.mlp(self.mlp_norm(latents_NLD))


class PerceiverConnector(Connector):
    Config = PerceiverConfig
    pointwise = False

    def __init__(self, config: PerceiverConfig, encoder_width: int, decoder_width: int):
        super().__init__()
        if decoder_width % config.heads:
            raise ConfigError(f"connector.heads {config.heads} does not divide the decoder's width {decoder_width}")
        self.project = nn.Linear(encoder_width, decoder_width)
        self.latents = nn.Parameter(torch.randn(config.latents, decoder_width) * 0.02)
        self.layers = nn.ModuleList(PerceiverLayer(decoder_width, config.heads) for _ in range(config.layers))
        self.norm = nn.LayerNorm(decoder_width)
        self.apply(init_weights)

    def forward(self, states: Tensor, mask_NS: Tensor | None = None) -> Tensor:
        states_NSD = self.project(states)
        if mask_NS is None:
            mask_NS = states_NSD.new_ones(states_NSD.shape[:2], dtype=torch.bool)
        latents = self.latents.expand(len(states_NSD), -1, -1)
        for layer in self.layers:
            latents = layer(latents, states_NSD, mask_NS)
        return self.norm(latents)
