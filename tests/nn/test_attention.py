"""Attention: every path gives what a brute-force loop over the mask's rule gives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

from metalm.nn import attention
from metalm.nn.attention import KVCache, Mask, all_of, attend, causal, same_document, within
from metalm.nn.transformer import Transformer, TransformerConfig

CPU = torch.device("cpu")
DOCUMENTS = torch.tensor([[1, 1, 1, 2, 2, 3, 0, 0], [0, 0, 1, 1, 1, 1, 1, 1]])


def draw(*shape: int, dtype=torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def qkv(B=2, H=4, G=4, Q=8, K=8, D=6, dtype=torch.float64) -> list[torch.Tensor]:
    return [draw(B, n, T, D, dtype=dtype, seed=i) for i, (n, T) in enumerate([(H, Q), (G, K), (G, K)])]


def brute_force(q, k, v, allowed, bias=None, softcap=0.0) -> torch.Tensor:
    """Attention query by query over the keys that `allowed(b, i, j)` names, without a mask."""
    out = torch.empty_like(q)
    B, H, Q, D = q.shape
    for b in range(B):
        for h in range(H):
            g = h // (H // k.shape[1])
            for i in range(Q):
                keys = [j for j in range(k.shape[2]) if allowed(b, i, j)]
                scores = k[b, g, keys] @ q[b, h, i] / D**0.5
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                if bias is not None:
                    scores = scores + bias[0, h, i, keys]
                out[b, h, i] = scores.softmax(0) @ v[b, g, keys]
    return out


def in_document(b: int, i: int, j: int) -> bool:
    return i >= j and bool(DOCUMENTS[b, i] == DOCUMENTS[b, j])


def causal_documents(documents=DOCUMENTS, **kwargs) -> Mask:
    B, T = documents.shape
    return Mask(all_of(causal, same_document(documents)), B, T, T, CPU, **kwargs)


RULES = {
    "causal": (lambda: Mask(causal, 2, 8, 8, CPU), lambda b, i, j: i >= j),
    "same document": (
        lambda: Mask(same_document(DOCUMENTS), 2, 8, 8, CPU),
        lambda b, i, j: bool(DOCUMENTS[b, i] == DOCUMENTS[b, j]),
    ),
    "both": (causal_documents, in_document),
    "causal by name": (lambda: "causal", lambda b, i, j: i >= j),
    "full by name": (lambda: "full", lambda b, i, j: True),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_masks_are_their_rule(rule, with_bias, groups):
    make_mask, allowed = RULES[rule]
    q, k, v = qkv(G=groups)
    bias = draw(1, 4, 8, 8, seed=9) if with_bias else None
    torch.testing.assert_close(attend(q, k, v, make_mask(), bias), brute_force(q, k, v, allowed, bias))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scores_at_a_time", [1, 2 * 4 * 8 * 3, 1 << 26])  # chunks of 1, 3 and all queries
@pytest.mark.parametrize("groups, with_bias", [(4, True), (2, False)])
def test_soft_caps_bend_scores_under_every_rule(monkeypatch, rule, scores_at_a_time, groups, with_bias):
    monkeypatch.setattr(attention, "CHUNK_SCORES", scores_at_a_time)
    make_mask, allowed = RULES[rule]
    q, k, v = qkv(G=groups)
    bias = draw(1, 4, 8, 8, seed=9) if with_bias else None
    capped = attend(q, k, v, make_mask(), bias, softcap=0.5)
    torch.testing.assert_close(capped, brute_force(q, k, v, allowed, bias, softcap=0.5))
    assert (capped - attend(q, k, v, make_mask(), bias)).abs().max() > 0.1
    torch.testing.assert_close(attend(q, k, v, make_mask(), bias, softcap=1e6), attend(q, k, v, make_mask(), bias))
    one = attend(q[:, :, -1:], k, v, make_mask() if rule == "full by name" else "causal", softcap=0.5)  # after a cache
    torch.testing.assert_close(one, attend(q, k, v, "full", softcap=0.5)[:, :, -1:])


def test_dense_mask_of_a_mask_rule():
    assert causal_documents().dense[0, 0].tolist() == [[in_document(0, i, j) for j in range(8)] for i in range(8)]
    assert causal_documents().dense.shape == (2, 1, 8, 8)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("named", [False, True])
def test_queries_after_a_cache_are_the_last_of_the_keys(with_bias, named):
    q, k, v = qkv(Q=3)
    bias = draw(1, 4, 3, 8, seed=9) if with_bias else None
    mask = "causal" if named else Mask(causal, 2, 3, 8, CPU, first_query=5)
    torch.testing.assert_close(attend(q, k, v, mask, bias), brute_force(q, k, v, lambda b, i, j: i + 5 >= j, bias))


def test_grouped_queries_equal_repeated_heads():
    q, k, v = qkv(G=2)
    repeated = [x.repeat_interleave(2, dim=1) for x in (k, v)]
    torch.testing.assert_close(attend(q, k, v, causal_documents()), attend(q, *repeated, causal_documents()))


def test_chunks_of_queries_read_the_keys_that_they_see_and_no_others(monkeypatch):
    monkeypatch.setattr(attention, "CHUNK", 4)
    q, k, v = (x.requires_grad_() for x in qkv(Q=18, K=18, G=2))
    mask = Mask(all_of(causal, within(torch.arange(18).expand(2, 18), 3)), 2, 18, 18, CPU)
    assert mask.chunks == [(slice(s, min(s + 4, 18)), slice(max(s - 2, 0), min(s + 4, 18))) for s in range(0, 18, 4)]
    out, expected = attend(q, k, v, mask), brute_force(q, k, v, lambda b, i, j: 0 <= i - j < 3)
    torch.testing.assert_close(out, expected)
    noise = draw(*out.shape, seed=9)
    grads, others = (torch.autograd.grad((x * noise).sum(), (q, k, v)) for x in (out, expected))
    torch.testing.assert_close(grads, others)
    assert Mask(lambda b, h, q, k: k >= 0, 2, 18, 18, CPU).chunks == []
    assert Mask(causal, 2, 4, 4, CPU).chunks == []
    monkeypatch.setattr(attention, "SHORT", 5)
    monkeypatch.setattr(attention, "LONG_CHUNK", 9)
    longer = Mask(mask.predicate, 2, 18, 18, CPU)  # of stretches of 6 keys
    assert longer.chunks == [(slice(0, 9), slice(0, 9)), (slice(9, 18), slice(7, 18))]
    torch.testing.assert_close(attend(q, k, v, longer), expected)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("groups", [4, 2])
def test_flex_attention_takes_the_same_mask(groups):
    """Its eager form, forward only: on the CPU FlexAttention has no backward."""
    documents = torch.arange(150).div(37, rounding_mode="floor")[None].repeat(2, 1) % 3
    q, k, v = qkv(G=groups, Q=150, K=150, D=16, dtype=torch.float32)
    mask = causal_documents(documents)
    out = flex_attention(q, k, v, block_mask=mask.block, enable_gqa=groups != 4)
    torch.testing.assert_close(out, attend(q, k, v, mask), atol=2e-6, rtol=1e-5)


WHOLE, HALVES = [(slice(0, 8), slice(0, 8))], [(slice(0, 4), slice(0, 4)), (slice(4, 8), slice(0, 8))]


@pytest.mark.parametrize("parts", [WHOLE, HALVES], ids=["whole", "halves"])
@pytest.mark.parametrize("plain", [True, False])
def test_parts_are_attention(parts, plain):
    """The CPU's own ways for short bfloat16 rows, here in float64: values and gradients of the kernel they stand in for."""
    ours, theirs = ([x.requires_grad_() for x in qkv()] for _ in range(2))
    out = attention._in_parts(*ours, causal_documents(), parts, 0.0, plain)
    expected = F.scaled_dot_product_attention(*theirs, attn_mask=causal_documents().dense)
    torch.testing.assert_close(out, expected)
    weight = draw(*out.shape, seed=5)
    for a, b in zip(torch.autograd.grad((out * weight).sum(), ours), torch.autograd.grad((expected * weight).sum(), theirs)):
        torch.testing.assert_close(a, b)


def test_short_bfloat16_rows_take_that_path_and_agree(monkeypatch):
    plain = []
    in_parts = attention._in_parts
    monkeypatch.setattr(attention, "_in_parts", lambda *args: plain.append(args[-1]) or in_parts(*args))
    q, k, v = qkv(dtype=torch.bfloat16, D=32)
    exact = attend(*(x.double() for x in (q, k, v)), causal_documents())
    trained = attend(q.requires_grad_(), k, v, causal_documents())
    assert plain == [True]
    read = attend(q.detach(), k, v, causal_documents())
    with torch.no_grad():
        attend(q, k, v, causal_documents())
    monkeypatch.setattr(attention, "SHORT", 7)
    attend(q, k, v, causal_documents())
    assert plain == [True]
    assert trained.dtype == torch.bfloat16
    # bfloat16 has 8 bits: 2^-8 of values around 1, through two products.
    torch.testing.assert_close(trained.double(), exact, atol=0.03, rtol=0.03)
    torch.testing.assert_close(read.double(), exact, atol=0.03, rtol=0.03)


@pytest.mark.parametrize("short", [False, True])
def test_dropout_keeps_the_expectation(short):
    torch.manual_seed(0)
    copies = 2000
    q, k, v = (x.repeat(copies, 1, 1, 1) for x in qkv())
    mask = causal_documents(DOCUMENTS.repeat(copies, 1))
    out = attention._in_parts(q, k, v, mask, HALVES, 0.3, True) if short else attend(q, k, v, mask, dropout=0.3)
    assert out[:2].ne(out[2:4]).any()
    mean = out.view(copies, 2, *out.shape[1:]).mean(0)
    torch.testing.assert_close(mean, attend(*qkv(), causal_documents()), atol=0.1, rtol=0)


@pytest.mark.parametrize("positions", ["sinusoidal", "learned", "rotary"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_cached_decoding_equals_the_whole(positions, kv_heads):
    torch.manual_seed(0)
    stack = Transformer(TransformerConfig(2, 16, 4, kv_heads, positions=positions, max_positions=12)).double().eval()
    x, position = draw(2, 10, 16), torch.arange(10).expand(2, 10)
    whole = stack(x, position, "causal")
    cache = KVCache(layers=2, capacity=10)
    pieces = []
    for start, end in [(0, 4), (4, 5), (5, 8), (8, 10)]:
        pieces.append(stack(x[:, start:end], position[:, start:end], "causal", cache))
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=0, atol=1e-12)
    assert cache.length == 10
    with pytest.raises(AssertionError, match="10 positions cannot hold 11"):
        stack(x[:, :1], position[:, :1], "causal", cache)


def test_reordering_a_cache_swaps_rows():
    cache = KVCache(layers=1, capacity=2)
    keys = draw(2, 1, 1, 3)
    cache.append(0, keys, -keys)
    cache.reorder(torch.tensor([1, 1, 0]))
    assert torch.equal(cache.keys[0][:, :, :1], keys[[1, 1, 0]])
    assert torch.equal(cache.values[0][:, :, :1], -keys[[1, 1, 0]])
