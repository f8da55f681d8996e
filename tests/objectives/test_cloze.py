"""Cloze: every token from all the others and never from itself; what the losses are; what the result docks as."""

from __future__ import annotations

import math
import pickle
import random

import pytest
import torch
from torch import Tensor

from metalm.config import build, to_plain
from metalm.data.tokenizer import Tokenizer
from metalm.encoders import two_tower
from metalm.errors import ConfigError
from metalm.model import MetaLM
from metalm.models import MODELS, fit_to_tokenizer
from metalm.objectives.cloze import Cloze, ClozeConfig, ClozeLayout
from metalm.segments import Batch, Document, Span, Text, make_batch

VOCABULARY, START = 23, 2
TEXTS = [[2, 5, 9, 7, 3, 1], [2, 8, 8, 4, 1], [6, 2, 11], [2, 1], [2]]  # the third goes on from a text's middle
LAYOUT = ClozeLayout(START, max_positions=64)
WORDS = [f"word{'s' * (n % 7)}" for n in range(VOCABULARY)]
SPELLED = {"characters": {"width": 8, "filters": [8, 16, 16], "max_length": 12}}


def make_model(encoder: dict | None = None, **changes) -> Cloze:
    torch.manual_seed(0)
    size = {"type": "two_tower", "layers": 2, "width": 16, "heads": 2, "max_positions": 64, "vocab_size": VOCABULARY}
    values = {"type": "cloze", "encoder": size | (encoder or {}), "s_token": START} | changes
    model = Cloze(build(ClozeConfig, values, "test")).double().eval()
    if (encoder or {}).get("characters"):
        model.encoder.embedding.spell(WORDS)
    return model


def make_rows(texts=TEXTS, rows: int = 1, length: int = 0) -> Batch:
    documents = [LAYOUT.lay_out(tokens, random.Random(0), str(n)) for n, tokens in enumerate(texts)]
    return LAYOUT.collate([documents[r::rows] for r in range(rows)], length)


def states_of(model: Cloze, batch: Batch) -> dict[str, Tensor]:
    """By loss, the states [L, D] that predict the batch's targets, taken position by position."""
    left, right = model.encoder.towers(batch.tokens_BT, batch.document_BT, batch.position_BT)
    both = model.encoder.combination(left, right, batch.document_BT, "full")
    places = batch.places_L.tolist()
    found = {"cloze": (both, 0), "forward": (left, -1), "backward": (right, 1)}
    return {name: torch.stack([x.flatten(0, 1)[i + shift] for i in places]) for name, (x, shift) in found.items()}


def nats_of(model: Cloze, hidden_LD: Tensor, targets_L: Tensor) -> Tensor:
    log_p = (hidden_LD @ model.encoder.embedding.weight.T).log_softmax(-1)
    return -sum(row[target] for row, target in zip(log_p, targets_L.tolist()))


def test_the_layout_by_hand():
    batch = make_rows([[2, 5, 9, 1], [6, 3, 4]], length=11)
    assert batch.tokens_BT.tolist() == [[2, 5, 9, 1, 2, 2, 3, 4, 2, 0, 0]]
    assert batch.document_BT.tolist() == [[1, 1, 1, 1, 1, 2, 2, 2, 2, 0, 0]]
    assert batch.position_BT.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0]]
    assert batch.places_L.tolist() == [1, 2, 3, 6, 7]
    assert batch.targets_L.tolist() == [5, 9, 1, 3, 4]
    assert batch.keys == ["0", "1"]


def test_every_token_of_every_text_is_a_target_and_its_own_input():
    batch = make_rows(rows=2)
    assert torch.equal(batch.tokens_BT.flatten()[batch.places_L], batch.targets_L)
    assert sorted(batch.targets_L.tolist()) == sorted(token for tokens in TEXTS for token in tokens[1:])
    assert (batch.document_BT.flatten()[batch.places_L - 1] == batch.document_BT.flatten()[batch.places_L + 1]).all()


def test_documents_fit_and_travel_to_workers():
    assert LAYOUT.room(100) == 63 and LAYOUT.room(10) == 9
    document = LAYOUT.lay_out(list(range(LAYOUT.room(10))), random.Random(0), "key")
    assert len(document) == 10 and document.key == "key"
    assert pickle.loads(pickle.dumps((LAYOUT, document))) == (LAYOUT, document)
    assert len(make_model(encoder={"positions": "learned", "max_positions": 8}).layout.lay_out([0] * 7, None, "")) == 8


def dependence(model: Cloze, batch: Batch, name: str = "cloze") -> Tensor:
    """[L, T] of a single row: the largest derivative of a target's logits by the input vector at a position."""
    seen = {}
    hook = model.encoder.embedding.register_forward_hook(
        lambda module, _, out: seen.setdefault("x", out.detach().requires_grad_())
    )
    logits_LV = states_of(model, batch)[name] @ model.encoder.embedding.weight.T
    hook.remove()
    rows = [[torch.autograd.grad(logit, seen["x"], retain_graph=True)[0][0] for logit in row[:5]] for row in logits_LV]
    return torch.stack([torch.stack(row).abs().amax(dim=(0, 2)) for row in rows])


def expected_dependence(batch: Batch, name: str = "cloze") -> Tensor:
    document_T, place_T = batch.document_BT[0], torch.arange(batch.document_BT.shape[1])
    place_L1 = batch.places_L[:, None]
    side = {"cloze": place_T != place_L1, "forward": place_T < place_L1, "backward": place_T > place_L1}[name]
    return side & (document_T == document_T[place_L1])


VARIANTS = [{}, {"bias_kv": False, "query": "concat"}, {"positions": "learned", "layers": 1, "combination": "curr"}]


@pytest.mark.parametrize("encoder", VARIANTS, ids=str)
@pytest.mark.parametrize("name", ["cloze", "forward", "backward"])
def test_logits_depend_on_every_other_token_and_not_on_their_own(encoder, name):
    batch = make_rows(length=32)
    assert torch.equal(dependence(make_model(encoder), batch, name) > 0, expected_dependence(batch, name))


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("encoder", VARIANTS, ids=str)
def test_the_leak_test_fails_when_less_becomes_less_or_equal(monkeypatch, encoder, side):
    model, batch = make_model(encoder), make_rows()
    mutants = (lambda b, h, q, k: k <= q), (lambda b, h, q, k: k >= q)
    sides = list(two_tower.SIGHTS["full"])
    sides[side] = mutants[side]
    monkeypatch.setitem(two_tower.SIGHTS, "full", tuple(sides))
    place_L1, document_T = batch.places_L[:, None], batch.document_BT[0]
    leaked = (dependence(model, batch) > 0) & ~expected_dependence(batch)
    own = torch.arange(len(document_T)) == place_L1
    assert torch.equal(leaked, own)  # exactly the diagonal, all of it


@pytest.mark.parametrize(("rows", "length"), [(1, 0), (1, 64), (2, 40), (5, 0)])
@pytest.mark.parametrize("encoder", VARIANTS, ids=str)
def test_packed_and_padded_the_loss_is_that_of_each_text_alone(encoder, rows, length):
    model = make_model(encoder, two_direction=0.15)
    alone = sum(model(make_rows([tokens])) for tokens in TEXTS)
    torch.testing.assert_close(model(make_rows(rows=rows, length=length)), alone, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("cloze", "two_direction"), [(1.0, 0.0), (1.0, 0.15), (0.0, 1.0)])
def test_the_loss_is_the_dense_form(cloze, two_direction):
    model, batch = make_model(cloze=cloze, two_direction=two_direction), make_rows(rows=2)
    weights = {"cloze": cloze, "forward": two_direction, "backward": two_direction}
    nats = {name: nats_of(model, hidden, batch.targets_L) for name, hidden in states_of(model, batch).items()}
    loss, expected = model(batch), sum(weights[name] * nats[name] for name in nats)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert {name: count for name, (_, count) in model.parts.items()} == {n: batch.num_targets for n, w in weights.items() if w}
    assert model.num_predictions(batch) == sum(count for _, count in model.parts.values())
    for name, (total, _) in model.parts.items():
        torch.testing.assert_close(total, nats[name], rtol=1e-12, atol=0)
        assert not total.requires_grad
    parameters = [p for n, p in model.named_parameters() if cloze or not n.startswith("encoder.combination")]
    for one, other in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters)):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_a_batch_without_a_target_costs_nothing():
    model = make_model(two_direction=1.0)
    loss = model(make_rows([[2], [2]]))
    loss.backward()
    assert loss == 0 and all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(
    ("changes", "least"),
    [
        ({}, 0.0),
        ({"encoder": SPELLED, "cutoffs": [4, 10]}, 0.0),
        # One direction cannot know which of three texts begins, nor which of the two equally long ones ends.
        ({"cloze": 0.0, "two_direction": 1.0}, (3 * math.log(3) + 2 * math.log(2)) / 16),
    ],
    ids=["tokens", "words", "two-direction"],
)
def test_small_texts_are_learned_by_heart_as_far_as_can_be(changes, least):
    model = make_model(**changes | {"encoder": {"width": 64} | changes.get("encoder", {})}).float().train()
    if "cutoffs" in changes:
        model.encoder.embedding.spell([f"{n:b}" for n in range(VOCABULARY)])  # no two alike
    batch = make_rows([[2, 5, 9, 7, 3, 5, 1], [2, 8, 12, 4, 9, 1], [2, 11, 20, 4, 5, 1]])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = model(batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item() / batch.num_targets)
    assert losses[0] > 2
    assert least < losses[-1] < least + 0.05


def test_the_encoder_docks_as_it_is_pretrained():
    """The same weights, by the same names; `combination` stays what the encoder is docked with."""
    model = make_model()
    encoder = to_plain(model.config)["encoder"] | {"connector": {"type": "linear"}}
    config = {"decoder": {"layers": 1, "width": 8, "heads": 1, "vocab_size": VOCABULARY}, "encoders": {"text": encoder}}
    docked = MetaLM(build(MetaLM.Config, config, "test")).double()
    docked.encoders["text"].load_state_dict(model.encoder.state_dict())
    document = Document([Text([2, 5]), Span("text", {"tokens": [9, 7, 3]}, 3, 9), Text([4, 1])])
    batch = make_batch([[document]], docked.processors)
    docked(batch).backward()
    assert all(parameter.grad is not None for parameter in docked.parameters())
    inputs = batch.spans["text"].inputs
    assert torch.equal(docked.encoders["text"](**inputs), model.encoder(**inputs))
    left, right = model.encoder.towers(**inputs)
    pretrained = model.encoder.combination(left, right, inputs["span_RS"], "full")
    assert not torch.allclose(model.encoder(**inputs), pretrained)  # it now sees all of its own tokens


def test_words_go_from_their_spelling_to_an_adaptive_softmax():
    """The loss is that of torch's own adaptive softmax on the states, and does not depend on a target's spelling."""
    model, batch = make_model(encoder=SPELLED, cutoffs=[4, 10], two_direction=0.5), make_rows(rows=2)
    loss = model(batch)
    expected = 0.0
    for name, hidden_LD in states_of(model, batch).items():
        log_p = model.softmax.log_prob(hidden_LD).gather(1, batch.targets_L[:, None])
        expected = expected - (1.0 if name == "cloze" else 0.5) * log_p.sum()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    before = states_of(model, batch)["cloze"]
    target = batch.targets_L.tolist().index(11)  # the only 11 of all texts
    model.encoder.embedding.spell([*WORDS[:11], "quite", *WORDS[12:]])
    after = states_of(model, batch)["cloze"]
    assert torch.equal(before[target], after[target])
    assert not torch.equal(before, after)


def test_the_tokenizer_fills_in_what_is_left_open():
    tokenizer = Tokenizer.train(["the red dog runs", "the blue dog"] * 9, 270)
    config = build(MODELS["cloze"].Config, {"encoder": {"type": "two_tower", "layers": 1, "width": 8, "heads": 1}}, "test")
    fit_to_tokenizer(config, tokenizer)
    model = Cloze(config)
    assert model.layout.s_token == tokenizer.start
    assert model.encoder.embedding.num_embeddings == tokenizer.size
    assert build(ClozeConfig, to_plain(config), "test") == config


ENCODER = {"type": "two_tower", "layers": 1, "width": 8, "heads": 1}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"cloze": -1.0}, r"cloze -1\.0 and two_direction 0\.0"),
        ({"cloze": 0.0}, r"not both 0"),
        ({"two_direction": -0.1}, r"two_direction -0\.1"),
        ({"two_directions": 0.1}, "unknown key 'two_directions'; did you mean 'two_direction'"),
        ({"encoder": ENCODER | {"type": "text"}}, "encoder.type is 'text'"),
        ({"encoder": ENCODER | {"connector": {"type": "linear"}}}, "encoder.connector belongs to the model"),
        ({"encoder": ENCODER | {"trainable": 1}}, "encoder.trainable belongs to the model"),
        ({"encoder": ENCODER | {"characters": {}}}, "encoder.characters needs cutoffs"),
        ({"encoder": ENCODER | {"vocab_size": 20}}, r"encoder\.vocab_size is 20, but the tokenizer has 23 tokens"),
        ({"cutoffs": [10, 4]}, r"cutoffs \[10, 4\] must rise"),
        ({"cutoffs": [10, 23]}, r"cutoffs \[10, 23\] must rise .* the vocabulary's 23 words"),
        ({"s_token": 23}, "s_token is 23"),
        ({"s_token": -1}, "s_token is -1"),
    ],
)
def test_bad_configurations_are_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        config = build(ClozeConfig, {"encoder": ENCODER, "s_token": START} | changes, "test")
        config.set_vocab_size(VOCABULARY)
        Cloze(config)


def test_rows_without_room_for_a_token_are_refused():
    config = build(ClozeConfig, {"encoder": ENCODER}, "test")
    config.check_row_length(3)
    with pytest.raises(ConfigError, match=r"data\.row_length 2 "):
        config.check_row_length(2)
