"""The contract of an encoder: a host-side `Processor` and a device-side `Encoder`.

A span's inputs are a plain dict, `{"image": bytes}`, `{"tokens": [int]}` or both, made by a layout; `{"text": str}` in place of
tokens where the encoder has a tokenizer of its own. In the data worker the processor says how many states the span will have,
loads it (decodes the picture) and collates the spans of a batch; on the device the encoder turns the collated tensors into
states.

Spans that read text are packed into rows like documents in the decoder, so the states of span i need not be row i:
`Collated.source` says where they are.

Shapes: N spans, R rows, S positions of a row, M states of all spans together, P patches, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from metalm.config import plugin
from metalm.connectors import CONNECTORS
from metalm.errors import ConfigError
from metalm.nn.freezing import Trainable, is_frozen
from metalm.nn.packing import pack

BESIDE = "./"  # before the name of a folder that lies beside an export's config.json


@dataclass(kw_only=True)
class EncoderConfig:
    """What every encoder's `Config` has.

    `type` picks the class; `trainable` is all, none, or the last n layers; `init_from` is a run or export whose encoder (of
    this name, if it has several) this is to be, type, shape and weights.
    """

    type: str
    connector: Any = plugin(CONNECTORS, default=None)
    trainable: Trainable = "all"
    init_from: str = ""


@dataclass
class Collated:
    """The spans of a batch as tensors.

    Attributes:
        inputs: keyword arguments of `Encoder.forward`.
        source: int64 [M], where in the flattened [R * S] states those of the spans are, span after span.
    """

    inputs: dict[str, Tensor]
    source: Tensor


class Processor(ABC):
    """Host side of an encoder; small and picklable, for it travels to every data worker."""

    reads: ClassVar[frozenset[str]]  # of "image", "text"
    own_tokens: ClassVar[bool] = False  # texts come as such, to be cut by a tokenizer of its own

    @abstractmethod
    def num_states(self, inputs: dict) -> int:
        """How many states the encoder makes of a span, known without decoding it."""

    @abstractmethod
    def load(self, inputs: dict) -> dict:
        """The inputs with media decoded to tensors; raises `DataError` on broken media."""

    @abstractmethod
    def collate(self, loaded: list[dict]) -> Collated:
        """Tensors of all spans of a batch (at least one)."""

    @abstractmethod
    def blank(self) -> dict:
        """The smallest valid inputs, for a batch without this modality: every encoder runs in every step."""

    def largest(self, share: float = 1.0) -> dict:
        """Inputs of the most states that a span has, or about this share of them, for estimates; of sounds, which have no most,
        those of a whole chunk. By default all spans are alike."""
        return self.blank()


class Encoder(nn.Module, ABC):
    """Device side: tensors in, states [R, S, width] out.

    Attributes:
        width: size of a state.
        processor: the host side that belongs to this encoder.
        runs_vary: whether it depends on the batch how often its layers run. ZeRO-3 gathers weights anew for each time, all
            ranks together, so that ranks with different batches would wait for each other forever.
    """

    Config: ClassVar[type[EncoderConfig]]
    runs_vary: bool = False
    width: int
    processor: Processor

    @abstractmethod
    def forward(self, **inputs: Tensor) -> Tensor:
        """States [R, S, width] of the collated inputs."""

    @abstractmethod
    def layers(self) -> list[nn.Module]:
        """The blocks from input to output, for freezing all but the last n; the final norm counts as the last."""

    def train(self, mode: bool = True) -> Encoder:
        """As any module's; but a frozen encoder goes on as in evaluation, without dropout and by the statistics it has."""
        return super().train(mode and not is_frozen(self))

    def save_files(self, folder: Path, plain: dict) -> None:
        """Writes what it takes to make the encoder again, beside its configuration and weights: nothing, for most.

        Args:
            folder: of the export, to be made where it is needed, for files called `config.json` and `tokenizer.json`.
            plain: the encoder's plain configuration as the export will have it, to be changed: a `name` that was to be fetched
                becomes `BESIDE` and the folder's.
        """


def layers_up_to(layers: nn.ModuleList, layer: int, name: str) -> nn.ModuleList:
    """The layers of the model `name` up to the one that is to be read: the n-th, or counted from the end, -1 being the last.

    Raises:
        ConfigError: there are not so many.
    """
    if not 1 <= abs(layer) <= len(layers):
        raise ConfigError(f"layer {layer}: {name} has {len(layers)} layers")
    return layers[: layer if layer > 0 else len(layers) + 1 + layer]


@dataclass
class PackedSpans:
    """Spans laid side by side in rows, by `pack_spans`.

    Attributes:
        span_RS: int64, the span's number from 1 on; 0 is padding.
        position_RS: int64, position inside the span.
        source: int64 [M], flat places of the states, span after span.
        starts: flat place of each span's first state.
    """

    span_RS: Tensor
    position_RS: Tensor
    source: Tensor
    starts: list[int] = field(default_factory=list)


def pack_spans(lengths: list[int]) -> PackedSpans:
    """Packs spans into rows as long as the longest of them."""
    capacity = max(lengths)
    rows = pack(lengths, capacity)
    span_RS = torch.zeros(len(rows), capacity, dtype=torch.long)
    position_RS = torch.zeros(len(rows), capacity, dtype=torch.long)
    starts = [0] * len(lengths)
    for r, members in enumerate(rows):
        column = 0
        for n in members:
            end = column + lengths[n]
            span_RS[r, column:end] = n + 1
            position_RS[r, column:end] = torch.arange(lengths[n])
            starts[n] = r * capacity + column
            column = end
    source = torch.cat([torch.arange(start, start + length) for start, length in zip(starts, lengths)])
    return PackedSpans(span_RS, position_RS, source, starts)
