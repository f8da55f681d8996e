"""The two-tower encoder is its definition, written out position by position; it sees what it may see and nothing else."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from metalm.config import build, to_plain
from metalm.encoders import two_tower
from metalm.encoders.two_tower import TwoTowerConfig, TwoTowerEncoder, combination_mask, document_edges, mirrored_columns
from metalm.errors import ConfigError, DataError
from metalm.model import MetaLM
from metalm.nn.attention import attend
from metalm.nn.freezing import set_trainable
from metalm.segments import Document, Span, Text, make_batch

VOCABULARY = 30
TEXTS = [[3, 8, 5, 5, 9], [7], [4, 2], [11, 6, 3, 1], [12, 3, 7]]
SIGHTS = ["full", "curr", "none"]


def make(seed: int = 0, **changes) -> TwoTowerEncoder:
    """A small encoder in float64, with no parameter at a special value."""
    torch.manual_seed(seed)
    size = {"type": "two_tower", "layers": 2, "width": 16, "heads": 2, "vocab_size": VOCABULARY, "combination": "full"}
    encoder = TwoTowerEncoder(build(TwoTowerConfig, size | changes, "test")).double().eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return encoder


def rows_of(rows: list[list[list[int]]], length: int = 0) -> dict[str, Tensor]:
    """Texts side by side in each row, then padding, as the encoder is given them."""
    S = length or max(sum(map(len, row)) for row in rows)
    inputs = {name: torch.zeros(len(rows), S, dtype=torch.long) for name in ("tokens_RS", "span_RS", "position_RS")}
    for r, row in enumerate(rows):
        start = 0
        for n, tokens in enumerate(row, start=1):
            place = slice(start, start + len(tokens))
            inputs["tokens_RS"][r, place] = torch.tensor(tokens)
            inputs["span_RS"][r, place] = n
            inputs["position_RS"][r, place] = torch.arange(len(tokens))
            start += len(tokens)
    return inputs


def slow_attention(q_D: Tensor, keys: list[Tensor], values: list[Tensor], heads: int, kv_heads: int, scale: float) -> Tensor:
    """One query, head by head; zero if there is nothing to see."""
    out = torch.zeros_like(q_D)
    W = len(q_D) // heads
    for head in range(heads if keys else 0):
        own, group = slice(head * W, (head + 1) * W), head // (heads // kv_heads)
        theirs = slice(group * W, (group + 1) * W)
        weights = torch.stack([scale * (q_D[own] * key[theirs]).sum() for key in keys]).softmax(0)
        out[own] = sum(weight * value[theirs] for weight, value in zip(weights, values))
    return out


def learned(module) -> tuple[list[Tensor], list[Tensor]]:
    if not hasattr(module, "bias_2G1W"):
        return [], []
    return [module.bias_2G1W[0].flatten()], [module.bias_2G1W[1].flatten()]


def slow_tower(tower, x: list[Tensor], forward: bool) -> list[Tensor]:
    """States of one document, from left to right or from right to left."""
    c = tower.config
    for block in tower.blocks:
        normed = [block.attention_norm(one) for one in x]
        size = c.kv_heads * c.head_width
        q, k, v = zip(*(block.attention.qkv(one).split([c.heads * c.head_width, size, size]) for one in normed))
        keys, values = learned(block.attention)
        attended = []
        for i in range(len(x)):
            seen = [j for j in range(len(x)) if (j <= i if forward else j >= i)]
            near_keys, near_values = [k[j] for j in seen] + keys, [v[j] for j in seen] + values
            attended.append(slow_attention(q[i], near_keys, near_values, c.heads, c.kv_heads, c.head_width**-0.5))
        x = [one + block.attention.out(a) for one, a in zip(x, attended)]
        x = [one + block.mlp(block.mlp_norm(one)) for one in x]
    return [tower.norm(one) for one in x]


def slow_encoder(encoder: TwoTowerEncoder, tokens: list[int]) -> Tensor:
    """States [n, D] of one document by the definition."""
    c, n = encoder.config, len(tokens)
    scale = math.sqrt(c.width) if c.positions == "sinusoidal" else 1.0
    table = encoder.positions.weight if c.positions == "learned" else encoder.positions.table
    x = [encoder.embedding.weight[token] * scale + table[i] for i, token in enumerate(tokens)]
    left, right = slow_tower(encoder.left_to_right, x, True), slow_tower(encoder.right_to_left, x, False)
    top = encoder.combination
    size = c.kv_heads * c.head_width
    (fk, fv), (bk, bv) = (zip(*(top.key_value(one).split(size) for one in side)) for side in (left, right))
    keys, values = learned(top)
    states = []
    for i in range(n):
        before, after = left[i - 1] if i else 0 * left[0], right[i + 1] if i + 1 < n else 0 * right[0]
        q = top.query(torch.cat([before, after]) if c.query == "concat" else before + after)
        seen_f = [j for j in range(n) if {"full": j < i, "curr": j <= i, "none": True}[c.combination]]
        seen_b = [j for j in range(n) if {"full": j > i, "curr": j >= i, "none": True}[c.combination]]
        all_keys = [fk[j] for j in seen_f] + [bk[j] for j in seen_b] + keys
        all_values = [fv[j] for j in seen_f] + [bv[j] for j in seen_b] + values
        x = top.out(slow_attention(q, all_keys, all_values, c.heads, c.kv_heads, 1.0))
        states.append(x + top.mlp(top.mlp_norm(x)))
    return torch.stack(states)


VARIANTS = [
    {},
    {"bias_kv": False},
    {"query": "concat", "kv_heads": 1},
    {"positions": "learned", "norm": "rms", "mlp": "swiglu", "bias": False},
    {"head_width": 6, "qkv_bias": False, "heads": 4, "kv_heads": 2},
]


@pytest.mark.parametrize("sight", SIGHTS)
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_the_encoder_is_its_definition(sight, changes):
    encoder = make(combination=sight, **changes)
    rows = [TEXTS[:3], TEXTS[3:]]
    states_RSD = encoder(**rows_of(rows))
    for r, row in enumerate(rows):
        start = 0
        for tokens in row:
            expected = slow_encoder(encoder, tokens)
            torch.testing.assert_close(states_RSD[r, start : start + len(tokens)], expected, rtol=1e-11, atol=1e-11)
            start += len(tokens)


@pytest.mark.parametrize("sight", SIGHTS)
@pytest.mark.parametrize("bias_kv", [True, False])
def test_packed_and_padded_states_are_those_of_each_text_alone(sight, bias_kv):
    encoder = make(combination=sight, bias_kv=bias_kv)
    alone = [encoder(**rows_of([[tokens]]))[0] for tokens in TEXTS]
    for length in (15, 16, 31):  # no padding, a single position of it, and more
        packed = encoder(**rows_of([TEXTS], length))[0]
        assert packed.isfinite().all()
        torch.testing.assert_close(packed[:15], torch.cat(alone), rtol=1e-12, atol=1e-12)


def influence(encoder: TwoTowerEncoder, inputs: dict[str, Tensor]) -> Tensor:
    """bool [S, S] of a single row: whether the state at i depends on the input vector at j."""
    seen = {}
    hook = encoder.embedding.register_forward_hook(lambda module, _, out: seen.setdefault("x", out.detach().requires_grad_()))
    states_SD = encoder(**inputs)[0]
    hook.remove()
    weights_D = torch.randn(states_SD.shape[1], dtype=torch.double, generator=torch.Generator().manual_seed(1))
    gradients = [torch.autograd.grad(state @ weights_D, seen["x"], retain_graph=True)[0][0] for state in states_SD]
    return torch.stack(gradients).abs().sum(-1) > 0


def allowed(span_S: Tensor, sight: str) -> Tensor:
    same = span_S[:, None] == span_S
    return same & ~torch.eye(len(span_S), dtype=torch.bool) if sight == "full" else same


@pytest.mark.parametrize("sight", SIGHTS)
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_a_state_depends_on_its_document_and_in_full_not_on_its_own_token(sight, changes):
    inputs = rows_of([TEXTS], 17)
    assert torch.equal(influence(make(combination=sight, **changes), inputs), allowed(inputs["span_RS"][0], sight))


def leaks(encoder: TwoTowerEncoder) -> bool:
    """Whether a state depends on its own token, or on another document."""
    inputs = rows_of([TEXTS], 17)
    return bool((influence(encoder, inputs) & ~allowed(inputs["span_RS"][0], "full")).any())


@pytest.mark.parametrize("bias_kv", [True, False])
@pytest.mark.parametrize(
    "name, mutant",
    [
        ("before", lambda b, h, q, k: k <= q),
        ("after", lambda b, h, q, k: k >= q),
        ("causal", lambda b, h, q, k: k <= q + 1),
        ("same_document", lambda span: lambda b, h, q, k: k >= 0),
        ("document_edges", lambda span: (torch.zeros_like(span, dtype=torch.bool),) * 2),
    ],
)
def test_the_leak_test_fails_under_mutation(monkeypatch, bias_kv, name, mutant):
    encoder = make(bias_kv=bias_kv)
    assert not leaks(encoder)
    if name in ("before", "after"):
        forward, backward = two_tower.SIGHTS["full"]
        monkeypatch.setitem(two_tower.SIGHTS, "full", (mutant, backward) if name == "before" else (forward, mutant))
    else:
        monkeypatch.setattr(two_tower, name, mutant)
    assert leaks(encoder)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias_kv", [True, False])
def test_a_changed_token_leaves_its_own_state_bit_identical(dtype, bias_kv):
    encoder = make(bias_kv=bias_kv).to(dtype)
    inputs = rows_of([TEXTS], 17)
    states_SD = encoder(**inputs)[0]
    for i in range(15):
        tokens_RS = inputs["tokens_RS"].clone()
        tokens_RS[0, i] = 29
        changed_SD = encoder(**{**inputs, "tokens_RS": tokens_RS})[0]
        same = inputs["span_RS"][0] == inputs["span_RS"][0, i]
        assert torch.equal(changed_SD[i], states_SD[i])
        assert torch.equal(changed_SD[~same], states_SD[~same])
        assert same.sum() == 1 or not torch.equal(changed_SD[same], states_SD[same])


@pytest.mark.parametrize("sight", SIGHTS)
@pytest.mark.parametrize("bias_kv", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_short_documents_have_finite_states_and_gradients(sight, bias_kv, dtype):
    encoder = make(combination=sight, bias_kv=bias_kv).to(dtype).train()
    states_RSD = encoder(**rows_of([[[7], [4, 2], [5], [6]], [[1]]]))
    states_RSD.float().pow(2).sum().backward()
    assert states_RSD.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in encoder.parameters())
    if sight == "full":  # what stands alone says nothing of itself
        assert torch.equal(states_RSD[0, 0], states_RSD[0, 3])
        assert torch.equal(states_RSD[0, 0], states_RSD[0, 4])
    else:
        assert not torch.equal(states_RSD[0, 0], states_RSD[0, 3])


def merged_attention(q: Tensor, sides: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Softmax attention over several sets of keys, each on its own, merged by their logsumexp; a set may be empty.

    Args:
        sides: keys, values [R, H, K, W] and what is seen of them, bool [R, 1, Q, K].
    """
    outs, totals = [], []
    for k, v, seen in sides:
        scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~seen, -1e30)  # finite, so that gradients are
        totals.append(scores.logsumexp(-1, keepdim=True))
        outs.append((scores - totals[-1]).exp() @ v)
    weights = torch.cat(totals, dim=-1).softmax(-1)  # exactly 0 for an empty set beside another
    return sum(weights[..., n : n + 1] * out for n, out in enumerate(outs))


def test_two_attentions_merged_by_logsumexp_are_the_masked_one():
    span_RS = rows_of([TEXTS], 17)["span_RS"]
    S = span_RS.shape[1]
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 8, dtype=torch.double, generator=generator).requires_grad_() for n in (S, 2 * S, 2 * S))
    mask = combination_mask(span_RS, "full", bias_kv=False)
    same, ones = span_RS[:, None, :, None] == span_RS[:, None, None], torch.ones(S, S, dtype=torch.bool)
    sides = [(k[:, :, :S], v[:, :, :S], same & ones.tril(-1)), (k[:, :, S:], v[:, :, S:], same & ones.triu(1))]
    first_RS, last_RS = document_edges(span_RS)
    some = ~(first_RS & last_RS)[0]  # the text of one token has two empty sides
    assert some.sum() == 16
    masked, merged = attend(q, k, v, mask)[:, :, some], merged_attention(q, sides)[:, :, some]
    torch.testing.assert_close(masked, merged, rtol=1e-12, atol=1e-12)
    weights = torch.randn(masked.shape, dtype=torch.double, generator=generator)
    ours, theirs = (torch.autograd.grad((out * weights).sum(), (q, k, v)) for out in (masked, merged))
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("sight", SIGHTS)
@pytest.mark.parametrize("bias_kv", [True, False])
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_takes_the_same_masks(sight, bias_kv):
    span_RS = rows_of([TEXTS * 9, TEXTS * 4], 140)["span_RS"]
    masks = [combination_mask(span_RS, sight, bias_kv)]
    masks.append(
        two_tower.make_mask(two_tower.all_of(two_tower.causal, two_tower.same_document(span_RS)), span_RS, 140, bias_kv)
    )
    for mask in masks:
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(2, 2, n, 16, generator=generator) for n in (140, mask.keys, mask.keys))
        torch.testing.assert_close(flex_attention(q, k, v, block_mask=mask.block), attend(q, k, v, mask), rtol=1e-4, atol=1e-5)


def test_scores_start_at_the_usual_size_without_being_scaled():
    torch.manual_seed(0)
    size = {"type": "two_tower", "layers": 1, "width": 256, "heads": 4, "vocab_size": VOCABULARY}
    top = TwoTowerEncoder(build(TwoTowerConfig, size, "test")).combination
    x = F.layer_norm(torch.randn(2, 64, 256), (256,))
    key, _ = top.split_heads(top.key_value(x[0][None])).chunk(2, dim=1)
    scores = top.split_heads(top.query(x[1][None])) @ key.transpose(-1, -2)
    assert 0.8 < scores.std() < 1.25


def test_mirrored_columns_by_hand():
    span_RS = torch.tensor([[1, 1, 1, 2, 2, 0], [0, 0, 4, 9, 9, 9], [1, 2, 3, 4, 5, 6]])
    mirror_RS = mirrored_columns(span_RS)
    assert mirror_RS.tolist() == [[2, 1, 0, 4, 3, 5], [1, 0, 2, 5, 4, 3], [0, 1, 2, 3, 4, 5]]
    assert torch.equal(mirror_RS.gather(1, mirror_RS), torch.arange(6).expand(3, 6))
    assert mirrored_columns(torch.ones(1, 1, dtype=torch.long)).tolist() == [[0]]


def test_checkpointing_activations_changes_nothing():
    inputs, grads = rows_of([TEXTS], 17), []
    for saving in (False, True):
        encoder = make(activation_checkpointing=saving).train()
        encoder(**inputs).pow(2).sum().backward()
        grads.append([parameter.grad for parameter in encoder.parameters()])
    for one, other in zip(*grads):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def docked(**changes) -> MetaLM:
    encoder = {"type": "two_tower", "layers": 2, "width": 16, "heads": 2, "connector": {"type": "linear"}} | changes
    decoder = {"layers": 1, "width": 8, "heads": 1}
    config = build(MetaLM.Config, {"decoder": decoder, "encoders": {"text": encoder}}, "test")
    config.set_vocab_size(VOCABULARY)
    return MetaLM(config).double()


def test_it_docks_as_a_text_encoder():
    source = make(combination="none")
    model = docked()
    assert model.config.encoders["text"].combination == "none"
    model.encoders["text"].load_state_dict(source.state_dict())
    document = Document([Text([1, 2]), Span("text", {"tokens": [3, 4, 5]}, 3, 3), Text([6, 7])])
    batch = make_batch([[document, document], [document]], model.processors)
    model(batch).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.encoders["text"].left_to_right.parameters())
    assert all(parameter.grad is not None for parameter in model.parameters())
    span = batch.spans["text"]
    states_MD = model.encoders["text"](**span.inputs).flatten(0, 1)[span.source]
    torch.testing.assert_close(states_MD[:3], source(**rows_of([[[3, 4, 5]]]))[0], rtol=1e-12, atol=1e-12)
    model(make_batch([[Document([Text([1, 2, 3])])]], model.processors)).backward()  # without a span: a blank one runs


@pytest.mark.parametrize("trainable", ["all", "none", 1, 2])
def test_the_last_layers_alone_train(trainable):
    encoder = make(layers=3)
    assert len(encoder.layers()) == 3
    set_trainable(encoder, encoder.layers(), trainable, "encoder")
    states_RSD = encoder(**rows_of([TEXTS]))
    if trainable == "none":
        assert not states_RSD.requires_grad
        return
    (states_RSD * torch.randn_like(states_RSD)).sum().backward()
    got = {name for name, parameter in encoder.named_parameters() if parameter.grad is not None}
    blocks = range(3 if trainable == "all" else trainable)
    names = ("combination.", "left_to_right.norm", "right_to_left.norm", *(f".blocks.{2 - n}." for n in blocks))
    assert got == {n for n, _ in encoder.named_parameters() if trainable == "all" or any(name in n for name in names)}


def test_the_processor_packs_spans_and_refuses_what_does_not_fit():
    processor = make(max_positions=6).processor
    assert pickle.loads(pickle.dumps(processor)) == processor
    collated = processor.collate([{"tokens": tokens} for tokens in TEXTS])
    assert len(collated.source) == 15
    with pytest.raises(DataError, match="max_positions=6"):
        processor.num_states({"tokens": [1] * 7})


def test_it_builds_and_runs_without_memory():
    with torch.device("meta"):
        encoder = TwoTowerEncoder(make().config)
        states_RSD = encoder(**{name: tensor.to("meta") for name, tensor in rows_of([TEXTS]).items()})
    assert states_RSD.is_meta and states_RSD.shape == (1, 15, 16)


def test_configurations_survive_being_written():
    config = make(characters={"width": 4, "filters": [3, 3]}).config
    assert build(TwoTowerConfig, to_plain(config), "test") == config


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"vocab_size": 0}, "vocab_size is not set"),
        ({"relative_bias": True}, "relative_bias is not for two towers"),
        ({"qk_norm": True}, "qk_norm is not for two towers"),
        ({"positions": "rotary"}, "positions cannot be 'rotary'"),
        ({"combination": "ful"}, "combination cannot be 'ful'; did you mean 'full'"),
        ({"query": "mean"}, "query cannot be 'mean'"),
        ({"towers": 2}, "unknown key 'towers'"),
        ({"characters": {"filters": []}}, r"characters: filters is \[\]"),
        ({"characters": {"max_length": 2}}, "characters: max_length is 2"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        make(**changes)
