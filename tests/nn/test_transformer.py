"""How a stack starts."""

from __future__ import annotations

import pytest
import torch

from metalm.nn.transformer import Transformer, TransformerConfig


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_half_of_the_heads_look_at_what_is_alike(kv_heads):
    torch.manual_seed(0)
    stack = Transformer(TransformerConfig(layers=2, width=64, heads=4, kv_heads=kv_heads, positions="none"))
    x_TD = torch.randn(20, 64)
    for block in stack.blocks:
        q, k, _ = block.attention.qkv(x_TD).view(20, -1, 16).transpose(0, 1).split([4, kv_heads, kv_heads])
        scores_HTT = q @ k.repeat_interleave(4 // kv_heads, dim=0).transpose(1, 2)
        own = scores_HTT.diagonal(dim1=1, dim2=2)
        assert (own[::2] > scores_HTT[::2].mean(-1) + 4).all()
        assert own[1::2].mean().abs() < 4
