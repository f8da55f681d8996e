"""The pseudo-masked model against a dense pass with a mask written out by hand, and who sees whom by gradients.

Everything is exact, in float64. `dense_states` knows nothing of the module's split, mask, bias or batch.
"""

from __future__ import annotations

import inspect
import math
import pickle
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from metalm.config import build
from metalm.encoders.text import TextEncoder
from metalm.errors import ConfigError
from metalm.nn import pseudo_masked
from metalm.nn.attention import Mask
from metalm.nn.positions import rotary_tables
from metalm.objectives.pmlm import (
    PMLM,
    REPLACEMENTS,
    PMLMBatch,
    PMLMConfig,
    PMLMDocument,
    lay_out,
    make_pmlm_batch,
    sample_blocks,
)

VOCABULARY, MASK, PSEUDO = 50, 48, 49
STACKS = {
    "learned, bias": {},
    "learned": {"relative_bias": False},
    "sinusoidal, bias": {"positions": "sinusoidal"},
    "rotary": {"positions": "rotary", "relative_bias": False},
    "rotary, bias, grouped": {"positions": "rotary", "kv_heads": 1, "norm": "rms", "mlp": "swiglu"},
}


def make_config(encoder: dict | None = None, **changes) -> PMLMConfig:
    shape = {"type": "text", "layers": 2, "width": 16, "heads": 2, "max_positions": 64, "vocab_size": VOCABULARY}
    values = {"encoder": shape | (encoder or {}), "mask_token": MASK, "pseudo_token": PSEUDO}
    return build(PMLMConfig, values | changes, "test")


def make_model(config: PMLMConfig) -> PMLM:
    torch.manual_seed(0)
    model = PMLM(config).double().eval()
    for parameter in model.parameters():  # zeros (biases, relative bias) would hide paths
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module", params=STACKS)
def model(request) -> PMLM:
    return make_model(make_config(STACKS[request.param]))


@pytest.fixture(scope="module")
def plain() -> PMLM:
    return make_model(make_config())


def make_document(length: int, seed: int = 0, **changes) -> PMLMDocument:
    rng = random.Random(seed)
    changes = {"ratio": 0.3} | changes
    return lay_out([rng.randrange(MASK) for _ in range(length)], make_config(**changes), rng)


# What the module is held against.


@dataclass(frozen=True)
class Slot:
    """A column behind the base."""

    kind: str
    step: int
    position: int
    token: int


def slots_of(document: PMLMDocument) -> list[Slot]:
    masked = list(zip(document.steps, document.places, document.originals))
    return [
        *(Slot("original", step, place, token) for step, place, token in masked),
        *(Slot("pseudo", step, place, PSEUDO) for step, place, _ in masked),
    ]


def visible(query: Slot | None, key: Slot | None) -> bool:
    """The paper's figure 2; None is a column of the base."""
    if key is None:
        return True
    if query is None:
        return False
    if key.kind == "original":
        return key.step < query.step or (query.kind == "original" and key.step == query.step)
    return query.kind == "pseudo" and key.step == query.step


def dense_states(model: PMLM, document: PMLMDocument, slots: list[Slot]) -> Tensor:
    """States [N, D] of a base and the slots behind it, in one sequence."""
    encoder, n = model.encoder, len(document)
    columns = [None] * n + slots
    position_1N = torch.tensor([[*range(n), *(slot.position for slot in slots)]])
    allowed = torch.tensor([[visible(query, key) for key in columns] for query in columns])
    mask = Mask(lambda b, h, q, k: allowed[q, k], 1, len(columns), len(columns), torch.device("cpu"))
    stack, rotary, bias = encoder.transformer, None, None
    x_1ND = encoder.embedding(torch.tensor([[*document.tokens, *(slot.token for slot in slots)]]))
    if stack.positions is not None:
        x_1ND = x_1ND + stack.positions(position_1N)
    if stack.config.positions == "rotary":
        rotary = rotary_tables(position_1N, stack.config.width // stack.config.heads)
    if stack.relative_bias is not None:
        distance = position_1N.T.new_tensor([[k - q for k in position_1N[0].tolist()] for q in position_1N[0].tolist()])
        bias = stack.relative_bias.weight[stack.relative_bias.bucket(distance)].permute(2, 0, 1)[None]
    for block in stack.blocks:
        x_1ND = block(x_1ND, mask, rotary, bias)
    return stack.norm(x_1ND)[0]


@torch.no_grad()
def parts_of(model: PMLM, batch: PMLMBatch) -> dict[str, tuple[Tensor, int]]:
    model(batch)
    return model.parts


def targets_states(model: PMLM, batch: PMLMBatch) -> tuple[Tensor, Tensor]:
    """States [L, D] at the [M] and at the [P] of the targets."""
    base_BTD, pseudo_BKD = model.hidden(batch)
    return base_BTD.flatten(0, 1)[batch.places_L], pseudo_BKD.flatten(0, 1)[batch.slots_L]


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


# Blocks.


def test_blocks_are_disjoint_and_hold_the_ratio():
    for seed in range(300):
        rng = random.Random(seed)
        length = rng.randint(20, 600)
        blocks = sample_blocks(length, make_config(), rng)
        places = [place for block in blocks for place in block]
        assert all(1 <= len(block) <= 6 for block in blocks)
        assert all(b == a + 1 for block in blocks for a, b in pairwise(block))
        assert len(set(places)) == len(places)
        assert 0 < min(places) <= max(places) < length - 1
        assert 0.15 * length <= len(places) <= math.ceil(0.15 * length) + 5


def test_blocks_are_in_the_order_of_drawing():
    blocks = sample_blocks(512, make_config(), random.Random(0))
    firsts = [block[0] for block in blocks]
    assert firsts != sorted(firsts)
    assert {len(block) for block in blocks} == {1, 2, 3, 4, 5, 6}


def test_block_lengths_are_the_papers():
    """0.6 single tokens, else uniform in 2..6; chi-square with 5 degrees of freedom, at 0.1 %."""
    config, rng, draws = make_config(ratio=1e-6), random.Random(0), 5000
    lengths = Counter(len(sample_blocks(100_000, config, rng)[0]) for _ in range(draws))
    expected = {1: 0.6 * draws} | dict.fromkeys(range(2, 7), 0.08 * draws)
    assert set(lengths) == set(expected)
    assert sum((lengths[n] - expected[n]) ** 2 / expected[n] for n in expected) < 20.5


def test_places_are_uniform():
    """All but the ends, which the guards make a little rarer; chi-square with 9 degrees of freedom, at 0.1 %."""
    config, rng = make_config(span_probability=0.0), random.Random(0)
    counts = Counter((block[0] - 1) // 20 for _ in range(400) for block in sample_blocks(202, config, rng))
    expected = sum(counts.values()) / 10
    assert sum((counts[n] - expected) ** 2 / expected for n in range(10)) < 27.9


@pytest.mark.parametrize("length", range(7))
def test_a_short_text_has_one_block_if_it_can(length):
    for seed in range(20):
        blocks = sample_blocks(length, make_config(span_probability=0.9), random.Random(seed))
        assert len(blocks) == (length > 2)
        assert all(0 < place < length - 1 for block in blocks for place in block)


def test_a_high_ratio_ends():
    blocks = sample_blocks(50, make_config(ratio=0.99), random.Random(0))
    assert sorted(place for block in blocks for place in block) == list(range(1, 49))


def test_token_order_is_left_to_right():
    """The autoregressive row of the paper's ablation masks the same tokens."""
    blocks = sample_blocks(100, make_config(), random.Random(3))
    tokens = sample_blocks(100, make_config(order="token"), random.Random(3))
    assert tokens == [[place] for place in sorted(place for block in blocks for place in block)]


# Layout.


def test_the_layout_masks_the_blocks():
    tokens = list(range(40))
    blocks = sample_blocks(40, make_config(), random.Random(5))
    document = lay_out(tokens, make_config(), random.Random(5))
    places = [place for block in blocks for place in block]
    assert document.tokens == [MASK if n in places else n for n in tokens]
    assert document.places == document.originals == places
    assert document.steps == [step for step, block in enumerate(blocks, start=1) for _ in block]
    assert document.replacements == [0] * len(places)
    assert tokens == list(range(40))


def test_replacements_have_their_shares():
    config, rng = make_config(replacement=[0.8, 0.1, 0.1]), random.Random(0)
    counts, randoms = Counter(), Counter()
    for _ in range(200):
        tokens = [7] * 200
        document = lay_out(tokens, config, rng)
        assert document.originals == [7] * len(document.places)
        for place, replacement in zip(document.places, document.replacements):
            counts[REPLACEMENTS[replacement]] += 1
            if REPLACEMENTS[replacement] == "random":
                randoms[document.tokens[place]] += 1
            else:
                assert document.tokens[place] == {"mask": MASK, "kept": 7}[REPLACEMENTS[replacement]]
        tokens = [token for place, token in enumerate(document.tokens) if place not in document.places]
        assert set(tokens) == {7}
    total = sum(counts.values())
    for name, share in zip(REPLACEMENTS, config.replacement):
        assert abs(counts[name] / total - share) < 4 * (share * (1 - share) / total) ** 0.5, name
    assert len(randoms) == VOCABULARY


def test_the_batch_of_two_documents():
    first = PMLMDocument([1, MASK, 5, 2], [1], [7], [1], [0], "first")
    second = PMLMDocument([1, 9, MASK, MASK, 2], [3, 2], [4, 6], [1, 2], [0, 2], "second")
    batch = make_pmlm_batch([[first, second], [first]], 10)
    assert batch.tokens_BT.tolist() == [[1, MASK, 5, 2, 1, 9, MASK, MASK, 2, 0], [1, MASK, 5, 2, 0, 0, 0, 0, 0, 0]]
    assert batch.document_BT[0].tolist() == [1] * 4 + [2] * 5 + [0]
    assert batch.position_BT[0].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 0]
    assert batch.places_L.tolist() == [1, 7, 6, 11]
    assert batch.targets_L.tolist() == [7, 4, 6, 7]
    assert batch.slots_L.tolist() == [0, 1, 2, 16]
    assert batch.replacement_L.tolist() == [0, 0, 2, 0]
    assert batch.original_BK.tolist() == [[7, 4, 6] + [0] * 13, [7] + [0] * 15]
    assert batch.position_BK.tolist() == [[1, 3, 2] + [0] * 13, [1] + [0] * 15]
    assert batch.document_BK.tolist() == [[1, 2, 2] + [0] * 13, [1] + [0] * 15]
    assert batch.step_BK.tolist() == [[1, 1, 2] + [0] * 13, [1] + [0] * 15]
    assert batch.keys == ["first", "second", "first"]
    assert (batch.num_targets, batch.num_positions) == (4, 13)
    with pytest.raises(ValueError, match="row 0: 9 positions do not fit 8"):
        make_pmlm_batch([[first, second]], 8)


def test_the_number_of_slots_is_a_multiple_of_sixteen():
    documents = [make_document(60, seed, ratio=0.5) for seed in range(2)]
    assert make_pmlm_batch([documents], 120).step_BK.shape == (1, 64)
    assert make_pmlm_batch([documents[:1]], 60).step_BK.shape == (1, 32)
    assert make_pmlm_batch([[]], 8).step_BK.shape == (1, 16)


def test_a_batch_travels():
    """To another process and another device, with every tensor."""
    document = pickle.loads(pickle.dumps(make_document(20)))
    batch = pickle.loads(pickle.dumps(make_pmlm_batch([[document]], 20))).to("meta")
    assert isinstance(batch, PMLMBatch)
    tensors = [value for field in fields(batch) if isinstance(value := getattr(batch, field.name), Tensor)]
    assert len(tensors) == 12
    assert all(tensor.is_meta for tensor in tensors)


def test_the_models_layout(plain):
    layout = pickle.loads(pickle.dumps(plain.layout))
    assert (layout.room(30), layout.room(1000)) == (30, 64)
    document = layout.lay_out(list(range(30)), random.Random(0), "key")
    assert document == replace(lay_out(list(range(30)), plain.config, random.Random(0)), key="key")
    assert len(document) == 30
    assert layout.collate([[document]], 32).keys == ["key"]


# States and losses.


def test_the_base_is_a_plain_pass(model):
    batch = make_pmlm_batch([[make_document(20), make_document(11, 1)], [make_document(30, 2)]], 40)
    base_BTD, _ = model.hidden(batch)
    close(base_BTD, model.encoder(batch.tokens_BT, batch.document_BT, batch.position_BT))


def test_the_split_pass_is_the_dense_pass(model):
    for seed in range(3):
        document = make_document(25, seed)
        at_mask, at_pseudo = targets_states(model, make_pmlm_batch([[document]], 25))
        states = dense_states(model, document, slots_of(document))
        close(at_mask, states[document.places])
        close(at_pseudo, states[-len(document.places) :])


def test_one_pass_is_a_pass_for_every_block(model):
    """Step i reads the base, the originals of the steps before, and its own pseudo masks."""
    document = make_document(25, 4)
    _, at_pseudo = targets_states(model, make_pmlm_batch([[document]], 25))
    assert max(document.steps) >= 3
    for step in set(document.steps):
        slots = [s for s in slots_of(document) if (s.step < step if s.kind == "original" else s.step == step)]
        own = [n for n, other in enumerate(document.steps) if other == step]
        close(at_pseudo[own], dense_states(model, document, slots)[-len(own) :])


def test_packed_and_padded_documents_are_each_alone(model):
    documents = [make_document(length, length) for length in (20, 9, 30, 3, 13)]
    rows = [documents[:2], documents[2:4], documents[4:], []]
    alone = [targets_states(model, make_pmlm_batch([[document]], len(document))) for document in documents]
    for length in (33, 64):  # the second row is full, or none
        packed = targets_states(model, make_pmlm_batch(rows, length))
        for together, each in zip(packed, zip(*alone)):
            close(together, torch.cat(each))


def test_padding_slots_do_nothing(plain):
    batch = make_pmlm_batch([[make_document(30)], [make_document(8, 1)], []], 30)
    assert (batch.step_BK == 0).any(dim=1).all()
    changed = replace(
        batch,
        original_BK=torch.where(batch.step_BK == 0, 33, batch.original_BK),
        position_BK=torch.where(batch.step_BK == 0, 5, batch.position_BK),
    )
    states, others = plain.hidden(batch), plain.hidden(changed)
    assert all(x.isfinite().all() for x in (*states, *others))
    for mine, theirs in zip(targets_states(plain, batch), targets_states(plain, changed)):
        assert torch.equal(mine, theirs)
    gradients = torch.autograd.grad(plain(changed), list(plain.parameters()))
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_the_order_of_the_slots_changes_nothing(model):
    batch = make_pmlm_batch([[make_document(20), make_document(11, 1)]], 31)
    K = batch.step_BK.shape[1]
    order = torch.randperm(K, generator=torch.Generator().manual_seed(0))
    permuted = replace(
        batch,
        original_BK=batch.original_BK[:, order],
        position_BK=batch.position_BK[:, order],
        document_BK=batch.document_BK[:, order],
        step_BK=batch.step_BK[:, order],
        slots_L=order.argsort()[batch.slots_L],
    )
    for mine, theirs in zip(targets_states(model, batch), targets_states(model, permuted)):
        close(mine, theirs)


def test_the_loss_is_both_cross_entropies_over_the_masked_tokens(model):
    documents = [make_document(20, replacement=[0.4, 0.3, 0.3]), make_document(26, 1, replacement=[0.4, 0.3, 0.3])]
    batch = make_pmlm_batch([documents], 50)
    ae, par = [], []
    for document in documents:
        logits = dense_states(model, document, slots_of(document)) @ model.encoder.embedding.weight.T
        targets = torch.tensor(document.originals)
        k = len(targets)
        ae.append(torch.nn.functional.cross_entropy(logits[document.places], targets, reduction="none"))
        par.append(torch.nn.functional.cross_entropy(logits[-k:], targets, reduction="none"))
    ae, par = torch.cat(ae), torch.cat(par)
    replacements = torch.tensor([n for document in documents for n in document.replacements])

    policy = make_model(replace(model.config, replacement=[0.4, 0.3, 0.3]))
    policy.load_state_dict(model.state_dict())
    close(policy(batch), ae.sum() + par.sum())
    expected = {"ae": (ae.sum(), len(ae)), "par": (par.sum(), len(par))}
    for n, name in enumerate(REPLACEMENTS):
        of = replacements == n
        assert of.any()
        expected[f"par/{name}"] = par[of].sum(), int(of.sum())
    parts = parts_of(policy, batch)
    assert parts.keys() == expected.keys() == policy.parts.keys()
    for name, (total, count) in expected.items():
        close(parts[name][0], total)
        assert not parts[name][0].requires_grad
        assert parts[name][1] == count


@pytest.mark.parametrize(
    ("switches", "names"),
    [({}, {"ae", "par", "par/mask"}), ({"par": False}, {"ae"}), ({"ae": False}, {"par", "par/mask"})],
)
def test_either_loss_can_be_left_out(switches, names):
    full, model = make_model(make_config()), make_model(make_config(**switches))
    batch = make_pmlm_batch([[make_document(20), make_document(11, 1)]], 31)
    parts, loss = parts_of(full, batch), model(batch)
    assert model.parts.keys() == names
    close(loss.detach(), sum(parts[name][0] for name in names & {"ae", "par"}))
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_activation_checkpointing_changes_nothing():
    batch = make_pmlm_batch([[make_document(20), make_document(11, 1)]], 31)
    gradients = []
    for checkpointing in (False, True):
        model = make_model(make_config({"activation_checkpointing": checkpointing})).train()
        gradients.append(torch.autograd.grad(model(batch), list(model.parameters())))
    for mine, theirs in zip(*gradients):
        assert torch.equal(mine, theirs)


def test_the_encoder_is_a_text_encoder(plain):
    encoder = TextEncoder(make_config().encoder).double()
    encoder.load_state_dict({name.removeprefix("encoder."): value for name, value in plain.state_dict().items()})
    batch = make_pmlm_batch([[make_document(20)]], 20)
    close(encoder(batch.tokens_BT, batch.document_BT, batch.position_BT), plain.hidden(batch)[0])


def test_it_learns():
    """Alternating tokens: both losses fall far below guessing."""
    torch.manual_seed(0)
    config = make_config({"width": 32})
    model, rng = PMLM(config), random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(120):
        texts = [[0, *(5 + (n + shift) % 4 for n in range(18)), 1] for shift in rng.choices(range(4), k=16)]
        batch = make_pmlm_batch([[lay_out(tokens, config, rng)] for tokens in texts], 20)
        (model(batch) / batch.num_targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name in ("ae", "par"):
        total, count = parts_of(model, batch)[name]
        assert total / count < 0.5 * math.log(4), name


# Leaks.


def leaks(model: PMLM, documents: list[PMLMDocument]) -> list[str]:
    """Gradients of states with respect to input vectors that should be zero and are not, or should not be and are.

    All documents lie in one row. The states are those of all base columns together and of each pseudo mask.
    """
    batch = make_pmlm_batch([documents], sum(map(len, documents)))
    seen: list[Tensor] = []
    hook = model.encoder.embedding.register_forward_hook(lambda module, arguments, out: seen.append(out))
    base_BTD, pseudo_BKD = model.hidden(batch)
    hook.remove()
    T, K = batch.tokens_BT.shape[1], batch.step_BK.shape[1]
    slots = [(d, slot) for d, document in enumerate(documents) for slot in slots_of(document)]
    originals = [(d, slot) for d, slot in slots if slot.kind == "original"]
    pseudos = [(d, slot) for d, slot in slots if slot.kind == "pseudo"]
    owners = [d for d, document in enumerate(documents) for _ in range(len(document))]
    columns: list[tuple[int, int, Slot | None]] = [(n, d, None) for n, d in enumerate(owners)]
    columns += [(T + n, d, slot) for n, (d, slot) in enumerate(originals)]
    columns += [(T + K + n, d, slot) for n, (d, slot) in enumerate(pseudos)]
    queries: list[tuple[Tensor, int, Slot | None]] = [
        (base_BTD[0, [n for n, owner in enumerate(owners) if owner == d]], d, None) for d in range(len(documents))
    ]
    queries += [(pseudo_BKD[0, n], d, slot) for n, (d, slot) in enumerate(pseudos)]
    found = []
    for states, document, query in queries:
        weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(0), dtype=states.dtype)
        (gradient,) = torch.autograd.grad((states * weights).sum(), seen, retain_graph=True)
        reached_N = (gradient[0] != 0).any(dim=-1).tolist()
        for column, owner, key in columns:
            if reached_N[column] != (owner == document and visible(query, key)):
                found.append(f"{query} of {document}, {key} in column {column} of {owner}: {reached_N[column]}")
        found += [f"{query} reaches padding {n}" for n in padding(columns, T + 2 * K) if reached_N[n]]
    return found


def padding(columns: Iterable[tuple], length: int) -> list[int]:
    used = {column for column, *_ in columns}
    return [n for n in range(length) if n not in used]


DOCUMENTS = [(18, 0), (12, 5)]


def test_every_state_sees_what_it_should_and_nothing_else(model):
    documents = [make_document(*one) for one in DOCUMENTS]
    assert all(max(Counter(document.steps).values()) > 1 and max(document.steps) > 1 for document in documents)
    assert leaks(model, documents) == []


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("(query_kind == PSEUDO) & (key_step < query_step)", "(query_kind == PSEUDO) & (key_step <= query_step)"),
        ("(query_kind == ORIGINAL) & (key_step <= query_step)", "(query_kind == ORIGINAL) & (key_step >= 0)"),
        ("(query_kind == PSEUDO) & (key_step < query_step)", "(query_kind == PSEUDO) & (key_step < 0)"),
        ("(query_kind == PSEUDO) & (key_step == query_step)", "(query_kind == PSEUDO) & (key_step <= query_step)"),
    ],
)
def test_the_check_sees_a_wrong_rule(plain, monkeypatch, right, wrong):
    source = inspect.getsource(pseudo_masked.sees)
    assert source.count(right) == 1
    names = dict(vars(pseudo_masked))
    exec(source.replace(right, wrong), names)
    monkeypatch.setattr(pseudo_masked, "sees", names["sees"])
    assert leaks(plain, [make_document(*one) for one in DOCUMENTS])


def test_the_check_sees_documents_that_see_each_other(plain, monkeypatch):
    monkeypatch.setattr(pseudo_masked, "same_document", lambda document_BN: lambda b, h, q, k: document_BN[b, k] >= 0)
    assert leaks(plain, [make_document(*one) for one in DOCUMENTS])


def test_a_kept_token_is_seen_by_its_own_pseudo_mask(plain):
    """The paper's policy leaks: this is why the log tells PAR's loss apart by what stands in the slot."""
    document = make_document(18, replacement=[0.0, 0.0, 1.0])
    assert document.tokens[document.places[0]] == document.originals[0]
    other = replace(document, tokens=[3 if n == document.places[0] else t for n, t in enumerate(document.tokens)])
    kept, changed = (targets_states(plain, make_pmlm_batch([[d]], 18))[1][0] for d in (document, other))
    assert not torch.allclose(kept, changed)


# Settings.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratio": 0.0}, "ratio 0.0"),
        ({"ratio": 1.0}, "ratio 1.0"),
        ({"span_probability": 1.0}, "span_probability 1.0"),
        ({"span_probability": -0.1}, "span_probability -0.1"),
        ({"max_block": 1}, "max_block is 1"),
        ({"replacement": [0.8, 0.1]}, "replacement"),
        ({"replacement": [0.8, 0.1, 0.2]}, "replacement"),
        ({"replacement": [1.1, -0.1, 0.0]}, "replacement"),
        ({"ae": False, "par": False}, "ae and par"),
        ({"order": "blocks"}, "order cannot be 'blocks'"),
        ({"encoder": {"type": "fused"}}, "encoder.type is 'fused'"),
        ({"encoder": {"trainable": 1}}, "encoder.trainable"),
        ({"encoder": {"connector": {"type": "linear"}}}, "encoder.connector"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        make_config(change.pop("encoder", None), **change)


def test_the_vocabulary_is_the_tokenizers():
    config = make_config({"vocab_size": 0})
    config.set_vocab_size(77)
    assert config.encoder.vocab_size == 77
    with pytest.raises(ConfigError, match=r"encoder\.vocab_size is 77, but the tokenizer has 78 tokens"):
        config.set_vocab_size(78)


@pytest.mark.parametrize("name", ["mask_token", "pseudo_token"])
def test_special_tokens_must_be_tokens(name):
    with pytest.raises(ConfigError, match=f"{name} is -1"):
        PMLM(make_config(**{name: -1}))


def test_rows_have_room_for_a_masked_token():
    make_config().check_row_length(3)
    with pytest.raises(ConfigError, match=r"data\.row_length 2 has no room"):
        make_config().check_row_length(2)
