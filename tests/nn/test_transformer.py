"""How a stack starts."""

from __future__ import annotations

import pytest
import torch

from metalm.nn.attention import Mask, all_of, causal, same_document
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


@pytest.mark.parametrize("recompute", [False, True])
def test_states_of_some_places_are_those_of_all_and_so_are_their_gradients(recompute):
    torch.manual_seed(0)
    config = TransformerConfig(layers=3, width=32, heads=4, positions="rotary", activation_checkpointing=recompute)
    stack = Transformer(config).double().train()
    x_BTD = torch.randn(2, 9, 32, dtype=torch.float64, requires_grad=True)
    position_BT, document_BT = torch.arange(9).expand(2, 9), torch.tensor([[1, 1, 1, 1, 2, 2, 2, 2, 0], [1] * 9])
    mask = Mask(all_of(causal, same_document(document_BT)), 2, 9, 9, x_BTD.device)
    places_N = torch.tensor([0, 3, 7, 9, 17, 3])
    some_ND = stack(x_BTD, position_BT, mask, places_N=places_N)
    all_ND = stack(x_BTD, position_BT, mask).flatten(0, 1)[places_N]
    torch.testing.assert_close(some_ND, all_ND, rtol=0, atol=1e-12)
    weights = torch.randn(6, 32, dtype=torch.float64)
    gradients = [torch.autograd.grad((h * weights).sum(), [x_BTD, *stack.parameters()]) for h in (some_ND, all_ND)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-12)
