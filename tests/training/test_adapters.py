"""Adapters: what trains, what an export holds, going on from adapters, and resuming; and biases alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from metalm.errors import CheckpointError, ConfigError
from metalm.pretrained import load_pretrained
from metalm.training.config import load_run_config
from metalm.training.loop import train

TARGETS = r"'decoder\.transformer\.blocks\.\d+\.attention\.(qkv|out)'"
PLAIN = ["training.precision=float32", "training.checkpoint_every=0"]


@pytest.fixture(scope="module")
def base(tiny_yaml, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("base") / "run"
    train(load_run_config(tiny_yaml, [f"out={out}", *PLAIN, "training.steps=2"]))
    return out


def tune(tiny_yaml, base: Path, out: Path, *more: str, adapters: str = "rank: 2", steps: int = 3) -> Path:
    settings = [f"out={out}", f"init_from={base}", f"training.steps={steps}", "training.lr=1e-2", *PLAIN]
    settings.append(f"training.adapters={{targets: {TARGETS}, {adapters}}}")
    return train(load_run_config(tiny_yaml, [*settings, *more]))


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "export/model.safetensors")


@pytest.mark.parametrize("kind", ["rank: 2", "rank: 2, dora: true"])
def test_a_plain_model_comes_out_and_only_what_has_adapters_has_changed(tiny_yaml, base, tmp_path, kind):
    out = tmp_path / "tuned"
    tune(tiny_yaml, base, out, "model.decoder.trainable=none", *frozen(base), adapters=kind)
    before, after = weights(base), weights(out)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    connectors = {name for name in changed if name.startswith("connectors.")}  # which train as before
    changed -= connectors
    assert connectors and changed == {
        name for name in before if name.endswith(("qkv.weight", "out.weight")) and "decoder" in name
    }
    if "dora" not in kind:
        for name in changed:
            difference = (after[name] - before[name]).double()
            assert torch.linalg.svdvals(difference)[2:].max() < 1e-5 < torch.linalg.svdvals(difference)[0]
    adapters = load_file(out / "export/adapters.safetensors")
    assert all(".lora_" in name for name in adapters) and json.loads((out / "export/adapters.json").read_text())["rank"] == 2
    load_pretrained(out)


def frozen(base: Path) -> list[str]:
    """Settings that freeze every encoder."""
    encoders = json.loads((base / "export/config.json").read_text())["model"]["encoders"]
    return [f"model.encoders.{name}.trainable=none" for name in encoders]


def test_a_pattern_means_linear_maps_alone(tiny_yaml, base, tmp_path):
    """The README's pattern also fits the names of dropouts."""
    settings = [f"out={tmp_path / 'run'}", f"init_from={base}", "training.steps=1", *PLAIN]
    train(load_run_config(tiny_yaml, [*settings, "training.adapters={targets: 'decoder.*(qkv|out|up|down)', rank: 2}"]))
    names = load_file(tmp_path / "run/export/adapters.safetensors")
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in names} == {"qkv", "out", "up", "down"}


def test_a_run_goes_on_from_adapters(tiny_yaml, base, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    tune(tiny_yaml, base, first)
    tune(tiny_yaml, base, second, "training.lr=1e-30", adapters=f"rank: 2, init_from: {first}", steps=1)
    tuned, again, start = weights(first), weights(second), weights(base)
    for name in tuned:
        expected = tuned[name] if name.endswith(("qkv.weight", "out.weight")) and "decoder" in name else start[name]
        torch.testing.assert_close(again[name], expected, rtol=0, atol=1e-6)
    with pytest.raises(CheckpointError, match="has no adapters"):
        tune(tiny_yaml, base, tmp_path / "third", adapters=f"rank: 2, init_from: {base}")


def test_a_run_with_adapters_resumes_where_it_was(tiny_yaml, base, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for out in (whole, stopped):
        tune(tiny_yaml, base, out, "training.checkpoint_every=2", steps=4)
    (newest,) = [path for path in (stopped / "checkpoints").iterdir() if path.name.endswith("4")]
    shutil.rmtree(newest)
    shutil.rmtree(stopped / "export")
    tune(tiny_yaml, base, stopped, "training.checkpoint_every=2", steps=4)
    a, b = weights(whole), weights(stopped)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_biases_alone_train(tiny_yaml, base, tmp_path):
    settings = [f"out={tmp_path / 'run'}", f"init_from={base}", "training.steps=2", "model.decoder.trainable=biases", *PLAIN]
    train(load_run_config(tiny_yaml, [*settings, *frozen(base)]))
    before, after = weights(base), weights(tmp_path / "run")
    changed = {name for name in before if name.startswith("decoder") and not torch.equal(before[name], after[name])}
    assert changed and all(name.endswith("bias") for name in changed)


@pytest.mark.parametrize(
    "adapters, message",
    [
        ("{targets: nothing}", "'nothing' is no linear map's whole name; there are decoder"),
        ("{targets: '('}", "is no regular expression"),
        ("{targets: a, rank: 0}", "rank 0 must be at least 1"),
    ],
)
def test_adapters_that_cannot_be_are_refused(tiny_yaml, base, tmp_path, adapters, message):
    with pytest.raises(ConfigError, match=message):
        train(load_run_config(tiny_yaml, [f"out={tmp_path / 'run'}", f"init_from={base}", f"training.adapters={adapters}"]))
