"""Text from prompts: greedy, sampling, and beam search over a key-value cache, for unequal prompts in one batch.

Sampling draws from a generator of its own for each prompt, so what comes out does not depend on the batch. Rows that have
ended leave it, and beams of a prompt hold its keys and values where they were: only their own words are reordered.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence, Sized
from dataclasses import dataclass

import torch
from torch import Tensor

from metalm.errors import ConfigError
from metalm.inference.decoding import Decoding
from metalm.inference.speculative import speculate
from metalm.model import MetaLM
from metalm.segments import Document

OPEN_ROWS = 0.75  # of a batch; where fewer still go on, they go on without the others


@dataclass
class GenerationConfig:
    """`num_beams` > 1 searches, `temperature` > 0 samples (within the nucleus of mass `top_p`), else greedy.

    A beam's score is its log-probability divided by length ** `length_penalty`. `guesses` are the tokens that a draft guesses
    at a time, where there is one (`metalm.inference.speculative`).
    """

    max_new_tokens: int = 32
    num_beams: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    length_penalty: float = 1.0
    seed: int = 0
    guesses: int = 4

    def __post_init__(self):
        if self.max_new_tokens < 1 or self.num_beams < 1 or self.guesses < 1:
            raise ConfigError("max_new_tokens, num_beams and guesses must be at least 1")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ConfigError("temperature must not be negative and top_p must be in (0, 1]")
        if self.num_beams > 1 and self.temperature > 0:
            raise ConfigError("beam search does not sample: set num_beams=1 or temperature=0")


@torch.inference_mode()
def generate(
    model: MetaLM,
    prompts: Sequence[Document],
    end: int | Collection[int],
    config: GenerationConfig | None = None,
    draft: MetaLM | None = None,
) -> list[list[int]]:
    """New tokens of each prompt, without the end token.

    Args:
        prompts: documents to continue; see `metalm.data.prompts.Interface`.
        end: the token that ends a turn, or several that do.
        draft: guesses what the model is to write greedily: the same text, sooner.
    """
    config = config or GenerationConfig()
    ends = {end} if isinstance(end, int) else set(end)
    if any(len(prompt) == 0 for prompt in prompts):
        raise ConfigError("an empty prompt cannot be continued: give it an image or a text")
    if not prompts:
        return []
    if draft is not None and (config.num_beams > 1 or config.temperature > 0):
        raise ConfigError("a draft is for greedy text: set num_beams=1 and temperature=0, or leave it out")
    if draft is not None:
        return speculate(model, draft, prompts, ends, config.max_new_tokens, config.guesses)
    if config.num_beams > 1:
        return beam_search(model, prompts, ends, config)
    decoding = Decoding(model, prompts, 1, config.max_new_tokens)
    generators = [torch.Generator().manual_seed(config.seed) for _ in prompts]
    outputs: list[list[int]] = [[] for _ in prompts]
    done = [False] * len(prompts)
    rows = list(range(len(prompts)))  # the prompts that are in the batch
    for n in range(config.max_new_tokens):
        if config.temperature > 0:
            tokens_B = sample(decoding.logits_BV, config.temperature, config.top_p, [generators[row] for row in rows])
        else:
            tokens_B = decoding.logits_BV.argmax(dim=-1)
        for row, token in zip(rows, tokens_B.tolist()):
            done[row] = done[row] or token in ends
            if not done[row]:
                outputs[row].append(token)
        places = [place for place, row in enumerate(rows) if not done[row]]
        if not places or n == config.max_new_tokens - 1:
            break
        if len(places) < OPEN_ROWS * len(rows):
            kept = torch.tensor(places, device=tokens_B.device)
            decoding.keep_rows(kept)
            tokens_B, rows = tokens_B[kept], [rows[place] for place in places]
        decoding.step(tokens_B)
    return outputs


def sample(logits_BV: Tensor, temperature: float, top_p: float, generators: list[torch.Generator]) -> Tensor:
    """One token a row from the smallest set of tokens whose probability reaches `top_p`: int64 [B]."""
    sorted_BV, order_BV = (logits_BV / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    before = sorted_BV.cumsum(-1) - sorted_BV
    kept = sorted_BV.masked_fill(before >= top_p, 0.0).cpu()
    ranks = torch.cat([torch.multinomial(row, 1, generator=g) for row, g in zip(kept, generators)])
    return order_BV.gather(1, ranks[:, None].to(order_BV.device)).squeeze(1)


def beam_search(model: MetaLM, prompts: Sequence[Document], ends: set[int], config: GenerationConfig) -> list[list[int]]:
    """The best-scoring continuation of each prompt.

    Each step keeps the `num_beams` best open beams; a beam that ends is set aside with its score. A prompt is done when
    none of its open beams can still beat its best ended one.
    """
    N, W = len(prompts), config.num_beams
    decoding = Decoding(model, prompts, W, config.max_new_tokens)
    device = decoding.logits_BV.device
    scores_NW = torch.full((N, W), float("-inf"), device=device)
    scores_NW[:, 0] = 0  # all beams are equal at first: only one counts
    texts: list[list[list[int]]] = [[[] for _ in range(W)] for _ in range(N)]
    ended: list[list[tuple[float, list[int]]]] = [[] for _ in range(N)]
    for length in range(1, config.max_new_tokens + 1):
        logp = decoding.logits_BV.log_softmax(-1).view(N, W, -1)
        V = logp.shape[-1]
        totals = (scores_NW[:, :, None] + logp).flatten(1)
        # Twice as many candidates as beams: even if W of them end, W stay open.
        best, index = totals.topk(min(2 * W, totals.shape[1]), dim=1)
        rows, tokens, new_texts = [], [], []
        scores_NW = torch.full_like(scores_NW, float("-inf"))
        for n, (values, choices) in enumerate(zip(best.tolist(), index.tolist())):
            open_beams: list[tuple[float, int, int]] = []
            for value, choice in zip(values, choices):
                beam, token = divmod(choice, V)
                if token in ends:
                    ended[n].append((value / length**config.length_penalty, texts[n][beam]))
                elif len(open_beams) < W:
                    open_beams.append((value, beam, token))
            open_beams += [(float("-inf"), 0, 0)] * (W - len(open_beams))
            scores_NW[n] = torch.tensor([value for value, _, _ in open_beams], device=device)
            new_texts.append([[*texts[n][beam], token] for _, beam, token in open_beams])
            rows += [n * W + beam for _, beam, _ in open_beams]
            tokens += [token for _, _, token in open_beams]
        texts = new_texts
        if length == config.max_new_tokens or all(_is_done(ended[n], float(scores_NW[n, 0]), length, config) for n in range(N)):
            break
        decoding.reorder_beams(torch.tensor(rows, device=device))
        decoding.step(torch.tensor(tokens, device=device))
    for n in range(N):  # beams cut off by the length limit compete as they are
        for score, text in zip(scores_NW[n].tolist(), texts[n]):
            if score > float("-inf"):
                ended[n].append((score / len(text) ** config.length_penalty, text))
    return [max(found, key=lambda pair: pair[0])[1] for found in ended]


def _is_done(ended: list[tuple[float, list[int]]], best_open: float, length: int, config: GenerationConfig) -> bool:
    """No open beam can win: log-probabilities only fall, so its score is bounded by the longest length it may reach."""
    if not ended:
        return False
    longest = config.max_new_tokens if config.length_penalty > 0 else length
    return max(score for score, _ in ended) >= best_open / longest**config.length_penalty


def batched(prompts: Sequence[Sized], size: int) -> Iterator[list[int]]:
    """Numbers of prompts, or of what else has a length, in batches of similar length, longest first: little is padded."""
    order = sorted(range(len(prompts)), key=lambda n: -len(prompts[n]))
    for start in range(0, len(order), size):
        yield order[start : start + size]
