"""Speculative decoding: whatever the draft says, the model's own greedy text comes out."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model, unequal_prompts

from metalm.config import build
from metalm.errors import ConfigError
from metalm.inference.generate import GenerationConfig, generate
from metalm.inference.speculative import Speculation, first_layers, speculate
from metalm.model import MetaLM, MetaLMConfig
from metalm.segments import Document, Span, Text

VOCABULARY, END = 30, 0


@pytest.fixture(scope="module", params=["rotary", "sinusoidal", "window", "windows by layer"])
def model(request):
    if request.param.startswith("window"):
        return tiny_model(VOCABULARY, positions="rotary", window=4 if request.param == "window" else [4, 0])
    return tiny_model(VOCABULARY, positions=request.param, kv_heads=2)


def drafts(model):
    """A bad one, a good one, and one that is always right."""
    other = tiny_model(VOCABULARY, layers=1, positions="rotary")
    return {"first layers": first_layers(model, 1), "another model": other, "the model itself": model}


@pytest.mark.parametrize("guesses", [1, 4])
@pytest.mark.parametrize("name", ["first layers", "another model", "the model itself"])
def test_the_text_is_that_of_plain_greedy_decoding(model, name, guesses):
    draft = drafts(model)[name]
    expected = generate(model, unequal_prompts(model), END, GenerationConfig(17))
    assert speculate(model, draft, unequal_prompts(model), {END}, 17, guesses) == expected
    for prompt, tokens in zip(unequal_prompts(model), expected):
        assert speculate(model, draft, [prompt], {END}, 17, guesses) == [tokens]


def test_what_ends_a_text_may_stand_among_the_guesses(model):
    text = generate(model, unequal_prompts(model)[:1], -1, GenerationConfig(12))[0]
    for end in set(text):
        expected = generate(model, unequal_prompts(model)[:1], end, GenerationConfig(12))
        assert speculate(model, model, unequal_prompts(model)[:1], {end}, 12) == expected


@torch.inference_mode()
def test_a_draft_that_is_always_right_saves_all_passes_but_one_in_five(model):
    speculation = Speculation(model, model, unequal_prompts(model), 20, guesses=4)
    assert [speculation.go_on([0, 1, 2]).shape[1] for _ in range(4)] == [5] * 4


def test_first_layers_share_the_weights_and_leave_the_model_as_it_was(model):
    draft = first_layers(model, 1)
    assert len(draft.decoder.transformer.blocks) == 1 and len(model.decoder.transformer.blocks) == 2
    assert draft.decoder.transformer.blocks[0] is model.decoder.transformer.blocks[0]
    assert model.config.decoder.layers == 2 and draft.config.decoder.layers == 1


def test_drafts_that_cannot_help_are_refused(model):
    with pytest.raises(ConfigError, match="1 to 1"):
        first_layers(model, 2)
    with pytest.raises(ConfigError, match="the model's tokenizer"):
        speculate(model, tiny_model(20), unequal_prompts(model), {END}, 4)


def test_a_draft_that_cannot_go_along_is_refused():
    shape = {"layers": 2, "width": 16, "heads": 2, "vocab_size": 20, "positions": "learned", "max_positions": 32}
    model = MetaLM(build(MetaLMConfig, {"decoder": shape}, "test")).eval()
    prompts = [Document([Text(list(range(18)))])]
    assert len(speculate(model, first_layers(model, 1), prompts, [], 10, guesses=4)[0]) == 10
    with pytest.raises(ConfigError, match="take 33 places, the model has 32"):
        speculate(model, first_layers(model, 1), prompts, [], 11, guesses=4)
    eye = {"type": "vit", "layers": 1, "width": 16, "heads": 2, "image_size": 16, "patch_size": 8}
    seeing = MetaLM(
        build(MetaLMConfig, {"decoder": shape, "encoders": {"eye": {**eye, "connector": {"type": "linear"}}}}, "test")
    )
    looking = [Document([Span("eye", {"image": torch.zeros(3, 16, 16, dtype=torch.uint8)}, 4), Text([1])])]
    with pytest.raises(ConfigError, match="the draft does not read 'eye'"):
        speculate(seeing.eval(), model, looking, [], 4)


def test_first_layers_without_a_window_need_no_base_for_windows():
    shape = {"layers": 2, "width": 16, "heads": 2, "vocab_size": 20, "positions": "rotary"}
    model = MetaLM(build(MetaLMConfig, {"decoder": {**shape, "window": [0, 4], "local_rotary_base": 100.0}}, "test"))
    assert first_layers(model, 1).config.decoder.local_rotary_base == 0
