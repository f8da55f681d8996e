"""The contract of a connector: encoder states in, decoder input vectors out.

A pointwise connector maps each state by itself and takes any leading shape. Any other sees whole spans, padded, with a
mask, and makes a fixed number of vectors of each.
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
        """Decoder positions that a span of `num_states` states takes."""
        return num_states


class Connector(nn.Module, ABC):
    """Built as `cls(config, encoder_width, decoder_width)`."""

    Config: ClassVar[type[ConnectorConfig]]
    pointwise: ClassVar[bool] = True

    @abstractmethod
    def forward(self, states: Tensor, mask_NS: Tensor | None = None) -> Tensor:
        """Pointwise: [..., encoder width] -> [..., decoder width]. Else [N, S, encoder width] with bool mask [N, S]
        (True for real states) -> [N, V, decoder width]."""
