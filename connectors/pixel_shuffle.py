"""Pixel shuffle: squares of neighbouring patches become one vector, so that a picture takes a fraction of the positions.

    side 4, scale 2       a b c d      [a b e f] [c d g h]
                          e f g h  ->  [i j m n] [k l o p]  -> linear map each
                          i j k l
                          m n o p

Source: Shi et al., "Real-Time Single Image and Video Super-Resolution" (arXiv 1609.05158), read backwards, as vision-language
models such as SmolVLM do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from metalm.connectors.base import Connector, ConnectorConfig
from metalm.errors import ConfigError
from metalm.nn.transformer import init_weights


@dataclass
class PixelShuffleConfig(ConnectorConfig):
    """`scale` x `scale` patches make a vector; for encoders whose states are a square of patches, row by row."""

    scale: int = 2

    def __post_init__(self):
        if self.scale < 2:
            raise ConfigError(f"scale {self.scale} must be at least 2; without, take type: linear")

    def num_vectors(self, num_states: int) -> int:
        side = math.isqrt(num_states)
        if side**2 != num_states or side % self.scale:
            raise ConfigError(
                f"pixel_shuffle needs a square of states whose side {self.scale} divides, not {num_states} states"
            )
        return num_states // self.scale**2


class PixelShuffleConnector(Connector):
    Config = PixelShuffleConfig
    pointwise = False

    def __init__(self, config: PixelShuffleConfig, encoder_width: int, decoder_width: int):
        super().__init__()
        self.scale = config.scale
        self.map = nn.Linear(config.scale**2 * encoder_width, decoder_width)
        self.apply(init_weights)

    def forward(self, states_NSD: Tensor, mask_NS: Tensor | None = None) -> Tensor:
        N, S, D = states_NSD.shape
        length_N = states_NSD.new_full((N,), S, dtype=torch.long) if mask_NS is None else mask_NS.sum(1)
        side_N11 = length_N.float().sqrt().round().long()[:, None, None]
        square_11K = torch.arange(self.scale**2, device=states_NSD.device)
        vector_1V1 = torch.arange(max(1, S // self.scale**2), device=states_NSD.device)[:, None]
        across_N11 = (side_N11 // self.scale).clamp(min=1)  # squares in a row of them
        row_NVK = vector_1V1 // across_N11 * self.scale + square_11K // self.scale
        column_NVK = vector_1V1 % across_N11 * self.scale + square_11K % self.scale
        place_NVK = (row_NVK * side_N11 + column_NVK).clamp(max=S - 1)
        picked = states_NSD.gather(1, place_NVK.flatten(1)[:, :, None].expand(-1, -1, D))
        return self.map(picked.view(N, -1, self.scale**2 * D))
