"""Meet in the middle: what each direction sees, which predictions are pairs, and what the loss is."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F

from metalm.config import build
from metalm.errors import ConfigError
from metalm.model import MetaLM
from metalm.objectives.mim import BACKWARD, FORWARD, MIM, MIMConfig, MIMLayout, pair_targets
from metalm.segments import Batch, Document, Text, make_batch

VOCABULARY, R2L = 23, 22
TEXTS = [[0, 5, 9, 7, 3, 1], [0, 8, 8, 4, 1], [6, 2, 11], [0, 1]]  # the third goes on from a text's middle
LAYOUT = MIMLayout(R2L)


def make_model(beta: float = 0.1, **decoder) -> MIM:
    torch.manual_seed(0)
    size = {"layers": 2, "width": 16, "heads": 2, "max_positions": 64, "vocab_size": VOCABULARY} | decoder
    config = build(MIMConfig, {"decoder": size, "beta": beta, "r2l_token": R2L}, "test")
    return MIM(config).double().eval()


def make_rows(texts=TEXTS, rows: int = 1, length: int = 0) -> Batch:
    documents = [LAYOUT.lay_out(tokens, random.Random(0), str(n)) for n, tokens in enumerate(texts)]
    return LAYOUT.collate([documents[r::rows] for r in range(rows)], length)


@pytest.fixture(params=["sinusoidal", "rotary", "learned"])
def model(request) -> MIM:
    return make_model(positions=request.param)


def test_the_layout_by_hand():
    batch = make_rows([[0, 5, 9, 1]])
    assert batch.tokens_BT.tolist() == [[0, 5, 9, 1, R2L, 1, 9, 5, 0]]
    assert batch.position_BT.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 4]]
    assert batch.branch_BT.tolist() == [[FORWARD] * 4 + [BACKWARD] * 5]
    assert batch.places_L.tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert batch.targets_L.tolist() == [5, 9, 1, 1, 9, 5, 0]


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_pairs_are_the_same_token_of_the_same_document(rows):
    batch = make_rows(rows=rows)
    T = batch.tokens_BT.shape[1]
    row_L = batch.places_L // T
    document_L = batch.document_BT.flatten()[batch.places_L] + 100 * row_L
    branch_L = batch.branch_BT.flatten()[batch.places_L]
    forward, backward, first = pair_targets(branch_L, document_L)
    assert torch.equal(batch.targets_L[forward], batch.targets_L[backward])
    assert torch.equal(document_L[forward], document_L[backward])
    assert set(branch_L[forward].tolist()) == {FORWARD} and set(branch_L[backward].tolist()) == {BACKWARD}
    assert sorted([*forward, *backward, *first]) == list(range(batch.num_targets))
    assert sorted(batch.targets_L[first].tolist()) == sorted(tokens[0] for tokens in TEXTS)
    assert len(forward) == sum(len(tokens) - 1 for tokens in TEXTS)


def logits_of(model: MIM, batch: Batch, x: torch.Tensor | None = None) -> torch.Tensor:
    """[L, V] at the places that predict; `x` in place of the embeddings."""
    original = model.embed
    if x is not None:
        model.embed = lambda batch: x
    hidden = model.hidden(batch).flatten(0, 1)[batch.places_L]
    model.embed = original
    return model.decoder.logits(hidden)


def seen(model: MIM, batch: Batch) -> torch.Tensor:
    """bool [L, T]: whether a target's logits depend on the input at a position of the (only) row."""
    x = model.embed(batch).detach().requires_grad_()
    logits = logits_of(model, batch, x)
    grads = [torch.autograd.grad(row.pow(2).sum(), x, retain_graph=True)[0] for row in logits]
    return torch.stack([grad[0].abs().sum(-1) > 0 for grad in grads])


def expected_sight(batch: Batch, strict: bool = True) -> torch.Tensor:
    """By the definition: a direction sees what precedes the token in it, of its own document."""
    T = batch.tokens_BT.shape[1]
    document, branch = batch.document_BT[0], batch.branch_BT[0]
    sight = torch.zeros(batch.num_targets, T, dtype=torch.bool)
    for target, place in enumerate(batch.places_L.tolist()):
        for t in range(T):
            # The token that `place` predicts enters as input at place + 1.
            before = t <= place if strict else t <= place + 1
            sight[target, t] = before and document[t] == document[place] and branch[t] == branch[place]
    return sight


def test_no_direction_sees_its_own_token_and_each_sees_all_before_it(model):
    batch = make_rows()
    assert torch.equal(seen(model, batch), expected_sight(batch))


def test_the_leak_test_fails_when_the_mask_lets_a_place_see_the_next(model, monkeypatch):
    monkeypatch.setattr("metalm.model.causal", lambda b, h, q, k: q + 1 >= k)
    batch = make_rows()
    assert not torch.equal(seen(model, batch), expected_sight(batch))


def test_backward_is_forward_on_the_reversed_text_with_the_sentinel_swapped(model):
    text = [4, 9, 2, 7, 3]
    batch = make_rows([[0, *text]])
    logits = logits_of(model, batch)
    forward, backward = logits[: len(text)], logits[len(text) :]
    reverse = make_rows([[R2L, *reversed(text)]])
    assert torch.allclose(logits_of(model, reverse)[: len(text)], backward[: len(text)], rtol=0, atol=1e-12)
    assert not torch.allclose(forward, backward[: len(text)].flip(0))


@pytest.mark.parametrize(("rows", "length"), [(1, 0), (1, 64), (2, 40), (4, 0)])
def test_packed_and_padded_the_loss_is_that_of_each_text_alone(model, rows, length):
    alone = sum(model(make_rows([tokens])) for tokens in TEXTS)
    assert torch.allclose(model(make_rows(rows=rows, length=length)), alone, rtol=1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.1, 2.0])
def test_the_loss_is_the_dense_form_of_the_paper(beta):
    model = make_model(beta)
    batch = make_rows()
    loss = model(batch)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    expected = torch.zeros((), dtype=torch.float64)
    for tokens in TEXTS:
        one = make_rows([tokens])
        n = len(tokens) - 1
        logits = logits_of(model, one)
        forward, backward = logits[:n], logits[n : 2 * n].flip(0)
        text = torch.tensor(tokens[1:])
        variation = (forward.softmax(-1) - backward.softmax(-1)).abs().sum() / 2
        expected = expected + F.cross_entropy(forward, text, reduction="sum") + F.cross_entropy(backward, text, reduction="sum")
        expected = expected + beta * variation + F.cross_entropy(logits[2 * n :], torch.tensor(tokens[:1]), reduction="sum")
    assert torch.allclose(loss, expected, rtol=1e-12)
    for grad, right in zip(grads, torch.autograd.grad(expected, list(model.parameters()))):
        assert torch.allclose(grad, right, rtol=1e-9, atol=1e-12)


def test_what_the_loss_is_made_of_is_logged():
    model = make_model()
    model(make_rows())
    count = sum(len(tokens) - 1 for tokens in TEXTS)
    assert {name: n for name, (_, n) in model.parts.items()} == dict.fromkeys(("forward", "backward", "total_variation"), count)
    assert 0 < model.parts["total_variation"][0] < count


def test_read_forward_the_model_is_a_causal_one():
    """The forward half's logits are those of a METALM with the same decoder on the plain text."""
    model = make_model()
    plain = MetaLM(build(MetaLM.Config, {"decoder": vars(model.config.decoder)}, "test")).double().eval()
    plain.load_state_dict(model.state_dict())
    text = TEXTS[0]
    batch = make_batch([[Document([Text(text)])]], {})
    expected = plain.decoder.logits(plain.hidden(batch))[0, :-1]
    assert torch.allclose(logits_of(model, make_rows([text]))[: len(text) - 1], expected, rtol=0, atol=1e-12)


def test_bad_configurations_are_named():
    decoder = {"layers": 1, "width": 8, "heads": 1}
    with pytest.raises(ConfigError, match="beta -1"):
        build(MIMConfig, {"decoder": decoder, "beta": -1.0}, "test")
    encoder = {"type": "text", "layers": 1, "width": 8, "heads": 1, "connector": {"type": "linear"}}
    with pytest.raises(ConfigError, match=r"decoder\.init_from"):
        build(MIMConfig, {"decoder": decoder, "encoders": {"text": encoder}}, "test")


@pytest.mark.parametrize("length", [5, 6, 64, 65])
def test_the_longest_document_fills_a_row(length):
    tokens = [3] * LAYOUT.room(length)
    assert length - 1 <= len(LAYOUT.lay_out(tokens, random.Random(0), "")) <= length
