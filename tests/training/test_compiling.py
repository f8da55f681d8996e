"""Compiled blocks compute what they compute without."""

from __future__ import annotations

import shutil

import pytest
import torch

from metalm.config import build
from metalm.decoder import CausalDecoder, DecoderConfig
from metalm.errors import ConfigError
from metalm.training.compiling import compile_blocks
from metalm.training.config import TrainingConfig
from metalm.training.engine import make_engine, setup_distributed

SHAPE = {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "norm": "rms", "mlp": "swiglu", "positions": "rotary"}


def decoder() -> CausalDecoder:
    torch.manual_seed(0)
    return CausalDecoder(build(DecoderConfig, {**SHAPE, "vocab_size": 50}, "test"))


def test_compiled_blocks_give_the_same_states_and_gradients():
    plain, compiled = decoder(), decoder()
    compile_blocks(compiled)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    position_BT = torch.arange(24).expand(3, 24)
    for seed in (1, 2):  # the second batch runs what the first has compiled
        tokens_BT = torch.randint(50, (3, 24), generator=torch.Generator().manual_seed(seed))
        hidden = [model(model.embed(tokens_BT), position_BT) for model in (plain, compiled)]
        torch.testing.assert_close(hidden[1], hidden[0], rtol=1e-5, atol=1e-5)
        for states in hidden:
            (states * torch.randn(32, generator=torch.Generator().manual_seed(3))).sum().backward()
    gradients = [[p.grad for p in model.parameters()] for model in (plain, compiled)]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4)


def test_what_reads_spans_is_left_alone():
    model = torch.nn.ModuleDict({"decoder": decoder(), "encoders": torch.nn.ModuleDict({"text": decoder()})})
    compile_blocks(model)
    own, apart = model["decoder"].transformer.blocks, model["encoders"]["text"].transformer.blocks
    assert all("before" in vars(block) for block in own) and not any("before" in vars(block) for block in apart)


def test_zero_3_and_a_machine_without_a_compiler_are_refused(monkeypatch):
    setup_distributed()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="there is no"):
        make_engine(decoder(), build(TrainingConfig, {"steps": 1, "compile": True}, "test"), rows=1)
    config = build(TrainingConfig, {"steps": 1, "compile": True, "deepspeed": "zero3"}, "test")
    with pytest.raises(ConfigError, match="take training"):
        make_engine(decoder(), config, rows=1)
