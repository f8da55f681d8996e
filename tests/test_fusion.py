"""Fusion: spans side by side read each other, and nothing of what is yet to be predicted."""

from __future__ import annotations

import pytest
import torch

from metalm.config import build
from metalm.data.prompts import Interface
from metalm.data.tokenizer import Tokenizer
from metalm.errors import ConfigError
from metalm.fusion import number_runs
from metalm.model import MetaLM, MetaLMConfig
from metalm.objectives.mim import MIMConfig
from metalm.pretrained import load_weights
from metalm.segments import IGNORE, Batch, Document, Span, Text, make_batch

SIZE = {"layers": 1, "width": 16, "heads": 2, "vocab_size": 40}
TEXT = {"type": "text", **SIZE, "connector": {"type": "linear"}}
VALUES = {"decoder": SIZE, "encoders": {"a": TEXT, "b": TEXT}, "fusion": {"layers": 2, "heads": 2}}


@pytest.fixture(scope="module")
def model() -> MetaLM:
    torch.manual_seed(0)
    model = MetaLM(build(MetaLMConfig, VALUES, "test")).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def span(name: str, tokens: list[int], first_target: int = IGNORE) -> Span:
    return Span(name, {"tokens": tokens}, len(tokens), first_target)


def embedded(model: MetaLM, *documents: Document) -> torch.Tensor:
    with torch.no_grad():
        return model.embed(make_batch([list(documents)], model.processors))[0]


def test_runs_end_at_targets_documents_and_branches():
    docked = torch.tensor([[1, 1, 1, 0, 1, 1, 1, 1, 1, 0]]).bool()
    predicts = torch.tensor([[0, 1, 0, 0, 0, 0, 0, 0, 0, 0]]).bool()
    document = torch.tensor([[1, 1, 1, 1, 1, 2, 2, 2, 2, 0]])
    branch = torch.tensor([[0, 0, 0, 0, 0, 0, 0, 1, 2, 0]])
    assert number_runs(docked, predicts, document, branch).tolist() == [[1, 1, 2, 0, 3, 4, 4, 5, 6, 0]]


def test_spans_side_by_side_read_each_other(model):
    one, other = (Document([span("a", [1, 2]), span("b", tokens), Text([9])]) for tokens in ([3, 4], [5, 4]))
    assert not torch.allclose(embedded(model, one)[:2], embedded(model, other)[:2])


@pytest.mark.parametrize(
    "between, first_target",
    [([], 3), ([Text([7])], IGNORE), ([Text([7], target=False)], IGNORE)],
)
def test_what_comes_after_a_prediction_is_not_seen_before_it(model, between, first_target):
    documents = [Document([span("a", [1, 2]), *between, span("b", [n, 4], first_target), Text([9])]) for n in (3, 5)]
    start = 2 + len(between)
    before, after = (embedded(model, document) for document in documents)
    assert torch.equal(before[:start], after[:start]) and not torch.equal(before[start:], after[start:])


def test_the_mutation_of_the_rule_leaks(model, monkeypatch):
    """The test above finds what it should: with runs that go on after targets the first span sees the second."""
    import metalm.fusion

    def lax(docked_BT, predicts_BT, document_BT, branch_BT):
        return number_runs(docked_BT, torch.zeros_like(predicts_BT), document_BT, branch_BT)

    monkeypatch.setattr(metalm.fusion, "number_runs", lax)
    before, after = (embedded(model, Document([span("a", [1, 2]), span("b", [n, 4], n), Text([9])])) for n in (3, 5))
    assert not torch.equal(before[:2], after[:2])


def test_documents_in_company_are_as_alone(model):
    documents = [
        Document([span("a", [1, 2, 3]), span("b", [4]), Text([9, 8])]),
        Document([Text([5, 6])]),
        Document([span("b", [4, 4, 4, 4]), Text([9]), span("a", [1], 1), Text([2])]),
        Document([span("a", [1]), span("b", [2]), span("a", [3]), Text([4])]),
    ]
    with torch.no_grad():
        alone = sum(model(make_batch([[document]], model.processors)) for document in documents)
        for rows in ([documents], [documents[:1], documents[1:]], [documents[2:], documents[:2]]):
            torch.testing.assert_close(model(make_batch(rows, model.processors)), alone)


def test_questions_of_a_picture_are_documents_of_their_own(model):
    """A question's span changes the picture beside it, so there is nothing to branch off from."""
    connectors = {name: encoder.connector for name, encoder in model.config.encoders.items()}
    for fusion in (True, False):
        interface = Interface(None, model.processors, connectors, 64, fusion=fusion)
        turns = [[span("a", [1, 2]), span("b", [n]), Text([9])] for n in (3, 4)]
        found = list(interface.documents(turns, "key"))
        assert len(found) == (2 if fusion else 1)
        plain = [[span("a", [1, 2]), Text([n, 9])] for n in (3, 4)]  # which no span follows
        assert len(list(interface.documents(plain, "key"))) == 1


def test_a_trained_model_can_be_given_one(tmp_path):
    torch.manual_seed(0)
    plain = MetaLM(build(MetaLMConfig, VALUES | {"fusion": None}, "test"))
    plain.tokenizer = Tokenizer.train(["a"], 300)
    plain.save_pretrained(tmp_path)
    fused = MetaLM(build(MetaLMConfig, VALUES, "test"))
    load_weights(fused, tmp_path)
    batch = make_batch([[Document([span("a", [1, 2]), span("b", [3, 4]), Text([9])])]], fused.processors)
    torch.testing.assert_close(fused(batch), plain(batch))


def test_at_the_start_it_adds_nothing_and_then_learns():
    torch.manual_seed(0)
    fused = MetaLM(build(MetaLMConfig, VALUES, "test"))
    plain = MetaLM(build(MetaLMConfig, VALUES | {"fusion": None}, "test"))
    assert plain.load_state_dict(fused.state_dict(), strict=False).missing_keys == []
    batch = make_batch([[Document([span("a", [1, 2]), span("b", [3, 4]), Text([9])])]], fused.processors)
    loss = fused(batch)
    torch.testing.assert_close(loss, plain(batch))
    loss.backward()
    assert fused.fusion.transformer.norm.weight.grad.abs().sum() > 0


def test_a_batch_without_spans_takes_part(model):
    batch: Batch = make_batch([[Document([Text([5, 6, 7])])]], model.processors)
    model.zero_grad()
    model(batch).backward()
    assert all(parameter.grad is not None for parameter in model.fusion.parameters())
    assert torch.equal(embedded(model, Document([Text([5, 6, 7])])), model.decoder.embed(torch.tensor([[5, 6, 7]]))[0].detach())


def test_fusion_needs_encoders():
    with pytest.raises(ConfigError, match="there are no encoders"):
        build(MetaLMConfig, VALUES | {"encoders": {}}, "test")
    with pytest.raises(ConfigError, match="there are no encoders"):
        build(MIMConfig, {"decoder": SIZE, "fusion": {}}, "test")
    with pytest.raises(ConfigError, match="not divisible"):
        MetaLM(build(MetaLMConfig, VALUES | {"fusion": {"heads": 3}}, "test"))
