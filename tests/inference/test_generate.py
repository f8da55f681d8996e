"""Generation: a cache changes nothing, a batch changes nothing, and beam search finds what brute force finds."""

from __future__ import annotations

import itertools

import pytest
import torch
from tiny_models import tiny_model, unequal_prompts

from metalm.data.prompts import Interface
from metalm.errors import ConfigError
from metalm.inference.decoding import Decoding, split_beginning
from metalm.inference.generate import GenerationConfig, generate
from metalm.model import MetaLM
from metalm.segments import Document, Text, load_spans, make_batch

END = 0


@pytest.fixture(scope="module", params=["sinusoidal", "rotary"])
def model(request) -> MetaLM:
    return tiny_model(30, positions=request.param, kv_heads=2)


def greedy_without_cache(model: MetaLM, prompt: Document, length: int) -> list[int]:
    """The obvious reference: the whole document anew for each token."""
    tokens: list[int] = []
    while len(tokens) < length:
        document = load_spans(Document([*prompt.segments, Text(tokens)]), model.processors)
        hidden = model.hidden(make_batch([[document]], model.processors))
        token = int(model.decoder.logits(hidden[0, -1]).argmax())
        if token == END:
            break
        tokens.append(token)
    return tokens


@torch.inference_mode()
def test_greedy_with_cache_in_a_batch_of_unequal_prompts_equals_one_by_one_without(model):
    expected = [greedy_without_cache(model, prompt, 12) for prompt in unequal_prompts(model)]
    assert generate(model, unequal_prompts(model), END, GenerationConfig(12)) == expected
    assert len({tuple(tokens) for tokens in expected}) == 3


@torch.inference_mode()
def test_logits_with_cache_equal_those_without_to_rounding(model):
    continuation = torch.tensor([[4, 9], [17, 2], [8, 8]])
    decoding = Decoding(model, unequal_prompts(model), 1, 3)
    for t, tokens_B in enumerate(continuation.T):
        decoding.step(tokens_B)
        for b, prompt in enumerate(unequal_prompts(model)):
            document = load_spans(Document([*prompt.segments, Text(continuation[b, : t + 1].tolist())]), model.processors)
            hidden = model.hidden(make_batch([[document]], model.processors))
            logits = model.decoder.logits(hidden[0, -1]).float()
            torch.testing.assert_close(decoding.logits_BV[b], logits, rtol=1e-5, atol=1e-5)


def test_sampling_depends_on_the_seed_but_not_on_the_batch(model):
    config = GenerationConfig(10, temperature=1.0, top_p=0.9, seed=7)
    together = generate(model, unequal_prompts(model), END, config)
    alone = [generate(model, [prompt], END, config)[0] for prompt in unequal_prompts(model)]
    assert together == alone
    other = generate(model, unequal_prompts(model), END, GenerationConfig(10, temperature=1.0, top_p=0.9, seed=8))
    assert together != other


def test_sampling_from_a_tiny_nucleus_is_greedy(model):
    config = GenerationConfig(8, temperature=1.0, top_p=1e-6)
    assert generate(model, unequal_prompts(model), END, config) == generate(
        model, unequal_prompts(model), END, GenerationConfig(8)
    )


def score(model: MetaLM, prompt: Document, tokens: list[int]) -> float:
    """The log-probability of a continuation, in one pass."""
    document = load_spans(Document([*prompt.segments, Text(tokens)]), model.processors)
    hidden = model.hidden(make_batch([[document]], model.processors))[0]
    logp = model.decoder.logits(hidden).float().log_softmax(-1)
    start = len(prompt) - 1
    return float(sum(logp[start + i, token] for i, token in enumerate(tokens)))


@torch.inference_mode()
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_a_wide_beam_finds_the_best_of_all_continuations(length_penalty):
    model = tiny_model(5)
    config = GenerationConfig(3, num_beams=64, length_penalty=length_penalty)
    found = generate(model, prompts_small(model), END, config)
    for prompt, tokens in zip(prompts_small(model), found):
        candidates = []
        for length in range(4):
            for text in itertools.product(range(1, 5), repeat=length):
                ends = [[*text, END]] if length < 3 else [list(text)]
                candidates += [(score(model, prompt, t) / len(t) ** length_penalty, list(text)) for t in ends]
        assert tokens == max(candidates)[1]


def prompts_small(model: MetaLM) -> list[Document]:
    interface = Interface(None, model.processors, {"text": model.config.encoders["text"].connector}, 64)
    return [Document([Text([1, 2], target=False)]), Document([interface.read_tokens([3, 4, 1])])]


def test_one_beam_more_or_less_does_not_depend_on_the_batch(model):
    config = GenerationConfig(10, num_beams=3)
    together = generate(model, unequal_prompts(model), END, config)
    assert together == [generate(model, [prompt], END, config)[0] for prompt in unequal_prompts(model)]


def test_settings_that_cannot_work_are_refused(model):
    with pytest.raises(ConfigError, match="beam search does not sample"):
        GenerationConfig(num_beams=2, temperature=1.0)
    with pytest.raises(ConfigError, match="empty prompt"):
        generate(model, [Document([])], END)


@torch.inference_mode()
def test_rows_that_have_ended_leave_the_batch_and_change_nothing(model):
    """A token that the rows write at different times ends them."""
    texts = generate(model, unequal_prompts(model), -1, GenerationConfig(20))
    for end in {token for text in texts for token in text}:
        for config in (GenerationConfig(20), GenerationConfig(20, temperature=1.0, seed=3)):
            together = generate(model, unequal_prompts(model) * 2, end, config)
            assert together == [generate(model, [prompt], end, config)[0] for prompt in unequal_prompts(model)] * 2


@torch.inference_mode()
def test_in_bfloat16_a_cache_in_float32_gives_what_none_gives(model):
    """Packed weights and a float32 cache: logits to bfloat16's rounding."""
    rounded = tiny_model(30, positions=model.config.decoder.positions, kv_heads=2).bfloat16()
    rounded.decoder.prepare_for_inference()
    decoding = Decoding(rounded, unequal_prompts(rounded), 1, 3)
    for t in range(3):
        decoding.step(torch.tensor([4, 17, 8]))
        assert decoding.cache.keys[0].dtype == torch.float32
        for b, prompt in enumerate(unequal_prompts(model)):
            document = load_spans(Document([*prompt.segments, Text([[4, 17, 8][b]] * (t + 1))]), model.processors)
            logits = model.decoder.logits(model.hidden(make_batch([[document]], model.processors))[0, -1])
            assert (decoding.logits_BV[b] - logits).abs().mean() < 0.05 * logits.abs().mean()


def alike_prompts(model: MetaLM, begin: int) -> list[Document]:
    """Unequal prompts after the same beginning: text, a span, text of `begin` tokens."""
    interface = Interface(None, model.processors, {"text": model.config.encoders["text"].connector}, 64)
    same = [Text([1, 2]), interface.read_tokens([3, 4, 5]), Text([6 + n % 9 for n in range(begin)], target=False)]
    rests = [[Text([7])], [interface.read_tokens([8, 9]), Text([10, 11])], [Text([7, 12, 13], target=False)]]
    return [Document([*same, *rest]) for rest in rests]


DECODERS = {
    "sinusoidal": {"positions": "sinusoidal"},
    "learned": {"positions": "learned", "max_positions": 64},
    "rotary": {"positions": "rotary", "kv_heads": 2},
    "windows": {"positions": "rotary", "window": [9, 0], "local_rotary_base": 100.0},
}


@torch.inference_mode()
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("decoder", list(DECODERS))
def test_what_prompts_begin_with_is_read_once_and_changes_nothing(decoder, beams):
    model = tiny_model(30, **DECODERS[decoder])
    prompts = alike_prompts(model, 35)
    shared, rests = split_beginning(prompts)
    assert len(shared) == 40
    assert list(map(len, rests)) == [1, 4, 3]
    config = GenerationConfig(10, num_beams=beams)
    assert generate(model, prompts, END, config) == [generate(model, [prompt], END, config)[0] for prompt in prompts]
    decoding = Decoding(model, prompts, 1, 4)
    for token in (3, 8):
        for b, prompt in enumerate(prompts):
            alone = Decoding(model, [prompt], 1, 4)
            if token == 8:
                alone.step(torch.tensor([3]))
            torch.testing.assert_close(decoding.logits_BV[b], alone.logits_BV[0], rtol=1e-5, atol=1e-5)
        decoding.step(torch.tensor([3, 3, 3]))


def test_a_beginning_ends_with_what_is_no_longer_alike(model):
    def positions(prompts):
        shared, rests = split_beginning(prompts)
        assert [len(shared) + len(rest) for rest in rests] == list(map(len, prompts))
        assert all(map(len, rests))
        return len(shared)

    few, many = alike_prompts(model, 3), alike_prompts(model, 80)
    assert positions(few) == 0  # it does not repay a pass
    assert positions(many) == 85
    assert positions(many[:1]) == 0
    assert positions([many[0], many[0]]) == 85  # each keeps a position
    longer = Document([*many[0].segments[:2], Text([*many[0].segments[2].tokens, 7, 7])])
    assert positions([many[0], longer]) == 85
    other = alike_prompts(model, 80)[0]  # its span is another object: what is in it is not compared
    assert positions([many[0], other]) == 0
    texts = [Document([Text([5] * 40 + [n, 5, 5])]) for n in range(3)]
    assert positions(texts) == 40
