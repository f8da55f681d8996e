"""What models of one encoder of text share: pretraining modes, and heads on what they trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from metalm.config import plugin
from metalm.encoders import ENCODERS
from metalm.errors import ConfigError
from metalm.hub import PretrainedModel
from metalm.nn.freezing import set_trainable
from metalm.segments import Batch

TEXT_ENCODERS = ("text", "two_tower", "causal")


@dataclass(kw_only=True)
class EncoderModelConfig:
    """An encoder of text."""

    type: str
    encoder: Any

    def set_vocab_size(self, size: int) -> None:
        """Fills in the tokenizer's size where the encoder's vocabulary is left at 0.

        Raises:
            ConfigError: the vocabulary is smaller than the tokenizer's.
        """
        self.encoder.vocab_size = self.encoder.vocab_size or size
        if self.encoder.vocab_size < size:
            raise ConfigError(f"encoder.vocab_size is {self.encoder.vocab_size}, but the tokenizer has {size} tokens")

    def check_row_length(self, length: int) -> None:
        """Raises `ConfigError` where rows are too short for a token between the ends of a text."""
        if length < 3:
            raise ConfigError(f"data.row_length {length} has no room for a token between a text's ends, it must be at least 3")

    def check_pretraining(self, encoder_type: str) -> None:
        """Raises `ConfigError` where the encoder is another one, or has what only a docked one needs."""
        if self.encoder.type != encoder_type:
            raise ConfigError(f"encoder.type is {self.encoder.type!r}, the model {self.type!r} trains {encoder_type!r}")
        for name, default in (("connector", None), ("trainable", "all")):
            if getattr(self.encoder, name) != default:
                raise ConfigError(f"encoder.{name} belongs to the model that the encoder is docked in afterwards")


@dataclass(kw_only=True)
class HeadConfig(EncoderModelConfig):
    """An encoder with a head. `dropout` is the head's; `s_token` is filled in from the tokenizer."""

    encoder: Any = plugin(ENCODERS)
    dropout: float = 0.1
    s_token: int = -1
    special_tokens: ClassVar[tuple[str, ...]] = ("<s>",)

    def check_head(self, names: list[str], what: str) -> None:
        """Raises `ConfigError` where the labels or tags are no choice, or the encoder does not read texts alone."""
        if len(names) < 2 or len(set(names)) < len(names):
            raise ConfigError(f"{what} {names} must be two or more, all different")
        if self.encoder.type not in TEXT_ENCODERS:
            raise ConfigError(
                f"encoder.type is {self.encoder.type!r}, a {self.type} of texts reads by one of: {', '.join(TEXT_ENCODERS)}"
            )
        if self.encoder.connector is not None:
            raise ConfigError(f"encoder.connector is for a decoder, which a {self.type} does not have")


class HeadModel(PretrainedModel):
    """An encoder, on whose states a head reads; its subclass has the head, `layout` and `forward`."""

    def __init__(self, config: HeadConfig):
        super().__init__()
        self.config = config
        self.encoder = ENCODERS[config.encoder.type](config.encoder)
        set_trainable(self.encoder, self.encoder.layers(), config.encoder.trainable, "encoder")
        self.processors: dict = {}
        self.parts: dict[str, tuple[Tensor, int]] = {}

    def hidden(self, batch: Batch) -> Tensor:
        return self.encoder(batch.tokens_BT, batch.document_BT, batch.position_BT)

    def num_predictions(self, batch: Batch) -> int:
        """Of the vocabulary: none."""
        return 0
