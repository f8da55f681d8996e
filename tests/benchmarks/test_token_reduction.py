"""The benchmarks of token reduction: what they compare is alike but for the setting, and scores are what they say."""

from __future__ import annotations

import math

import torch

from benchmarks import token_reduction, token_reduction_accuracy
from metalm.config import build
from metalm.data.tokenizer import Tokenizer
from metalm.model import MetaLM, MetaLMConfig


def test_ratios_are_to_the_first_setting():
    work = torch.randn(400, 400)
    steps = {0: lambda: [work @ work for _ in range(8)], 4: lambda: [work @ work for _ in range(2)]}
    measured = token_reduction.rates(steps, 10, rounds=3)
    assert measured[0]["ratio"] == measured[0]["cpu_ratio"] == 1
    assert measured[4]["cpu_ratio"] > 1.5 and measured[4]["rate"] > 0


def test_settings_differ_in_merging_alone():
    tokenizer = Tokenizer.train(["question: what color is the circle? answer: red"], 300)
    torch.manual_seed(0)
    plain = token_reduction_accuracy.make_reader(0, tokenizer)
    torch.manual_seed(0)
    merging = token_reduction_accuracy.make_reader(6, tokenizer)
    assert [m.processors["image"].row_states for m in (plain, merging)] == [36, 36 - 3 * 6]
    other = dict(merging.named_parameters())
    assert all(torch.equal(parameter, other.pop(name)) for name, parameter in plain.named_parameters()) and not other
    one, again = (list(token_reduction_accuracy.scenes("train 0", range(3, 5))) for _ in range(2))
    assert one == again and [sample.key for sample in one] == ["train 0-000003", "train 0-000004"]


def test_a_model_that_knows_nothing_is_as_perplexed_as_its_vocabulary_is_large():
    decoder = {"layers": 1, "width": 8, "heads": 2, "positions": "rotary", "vocab_size": 50}
    model = MetaLM(build(MetaLMConfig, {"decoder": decoder}, "test"))
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    assert math.isclose(token_reduction_accuracy.perplexity(model, torch.arange(600) % 50), 50, rel_tol=1e-4)
