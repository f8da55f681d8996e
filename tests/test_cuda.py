"""On a GPU everything is what it is on the CPU; without one these tests skip.

The rest of the suite runs on a GPU where there is one, too; here is what only a GPU does.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from processes import STAGES, launch
from torch import nn

from metalm.config import build
from metalm.data.prompts import Interface
from metalm.inference.generate import GenerationConfig, generate
from metalm.model import MetaLM, MetaLMConfig
from metalm.models import MODELS
from metalm.nn.attention import Mask, all_of, attend, causal, same_branch, same_document
from metalm.segments import Batch, Document, Text, load_spans, make_batch
from metalm.training.config import load_run_config
from metalm.training.estimate import fill_in_tokens
from metalm.training.loop import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

# Decoders whose layers see differently far, without and with soft caps.
LAYERED = {"positions": "rotary", "window": "[100,0]", "local_rotary_base": 100.0, "post_norm": "true"}
DECODERS = {"layered": LAYERED, "capped": LAYERED | {"attention_softcap": 5.0, "logit_softcap": 3.0}}
TEXT_MODES = ("causal", "mim", "mim-synchronous", "pmlm", "cloze", "cloze-words", *DECODERS)
LENGTH = 620
SMALL = ["tokenizer.vocab_size=300", f"data.row_length={LENGTH}", "data.rows=3"]
MEDIA = {
    "decoder": {"layers": 2, "width": 64, "heads": 2, "vocab_size": 300, "positions": "rotary", "kv_heads": 1},
    "encoders": {
        "image": {"type": "vit", "layers": 2, "width": 64, "heads": 2, "image_size": 64, "connector": {"type": "feedforward"}},
        "sound": {
            "type": "log_mel",
            "layers": 2,
            "width": 64,
            "heads": 2,
            "sample_rate": 8000,
            "connector": {"type": "linear"},
        },
        "text": {
            "type": "text",
            "layers": 2,
            "width": 64,
            "heads": 2,
            "vocab_size": 300,
            "connector": {"type": "qformer", "queries": 4, "layers": 1, "heads": 2},
        },
    },
}


@pytest.fixture(autouse=True)
def exact():
    """Convolutions in float32, not in TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def text_mode(name: str) -> tuple[nn.Module, Batch]:
    """A small model of a bundled configuration, and three rows of texts of several lengths, some longer than 256."""
    base = "mim" if name == "mim-synchronous" else "causal" if name in DECODERS else name
    part = "encoder" if name.startswith(("pmlm", "cloze")) else "decoder"
    shape = {"layers": 2, "width": 64, "heads": 2, "max_positions": LENGTH} | DECODERS.get(name, {})
    config = load_run_config(f"configs/text/{base}.yaml", [*SMALL, *(f"model.{part}.{key}={n}" for key, n in shape.items())])
    if name == "mim-synchronous":
        config.model.synchronous = 0.3
    if name == "cloze-words":
        config.model.cutoffs = [100, 200]
    fill_in_tokens(config)
    torch.manual_seed(0)
    model = MODELS[config.model.type](config.model)
    if name == "cloze-words":
        model.encoder.embedding.spell([f"word {n}" for n in range(config.model.encoder.vocab_size)])
    interface = Interface.of(model, None, LENGTH)
    rng = random.Random(0)
    rows = []
    for lengths in ((280, 9, 5), (120, 150), (40, 30, 20, 60)):
        texts = [[0, *(rng.randrange(10, 290) for _ in range(length)), 1] for length in lengths]
        if interface.layout:
            rows.append([interface.layout.lay_out(text, rng, "") for text in texts])
        else:
            rows.append([Document([Text(text)]) for text in texts])
    return model, interface.collate(rows, LENGTH)


def media() -> tuple[MetaLM, Batch]:
    """A model with three encoders, and two rows in which images, sounds and texts are read."""
    torch.manual_seed(0)
    model = MetaLM(build(MetaLMConfig, MEDIA, "test"))
    connectors = {name: encoder.connector for name, encoder in model.config.encoders.items()}
    interface = Interface(None, model.processors, connectors, 400)
    blank = {kind: value for processor in model.processors.values() for kind, value in processor.blank().items()}
    texts = [[random.Random(n).randrange(300) for _ in range(150)] for n in range(2)]
    documents = [
        Document([interface.span(name, {kind: blank[kind]}), Text(text)])
        for (name, kind), text in zip((("image", "image"), ("sound", "audio")), texts)
    ] + [Document([interface.read_tokens(texts[0][:9]), Text(texts[1])])]
    loaded = [load_spans(document, model.processors) for document in documents]
    return model, make_batch([loaded[:2], loaded[2:]], model.processors, 400)


def loss_and_gradients(model: nn.Module, batch: Batch, device: str) -> tuple[float, dict[str, torch.Tensor]]:
    model.to(device).zero_grad()
    loss = model(batch.to(device))
    loss.backward()
    return loss.item(), {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", [*TEXT_MODES, "media"])
def test_losses_and_gradients_are_the_cpus(name):
    model, batch = media() if name == "media" else text_mode(name)
    model.train()
    expected, gradients = loss_and_gradients(model, batch, "cpu")
    found, found_gradients = loss_and_gradients(model, batch, "cuda")
    assert found == pytest.approx(expected, rel=1e-5)
    assert gradients.keys() == found_gradients.keys()
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert (found_gradients[name] - gradient).abs().max() < 1e-4 * largest, name


@pytest.mark.parametrize("name", [*TEXT_MODES, "media"])
def test_bfloat16_is_near(name):
    model, batch = media() if name == "media" else text_mode(name)
    expected, _ = loss_and_gradients(model, batch, "cuda")
    found, gradients = loss_and_gradients(model.bfloat16(), batch, "cuda")
    assert found == pytest.approx(expected, rel=1e-2)
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_block_masks_attend_as_dense_ones_do(heads):
    H, G = heads
    torch.manual_seed(0)
    document_BT = torch.tensor([[1] * 300 + [2] * 250 + [0] * 50, [1] * 100 + [2] * 500])
    branch_BT = torch.tensor([[0] * 100 + [1] * 100 + [2] * 100 + [0] * 300, [0] * 200 + [1] * 200 + [2] * 200])
    q, k, v = (torch.randn(2, n, 600, 32, dtype=torch.float64, requires_grad=True) for n in (H, G, G))
    upstream = torch.randn(2, H, 600, 32, dtype=torch.float64)

    def run(device: str, dtype: torch.dtype) -> list[torch.Tensor]:
        documents, branches = document_BT.to(device), branch_BT.to(device)
        predicate = all_of(causal, same_document(documents), same_branch(branches))
        mask = Mask(predicate, 2, 600, 600, torch.device(device))
        own = [x.detach().to(device, dtype).requires_grad_() for x in (q, k, v)]
        out = attend(*own, mask)
        out.backward(upstream.to(device, dtype))
        if device == "cuda":
            assert "block" in vars(mask) and "dense" not in vars(mask)
        return [x.detach().double().cpu() for x in (out, *(x.grad for x in own))]

    for expected, found in zip(run("cpu", torch.float64), run("cuda", torch.float32)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_greedy_text_is_the_cpus_compiled_or_not():
    model, _ = media()
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():  # far from uniform predictions
            parameter.mul_(2).add_(torch.randn_like(parameter) * 0.1)
    prompts = [Document([Text(list(range(5, 5 + n)), target=False)]) for n in (3, 40, 17)]
    expected = generate(model, prompts, 0, GenerationConfig(max_new_tokens=20))
    assert generate(model.cuda(), prompts, 0, GenerationConfig(max_new_tokens=20)) == expected
    assert any(len(tokens) for tokens in expected)
    model.decoder.prepare_for_inference(compiled=True)
    assert generate(model, prompts, 0, GenerationConfig(max_new_tokens=20)) == expected


def test_every_zero_stage_trains_alike(tmp_path):
    results = launch(1, tmp_path / "stages.json", STAGES, gpu=True)
    for stage in STAGES:
        assert results[stage]["losses"] == pytest.approx(results["zero0"]["losses"], rel=1e-4), stage
        assert results[stage]["weights"] == pytest.approx(results["zero0"]["weights"], rel=1e-4), stage


def test_a_bfloat16_run_trains_validates_and_resumes(tiny_yaml, scenes, tmp_path):
    out = tmp_path / "run"
    overrides = [f"out={out}", "training.precision=bfloat16", "training.steps=12", "training.validate_every=6"]
    overrides += [f"data.validation=[{{shards: {scenes}/images, task: image_text}}]"]
    train(load_run_config(tiny_yaml, overrides))
    rows = [json.loads(line) for line in Path(out / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    assert losses[12] < losses[1] and any("val_loss" in row for row in rows)
    (out / "metrics.jsonl").unlink()
    shutil.rmtree(out / "checkpoints" / "step-000012")
    train(load_run_config(tiny_yaml, overrides))
    again = [json.loads(line) for line in Path(out / "metrics.jsonl").read_text().splitlines()]
    resumed = {row["step"]: row["loss"] for row in again if "loss" in row}
    assert min(resumed) == 11
    assert resumed[12] == pytest.approx(losses[12], rel=2e-2)
