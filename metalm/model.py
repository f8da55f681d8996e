"""MetaLM: encoders and connectors docked on a causal decoder.

    batch -> token embeddings, with connector(encoder(span)) at the spans' positions (-> fusion) -> decoder -> loss or logits

Shapes: B rows, T positions, M docked vectors, D decoder width, V vocabulary, L targets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from metalm.config import plugin
from metalm.connectors import CONNECTORS
from metalm.decoder import CausalDecoder, DecoderConfig
from metalm.encoders import ENCODERS
from metalm.errors import ConfigError
from metalm.fusion import Fusion, FusionConfig
from metalm.hub import PretrainedModel
from metalm.nn.attention import LayerMasks, Mask, all_of, by_window, causal, same_branch, same_document, within
from metalm.nn.freezing import is_frozen, set_trainable
from metalm.nn.losses import weighted_cross_entropy
from metalm.nn.partitions import is_partitioned
from metalm.nn.transformer import Attends
from metalm.objectives.base import TextLayout
from metalm.segments import Batch, SpanBatch


@dataclass
class MetaLMConfig:
    """The decoder and what docks on it, by a name of one's choice; with `fusion` spans side by side read each other first."""

    decoder: DecoderConfig
    encoders: dict[str, Any] = plugin(ENCODERS, default_factory=dict)
    fusion: FusionConfig | None = None
    type: str = "metalm"
    special_tokens: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self):
        for name, encoder in self.encoders.items():
            if encoder.connector is None:
                raise ConfigError(f"encoders.{name} needs a connector, one of: {', '.join(CONNECTORS.names())}")
        if self.fusion and not self.encoders:
            raise ConfigError("fusion is over what encoders read, and there are no encoders")

    def check_row_length(self, length: int) -> None:
        """Raises `ConfigError` where the decoder has no positions for rows so long."""
        if length > self.decoder.max_positions and self.decoder.positions == "learned":
            raise ConfigError(f"data.row_length {length} exceeds model.decoder.max_positions {self.decoder.max_positions}")

    def set_vocab_size(self, vocab_size: int) -> None:
        """Fills in the tokenizer's size wherever a vocabulary is left at 0.

        Raises:
            ConfigError: a vocabulary is smaller than the tokenizer's.
        """
        for name, part in {"decoder": self.decoder, **self.encoders}.items():
            if getattr(part, "vocab_size", None) == 0:
                part.vocab_size = vocab_size
            elif getattr(part, "vocab_size", vocab_size) < vocab_size:
                raise ConfigError(f"{name}.vocab_size is {part.vocab_size}, but the tokenizer has {vocab_size} tokens")


class MetaLM(PretrainedModel):
    """Bidirectional encoders -> connectors -> causal decoder."""

    Config = MetaLMConfig
    layout: TextLayout | None = None
    taught_by: Any = None  # a `metalm.training.distill.Distillation`, while training

    def __init__(self, config: MetaLMConfig):
        super().__init__()
        self.config = config
        self.parts: dict[str, tuple[Tensor, int]] = {}
        self.decoder = CausalDecoder(config.decoder)
        self.encoders, self.connectors = nn.ModuleDict(), nn.ModuleDict()
        for name, c in config.encoders.items():
            try:
                self.encoders[name] = encoder = ENCODERS[c.type](c)
                self.connectors[name] = CONNECTORS[c.connector.type](c.connector, encoder.width, config.decoder.width)
            except ConfigError as error:
                raise ConfigError(f"encoders.{name}: {error}") from error
        self.fusion = Fusion(config.fusion, config.decoder.width) if config.fusion else None
        blocks = self.decoder.transformer.blocks
        layers = [*blocks[:-1], nn.ModuleList([blocks[-1], self.decoder.transformer.norm])]
        set_trainable(self.decoder, layers, config.decoder.trainable, "decoder")
        for name, c in config.encoders.items():
            set_trainable(self.encoders[name], self.encoders[name].layers(), c.trainable, f"encoders.{name}")

    @property
    def processors(self) -> dict[str, Any]:
        """The host side of each encoder, for `make_batch` and the data workers."""
        return {name: encoder.processor for name, encoder in self.encoders.items()}

    def states(self, name: str, span: SpanBatch) -> Tensor:
        """One encoder's states [K, width]: stored ones, then those that it makes, in all of which `span.source` has its places.

        A frozen encoder leaves nothing to a backward pass, and does not run where it has nothing to read; but under ZeRO-3 it
        does, on a blank, for all processes must gather its weights together.
        """
        encoder, inputs = self.encoders[name], span.inputs
        if not inputs and is_partitioned(encoder):
            blank = encoder.processor.load(encoder.processor.blank())
            inputs = {key: x.to(span.source.device) for key, x in encoder.processor.collate([blank]).inputs.items()}
        dtype = next(self.decoder.parameters()).dtype  # by the iterator: ZeRO-3 gathers a weight that is asked for by its name
        states = [] if span.stored is None else [span.stored.to(dtype)]
        if inputs:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not is_frozen(encoder)):
                states.append(encoder(**inputs).flatten(0, 1))
        return states[0] if len(states) == 1 else torch.cat(states)

    def dock(self, name: str, span: SpanBatch) -> Tensor:
        """The decoder input vectors [M, D] of one encoder's spans."""
        states = self.states(name, span)
        connector = self.connectors[name]
        if connector.pointwise:
            return connector(states[span.source])
        ends = span.lengths.cumsum(0)
        index_NS = (ends - span.lengths)[:, None] + torch.arange(span.max_length, device=states.device)
        mask_NS = index_NS < ends[:, None]
        padded = states[span.source[index_NS.clamp(max=len(span.source) - 1)]]
        return first_vectors(connector(padded, mask_NS), span.vectors, len(span.positions))

    def embed(self, batch: Batch) -> Tensor:
        """What the decoder reads, [B, T, D]: token embeddings, and docked states at the spans' positions."""
        x_BTD = self.decoder.embed(batch.tokens_BT)
        flat = x_BTD.flatten(0, 1)
        for name in self.encoders:
            reads = len(batch.spans[name].positions) > 0
            if not (reads or torch.is_grad_enabled() or is_partitioned(self.encoders[name])):
                continue
            docked = self.dock(name, batch.spans[name])
            if reads:
                flat = flat.index_copy(0, batch.spans[name].positions, docked.to(flat.dtype))
            else:  # the batch lacks this modality; the encoder still takes part in the graph, so that all ranks agree
                flat = flat + 0 * docked.sum().to(flat.dtype)
        x_BTD = flat.view_as(x_BTD)
        return self.fusion(x_BTD, batch) if self.fusion else x_BTD

    def hidden(self, batch: Batch, places_N: Tensor | None = None) -> Tensor:
        """The decoder's states [B, T, D] at every position of the batch, or [N, D] at some of its [B x T] places."""
        return self.decoder(self.embed(batch), batch.position_BT, self.attention(batch), places_N=places_N)

    def attention(self, batch: Batch) -> Mask | LayerMasks | Attends:
        """What the batch's positions see of each other."""
        B, T = batch.tokens_BT.shape
        seen = causal, same_document(batch.document_BT), same_branch(batch.branch_BT)

        def make(window: int) -> Mask:
            return Mask(all_of(*seen, within(batch.position_BT, window)), B, T, T, batch.tokens_BT.device)

        return by_window(self.config.decoder.windows, make)

    def num_predictions(self, batch: Batch) -> int:
        return batch.num_targets

    def forward(self, batch: Batch) -> Tensor:
        """Cross-entropy summed over the batch's targets, each by its weight, in nats: a float32 scalar.

        `parts` are the unweighted nats of each modality.
        """
        hidden_LD = self.hidden(batch, places_N=batch.places_L)
        weight_VD, softcap = self.decoder.softmax_weight, self.config.decoder.logit_softcap
        loss, nats_L = weighted_cross_entropy(hidden_LD, weight_VD, batch.targets_L, batch.weight_L, softcap)
        self.parts = {
            f"loss/{name}": ((nats_L * (batch.modality_L == number)).sum(), count)
            for number, (name, count) in enumerate(batch.modalities.items())
        }
        if self.training and self.taught_by:
            loss = self.taught_by(loss, hidden_LD, batch, self)
        return loss


def first_vectors(vectors_NVD: Tensor, count_N: Tensor, total: int) -> Tensor:
    """The first `count_N` vectors of each span, `total` of all, one after another; every one where none is wanted."""
    N, V, _ = vectors_NVD.shape
    flat = vectors_NVD.flatten(0, 1)
    if total in (0, N * V):
        return flat
    span_M = torch.arange(N, device=flat.device).repeat_interleave(count_N, output_size=total)
    before_M = (count_N.cumsum(0) - count_N)[span_M]
    return flat[span_M * V + torch.arange(total, device=flat.device) - before_M]
