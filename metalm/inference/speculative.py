"""Speculative decoding: a draft guesses some tokens, the model reads them all in one pass and keeps those that it would write.

    written   the cat                 the model's own
    draft              sat on my      guessed one by one, by a model of a fraction of the cost
    model              sat on the     read at once: a pass of few tokens takes hardly longer than one of a single token
    kept               sat on the     the agreed beginning, and the model's word where they part

What comes out is what the model alone would write greedily, whatever the draft says, as exactly as passes of one token and of
several round alike: in bfloat16, and with rounded weights, near ties may fall the other way. With a share a of guesses agreed
to, a pass keeps (1 - a^(g + 1)) / (1 - a) tokens for g guesses. The draft is a smaller run with the same tokenizer, or the
model's own first layers (`first_layers`). Rows of a batch go on together, as far as all of them agree: it is for few prompts.
Source: Leviathan et al. 2023 (arXiv 2211.17192), the greedy case.

Shapes: B rows, G guesses.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from metalm.errors import ConfigError
from metalm.inference.decoding import Decoding
from metalm.model import MetaLM
from metalm.segments import Document, Span


class Speculation:
    """Texts of a batch that a model and its draft go on with; `rounds` counts the model's passes after the prompts.

    Args:
        guesses: tokens that the draft guesses at a time.
    """

    def __init__(self, model: MetaLM, draft: MetaLM, prompts: Sequence[Document], max_new_tokens: int, guesses: int):
        sizes = [one.config.decoder.vocab_size for one in (model, draft)]
        if sizes[0] != sizes[1]:
            raise ConfigError(
                f"the model knows {sizes[0]} tokens, the draft {sizes[1]}: train the draft with the model's tokenizer"
            )
        spans = [span for prompt in prompts for span in prompt.segments if isinstance(span, Span)]
        for name in {span.encoder for span in spans}:
            if draft.processors.get(name) != model.processors[name]:
                raise ConfigError(f"the draft does not read {name!r} as the model does: take one with the same encoder")
        if any("states" in span.inputs and draft.encoders[span.encoder] is not model.encoders[span.encoder] for span in spans):
            raise ConfigError("stored states are the model's: a draft that is another run cannot read them")
        longest = max(map(len, prompts), default=0) + max_new_tokens + guesses
        for what, one in (("model", model), ("draft", draft)):
            if one.config.decoder.positions == "learned" and longest > one.config.decoder.max_positions:
                raise ConfigError(
                    f"prompt, answer and guesses take {longest} places, the {what} has {one.config.decoder.max_positions}: "
                    "ask for fewer new tokens or guesses, or go without a draft"
                )
        self.guesses, self.rounds = guesses, 0
        self.model, self.draft = (Decoding(one, prompts, 1, max_new_tokens + guesses) for one in (model, draft))
        self.tokens_BT = self.model.logits_BV.argmax(-1, keepdim=True)  # the last ones written, which the draft has not read

    def go_on(self, open_rows: Sequence[int]) -> Tensor:
        """One round; the new tokens [B, 1 .. G + 1], of which those of `open_rows` all count."""
        self.rounds += 1
        guesses_BG = self.guess()
        start = self.model.cache.length
        best_BG = self.model.read(torch.cat([self.tokens_BT[:, -1:], guesses_BG], dim=1)).argmax(-1)
        agreed = int(self.agreed(best_BG, guesses_BG)[list(open_rows)].min())
        self.model.rewind(start + 1 + agreed)
        new = best_BG[:, : agreed + 1]
        unread = agreed + 1 - (self.draft.cache.length - start - 1) if agreed == self.guesses else 1
        self.draft.rewind(min(self.draft.cache.length, start + 1 + agreed))
        self.tokens_BT = new[:, -unread:]
        return new

    def agreed(self, best_BG: Tensor, guesses_BG: Tensor) -> Tensor:
        """How many of its guesses each row takes, int64 [B], of `best_BG`, which has one more."""
        return (best_BG[:, :-1] == guesses_BG).cumprod(1).sum(1)

    def guess(self) -> Tensor:
        """What the draft writes, [B, G]; it does not read its last guess."""
        token_B1 = self.draft.read(self.tokens_BT)[:, -1:].argmax(-1)
        guesses = [token_B1]
        while len(guesses) < self.guesses:
            token_B1 = self.draft.read(token_B1)[:, -1:].argmax(-1)
            guesses.append(token_B1)
        return torch.cat(guesses, dim=1)


@torch.inference_mode()
def speculate(
    model: MetaLM, draft: MetaLM, prompts: Sequence[Document], ends: Collection[int], max_new_tokens: int, guesses: int = 4
) -> list[list[int]]:
    """The model's greedy continuation of each prompt, without the end token.

    Raises:
        ConfigError: the draft has another vocabulary.
    """
    speculation = Speculation(model, draft, prompts, max_new_tokens, guesses)
    outputs: list[list[int]] = [[] for _ in prompts]
    open_rows, new_BT, length = list(range(len(prompts))), speculation.tokens_BT, 0
    while True:
        length += new_BT.shape[1]
        for row, tokens in zip(list(open_rows), new_BT[open_rows].tolist()):
            end = next((n for n, token in enumerate(tokens) if token in ends), None)
            outputs[row] += tokens[:end]
            if end is not None:
                open_rows.remove(row)
        if not open_rows or length >= max_new_tokens:
            return [tokens[:max_new_tokens] for tokens in outputs]
        new_BT = speculation.go_on(open_rows)


def first_layers(model: MetaLM, layers: int) -> MetaLM:
    """A draft of the model's own first layers, under its own last norm and softmax; the weights are shared.

    Raises:
        ConfigError: the model does not have more layers than that.
    """
    config = model.config.decoder
    if not 1 <= layers < config.layers:
        raise ConfigError(
            f"a draft of {layers} layers: the model has {config.layers}, a draft 1 to {config.layers - 1} of them"
        )
    draft, draft.decoder, stack = (shallow(part) for part in (model, model.decoder, model.decoder.transformer))
    draft.decoder.transformer = stack
    stack.blocks = stack.blocks[:layers]
    windows = config.windows[:layers]
    local = config.local_rotary_base if any(windows) else 0.0
    fewer = replace(config, layers=layers, window=windows, local_rotary_base=local)
    draft.config, draft.decoder.config, stack.config = replace(model.config, decoder=fewer), fewer, fewer
    return draft


def shallow(module: nn.Module) -> nn.Module:
    """A module of its own with the same parts."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin
