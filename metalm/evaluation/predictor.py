"""A loaded model that answers prompts in batches: what every evaluation and `metalm generate` share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from rich.progress import track

from metalm.data.chat import answer_ends
from metalm.data.prompts import Interface
from metalm.data.tokenizer import Tokenizer
from metalm.errors import ConfigError, DataError
from metalm.fingerprint import fingerprints
from metalm.inference.generate import GenerationConfig, batched, generate
from metalm.inference.rank import score_choices
from metalm.inference.speculative import first_layers
from metalm.model import MetaLM
from metalm.nn.linear import Weights
from metalm.pretrained import load_pretrained
from metalm.segments import Document


@dataclass
class Predictor:
    """Model, interface, and how to generate. In float32 (the default) predictions do not depend on the batch size.

    A `draft` speeds greedy text up and changes nothing else (`metalm.inference.speculative`).
    """

    model: MetaLM
    interface: Interface
    generation: GenerationConfig
    batch_size: int = 64
    draft: MetaLM | None = None

    @classmethod
    def load(
        cls,
        name: str | Path,
        generation: GenerationConfig,
        batch_size: int = 64,
        dtype: str = "float32",
        device: str = "",
        draft: str = "",
        compiled: bool = False,
    ) -> Predictor:
        """From an export, a run, or a Hub id; `device` empty takes the GPU if there is one.

        Args:
            dtype: float32, bfloat16, or int8 or int4: the decoder's weights rounded to it (`metalm.nn.linear`), all else
                bfloat16; or w8a8: products of integers. On a CPU bfloat16 holds each weight twice, in 4 bytes.
            draft: another run with the same tokenizer, or how many of the model's first layers, that guess ahead.
            compiled: has torch.compile make steps of decoding faster, for half a minute or so at the first; it may hold further
                copies of the weights (`metalm.nn.linear`).

        Raises:
            ConfigError: the model has no decoder to answer with, or the draft is of another vocabulary; or `compiled`
                finds no C++ compiler on a CPU.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model, tokenizer = load_decoding(name, dtype, device, compiled)
        # The draft's layers are taken from what is laid out for inference, and another run is laid out in its turn.
        guesser = None
        if draft:
            own = draft.isdecimal()
            guesser = first_layers(model, int(draft)) if own else load_decoding(draft, dtype, device, compiled)[0]
        interface = Interface.of(model, tokenizer, model.config.decoder.max_positions)
        interface.fingerprints = fingerprints(model)
        return cls(model, interface, generation, batch_size, guesser)

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
            outputs = generate(self.model, [prompts[n] for n in numbers], ends, self.generation, self.draft)
            for n, tokens in zip(numbers, outputs):
                answers[n] = tokenizer.decode(tokens).strip()
        return answers

    def rank(self, prompts: Sequence[Document], choices: Sequence[Sequence[str]], what: str = "") -> list[list[float]]:
        """log p in nats of each answer of each prompt, from its first word to the end of the turn (`metalm.inference.rank`)."""
        rooms = [self.interface.room(list(prompt.segments)) for prompt in prompts]
        tokens = [[self.interface.turn(choice, room) for choice in own] for own, room in zip(choices, rooms)]
        if any(choice[-1] != self.interface.tokenizer.end for own in tokens for choice in own):
            raise DataError("an answer to be ranked does not fit behind its prompt: shorten the prompt, or the answers")
        scores: list[list[float]] = [[] for _ in prompts]
        groups = list(batched(prompts, self.batch_size))
        for numbers in track(groups, what) if what else groups:
            found = score_choices(self.model, [prompts[n] for n in numbers], [tokens[n] for n in numbers])
            for n, own in zip(numbers, found):
                scores[n] = own
        return scores


def load_decoding(name: str | Path, dtype: str, device: str, compiled: bool = False) -> tuple[MetaLM, Tokenizer]:
    """A model whose decoder is laid out for inference, and its tokenizer."""
    rounded = [weights for weights in get_args(Weights) if weights != "as they are"]
    if dtype not in ("float32", "bfloat16", *rounded):
        raise ConfigError(f"dtype {dtype!r}: float32, bfloat16, {', '.join(rounded)}")
    model, tokenizer = load_pretrained(name, torch.float32 if dtype == "float32" else torch.bfloat16)
    if not isinstance(model, MetaLM):
        raise ConfigError(f"{name} holds the model {model.config.type!r}, which has no decoder to answer with")
    model.to(device)
    model.decoder.prepare_for_inference(dtype if dtype in rounded else "as they are", compiled)
    return model, tokenizer
