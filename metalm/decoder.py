"""The causal decoder: token embeddings and softmax around the Transformer stack."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metalm.errors import ConfigError
from metalm.nn.attention import KVCache, LayerMasks, Mask, all_of, by_window, causal, soft_cap, within
from metalm.nn.compiler import require_compiler
from metalm.nn.freezing import Trainable
from metalm.nn.linear import (
    FEW_ROWS,
    Int8Linear,
    Int8Products,
    PackedLinear,
    TracedLinear,
    Weights,
    can_pack,
    has_fbgemm,
    int4_or_int8,
    replace_linear,
)
from metalm.nn.losses import CHUNK_LOGITS
from metalm.nn.transformer import Attends, TextStackConfig, Transformer, init_weights


@dataclass
class DecoderConfig(TextStackConfig):
    """A stack with a vocabulary.

    `vocab_size` 0 takes the tokenizer's; `tied`: the softmax's matrix is that of the embeddings, which `scaled` multiplies by
    the root of the width (as sinusoidal positions always do); `logit_softcap` s makes logits x into s tanh(x / s) (0: none);
    `trainable`: all, none, or the last n layers; `init_from`: a run or export whose decoder this is to be, shape and weights.
    """

    vocab_size: int = 0
    tied: bool = True
    scaled: bool = False
    logit_softcap: float = 0.0
    trainable: Trainable = "all"
    init_from: str = ""

    def __post_init__(self):
        super().__post_init__()
        if self.logit_softcap < 0:
            raise ConfigError(f"logit_softcap is {self.logit_softcap}, it must be positive, or 0 for none")
        if self.relative_bias:
            raise ConfigError("relative_bias is for encoders: the decoder's key-value cache does not carry it")


class CausalDecoder(nn.Module):
    """Reads one vector a position, whether token embedding or docked encoder state, and predicts the next token."""

    Config = DecoderConfig

    def __init__(self, config: DecoderConfig):
        super().__init__()
        if config.vocab_size < 1:
            raise ConfigError("decoder.vocab_size is not set and there is no tokenizer to take it from")
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        init_weights(self.embedding)
        self.scale = 1.0
        if config.positions == "sinusoidal":
            # The sinusoids are of size 1: so must be what they are added to, while the tied softmax keeps small weights.
            self.scale = config.width**0.5
            nn.init.normal_(self.embedding.weight, std=1 / self.scale)
        elif config.scaled:
            self.scale = config.width**0.5
        self.transformer = Transformer(config)
        self.softmax = nn.Identity() if config.tied else nn.Linear(config.width, config.vocab_size, bias=False)
        self.softmax.apply(init_weights)
        self.compiled = False  # whether steps of decoding run as `metalm.inference.compiled` has them
        self.exact_rows = 0  # up to so many, states are float32 between maps whose weights are bfloat16

    @property
    def softmax_weight(self) -> Tensor:
        """[V, D]"""
        return self.embedding.weight if self.config.tied else self.softmax.weight

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids [...] to input vectors [..., D]; times sqrt(D) under sinusoids ("Attention Is All You Need", 3.4)."""
        return self.embedding(tokens) * self.scale

    def forward(
        self,
        x_BTD: Tensor,
        position_BT: Tensor,
        mask: Mask | LayerMasks | str | Attends = "causal",
        cache: KVCache | None = None,
        places_N: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [B, T, D], or [N, D] of places of [B x T] alone; `logits` turns them into predictions.

        Args:
            mask: a mask of one's own must keep to the `window`.
        """
        if self.config.window and mask == "causal":
            B, T = position_BT.shape
            mask = by_window(self.config.windows, lambda n: Mask(all_of(causal, within(position_BT, n)), B, T, T, x_BTD.device))
        if position_BT.numel() <= self.exact_rows:
            x_BTD = x_BTD.float()
        return self.transformer(x_BTD, position_BT, mask, cache, places_N)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V]."""
        return soft_cap(self.scores(hidden), self.config.logit_softcap)

    def scores(self, hidden: Tensor) -> Tensor:
        """The logits before their cap."""
        tied = isinstance(self.softmax, nn.Identity)
        return F.linear(hidden, self.embedding.weight) if tied else self.softmax(hidden)

    @torch.no_grad()
    def nats(self, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
        """-log p of tokens after states, [N] in float32 or better, with the weights as they are laid out; for reading alone."""
        chunk = max(1, CHUNK_LOGITS // self.config.vocab_size)
        exact = torch.promote_types(hidden_ND.dtype, torch.float32)
        nats = []
        for hidden, targets in zip(hidden_ND.split(chunk), targets_N.split(chunk)):
            logits = soft_cap(self.scores(hidden).to(exact), self.config.logit_softcap)
            nats.append(F.cross_entropy(logits, targets, reduction="none"))
        return torch.cat(nats)

    @torch.no_grad()
    def prepare_for_inference(self, weights: Weights = "as they are", compiled: bool = False) -> None:
        """Lays the linear maps out for reading, for good: what is left can neither be trained nor saved.

        It is for a model on its device and in its type, before its first layers are taken as a draft. On a CPU bfloat16's
        states in a step of decoding are float32 from then on, if it is compiled, or weights are "as they are" or "w8a8": that
        is what these kernels compute in, and casts between them cost more than they do.

        Args:
            weights: "int8" rounds them (`metalm.nn.linear`), and where they are tied the embeddings with them; so does
                "int4", to 4 bits in the blocks and to 8 in the softmax; "w8a8" rounds inputs, too.
            compiled: steps of decoding run as one graph (`metalm.inference.compiled`).

        Raises:
            ConfigError: this device, or this build of torch, does not have the products; or there is no C++ compiler.
        """
        weight_VD = self.softmax_weight
        on_cpu, in_bfloat16 = weight_VD.device.type == "cpu", weight_VD.dtype == torch.bfloat16
        if weights in ("int4", "w8a8") and not on_cpu:
            raise ConfigError(f"{weights} is for the CPU, this is {weight_VD.device.type}: take int8")
        if weights == "w8a8" and not has_fbgemm():
            raise ConfigError(f"w8a8 needs FBGEMM, this torch has {torch.backends.quantized.engine}: take int8")
        if weights == "w8a8" and compiled:
            raise ConfigError("the products of w8a8 do not compile: take int8, or leave compile out")
        if compiled and on_cpu:
            require_compiler("compile")
        self.compiled = compiled
        make: type[nn.Module] | None = None
        if weights != "as they are":
            make = Int8Products if weights == "w8a8" else Int8Linear
        elif on_cpu and in_bfloat16 and (compiled or can_pack()):
            make = TracedLinear if compiled else PackedLinear
        if make is not None:
            if self.config.tied:
                self.softmax = make(weight_VD)
                self.embedding.weight.copy_(self.softmax.weight)
            replace_linear(self.transformer, int4_or_int8 if weights == "int4" else make)
            replace_linear(self, make)
        if make in (PackedLinear, Int8Products) and in_bfloat16 and has_fbgemm():
            self.exact_rows = FEW_ROWS
        if self.exact_rows or (compiled and on_cpu and in_bfloat16):
            for norm in (module for module in self.modules() if isinstance(module, nn.LayerNorm)):
                norm.float()
