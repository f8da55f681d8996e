"""A loaded model that answers prompts in batches: what every evaluation and `metalm generate` share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import track

from metalm.data.chat import answer_ends
from metalm.data.prompts import Interface
from metalm.errors import ConfigError
from metalm.inference.generate import GenerationConfig, batched, generate
from metalm.model import MetaLM
from metalm.pretrained import load_pretrained
from metalm.segments import Document


@dataclass
class Predictor:
    """Model, interface, and how to generate. In float32 (the default) predictions do not depend on the batch size."""

    model: MetaLM
    interface: Interface
    generation: GenerationConfig
    batch_size: int = 64

    @classmethod
    def load(
        cls,
        name: str | Path,
        generation: GenerationConfig,
        batch_size: int = 64,
        dtype: str = "float32",
        device: str = "",
    ) -> Predictor:
        """From an export, a run, or a Hub id; `device` empty takes the GPU if there is one.

        Raises:
            ConfigError: the model has no decoder to answer with.
        """
        if dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"dtype {dtype!r}: float32 or bfloat16")
        model, tokenizer = load_pretrained(name, getattr(torch, dtype))
        if not isinstance(model, MetaLM):
            raise ConfigError(f"{name} holds the model {model.config.type!r}, which has no decoder to answer with")
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        interface = Interface.of(model, tokenizer, model.config.decoder.max_positions)
        return cls(model, interface, generation, batch_size)

    def __call__(self, prompts: Sequence[Document], what: str = "") -> list[str]:
        """The answer to each prompt, stripped; `what` names the work on the progress bar."""
        tokenizer = self.interface.tokenizer
        limit = self.model.config.decoder.max_positions - self.generation.max_new_tokens
        for prompt in prompts:
            if self.model.config.decoder.positions == "learned" and len(prompt) > limit:
                raise ConfigError(f"prompt {prompt.key!r} of {len(prompt)} positions leaves no room for an answer")
        answers, ends = [""] * len(prompts), answer_ends(tokenizer)
        groups = list(batched(prompts, self.batch_size))
        for numbers in track(groups, what) if what else groups:
            outputs = generate(self.model, [prompts[n] for n in numbers], ends, self.generation)
            for n, tokens in zip(numbers, outputs):
                answers[n] = tokenizer.decode(tokens).strip()
        return answers
