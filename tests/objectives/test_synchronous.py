"""Synchronous attention: what the two sides of a hole see of each other, in training and in decoding."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F

import metalm.objectives.mim
from metalm.config import build
from metalm.errors import ConfigError
from metalm.inference.infill import Hole, InfillConfig, infill
from metalm.inference.readings import Reading, Readings
from metalm.model import MetaLM
from metalm.objectives.mim import MIM, HoleBatch, HoleDocument, MIMConfig, MIMLayout
from metalm.segments import Document, Text, make_batch

START, END, R2L, VOCABULARY = 0, 1, 22, 23
TEXT = [START, 5, 9, 7, 3, 8, 4, 6, 11, 12, END]
HOLES = [(1, 11), (3, 8), (3, 7), (1, 2), (4, 11), (1, 10), (10, 11)]  # first and one past the last
LAYOUT = MIMLayout(R2L, hole_share=1.0)


def make_model(synchronous: float = 0.3, **decoder) -> MIM:
    torch.manual_seed(0)
    size = {"layers": 3, "width": 16, "heads": 2, "max_positions": 64, "vocab_size": VOCABULARY} | decoder
    model = MIM(build(MIMConfig, {"decoder": size, "synchronous": synchronous, "r2l_token": R2L}, "test"))
    return model.double().eval()


@pytest.fixture(params=["rotary", "sinusoidal", "learned"])
def model(request) -> MIM:
    return make_model(positions=request.param)


def batch_of(*documents: Document, length: int = 0) -> HoleBatch:
    return LAYOUT.collate([list(documents)], length)


def plain(tokens: list[int]) -> Document:
    return MIMLayout(R2L).lay_out(tokens, random.Random(0), "")


def logits_of(model: MIM, batch, x: torch.Tensor | None = None) -> torch.Tensor:
    """[T, V] at every position of the (only) row; `x` in place of the embeddings."""
    x = model.embed(batch) if x is None else x
    return model.decoder.logits(model.decoder(x, batch.position_BT, model.attention(batch)))[0]


def test_the_layout_by_hand():
    document = LAYOUT.lay_out_hole([START, 5, 6, 7, 8, 9, END], 3, 6)
    batch = batch_of(document)
    assert batch.tokens_BT.tolist() == [[START, 5, 6, 7, 8, R2L, END, 9]]
    assert batch.position_BT.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2]]
    assert batch.across_BT.tolist() == [[-1, -1, 1, 2, 3, -1, 2, 3]]  # <s> 5 6 sees <r2l> </s>, then also 9
    assert batch.targets_L.tolist() == [5, 6, 7, 8, END, 9]


@pytest.mark.parametrize("hole", HOLES)
def test_every_token_is_predicted_once(hole):
    batch = batch_of(LAYOUT.lay_out_hole(TEXT, *hole))
    assert sorted(batch.targets_L.tolist()) == sorted(TEXT[1:])
    assert batch.in_hole_text_L.all()


def seen(model: MIM, batch: HoleBatch) -> dict[int, set[int]]:
    """By the text's index of a target: on the input of which of the row's positions its logits depend."""
    x = model.embed(batch).detach().requires_grad_()
    logits = logits_of(model, batch, x)
    found = {}
    for place, target in zip(batch.places_L.tolist(), batch.targets_L.tolist()):
        [grad] = torch.autograd.grad(logits[place].pow(2).sum(), x, retain_graph=True)
        found[TEXT.index(target)] = set(grad[0].abs().sum(-1).nonzero()[:, 0].tolist())
    return found


def expected_sight(batch: HoleBatch, start: int, end: int) -> dict[int, set[int]]:
    """By the definition, in the text's own indices: a side sees what it has read, and from the hole on what the other one had
    read when it was as far into the hole."""
    tokens = batch.tokens_BT[0].tolist()
    column = {TEXT.index(token): c for c, token in enumerate(tokens) if token != R2L}
    sentinel = tokens.index(R2L)
    middle = (start + end + 1) // 2
    sight = {}
    for i in range(1, len(TEXT)):
        left, right = set(range(i)), set()  # the forward side
        if i < middle and i >= start:
            step = i - start
            right = {j for j in range(len(TEXT)) if j >= end - step}
        if i >= middle:
            left, right = set(), set(range(i + 1, len(TEXT)))
            if i < end:
                step = end - 1 - i
                left = set(range(start + step))
        backward_read = i >= middle or i >= start
        sight[i] = {column[j] for j in left | right} | ({sentinel} if backward_read else set())
    return sight


@pytest.mark.parametrize("hole", HOLES)
def test_a_side_sees_the_other_up_to_its_own_step_and_never_its_target(model, hole):
    batch = batch_of(LAYOUT.lay_out_hole(TEXT, *hole))
    sight = seen(model, batch)
    assert sight == expected_sight(batch, *hole)
    columns = batch.tokens_BT[0].tolist()
    assert all(columns.index(TEXT[i]) not in columns_seen for i, columns_seen in sight.items())


def test_the_leak_test_fails_where_a_side_sees_one_step_more(model, monkeypatch):
    original = metalm.objectives.mim.other_side

    def leaking(batch):
        batch.across_BT = torch.where(batch.across_BT >= 0, batch.across_BT + 1, batch.across_BT)
        return original(batch)

    monkeypatch.setattr(metalm.objectives.mim, "other_side", leaking)
    batch = batch_of(LAYOUT.lay_out_hole(TEXT, 3, 8))
    assert seen(model, batch) != expected_sight(batch, 3, 8)


def test_texts_read_in_both_directions_are_those_of_the_plain_model(model):
    """Bit for bit, and so are the gradients: synchronous attention leaves plain reading as it is."""
    texts = [plain(TEXT), plain(TEXT[:4])]
    without = make_model(0.0, positions=model.config.decoder.positions)
    results = []
    for one, batch in ((model, batch_of(*texts)), (without, make_batch([texts], {}))):
        loss = one(batch)
        results.append([loss, *torch.autograd.grad(loss, list(one.parameters()))])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_with_weight_zero_each_side_reads_alone():
    model = make_model(0.0, positions="rotary")
    batch = batch_of(LAYOUT.lay_out_hole(TEXT, 3, 8))
    alone = make_batch([[Document([], "", LAYOUT.lay_out_hole(TEXT, 3, 8).branches)]], {})
    assert torch.equal(logits_of(model, batch), logits_of(model, alone))
    assert not torch.equal(logits_of(make_model(0.3, positions="rotary"), batch), logits_of(model, alone))


def test_packed_and_padded_the_loss_is_that_of_each_text_alone(model):
    documents = [LAYOUT.lay_out_hole(TEXT, 3, 8), plain(TEXT[:5]), LAYOUT.lay_out_hole(TEXT[2:9], 2, 6)]
    alone = sum(model(batch_of(document)) for document in documents)
    assert torch.allclose(model(batch_of(*documents)), alone, rtol=1e-12)
    assert torch.allclose(model(batch_of(*documents, length=60)), alone, rtol=1e-12)
    assert set(model.parts) == {"forward", "backward", "total_variation", "with_hole"}


def slow_states(model: MIM, text: list[int], start: int, end: int) -> torch.Tensor:
    """Log-probabilities of the text's tokens by the definition, position by position, with loops: rotary positions."""
    decoder, weight = model.decoder, model.config.synchronous
    heads, width = decoder.config.heads, decoder.config.width // decoder.config.heads
    middle = (start + end + 1) // 2
    sides = [text[:middle], [R2L, *reversed(text[middle:])]]
    contexts = [start, 1 + len(text) - end]
    states = [decoder.embed(torch.tensor(side)) for side in sides]

    def turned(x: torch.Tensor, position: int) -> torch.Tensor:
        angle = position * 10000.0 ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=-1)

    def look(q: torch.Tensor, at: int, keys: list[torch.Tensor], values: list[torch.Tensor]) -> torch.Tensor:
        """[H, D]: a query that stands at a position, over the keys of a side's first positions."""
        scores = torch.stack([(turned(q, at) * turned(k, p)).sum(-1) / width**0.5 for p, k in enumerate(keys)])
        return (scores.softmax(0)[..., None] * torch.stack(list(values))).sum(0)

    for block in decoder.transformer.blocks:
        qkv = [block.attention.qkv(block.attention_norm(x)).view(len(x), 3, heads, width).unbind(1) for x in states]
        new = []
        for side, x in enumerate(states):
            (q, k, v), (_, k_other, v_other) = qkv[side], qkv[1 - side]
            attended = []
            for p in range(len(x)):
                out = look(q[p], p, k[: p + 1], v[: p + 1])
                step = p - (contexts[side] - 1)
                if step >= 0:
                    at = contexts[1 - side] - 1 + step
                    out = out + weight * look(q[p], at, k_other[: at + 1], v_other[: at + 1])
                attended.append(out.flatten())
            x = x + block.attention.out(torch.stack(attended))
            new.append(x + block.mlp(block.mlp_norm(x)))
        states = new
    logs = [F.log_softmax(decoder.logits(decoder.transformer.norm(x)), -1) for x in states]
    return sum(log[range(len(side) - 1), side[1:]].sum() for log, side in zip(logs, sides))


@pytest.mark.parametrize("hole", HOLES)
def test_the_loss_is_the_slow_form_of_the_definition(hole):
    model = make_model(positions="rotary")
    loss = model(batch_of(LAYOUT.lay_out_hole(TEXT, *hole)))
    # The tables of rotary angles are float32.
    assert torch.allclose(loss, -slow_states(model, TEXT, *hole), rtol=1e-6)


@torch.inference_mode()
@pytest.mark.parametrize("hole", HOLES)
def test_decoding_sees_what_training_saw(model, hole):
    """Both sides write the text's own tokens in lockstep: every prediction is that of the training pass."""
    start, end = hole
    document = LAYOUT.lay_out_hole(TEXT, start, end)
    batch = batch_of(document)
    [[forward], [backward]] = document.branches
    trained = logits_of(model, batch).float().split([len(forward), len(backward)])
    contexts = start, 1 + len(TEXT) - end
    readings = Readings(model, 2, longest=40)
    for step in range((end - start + 1) // 2):
        request = []
        for side, (text, context) in enumerate(zip((forward, backward), contexts)):
            first = context - 1 + step if step else 0
            tokens = list(text.tokens[first : context + step])
            across = contexts[1 - side] - 1 + min(step, (end - start) // 2)
            request.append(Reading(first, tokens, 1, across) if tokens else None)
        decoded = readings({1: tuple(request)})[1]
        for side, reply in enumerate(decoded):
            if request[side]:
                assert torch.allclose(reply[0], trained[side][contexts[side] - 1 + step], rtol=0, atol=1e-5)


def make_holes(number: int) -> list[Hole]:
    rng = random.Random(0)
    return [Hole(*([rng.randrange(3, 22) for _ in range(rng.randint(0, 6))] for _ in range(2))) for _ in range(number)]


@pytest.mark.parametrize("config", [{"ngram": 1}, {"ngram": 2}, {"ngram": 1, "threshold": 0.03, "predict_suffix": True}])
def test_a_model_fills_holes_side_by_side_as_each_alone(model, config):
    holes, config = make_holes(20), InfillConfig(max_new_tokens=24, **config)
    alone = [infill(model, [hole], START, END, config) for hole in holes]
    together, calls = infill(model, holes, START, END, config)
    assert together == [one for [one], _ in alone]
    assert max(one.calls for one in together) <= calls < sum(one.calls for one in together) / 3


def test_looking_across_changes_what_is_written():
    model, holes = make_model(), make_holes(20)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    looking, _ = infill(model, holes, START, END)
    model.config.synchronous = 0.0
    assert sum(a.tokens != b.tokens for a, b in zip(looking, infill(model, holes, START, END)[0])) > 10


@torch.inference_mode()
def test_what_is_accepted_the_forward_side_says_on_its_own():
    """Verified tokens are those that a plain causal reading of what stands before them would write."""
    model, checked = make_model(), 0
    for hole in make_holes(30):
        [one], _ = infill(model, [hole], START, END, InfillConfig(max_new_tokens=24, ngram=1))
        if one.ended == "met" and one.accepted and one.accepted[-1]:
            text = [START, *hole.prefix, *one.tokens]
            batch = make_batch([[Document([Text(text)])]], {})
            said = model.decoder.logits(MetaLM.hidden(model, batch))[0].argmax(-1).tolist()
            accepted = one.accepted[-1]
            assert said[-accepted - 1 : -1] == one.tokens[-accepted:]
            checked += accepted
    assert checked > 5


def test_with_training_a_side_uses_what_only_the_other_side_knows():
    """The hole's first word is the suffix's last one: from the left it is a guess among eight."""
    rng = random.Random(0)
    model = make_model(1.0, positions="rotary", layers=2, width=32).float().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def text() -> list[int]:
        word = rng.randrange(10, 18)
        return [START, 3, word, 4, 5, word]

    def loss_of_word(batch_size: int) -> torch.Tensor:
        rows = [[LAYOUT.lay_out_hole(text(), 2, 5)] for _ in range(batch_size)]
        batch = LAYOUT.collate(rows, 0)
        first_B = torch.arange(batch_size) * batch.tokens_BT.shape[1] + 1  # the position before the hole
        hidden = model.hidden(batch).flatten(0, 1)[first_B]
        return F.cross_entropy(model.decoder.logits(hidden), batch.tokens_BT[:, 2])

    for _ in range(120):
        loss = loss_of_word(32)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        assert loss_of_word(64) < 0.1  # a guess costs log 8 = 2.08 nats


def test_half_of_the_texts_have_holes_and_those_too_short_have_none():
    layout = make_model().layout
    rng = random.Random(0)
    made = [layout.lay_out(TEXT, rng, "k") for _ in range(400)]
    assert 160 < sum(isinstance(document, HoleDocument) for document in made) < 240
    assert {document.key for document in made} == {"k"}
    assert all(len(document) <= 2 * len(TEXT) + 1 for document in made)
    assert not any(isinstance(layout.lay_out([START, END], rng, ""), HoleDocument) for _ in range(20))
    assert not make_model(0.0).layout.hole_share


def test_a_negative_weight_is_refused():
    with pytest.raises(ConfigError, match=r"synchronous -0\.3"):
        make_model(-0.3)
