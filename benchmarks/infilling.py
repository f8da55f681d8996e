"""What it saves to fill holes side by side: holes in batches of similar length against the same holes one by one.

    python -m benchmarks.infilling [--holes 64] [--batch 16] [--rounds 3] [--threads 1]

The decoder, 8 layers 320 wide with a vocabulary of 4,096, runs as it is, but what it says is replaced by a text that both
sides know by heart, save `--noise` of the backward side's tokens, which are wrong: a trained model's course, without training.
Seconds are of processor time.
"""

from __future__ import annotations

import argparse
import random
import time

import torch

from metalm.config import build
from metalm.inference.generate import batched
from metalm.inference.infill import Filling, Hole, InfillConfig, Infilling, side_by_side
from metalm.inference.readings import Readings
from metalm.objectives.mim import MIM, MIMConfig

START, END, R2L, VOCABULARY, LONGEST = 0, 1, 2, 4096, 60


class Recited(Readings):
    """Readings whose predictions are replaced by what `said[hole][side]` lists, from the end of the context on."""

    def __init__(self, model: MIM, holes: list[Hole], said: list[tuple[list[int], list[int]]]):
        super().__init__(model, len(holes), max(map(len, holes)) + 1 + 2 * LONGEST)
        self.said = said
        self.contexts = [(1 + len(hole.prefix), 1 + len(hole.suffix)) for hole in holes]

    def __call__(self, requests):
        replies = super().__call__(requests)
        for hole, request in requests.items():
            for side, reading in enumerate(request):
                if reading:
                    after = reading.first + len(reading.tokens) - self.contexts[hole][side]
                    words = self.said[hole][side][after - reading.predict + 1 : after + 1]
                    replies[hole][side].zero_()[range(reading.predict), words] = 20.0
        return replies


def make_holes(number: int, noise: float) -> tuple[list[Hole], list[tuple[list[int], list[int]]]]:
    """Holes of 8 to 48 tokens between contexts of 20 to 120, and what either side says in them."""
    rng = random.Random(0)
    words = lambda low, high: [rng.randrange(10, VOCABULARY) for _ in range(rng.randint(low, high))]  # noqa: E731
    holes, said = [], []
    for _ in range(number):
        hole, middle = Hole(words(20, 120), words(20, 120)), words(8, 48)
        heard = [rng.randrange(10, VOCABULARY) if rng.random() < noise else token for token in middle]
        holes.append(hole)
        said.append(([*middle, *hole.suffix, *[END] * 100], [*heard[::-1], *hole.prefix[::-1], *[START] * 100]))
    return holes, said


@torch.inference_mode()
def fill(model: MIM, holes: list[Hole], said: list) -> tuple[list[Infilling], int]:
    readings = Recited(model, holes, said)
    config = InfillConfig(max_new_tokens=LONGEST)
    return side_by_side(
        [Filling(hole, (END, START), R2L, config).steps() for hole in holes], readings, readings.drop
    ), readings.calls


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.infilling", description=__doc__.partition("\n")[0])
    parser.add_argument("--holes", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--noise", type=float, default=0.05)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    decoder = {"layers": 8, "width": 320, "heads": 5, "vocab_size": VOCABULARY, "positions": "rotary"}
    model = MIM(build(MIMConfig, {"decoder": decoder, "r2l_token": R2L}, "benchmark")).eval()
    holes, said = make_holes(arguments.holes, arguments.noise)
    times: dict[str, list[float]] = {"one by one": [], "side by side": []}
    calls, found = {}, {}
    for _ in range(arguments.rounds):
        for name, size in (("one by one", 1), ("side by side", arguments.batch)):
            groups = list(batched(holes, size))
            start = time.process_time()
            filled = [fill(model, [holes[n] for n in group], [said[n] for n in group]) for group in groups]
            times[name].append(time.process_time() - start)
            calls[name], found[name] = sum(count for _, count in filled), {}
            for group, (filled_group, _) in zip(groups, filled):
                found[name] |= dict(zip(group, filled_group))
    assert found["one by one"] == found["side by side"]
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters, {len(holes)} holes, ", end="")
    print(f"{sum(len(one.tokens) for one in found['one by one'].values())} tokens, threads: {arguments.threads}")
    for name, seconds in times.items():
        print(f"{name:14s} {min(seconds):7.2f} s   {calls[name]:5d} calls")
    print(f"{min(times['one by one']) / min(times['side by side']):.1f} times as fast")


if __name__ == "__main__":
    main()
