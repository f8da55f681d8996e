"""Words by their spelling, and a softmax over very many of them: what word-level models have in place of one big matrix.

    x(word) = W highway([max_t relu(conv_k(characters))_t for k = 1, 2, …])          input
    p(word) = p_head(cluster) p_tail(word | cluster), or p_head(word) for frequent words    output

Characters are UTF-8 bytes between two marks. A convolution's windows start at the word's characters only, so a word's vector
does not depend on how long the others are. Cost: each distinct word of a batch is read once.
Source: Kim et al. 2016 (arXiv 1508.06615); Grave et al. 2017 (arXiv 1609.04309); sizes from Baevski et al. 2019.

Shapes: V words of the vocabulary, C characters of a word, U distinct words of a batch, E character width, N targets, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metalm.errors import ConfigError
from metalm.nn.losses import linear_cross_entropy

BEGIN, END = 257, 258  # after 0, padding, and byte + 1


@dataclass
class CharacterConfig:
    """`filters`: how many span 1, 2, 3, … characters; of longer words the first `max_length` - 2 bytes are read."""

    width: int = 128
    filters: list[int] = field(default_factory=lambda: [128, 256, 384, 512, 512, 512])
    max_length: int = 50

    def __post_init__(self):
        if not self.filters or min(self.filters) < 1:
            raise ConfigError(f"filters is {self.filters}, it takes a positive number for each length from 1 on")
        for name, least in (("width", 1), ("max_length", 3)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}, it must be at least {least}")


class CharacterEmbedding(nn.Module):
    """Word vectors from a convolutional network over characters and one highway layer; `spell` says how words are written."""

    def __init__(self, config: CharacterConfig, vocab_size: int, width: int):
        super().__init__()
        features = sum(config.filters)
        self.register_buffer("table_VC", torch.zeros(vocab_size, config.max_length, dtype=torch.int16))
        self.characters = nn.Embedding(END + 1, config.width)
        self.convolutions = nn.ModuleList(nn.Conv1d(config.width, n, k) for k, n in enumerate(config.filters, start=1))
        self.highway = nn.Linear(features, 2 * features)
        self.out = nn.Linear(features, width)
        # Variance 1 / fan-in, as everywhere: words are then about as far apart as the sinusoids that are added to them.
        for layer in (*self.convolutions, self.highway, self.out):
            nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)
            nn.init.zeros_(layer.bias)
        nn.init.ones_(self.highway.bias[features:])  # starts by carrying most of its input through

    def spell(self, words: Sequence[str]) -> None:
        """Sets the characters of the words with ids 0, 1, …; ids beyond them, which no text has, are written as nothing."""
        V, C = self.table_VC.shape
        if len(words) > V:
            raise ValueError(f"{len(words):,} words for a vocabulary of {V:,}")
        for row_C, word in zip_longest(self.table_VC, words, fillvalue=""):
            characters = [BEGIN, *(byte + 1 for byte in word.encode()[: C - 2]), END]
            row_C.zero_()[: len(characters)] = torch.tensor(characters)

    def forward(self, tokens: Tensor) -> Tensor:
        """Word ids [...] to vectors [..., D]."""
        if tokens.is_meta:  # which of them are distinct is not known: as many as can be
            words_U, place = tokens.flatten()[: len(self.table_VC)], tokens
        else:
            words_U, place = tokens.unique(return_inverse=True)
        characters_UC = self.table_VC[words_U].long()
        if not tokens.is_meta and not characters_UC[:, 0].all():
            raise ValueError("words without characters: call `spell` with the vocabulary before reading, or load weights")
        written_U1C = (characters_UC > 0)[:, None]
        x_UEC = self.characters(characters_UC).transpose(1, 2) * written_U1C
        found = [conv(F.pad(x_UEC, (0, k))).relu() * written_U1C for k, conv in enumerate(self.convolutions)]
        x = torch.cat([features.amax(dim=-1) for features in found], dim=-1)
        new, carry = self.highway(x).chunk(2, dim=-1)
        carry = carry.sigmoid()
        return self.out(carry * x + (1 - carry) * new.relu())[place]


class AdaptiveSoftmax(nn.AdaptiveLogSoftmaxWithLoss):
    """torch's adaptive softmax, its loss in chunks; rarer clusters have 4, 16, … times smaller states.

    Args:
        cutoffs: where each cluster ends, frequent words first; the last ends with the vocabulary.
    """

    def __init__(self, width: int, vocab_size: int, cutoffs: list[int]):
        if not cutoffs or sorted({0, *cutoffs, vocab_size}) != [0, *cutoffs, vocab_size]:
            raise ConfigError(f"cutoffs {cutoffs} must rise from above 0 to below the vocabulary's {vocab_size:,} words")
        super().__init__(width, vocab_size, cutoffs, div_value=4.0)

    def forward(self, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
        """Summed cross-entropy in nats, a float32 scalar (float64 for float64 input)."""
        bounds = torch.tensor(self.cutoffs[:-1], device=targets_N.device)
        cluster_N = torch.bucketize(targets_N, bounds, right=True)
        head_N = torch.where(cluster_N == 0, targets_N, self.shortlist_size + cluster_N - 1)
        loss = linear_cross_entropy(hidden_ND, self.head.weight, head_N)
        for n, (narrow, words) in enumerate(self.tail):
            member_N = cluster_N == n + 1
            states = narrow(hidden_ND[member_N])
            loss = loss + linear_cross_entropy(states, words.weight, targets_N[member_N] - self.cutoffs[n])
        return loss
