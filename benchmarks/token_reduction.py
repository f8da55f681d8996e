"""What fewer tokens save: image towers that merge patches, and decoders that see a window only.

    python -m benchmarks.token_reduction [towers] [decoder] [--rounds 5] [--threads 1]

Images/s of timm's ViT-S/16 at 224 x 224 pixels (196 patches and a class token, random weights) by the tokens that each of its
12 layers merges, forward alone and with the backward pass; and tokens/s of a decoder's training steps (8 layers, 512 wide, one
row of 1,024 tokens, AdamW with float32 master weights) by its window. bfloat16; all settings interleaved in one process,
medians over rounds, in wall-clock and in processor time, which other load on the machine hardly touches (with `--threads 1`).
Times alone: what it costs in accuracy is `python -m benchmarks.token_reduction_accuracy`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median

import torch

from benchmarks.mixed_precision import MasterAdamW
from benchmarks.train_step import seconds
from metalm.config import build
from metalm.encoders.timm_tower import TimmConfig, TimmEncoder
from metalm.model import MetaLM, MetaLMConfig
from metalm.segments import Document, Text, make_batch

MERGES = (0, 4, 8, 13, 16)
WINDOWS = (0, 256, 128)
PICTURES, ROWS, LENGTH, VOCABULARY = 4, 1, 1024, 8192


def make_tower(merge: int) -> TimmEncoder:
    torch.manual_seed(0)
    values = {"type": "timm", "name": "vit_small_patch16_224", "merge": merge}
    return TimmEncoder(build(TimmConfig, values, "benchmark")).bfloat16()


def forward(tower: TimmEncoder, pixels_N3HW: torch.Tensor) -> Callable[[], None]:
    def step() -> None:
        with torch.no_grad():
            tower(pixels_N3HW)

    return step


def forward_and_backward(tower: TimmEncoder, pixels_N3HW: torch.Tensor) -> Callable[[], None]:
    def step() -> None:
        tower(pixels_N3HW).float().square().mean().backward()
        tower.zero_grad()

    return step


def training_step(window: int) -> Callable[[], None]:
    torch.manual_seed(0)
    decoder = {"layers": 8, "width": 512, "heads": 8, "positions": "rotary", "vocab_size": VOCABULARY, "window": window}
    model = MetaLM(build(MetaLMConfig, {"decoder": decoder}, "benchmark")).bfloat16().train()
    rows = [[Document([Text(torch.randint(VOCABULARY, (LENGTH,)).tolist())])] for _ in range(ROWS)]
    batch = make_batch(rows, {})
    optimizer = MasterAdamW(model, lr=1e-4)

    def step() -> None:
        (model(batch) / batch.num_targets).backward()
        optimizer.step()

    return step


def rates(steps: dict[int, Callable[[], None]], amount: int, rounds: int) -> dict[int, dict[str, float]]:
    """What each setting does a second, and its speed over the first setting's in the same round."""
    for step in steps.values():
        step()
    taken: dict[int, list[tuple[float, float]]] = {setting: [] for setting in steps}
    for number in range(rounds):
        for setting in steps if number % 2 else reversed(steps):
            taken[setting].append(seconds(steps[setting], 1))
    plain = taken[next(iter(steps))]
    return {
        setting: {
            "rate": median(amount / wall for wall, _ in own),
            "ratio": median(other / wall for (wall, _), (other, _) in zip(own, plain)),
            "cpu_ratio": median(other / cpu for (_, cpu), (_, other) in zip(own, plain)),
        }
        for setting, own in taken.items()
    }


def show(title: str, measured: dict[int, dict[str, float]], label: Callable[[int], str], unit: str) -> None:
    print(title)
    for setting, result in measured.items():
        print(
            f"  {label(setting):28s} {result['rate']:8,.1f} {unit}  x {result['ratio']:.2f}  "
            f"x {result['cpu_ratio']:.2f} in processor time"
        )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.token_reduction", description=__doc__.partition("\n")[0])
    parser.add_argument("what", nargs="*", default=["towers", "decoder"], help="towers, decoder, or both")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's default")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if "towers" in arguments.what:
        time_towers(arguments.rounds)
    if "decoder" in arguments.what:
        steps = {window: training_step(window) for window in WINDOWS}
        measured = rates(steps, ROWS * LENGTH, arguments.rounds)
        show(f"decoder, training, rows of {LENGTH}", measured, lambda window: f"window {window or 'none'}", "tokens/s")


def time_towers(rounds: int) -> None:
    towers = {merge: make_tower(merge) for merge in MERGES}
    pixels = torch.randint(256, (PICTURES, 3, 224, 224), dtype=torch.uint8)

    def merged(merge: int) -> str:
        return f"merge {merge}: {towers[merge].processor.row_states} states"

    for title, make in (("ViT-S/16, forward", forward), ("ViT-S/16, forward and backward", forward_and_backward)):
        steps = {merge: make(tower, pixels) for merge, tower in towers.items()}
        show(title, rates(steps, PICTURES, rounds), merged, "images/s")


if __name__ == "__main__":
    main()
