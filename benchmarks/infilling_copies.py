"""Calls that infilling takes where the model is confident: holes in lines whose copies stand left and right of them.

    python -m benchmarks.infilling_copies [--steps 2000] [--holes 500] [--threads 1]

    <s>  7 3 9 5  #  7 [3 9] 5  #  7 3 9 5  </s>      a line of random tokens three times, the hole in the middle one

The lines are new: drawn at random, 24 to 40 tokens of 200, none is ever seen twice. What is learnt is to copy, from the left
and from the right. Calls of the model, one after another, are those that a hole takes; left to right it takes one a token and
one for the context. Bar: at most 0.6 times as many.
"""

from __future__ import annotations

import argparse
import random
import time

import torch

from metalm.config import build
from metalm.inference.generate import batched
from metalm.inference.infill import Hole, InfillConfig, infill
from metalm.objectives.mim import MIM, MIMConfig

START, END, R2L, LINE_END, FIRST, VOCABULARY = 0, 1, 2, 3, 4, 204


def make_line(rng: random.Random) -> list[int]:
    return [rng.randrange(FIRST, VOCABULARY) for _ in range(rng.randint(24, 40))]


def make_hole(rng: random.Random) -> tuple[Hole, list[int]]:
    """Context and answer; the hole has 16 to 24 tokens."""
    line = make_line(rng)
    length = rng.randint(16, 24)
    start = rng.randint(0, len(line) - length)
    middle = line[start : start + length]
    return Hole([*line, LINE_END, *line[:start]], [*line[start + length :], LINE_END, *line, END]), middle


def train(model: MIM, steps: int, rng: random.Random, rows: int = 24) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    warm_up_then_down = lambda step: min(1.0, (step + 1) / 100) * (1 - step / steps)  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_up_then_down)
    start = time.monotonic()
    for step in range(1, steps + 1):
        lines = [make_line(rng) for _ in range(rows)]
        texts = [[START, *line, LINE_END, *line, LINE_END, *line, END] for line in lines]
        batch = model.layout.collate([[model.layout.lay_out(text, rng, "")] for text in texts], 0)
        loss = model(batch) / batch.num_targets
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % max(1, steps // 10) == 0:
            print(f"step {step:,}  loss {loss.item():.3f}  {time.monotonic() - start:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.infilling_copies", description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--holes", type=int, default=500)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    decoder = {"layers": 3, "width": 96, "heads": 6, "vocab_size": VOCABULARY, "positions": "rotary", "max_positions": 256}
    model = MIM(build(MIMConfig, {"decoder": decoder, "r2l_token": R2L}, "benchmark"))
    rng = random.Random(0)
    train(model.train(), arguments.steps, rng)
    holes = [make_hole(rng) for _ in range(arguments.holes)]
    for name, config in (
        ("from both sides", InfillConfig(max_new_tokens=48, ngram=2)),
        ("left to right", InfillConfig(max_new_tokens=48, ngram=2, forward_only=True)),
    ):
        found, middles = [], []
        for group in batched([hole for hole, _ in holes], 50):
            found += infill(model.eval(), [holes[n][0] for n in group], START, END, config)[0]
            middles += [holes[n][1] for n in group]
        calls = sum(one.calls for one in found)
        right = sum(one.tokens == middle for one, middle in zip(found, middles)) / len(found)
        by_token = sum(len(middle) + 1 for middle in middles)
        print(f"{name:15s} {calls:6,d} calls, {calls / by_token:.2f} of one a token; {right:.1%} of the holes right")


if __name__ == "__main__":
    main()
