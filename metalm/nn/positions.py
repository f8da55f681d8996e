"""Positions: fixed sinusoids, learned vectors, rotations of query and key, and T5's relative bias."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def sinusoids(positions: int, width: int) -> Tensor:
    """The fixed table of "Attention Is All You Need", sines in the first half, cosines in the second: [positions, width]."""
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :width].float()


class SinusoidalPositions(nn.Module):
    """Adds the fixed table, which grows when a longer input comes; position_BT: int64 [B, T] -> [B, T, D]."""

    def __init__(self, positions: int, width: int):
        super().__init__()
        self.width = width
        self.register_buffer("table", sinusoids(positions, width), persistent=False)

    def forward(self, position_BT: Tensor) -> Tensor:
        if not position_BT.is_meta and not torch.compiler.is_compiling():
            self.reach(int(position_BT.max()) + 1)
        return nn.functional.embedding(position_BT, self.table)

    def reach(self, positions: int) -> None:
        """Has the table hold so many; for a graph, which cannot look, its caller has to."""
        if positions > len(self.table):
            self.table = sinusoids(positions, self.width).to(self.table)


class LearnedPositions(nn.Embedding):
    """One learned vector a position; positions beyond the table are an error of the caller's."""


def rotary_tables(
    position_BT: Tensor, head_width: int, base: float = 10000.0, scaling: dict[str, float] | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, 1, T, 2, D/2] in float32 for `rotate`, the first half of the sines negative. Source: RoFormer, in
    the half-split layout of Llama.

    Args:
        scaling: Llama 3's `factor`, `low_freq_factor`, `high_freq_factor` and `original_max_position_embeddings`; `factor`
            alone divides every position.
    """
    exponents = torch.arange(0, head_width, 2, device=position_BT.device, dtype=torch.float32) / head_width
    frequencies = base**-exponents
    if scaling is not None:
        frequencies = scale_frequencies(frequencies, **scaling)
    angles = position_BT[:, None, :, None].float() * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([cos, cos], dim=-2), torch.stack([-sin, sin], dim=-2)


def scale_frequencies(
    frequencies: Tensor,
    factor: float,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 1.0,
    original_max_position_embeddings: float = 0.0,
) -> Tensor:
    """Frequencies for longer texts: the slow ones divided by `factor`, the fast ones as they were, between them a blend.

    Slow and fast by how often a frequency turns in the original length: less than `low_freq_factor`, more than
    `high_freq_factor`. Without an original length all are divided. Source: Llama 3.1 (arXiv 2407.21783), as released.
    """
    if not original_max_position_embeddings:
        return frequencies / factor
    turns = original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / factor)


def rotate(x_BHTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (x_i, x_{i + D/2}) by their position's angles."""
    halves = x_BHTD.to(torch.promote_types(x_BHTD.dtype, torch.float32)).unflatten(-1, (2, -1))
    return torch.addcmul(halves * cos, halves.flip(-2), sin).flatten(-2).to(x_BHTD.dtype)


class RelativeBias(nn.Module):
    """T5's relative position bias: a learned scalar a head and logarithmic bucket of (key - query).

    Half of the buckets serve keys before the query, half keys after it; in each half the first part is exact, the rest
    grows logarithmically up to `max_distance`. Shared by all layers. Source: Raffel et al. 2020, section 2.1.
    """

    def __init__(self, heads: int, buckets: int = 32, max_distance: int = 128):
        super().__init__()
        self.buckets, self.max_distance = buckets, max_distance
        self.weight = nn.Parameter(torch.zeros(buckets, heads))

    def bucket(self, distance: Tensor) -> Tensor:
        half = self.buckets // 2
        exact = half // 2
        size = distance.abs()
        scale = torch.log(size.clamp(min=1).float() / exact) / math.log(self.max_distance / exact)
        far = exact + (scale * (half - exact)).long()
        return torch.where(size < exact, size, far.clamp(max=half - 1)) + half * (distance > 0)

    def forward(self, query_BQ: Tensor, key_BK: Tensor) -> Tensor:
        """The bias [B, H, Q, K] between position ids int64 [B, Q] and [B, K]; B is 1 for ids [Q] and [K] of all rows."""
        query_BQ, key_BK = torch.atleast_2d(query_BQ, key_BK)
        buckets = self.bucket(key_BK[:, None, :] - query_BQ[:, :, None])
        return nn.functional.embedding(buckets, self.weight).permute(0, 3, 1, 2).contiguous()
