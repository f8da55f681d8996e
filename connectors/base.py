"""The contract of a connector: encoder states in, decoder input vectors out.

A pointwise connector maps each state by itself and takes any leading shape. Any other sees whole spans, padded, with a
mask, and makes of each as many vectors as its configuration says, the first of those that it returns for the span.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn


@dataclass
class ConnectorConfig:
    """What every connector's `Config` has."""

    type: str

    def num_vectors(self, num_states: int) -> int:
        """Decoder positions that a span of `num_states` states takes.

        Raises:
            ConfigError: the connector does not read spans of so many states.
        """
        return num_states


class Connector(nn.Module, ABC):
    """Built as `cls(config, encoder_width, decoder_width)`."""

    Config: ClassVar[type[ConnectorConfig]]
    pointwise: ClassVar[bool] = True

    @abstractmethod
    def forward(self, states: Tensor, mask_NS: Tensor | None = None) -> Tensor:
        """Pointwise: [..., encoder width] -> [..., decoder width]. Else [N, S, encoder width] with bool mask [N, S]
        (True for real states, which come first) -> [N, V, decoder width], V those of the longest span."""
