"""Convolutional abstractor: residual convolutions over the square of patches, pooled to a smaller one.

    patches -> blocks -> average pool to side x side -> blocks -> linear map

Neighbourhood survives, which latents that read everything lose. Source: Honeybee (arXiv 2312.06742), section 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from metalm.connectors.base import Connector, ConnectorConfig
from metalm.errors import ConfigError
from metalm.nn.transformer import init_weights


@dataclass
class ConvolutionConfig(ConnectorConfig):
    """`side` x `side` vectors a picture, by `layers` blocks before the pooling and as many after it, `width` wide (0: as the
    decoder); for encoders whose states are a square of patches, row by row."""

    side: int = 8
    layers: int = 2
    width: int = 0

    def __post_init__(self):
        if min(self.side, self.layers) < 1:
            raise ConfigError("side and layers must be at least 1")

    def num_vectors(self, num_states: int) -> int:
        if math.isqrt(num_states) ** 2 != num_states:
            raise ConfigError(f"convolution needs a square of states, not {num_states} states")
        return self.side**2


class ConvolutionBlock(nn.Module):
    """Norm, 3 x 3 convolution channel by channel, and a network on each place, around which the states pass unchanged."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x_NHWD: Tensor) -> Tensor:
        around = self.depthwise(self.norm(x_NHWD).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x_NHWD + self.mlp(around)


class ConvolutionConnector(Connector):
    Config = ConvolutionConfig
    pointwise = False

    def __init__(self, config: ConvolutionConfig, encoder_width: int, decoder_width: int):
        super().__init__()
        width = config.width or decoder_width
        self.side = config.side
        self.project = nn.Linear(encoder_width, width)
        self.before, self.after = (nn.Sequential(*(ConvolutionBlock(width) for _ in range(config.layers))) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.map = nn.Linear(width, decoder_width)
        self.apply(init_weights)

    def forward(self, states_NSD: Tensor, mask_NS: Tensor | None = None) -> Tensor:
        x_NSD = self.project(states_NSD)
        if mask_NS is None or mask_NS.is_meta or bool(mask_NS.all()):
            return self.pooled(x_NSD)
        out = x_NSD.new_zeros(len(x_NSD), self.side**2, self.map.out_features)
        length_N = mask_NS.sum(1)
        for length in length_N.unique().tolist():
            rows = (length_N == length).nonzero()[:, 0]
            out = out.index_copy(0, rows, self.pooled(x_NSD[rows, :length]))
        return out

    def pooled(self, x_NSD: Tensor) -> Tensor:
        side = math.isqrt(x_NSD.shape[1])
        x_NHWD = self.before(x_NSD.unflatten(1, (side, side)))
        small_NDHW = F.adaptive_avg_pool2d(x_NHWD.permute(0, 3, 1, 2), self.side)
        x_NHWD = self.after(small_NDHW.permute(0, 2, 3, 1))
        return self.map(self.norm(x_NHWD.flatten(1, 2)))
