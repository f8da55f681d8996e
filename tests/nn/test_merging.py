"""Merging against loops that say what is meant, and what it must not change."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from metalm.encoders.open_clip_tower import MergingClipBlocks
from metalm.encoders.timm_tower import MergingTimmBlocks
from metalm.encoders.vit import MergingViTBlocks
from metalm.nn.merging import MergingBlocks, best_matches, merge_tokens, tokens_left
from metalm.nn.transformer import Block, TransformerConfig

WIDTH, HEADS = 12, 2


def make(kind: str, layers: int, merge: int, kept: int = 0) -> MergingBlocks:
    torch.manual_seed(0)
    if kind == "own":
        made = MergingViTBlocks, [Block(TransformerConfig(layers, WIDTH, HEADS)) for _ in range(layers)]
    elif kind == "timm":
        from timm.models.vision_transformer import Block as TimmBlock

        made = MergingTimmBlocks, [TimmBlock(WIDTH, HEADS, qkv_bias=True, qk_norm=True) for _ in range(layers)]
    else:
        from open_clip.transformer import ResidualAttentionBlock

        made = MergingClipBlocks, [ResidualAttentionBlock(WIDTH, HEADS) for _ in range(layers)]
    cls, blocks = made
    merging = cls(blocks, merge, kept)
    for parameter in merging.parameters():
        nn.init.normal_(parameter, std=0.4)
    return merging.double().eval()


def merged_by_loops(x: list[Tensor], size: list[float], key: list[Tensor], merge: int) -> tuple[list[Tensor], list[float]]:
    """One picture's tokens, as lists."""
    matches = []
    for a in range(0, len(x), 2):
        cosines = {b: float(key[a] @ key[b] / key[a].norm() / key[b].norm()) for b in range(1, len(x), 2)}
        partner = max(cosines, key=cosines.get)
        matches.append((cosines[partner], a, partner))
    joined = {place: [place] for place in range(len(x))}
    for _, a, b in sorted(matches, reverse=True)[:merge]:
        joined[b] += joined.pop(a)
    groups = [joined[place] for place in sorted(joined)]
    sizes = [sum(size[i] for i in group) for group in groups]
    return [sum(size[i] * x[i] for i in group) / total for group, total in zip(groups, sizes)], sizes


@pytest.mark.parametrize("tokens, merge", [(8, 3), (9, 4), (2, 1), (7, 1), (6, 3)])
def test_merging_is_what_loops_say(tokens, merge):
    torch.manual_seed(tokens)
    x, key = torch.randn(3, tokens, 5).double(), torch.randn(3, tokens, 4).double()
    size = torch.randint(1, 5, (3, tokens)).double()
    out, sizes = merge_tokens(x, size, *best_matches(key, merge))
    for n in range(3):
        expected, total = merged_by_loops([*x[n]], size[n].tolist(), [*key[n]], merge)
        torch.testing.assert_close(out[n], torch.stack(expected))
        assert sizes[n].tolist() == total and sum(total) == size[n].sum()


@torch.no_grad()
def test_a_stack_is_what_loops_say():
    """Attention in which a token counts as often as its size, merging, and the network, two layers of it."""
    merging = make("own", layers=2, merge=2, kept=1)
    torch.manual_seed(1)
    x_SD = torch.randn(8, WIDTH).double()
    tokens, size = [*x_SD], [1.0] * 8
    for block in merging:
        qkv = block.attention.qkv(block.attention_norm(torch.stack(tokens))).view(len(tokens), 3, HEADS, -1)
        attended = []
        for i in range(len(tokens)):
            heads = []
            for h in range(HEADS):
                weights = [s * math.exp(qkv[i, 0, h] @ qkv[j, 1, h] / (WIDTH / HEADS) ** 0.5) for j, s in enumerate(size)]
                heads.append(sum(w * qkv[j, 2, h] for j, w in enumerate(weights)) / sum(weights))
            attended.append(tokens[i] + block.attention.out(torch.cat(heads)))
        key = [*qkv[1:, 1].mean(1)]
        rest, sizes = merged_by_loops(attended[1:], size[1:], key, 2)
        tokens, size = [attended[0], *rest], [1.0, *sizes]
        tokens = [x + block.mlp(block.mlp_norm(x)) for x in tokens]
    torch.testing.assert_close(merging(x_SD[None])[0], torch.stack(tokens))


@pytest.mark.parametrize("kind", ["own", "timm", "open_clip"])
def test_tokens_that_are_alike_merge_without_a_trace(kind):
    """Each of six tokens twice: the six that are left have the states that all twelve have without merging."""
    torch.manual_seed(2)
    x_NSD = torch.randn(2, 7, WIDTH).double()
    twice = torch.cat([x_NSD[:, :1], x_NSD[:, 1:].repeat_interleave(2, dim=1)], dim=1)
    whole, left = (make(kind, 3, merge, kept=1)(twice) for merge in (0, 2))
    torch.testing.assert_close(left, torch.cat([whole[:, :1], whole[:, 1::2]], dim=1))


def test_the_key_of_every_kind_is_the_mean_over_heads():
    for kind in ("own", "timm", "open_clip"):
        merging = make(kind, 1, merge=1)
        x_NSD = torch.randn(2, 5, WIDTH).double()
        block = merging[0]
        _, key_NSK = merging.attention(block, x_NSD, None)
        if kind == "own":
            keys = block.attention.qkv(block.attention_norm(x_NSD)).chunk(3, dim=-1)[1]
        elif kind == "timm":
            keys = block.attn.qkv(block.norm1(x_NSD)).chunk(3, dim=-1)[1]
        else:
            weight, bias = block.attn.in_proj_weight, block.attn.in_proj_bias
            keys = nn.functional.linear(block.ln_1(x_NSD), weight, bias).chunk(3, dim=-1)[1]
        keys_NSHK = keys.unflatten(-1, (HEADS, -1))
        if kind == "timm":
            keys_NSHK = block.attn.k_norm(keys_NSHK)
        torch.testing.assert_close(key_NSK, keys_NSHK.mean(2))
        assert not key_NSK.requires_grad


@pytest.mark.parametrize("tokens", [1, 2, 3, 10, 17])
@pytest.mark.parametrize("merge", [0, 1, 4, 100])
def test_the_number_of_tokens_is_known_beforehand(tokens, merge):
    for kept in (0, 1, 5):
        out = make("own", 3, merge, kept)(torch.randn(2, kept + tokens, WIDTH).double())
        left = tokens_left(tokens, merge, 3)
        assert out.shape == (2, kept + left, WIDTH) and 1 <= left <= tokens


def test_tokens_that_are_kept_stay_in_front_and_the_rest_in_order():
    key = torch.ones(1, 9, 4).double()
    x = torch.arange(9.0).double()[None, :, None]
    source, target = best_matches(key[:, 3:], 2)
    out, sizes = merge_tokens(x, torch.ones(1, 9).double(), source + 3, target + 3)
    assert out[0, :3, 0].tolist() == [0, 1, 2] and sizes[0, :3].tolist() == [1, 1, 1]
    torch.manual_seed(0)
    source, target = best_matches(torch.randn(1, 40, 4), 1)
    out, _ = merge_tokens(torch.arange(40.0)[None, :, None], torch.ones(1, 40), source, target)
    a, b = int(source), int(target)
    assert out.flatten().tolist() == [(a + b) / 2 if place == b else place for place in range(40) if place != a]


def test_gradients_flow_through_the_means():
    torch.manual_seed(3)
    source, target = best_matches(torch.randn(2, 6, 4), 2)
    size = torch.randint(1, 4, (2, 6)).double()
    x = torch.randn(2, 6, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: merge_tokens(x, size, source, target)[0], x)
    merging = make("own", 2, 2)
    x = torch.randn(1, 8, WIDTH).double().requires_grad_()
    merging(x).square().sum().backward()
    assert (x.grad.abs().sum(-1) > 0).all()
    assert all(parameter.grad is not None for parameter in merging.parameters())


def test_means_of_many_are_not_taken_in_bfloat16():
    x, size = torch.full((1, 2, 1), 1.0, dtype=torch.bfloat16), torch.tensor([[1.0, 999.0]])
    x[0, 0] = 101.0
    out, sizes = merge_tokens(x, size, torch.tensor([[0]]), torch.tensor([[1]]))
    assert sizes.tolist() == [[1000.0]] and out.dtype == torch.bfloat16
    assert float(out) == float(torch.tensor(1.1, dtype=torch.bfloat16))
