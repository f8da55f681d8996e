"""A causal decoder as an encoder of text: every state sees what stands before it alone.

What a causal, semi-causal or MIM run trained is thereby read by the same heads as a bidirectional encoder: `encoder:
{type: causal, init_from: RUN}` takes the run's decoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from metalm.encoders.text import TextEncoder, TextEncoderConfig
from metalm.nn.attention import Mask, all_of, by_window, causal, same_document, within


@dataclass(kw_only=True)
class CausalEncoderConfig(TextEncoderConfig):
    """A decoder's stack and vocabulary; `scaled` as of a `DecoderConfig`."""

    positions: Literal["learned", "sinusoidal", "rotary", "none"] = "sinusoidal"
    relative_bias: bool = False
    scaled: bool = False


class CausalEncoder(TextEncoder):
    """Its parameters are called as the decoder's."""

    Config = CausalEncoderConfig

    def __init__(self, config: CausalEncoderConfig):
        super().__init__(config)
        scaled = config.scaled or config.positions == "sinusoidal"  # as `CausalDecoder.embed`
        self.scale = config.width**0.5 if scaled else 1.0

    def forward(self, tokens_RS: Tensor, span_RS: Tensor, position_RS: Tensor) -> Tensor:
        R, S = tokens_RS.shape

        def make(window: int) -> Mask:
            predicate = all_of(causal, same_document(span_RS), within(position_RS, window))
            return Mask(predicate, R, S, S, tokens_RS.device)

        mask = by_window(self.windows, make)
        return self.transformer(self.embedding(tokens_RS) * self.scale, position_RS, mask)
