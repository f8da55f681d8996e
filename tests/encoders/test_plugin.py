"""A third party's encoder: one file and an entry point in a package of its own, used by name."""

from __future__ import annotations

import os
import subprocess
import sys

MODULE = '''
from dataclasses import dataclass

import torch

from metalm.encoders.base import Collated, Encoder, EncoderConfig, Processor


@dataclass(kw_only=True)
class ToneConfig(EncoderConfig):
    """A sound as numbers, `frame` of them a state."""

    width: int
    frame: int = 4


@dataclass
class ToneProcessor(Processor):
    frame: int
    reads = frozenset({"sound"})

    def num_states(self, inputs):
        return len(inputs["sound"]) // self.frame

    def load(self, inputs):
        return inputs

    def collate(self, loaded):
        frames = torch.cat([torch.tensor(one["sound"]).view(-1, self.frame) for one in loaded])
        return Collated({"frames_1SF": frames[None]}, torch.arange(len(frames)))

    def blank(self):
        return {"sound": [0.0] * self.frame}


class ToneEncoder(Encoder):
    Config = ToneConfig

    def __init__(self, config):
        super().__init__()
        self.width = config.width
        self.processor = ToneProcessor(config.frame)
        self.stack = torch.nn.Sequential(torch.nn.Linear(config.frame, config.width), torch.nn.LayerNorm(config.width))

    def forward(self, frames_1SF):
        return self.stack(frames_1SF)

    def layers(self):
        return list(self.stack)
'''

PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "metalm-tones"
version = "1.0"

[project.entry-points."metalm.encoders"]
tones = "metalm_tones:ToneEncoder"

[tool.setuptools]
py-modules = ["metalm_tones"]
"""

USE = """
import sys

from metalm.encoders import ENCODERS
assert "metalm_tones" not in sys.modules, "a plug-in is imported only when asked for"
assert "tones" in ENCODERS.names()

import torch

from metalm.config import build
from metalm.errors import ConfigError
from metalm.model import MetaLM, MetaLMConfig
from metalm.segments import Document, Span, Text, make_batch
from metalm.testing import check_encoder

decoder = {"layers": 1, "width": 8, "heads": 2, "vocab_size": 9}
tones = {"type": "tones", "width": 6, "trainable": 1, "connector": {"type": "linear"}}
model = MetaLM(build(MetaLMConfig, {"decoder": decoder, "encoders": {"ear": tones}}, "run.yaml"))
document = Document([Span("ear", {"sound": [0.5] * 12}, 3), Text([1, 2])])
batch = make_batch([[document], [Document([Text([3, 4])])]], model.processors)
model(batch).backward()
print("trained:", [n for n, p in model.encoders["ear"].named_parameters() if p.grad is not None])
for key, value in {"type": "tone", "frames": 3}.items():
    try:
        build(MetaLMConfig, {"decoder": decoder, "encoders": {"ear": {**tones, key: value}}}, "run.yaml")
    except ConfigError as error:
        print(error)
check_encoder(model.encoders["ear"], [{"sound": [0.5] * 12}, {"sound": [0.25, 0.5] * 2}])
print("keeps the contract")
"""


def test_an_encoder_from_another_package(tmp_path):
    project, site = tmp_path / "project", tmp_path / "site"
    project.mkdir()
    (project / "metalm_tones.py").write_text(MODULE)
    (project / "pyproject.toml").write_text(PROJECT)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    subprocess.run([*install, "--target", str(site), str(project)], check=True)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    run = subprocess.run([sys.executable, "-c", USE], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [
        "trained: ['stack.1.weight', 'stack.1.bias']",
        "run.yaml: encoders.ear.type: no encoder is called 'tone'; did you mean 'tones'?",
        "run.yaml: unknown key 'encoders.ear.frames'; did you mean 'frame'?",
        "keeps the contract",
    ]
