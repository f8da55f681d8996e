"""A bidirectional Transformer over text: the paper's encoder for language (learned positions, T5 relative bias)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from metalm.encoders.base import Collated, Encoder, EncoderConfig, Processor, pack_spans
from metalm.errors import ConfigError, DataError
from metalm.nn.attention import Mask, all_of, by_window, same_document, within
from metalm.nn.transformer import TextStackConfig, Transformer, init_weights


@dataclass(kw_only=True)
class TextEncoderConfig(TextStackConfig, EncoderConfig):
    """A stack with a vocabulary (0: the tokenizer's); spans longer than `max_positions` are refused."""

    positions: Literal["learned", "sinusoidal", "rotary"] = "learned"
    relative_bias: bool = True
    max_positions: int = 512
    vocab_size: int = 0


@dataclass
class TextProcessor(Processor):
    """Text spans are packed side by side into rows; a blank span is one token."""

    max_positions: int
    reads = frozenset({"text"})

    def num_states(self, inputs: dict) -> int:
        return check_room(len(inputs["tokens"]), self.max_positions)

    def load(self, inputs: dict) -> dict:
        return inputs

    def collate(self, loaded: list[dict]) -> Collated:
        packed = pack_spans([len(inputs["tokens"]) for inputs in loaded])
        tokens_RS = torch.zeros_like(packed.span_RS)
        tokens = [token for inputs in loaded for token in inputs["tokens"]]
        tokens_RS.view(-1)[packed.source] = torch.tensor(tokens)
        inputs = {"tokens_RS": tokens_RS, "span_RS": packed.span_RS, "position_RS": packed.position_RS}
        return Collated(inputs, packed.source)

    def blank(self) -> dict:
        return {"tokens": [0]}


def check_room(tokens: int, max_positions: int) -> int:
    """The number of tokens; raises `DataError` where the encoder has no positions for them."""
    if tokens > max_positions:
        raise DataError(f"a text of {tokens:,} tokens does not fit the encoder's max_positions={max_positions}")
    return tokens


class TextEncoder(Encoder):
    Config = TextEncoderConfig

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        if config.vocab_size < 1:
            raise ConfigError("the text encoder's vocab_size is not set and there is no tokenizer to take it from")
        self.width, self.windows = config.width, config.windows
        self.processor = TextProcessor(config.max_positions)
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        init_weights(self.embedding)
        self.transformer = Transformer(config)

    def forward(self, tokens_RS: Tensor, span_RS: Tensor, position_RS: Tensor) -> Tensor:
        R, S = tokens_RS.shape
        mask = by_window(
            self.windows, lambda n: Mask(all_of(same_document(span_RS), within(position_RS, n)), R, S, S, tokens_RS.device)
        )
        return self.transformer(self.embedding(tokens_RS), position_RS, mask)

    def layers(self) -> list[nn.Module]:
        blocks = self.transformer.blocks
        return [*blocks[:-1], nn.ModuleList([blocks[-1], self.transformer.norm])]
