"""The character benchmark, against a stand-in with nanoGPT's interface: users bring their own checkout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import nanogpt
from metalm.errors import DataError

BIGRAMS = """
from dataclasses import dataclass
import torch
from torch import nn

@dataclass
class GPTConfig:
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    bias: bool
    dropout: float

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.table = nn.Embedding(config.vocab_size, config.vocab_size)

    def configure_optimizers(self, weight_decay, lr, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=lr, betas=betas, weight_decay=weight_decay)

    def forward(self, x, y):
        logits = self.table(x)
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
"""
TEXT = "abab abba " * 400


@pytest.fixture
def checkout(tmp_path) -> Path:
    (tmp_path / "model.py").write_text(BIGRAMS)
    return tmp_path


def test_the_peers_loop_trains_and_scores_the_last_tenth(checkout):
    short, long = (nanogpt.peer(checkout, TEXT, steps) for steps in (1, 300))
    assert long["val_loss"] < short["val_loss"] - 0.05 and 0 < short["seconds"] < long["seconds"]


def test_the_score_is_the_mean_over_all_characters(checkout):
    model = nanogpt.load_model_file(checkout).GPT(nanogpt.load_model_file(checkout).GPTConfig(4, **nanogpt.SHAPE))
    data = torch.randint(4, (64 * 70 + 1,))
    expected = model(data[None, :-1], data[None, 1:])[1]
    assert nanogpt.validation_loss(model, data, 64) == pytest.approx(expected.item(), rel=1e-5)


def test_ours_is_a_run_of_the_bundled_configuration(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    result = nanogpt.ours(text, 50, threads=1)
    assert 0 < result["val_loss"] < 4 and result["seconds"] > 0


def test_no_checkout(tmp_path):
    with pytest.raises(DataError, match=r"model\.py: there is no such file"):
        nanogpt.load_model_file(tmp_path)
