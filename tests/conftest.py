"""Fixtures that several test files share."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

# Tests run without a network; a hub look-up in a test would be a defect.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

CHECKOUT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(CHECKOUT))  # benchmarks are no part of the installed package


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real data (`data/flickr8k`, …), which users do not have: tests on it skip where it is missing."""
    folder = Path(os.environ.get("METALM_SHARED", CHECKOUT.parent / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"real data not found at {folder}: set METALM_SHARED to the folder that holds data/")
    return folder


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    """A small embedded world: 64 pretraining pictures, texts and question texts, and the evaluation sets."""
    from metalm.data.scenes import write_scenes

    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, seed=1, size=64)
    return folder


@pytest.fixture(scope="session")
def tiny_yaml(tmp_path_factory, scenes) -> Path:
    """A run of a tiny model on the small world, a second or two long; override what a test needs."""
    path = tmp_path_factory.mktemp("configs") / "tiny.yaml"
    path.write_text(
        f"""
out: runs/tiny
tokenizer: {{vocab_size: 400}}
model:
  decoder: {{layers: 1, width: 32, heads: 2, max_positions: 192}}
  encoders:
    fused:
      type: fused
      layers: 1
      width: 32
      heads: 2
      image_size: 48
      patch_size: 16
      max_positions: 128
      connector: {{type: linear}}
data:
  row_length: 160
  rows: 4
  block: 32
  workers: 1
  train:
    - {{shards: "{scenes}/images", task: image_text}}
    - {{shards: "{scenes}/questions", task: vqa}}
training: {{steps: 6, lr: 1.0e-3, warmup: 2, log_every: 1, checkpoint_every: 2, precision: float32}}
"""
    )
    return path
