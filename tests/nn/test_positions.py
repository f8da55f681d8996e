"""Positions against the published implementations."""

from __future__ import annotations

import math

import torch
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.t5.modeling_t5 import T5Attention

from metalm.nn.positions import LearnedPositions, RelativeBias, SinusoidalPositions, rotary_tables, rotate, sinusoids


def test_sinusoids_are_the_formula():
    table = sinusoids(50, 8)
    for p in (0, 1, 7, 49):
        angles = [p / 10000 ** (2 * i / 8) for i in range(4)]
        expected = torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles])
        torch.testing.assert_close(table[p], expected)
    assert sinusoids(3, 7).shape == (3, 7)


def test_sinusoids_grow_with_the_input():
    positions = SinusoidalPositions(4, 6)
    before = positions(torch.arange(4)[None])
    longer = positions(torch.arange(9)[None])
    assert torch.equal(longer[0], sinusoids(9, 6))
    assert torch.equal(longer[:, :4], before)
    assert SinusoidalPositions(4, 6).double()(torch.tensor([[5]])).dtype == torch.float64


def test_learned_positions_are_a_table():
    positions = LearnedPositions(5, 3)
    assert torch.equal(positions(torch.tensor([[4, 0]]))[0], positions.weight[[4, 0]])


def test_rotary_equals_llama():
    head_width = 16
    config = LlamaConfig(hidden_size=head_width * 2, num_attention_heads=2, max_position_embeddings=512)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 2, 7, head_width, generator=generator) for _ in range(2))
    position = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [9, 3, 100, 0, 1, 511, 2]])
    cos, sin = LlamaRotaryEmbedding(config)(q, position)
    expected = apply_rotary_pos_emb(q, k, cos, sin)
    tables = rotary_tables(position, head_width)
    for ours, theirs in zip((rotate(q, *tables), rotate(k, *tables)), expected):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)
    assert rotate(q.double(), *tables).dtype == torch.float64


def test_rotary_scores_depend_on_distance_alone():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 1, 16, generator=generator, dtype=torch.float64) for _ in range(2))

    def score(i: int, j: int) -> torch.Tensor:
        return (rotate(q, *rotary_tables(torch.tensor([[i]]), 16)) * rotate(k, *rotary_tables(torch.tensor([[j]]), 16))).sum()

    torch.testing.assert_close(score(7, 3), score(104, 100), atol=1e-4, rtol=0)
    assert abs(score(7, 3) - score(7, 4)) > 1e-3


def test_relative_buckets_are_t5s():
    bias = RelativeBias(heads=2)
    distance = torch.arange(-700, 701)
    expected = T5Attention._relative_position_bucket(distance, bidirectional=True, num_buckets=32, max_distance=128)
    assert torch.equal(bias.bucket(distance), expected)
    wide = RelativeBias(heads=2, buckets=64, max_distance=256)
    expected = T5Attention._relative_position_bucket(distance, bidirectional=True, num_buckets=64, max_distance=256)
    assert torch.equal(wide.bucket(distance), expected)


def test_relative_bias_is_a_scalar_a_head_and_distance():
    bias = RelativeBias(heads=3)
    torch.nn.init.normal_(bias.weight)
    out = bias(torch.arange(5), torch.arange(9))
    assert out.shape == (1, 3, 5, 9)
    for q, k in [(0, 0), (4, 1), (1, 8)]:
        assert torch.equal(out[0, :, q, k], bias.weight[bias.bucket(torch.tensor(k - q))])
