"""Stacking: every few states one after another become one vector, as speech models do to shorten sound."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from metalm.connectors.base import Connector, ConnectorConfig
from metalm.errors import ConfigError
from metalm.nn.transformer import init_weights


@dataclass
class StackConfig(ConnectorConfig):
    """`size` states make a vector; the last of a span may be of fewer, and zeros."""

    size: int = 4

    def __post_init__(self):
        if self.size < 2:
            raise ConfigError(f"size {self.size} must be at least 2; without, take type: linear")

    def num_vectors(self, num_states: int) -> int:
        return -(-num_states // self.size)


class StackConnector(Connector):
    Config = StackConfig
    pointwise = False

    def __init__(self, config: StackConfig, encoder_width: int, decoder_width: int):
        super().__init__()
        self.size = config.size
        self.map = nn.Linear(config.size * encoder_width, decoder_width)
        self.apply(init_weights)

    def forward(self, states_NSD: Tensor, mask_NS: Tensor | None = None) -> Tensor:
        N, S, D = states_NSD.shape
        if mask_NS is not None:
            states_NSD = states_NSD.masked_fill(~mask_NS[:, :, None], 0)
        padded = nn.functional.pad(states_NSD, (0, 0, 0, -S % self.size))
        return self.map(padded.view(N, -1, self.size * D))
