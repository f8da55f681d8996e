"""Small random models whose predictions differ, and unequal prompts for them."""

from __future__ import annotations

import torch

from metalm.config import build
from metalm.data.prompts import Interface
from metalm.model import MetaLM, MetaLMConfig
from metalm.segments import Document, Text


def tiny_model(vocab_size: int, **decoder) -> MetaLM:
    torch.manual_seed(0)
    text = {"type": "text", "layers": 1, "width": 16, "heads": 2, "vocab_size": vocab_size, "connector": {"type": "linear"}}
    values = {
        "decoder": {"layers": 2, "width": 32, "heads": 4, "vocab_size": vocab_size, **decoder},
        "encoders": {"text": text},
    }
    model = MetaLM(build(MetaLMConfig, values, "test")).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # far from uniform predictions
            parameter.mul_(2).add_(torch.randn_like(parameter) * 0.1)
    return model


def unequal_prompts(model: MetaLM) -> list[Document]:
    """Text alone, a span alone, both."""
    interface = Interface(None, model.processors, {"text": model.config.encoders["text"].connector}, 64)
    return [
        Document([Text([5, 6, 7, 8, 9, 10, 11], target=False)]),
        Document([interface.read_tokens([3, 4])]),
        Document([Text([1], target=False), interface.read_tokens([12, 13, 14]), Text([2], target=False)]),
    ]
