"""The paper's two configurations: its shapes, its recipe, and its parameter counts on the meta device."""

from __future__ import annotations

import pytest
import torch

from metalm.config import find_config
from metalm.encoders.fused import FusedEncoder
from metalm.encoders.text import TextEncoder
from metalm.model import MetaLM
from metalm.nn.transformer import Transformer
from metalm.training.config import RunConfig, load_run_config
from metalm.training.estimate import estimate, fill_in_tokens

VOCABULARY = 50_259


@pytest.fixture(scope="module")
def configs() -> dict[str, RunConfig]:
    return {name: load_run_config(f"configs/paper/{name}.yaml") for name in ("language", "vision-language")}


@pytest.fixture(scope="module")
def models(configs) -> dict[str, MetaLM]:
    with torch.device("meta"):
        return {name: MetaLM(config.model) for name, config in configs.items()}


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def matrices(module: torch.nn.Module) -> int:
    """Parameters without norms and biases."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.dim() > 1)


def shape(stack: Transformer) -> tuple:
    return len(stack.blocks), stack.config.width, stack.config.ffn, stack.config.heads, stack.config.dropout


def test_vision_language_decoder(models):
    """353.5M = 12 x 24 x 1024^2 + 50,259 x 1024, and norms and biases."""
    decoder = models["vision-language"].decoder
    assert shape(decoder.transformer) == (24, 1024, 4096, 16, 0.2)
    assert matrices(decoder) == 12 * 24 * 1024**2 + VOCABULARY * 1024 == 353_455_104
    assert count(decoder) - matrices(decoder) < 0.001 * count(decoder)
    assert decoder.transformer.positions.table.shape == (1024, 1024)


def test_fused_encoder(models):
    """192M in VLMo's shape: 196 patches and 40 tokens, experts for patches, for text, and for both in two layers."""
    encoder = models["vision-language"].encoders["fused"]
    assert isinstance(encoder, FusedEncoder)
    assert abs(count(encoder) - 192e6) < 0.015 * 192e6
    assert (encoder.processor.num_patches, encoder.processor.max_positions) == (196, 40)
    assert [sorted(block.experts) for block in encoder.blocks] == [["patch", "text"]] * 10 + [
        ["both", "patch_alone", "text_alone"]
    ] * 2
    config = encoder.config
    assert (config.width, config.ffn, config.heads, config.dropout) == (768, 3072, 12, 0.1)
    assert all(parameter.requires_grad for parameter in models["vision-language"].parameters())


def test_language_decoder(models):
    """1.3B."""
    decoder = models["language"].decoder
    assert shape(decoder.transformer) == (24, 2048, 8192, 32, 0.0)
    assert abs(count(decoder) - 1.3e9) < 0.01 * 1.3e9
    assert decoder.transformer.positions.table.shape == (2048, 2048)


def test_text_encoder(models):
    """About 366M in the paper, 354M here: the layers are 302M in both; the difference would be a larger vocabulary's."""
    encoder = models["language"].encoders["text"]
    assert isinstance(encoder, TextEncoder)
    assert shape(encoder.transformer) == (24, 1024, 4096, 16, 0.1)
    assert matrices(encoder.transformer.blocks) == 12 * 24 * 1024**2
    assert abs(count(encoder) - 366e6) < 0.04 * 366e6
    assert encoder.transformer.positions.weight.shape == (512, 1024)
    assert encoder.transformer.relative_bias is not None


def test_only_the_last_two_layers_of_the_text_encoder_train(models):
    encoder = models["language"].encoders["text"]
    trained = {name for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    last = {f"transformer.blocks.{n}.{name}" for n in (22, 23) for name, _ in encoder.transformer.blocks[n].named_parameters()}
    assert trained == last | {"transformer.norm.weight", "transformer.norm.bias"}
    assert all(parameter.requires_grad for parameter in models["language"].decoder.parameters())


def test_connectors(models):
    assert [type(layer).__name__ for layer in models["language"].connectors["text"].children()] == ["Linear"]
    assert models["language"].connectors["text"].linear.weight.shape == (2048, 1024)
    layers = models["vision-language"].connectors["fused"].layers
    shapes = [tuple(layer.weight.shape) for layer in layers if isinstance(layer, torch.nn.Linear)]
    assert shapes == [(1024, 768), (1024, 1024), (1024, 1024)]


def test_recipes(configs):
    language, vision = configs["language"].training, configs["vision-language"].training
    assert (language.steps, language.lr, language.warmup, language.eps) == (300_000, 6e-4, 375, 1e-6)
    assert (vision.steps, vision.lr, vision.warmup) == (350_000, 1e-4, 2_500)
    for training in (language, vision):
        assert (training.schedule, training.betas, training.weight_decay) == ("linear", [0.9, 0.98], 0.01)
    assert configs["language"].data.rows * language.accumulation * 8 == 1024
    (source,) = configs["language"].data.train
    assert (source.task, vars(source.objective)) == (
        "text",
        {"type": "semicausal", "min_length": 64, "max_length": 128, "ratio": 0.25},
    )
    assert [source.task for source in configs["vision-language"].data.train] == ["image_text", "text"]


@pytest.mark.parametrize("name", ["language", "vision-language"])
def test_the_command_stands_in_the_first_line(name):
    path = find_config(f"configs/paper/{name}.yaml")
    first = path.read_text().splitlines()[0]
    assert first.startswith("# deepspeed ") and f"metalm train configs/paper/{name}.yaml" in first


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("causal", 12 * 24 * 1024**2 + 100_000 * 1024),  # "350M" counts a smaller vocabulary
        ("mim", 12 * 24 * 1024**2 + 100_001 * 1024),
        ("pmlm", 110e6),
        ("cloze", 370e6),
    ],
)
def test_text_side_modes_have_the_papers_sizes(name, parameters):
    config = load_run_config(f"text/{name}-paper.yaml")
    fill_in_tokens(config)
    assert estimate(config, 1)["total"]["all"] == pytest.approx(parameters, rel=0.012)


@pytest.mark.parametrize(("blocks", "query", "parameters"), [(6, "sum", 177e6), (12, "concat", 330e6)])
def test_cloze_on_words_has_the_papers_sizes(blocks, query, parameters):
    """As the configuration's header says; the softmax is not counted, which grows with the vocabulary."""
    changes = ["tokenizer.type=words", "tokenizer.vocab_size=800000", "model.cutoffs=[60000, 220000]"]
    changes += ["model.encoder.characters={}", f"model.encoder.layers={blocks}", f"model.encoder.query={query}"]
    config = load_run_config("text/cloze-paper.yaml", changes)
    fill_in_tokens(config)
    assert estimate(config, 1)["parameters"]["encoder"]["all"] == pytest.approx(parameters, rel=0.006)
