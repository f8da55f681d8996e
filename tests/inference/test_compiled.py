"""Compiled steps of decoding: what eager ones write, whatever the stack, the batch and the weights' layout."""

from __future__ import annotations

import shutil
from copy import deepcopy

import pytest
import torch
from tiny_models import tiny_model, unequal_prompts

from metalm.errors import ConfigError
from metalm.inference.decoding import Decoding, split_beginning
from metalm.inference.generate import GenerationConfig, generate
from metalm.inference.speculative import first_layers, speculate
from metalm.model import MetaLM
from metalm.segments import Document, Text

GEMMA = {
    "positions": "rotary", "norm": "rms", "mlp": "geglu_tanh", "bias": False, "kv_heads": 2, "qk_norm": True, "post_norm": True,
    "window": [4, 0], "attention_softcap": 20.0, "logit_softcap": 30.0, "local_rotary_base": 100.0, "scale_width": 4,
}  # fmt: skip


def compiled_twin(model: MetaLM, weights="as they are") -> MetaLM:
    twin = deepcopy(model)
    twin.decoder.prepare_for_inference(weights, compiled=True)
    return twin


@pytest.fixture(scope="module")
def gemma() -> tuple[MetaLM, MetaLM]:
    """A model and its compiled twin, in float64; all tests of them share two graphs."""
    model = tiny_model(30, **GEMMA)
    return model, compiled_twin(model)


def logits_of(model: MetaLM, rows: int, steps: int, capacity: int = 0) -> torch.Tensor:
    """After each of some steps, the same whatever is written: [steps, rows, V]."""
    decoding = Decoding(model, unequal_prompts(model)[:rows], 1, capacity or steps)
    logits = []
    for t in range(steps):
        decoding.step((torch.arange(rows) * 5 + 3 * t + 1) % 30)
        logits.append(decoding.logits_BV)
    return torch.stack(logits)


def assert_same_logits(compiled: MetaLM, model: MetaLM, rows: int) -> None:
    """To float32's rounding of the rotation's angles, which grows from layer to layer."""
    expected = logits_of(model, rows, 9)
    assert expected.std() > 1
    torch.testing.assert_close(logits_of(compiled, rows, 9), expected, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("rows", [1, 3])
def test_logits_are_those_of_eager_steps_for_one_row_and_for_padded_rows(gemma, rows):
    assert_same_logits(*reversed(gemma), rows)


PLAINER = [
    {"positions": "sinusoidal", "max_positions": 8},  # the table is too short at first
    {"positions": "learned", "mlp": "relu"},
    {"positions": "rotary", "window": 4},
]


@torch.inference_mode()
@pytest.mark.parametrize("stack", PLAINER)
def test_logits_of_plainer_stacks(stack):
    model = tiny_model(30, layers=1, **stack)
    assert_same_logits(compiled_twin(model), model, 1)


@pytest.mark.parametrize("beams", [1, 2])
def test_text_is_the_same_and_other_sizes_compile_nothing(gemma, beams):
    """With rows that leave the batch, down to the last, and without."""
    model, compiled = gemma
    for recompiling, rows, new in ((False, 3, 12), (False, 1, 12), (True, 2, 9), (True, 1, 17)):
        with torch._dynamo.config.patch(error_on_recompile=recompiling):
            for end in (0, -1):
                prompts, config = unequal_prompts(model)[:rows], GenerationConfig(new, num_beams=beams)
                assert generate(compiled, prompts, end, config) == generate(model, prompts, end, config)


@torch.inference_mode()
def test_models_of_one_shape_keep_their_own_weights(gemma):
    """A graph of several rows has packed those that it was made with."""
    other = deepcopy(gemma[0])
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if name.endswith("up.weight"):
                parameter.neg_()
    assert_same_logits(gemma[1], gemma[0], 3)
    assert_same_logits(compiled_twin(other), other, 3)
    assert_same_logits(gemma[1], gemma[0], 3)


@torch.inference_mode()
def test_what_is_left_in_memory_is_not_seen(gemma, monkeypatch):
    """The cache's room that nothing was stored in is read, with a weight of 0: there must be no nan."""
    new_empty = torch.Tensor.new_empty

    def poisoned(x, *args, **kwargs):
        made = new_empty(x, *args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    assert logits_of(gemma[1], 3, 4, capacity=50).isfinite().all()


@torch.inference_mode()
@pytest.mark.parametrize("weights", ["as they are", "int8", pytest.param("int4", marks=pytest.mark.slow)])
def test_steps_in_bfloat16_are_as_near_to_float32_as_eager_ones_in_bfloat16_throughout(weights):
    model = tiny_model(30, layers=1, width=64, positions="rotary").bfloat16()
    eager, compiled = deepcopy(model), compiled_twin(model, weights)
    if weights != "as they are":  # laid out for inference, those have float32 inputs and keys for several rows, too
        eager.decoder.prepare_for_inference(weights)
    exact = deepcopy(model).float()  # the weights as they were rounded, all else in float32
    for name, part in exact.decoder.named_modules():
        if hasattr(part, "weight"):
            part.weight.data = compiled.decoder.get_submodule(name).weight.float()
    for rows in (1, 3):
        expected = logits_of(exact, rows, 6)
        errors = [float((logits_of(one, rows, 6) - expected).square().mean().sqrt()) for one in (compiled, eager)]
        assert errors[0] < 1.2 * errors[1] < 0.05 * expected.std()


def test_what_prompts_begin_with_is_read_once(gemma):
    """The rests are read behind a cache that steps go on with."""
    model, compiled = gemma
    prompts = [Document([Text([*([5, 9, 3, 7] * 20), *rest], target=False)]) for rest in ([4], [8, 8, 2], [1, 6])]
    assert len(split_beginning(prompts)[0]) == 80
    assert generate(compiled, prompts, -1, GenerationConfig(8)) == generate(model, prompts, -1, GenerationConfig(8))


@pytest.mark.slow
def test_drafts_compile_too_and_the_text_is_the_same():
    model = tiny_model(30, positions="rotary", kv_heads=2)
    compiled = compiled_twin(model)
    for rows in (3, 1):
        prompts = unequal_prompts(model)[:rows]
        expected = generate(model, prompts, 0, GenerationConfig(12))
        assert speculate(compiled, first_layers(compiled, 1), prompts, {0}, 12) == expected


def test_what_cannot_be_compiled_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match="take int8"):
        tiny_model(30).float().decoder.prepare_for_inference("w8a8", compiled=True)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="C\\+\\+ compiler"):
        tiny_model(30).decoder.prepare_for_inference(compiled=True)
