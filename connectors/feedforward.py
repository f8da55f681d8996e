"""A feed-forward network of n layers with GELU between them: the paper's connector for vision-language, with n = 3."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from metalm.connectors.base import Connector, ConnectorConfig
from metalm.errors import ConfigError


@dataclass
class FeedForwardConfig(ConnectorConfig):
    """`layers` linear maps; the inner ones are `hidden` wide (0: as the decoder)."""

    layers: int = 3
    hidden: int = 0

    def __post_init__(self):
        if self.layers < 2:
            raise ConfigError("layers must be at least 2; for one use type: linear")


class FeedForwardConnector(Connector):
    Config = FeedForwardConfig

    def __init__(self, config: FeedForwardConfig, encoder_width: int, decoder_width: int):
        super().__init__()
        hidden = config.hidden or decoder_width
        widths = [encoder_width, *[hidden] * (config.layers - 1), decoder_width]
        modules: list[nn.Module] = []
        for i, (fan_in, fan_out) in enumerate(zip(widths, widths[1:])):
            modules += [nn.GELU()] if i else []
            modules.append(nn.Linear(fan_in, fan_out))
            # Keeps the variance through the layers, so that what docks is of the size of scaled embeddings and positions.
            nn.init.normal_(modules[-1].weight, std=fan_in**-0.5)
            nn.init.zeros_(modules[-1].bias)
        self.layers = nn.Sequential(*modules)

    def forward(self, states: Tensor, mask_NS: Tensor | None = None) -> Tensor:
        return self.layers(states)
