"""Distillation: the chunked divergence is the dense one; a taught run nears its teacher, and exports the student alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from metalm.data.prompts import Interface
from metalm.data.stream import PackedStream
from metalm.errors import CheckpointError, ConfigError
from metalm.nn import losses
from metalm.nn.soft_targets import soft_cross_entropy
from metalm.pretrained import load_pretrained
from metalm.training.config import load_run_config
from metalm.training.distill import Distillation, DistillConfig
from metalm.training.loop import train

PLAIN = ["training.precision=float32", "training.checkpoint_every=0"]


@pytest.mark.parametrize("logits_at_a_time", [14, 60, 1 << 24])
@pytest.mark.parametrize("temperature, softcaps", [(1.0, (0.0, 0.0)), (2.5, (0.0, 0.0)), (2.5, (1.5, 0.5))])
def test_the_chunked_divergence_is_the_dense_one(monkeypatch, logits_at_a_time, temperature, softcaps):
    monkeypatch.setattr(losses, "CHUNK_LOGITS", logits_at_a_time)
    generator = torch.Generator().manual_seed(0)
    shapes = ((11, 5), (7, 5), (11, 3), (7, 3))
    h, W, g, U = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)
    h.requires_grad_(), W.requires_grad_()
    w = torch.rand(11, generator=generator, dtype=torch.float64)
    ours = soft_cross_entropy(h, W, g, U, w, temperature, softcaps)
    logits = [s * torch.tanh(x @ y.T / s) if s else x @ y.T for x, y, s in ((h, W, softcaps[0]), (g, U, softcaps[1]))]
    own, theirs = ((x / temperature).log_softmax(1) for x in logits)
    dense = temperature**2 * (w[:, None] * F.kl_div(own, theirs, reduction="none", log_target=True)).sum()
    torch.testing.assert_close(ours, dense)
    for a, b in zip(torch.autograd.grad(ours * 0.7, (h, W)), torch.autograd.grad(dense * 0.7, (h, W))):
        torch.testing.assert_close(a, b)


@pytest.fixture(scope="module")
def teacher(tiny_yaml, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("teacher") / "run"
    train(load_run_config(tiny_yaml, [f"out={out}", *PLAIN, "training.steps=40", "training.lr=5e-3", "model.decoder.layers=2"]))
    return out


def learn(tiny_yaml, teacher: Path, out: Path, distill: str, *more: str) -> list[dict]:
    settings = [f"out={out}", *PLAIN, f"tokenizer.path={teacher}", "training.steps=30", "training.lr=5e-3", *more]
    train(load_run_config(tiny_yaml, [*settings, f"training.distill={{teacher: {teacher}, {distill}}}"]))
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_student_nears_its_teacher_and_is_exported_alone(tiny_yaml, teacher, tmp_path):
    found = learn(tiny_yaml, teacher, tmp_path / "run", "weight: 1.0, states: 0.1")
    assert found[-1]["divergence"] < 0.5 * found[0]["divergence"]
    assert found[-1]["state_distance"] < found[0]["state_distance"]
    assert found[-1]["loss"] == pytest.approx(found[-1]["divergence"] + 0.1 * found[-1]["state_distance"], rel=1e-4)
    student, _ = load_pretrained(tmp_path / "run")
    assert len(student.decoder.transformer.blocks) == 1 and student.taught_by is None
    assert not any("teacher" in name for name in student.state_dict())


def test_a_model_that_is_its_own_teacher_has_nothing_to_learn(tiny_yaml, teacher):
    config = load_run_config(tiny_yaml, [f"init_from={teacher}", "data.workers=0"])
    model, tokenizer = load_pretrained(teacher)
    taught = Distillation(DistillConfig(str(teacher), weight=0.3, states=1.0), model, tokenizer, torch.float32)
    batch = next(iter(PackedStream(config.data.train, Interface.of(model, tokenizer, 160), config.data)))
    model.train()
    plain = model(batch)
    model.taught_by = taught
    together = model(batch)
    assert model.parts["divergence"][0] < 1e-3 and model.parts["state_distance"][0] < 1e-6
    torch.testing.assert_close(together, 0.7 * plain, rtol=1e-4, atol=1e-3)
    assert torch.equal(model.eval()(batch), plain)  # validation is by the plain loss
    assert all(parameter.grad is None for parameter in taught.teacher.parameters())


@pytest.mark.parametrize(
    "distill, more, error, message",
    [
        ("weight: 2", [], ConfigError, "from 0 to 1"),
        ("temperature: 0", [], ConfigError, "temperature must be positive"),
        ("states: 1", ["model.decoder.width=16"], ConfigError, "not 16 with 32"),
        ("weight: 0.5", ["model.encoders.fused.image_size=32"], ConfigError, "they take other inputs"),
        ("weight: 0.5", ["tokenizer.path=''", "tokenizer.vocab_size=300"], CheckpointError, "was trained on other tokens"),
    ],
)
def test_what_cannot_teach_is_refused(tiny_yaml, teacher, tmp_path, distill, more, error, message):
    with pytest.raises(error, match=message):
        learn(tiny_yaml, teacher, tmp_path / "run", distill, *more)


def test_other_models_are_not_taught(tiny_yaml, teacher):
    from metalm.config import build
    from metalm.objectives.mim import MIM, MIMConfig

    size = {"layers": 1, "width": 8, "heads": 1, "vocab_size": 400}
    _, tokenizer = load_pretrained(teacher)
    with pytest.raises(ConfigError, match="not 'mim'"):
        Distillation(DistillConfig(str(teacher)), MIM(build(MIMConfig, {"decoder": size}, "test")), tokenizer, torch.float32)
