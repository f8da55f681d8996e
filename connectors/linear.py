"""One linear layer: the paper's connector for language."""

from __future__ import annotations

from torch import Tensor, nn

from metalm.connectors.base import Connector, ConnectorConfig


class LinearConnector(Connector):
    Config = ConnectorConfig

    def __init__(self, config: ConnectorConfig, encoder_width: int, decoder_width: int):
        super().__init__()
        self.linear = nn.Linear(encoder_width, decoder_width)
        nn.init.normal_(self.linear.weight, std=encoder_width**-0.5)
        nn.init.zeros_(self.linear.bias)

    def forward(self, states: Tensor, mask_NS: Tensor | None = None) -> Tensor:
        return self.linear(states)
