"""How the cost of a training step grows with length, images, rows, vocabulary, processes and GPUs: a table and a plot.

    python -m benchmarks.growth [--rounds 3] [--threads 2] [--longest 16384] [--out runs/bench]

A small model (ViT of 4 layers, 192 wide; decoder of 4 layers, 256 wide), bfloat16, forward and backward, one quantity at a
time, the others held. `each` is the time a position (a text's, an image's, a target's): where it leaves the least of its curve
by half, growth has ceased to be linear. Processes, with a thread and 24 full rows each, train the demo's model under each ZeRO
stage: what share of twice one process's positions/s two reach. The curve of GPUs is no measurement but `zero_efficiency`, for a
step of `--parameters` and `--positions` a GPU at `--gpu-rate`, of which it reaches the largest share that one process reached
of this machine's matrix rate: the sooner a step is done, the more of its time is waiting.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from metalm.config import build
from metalm.model import MetaLM, MetaLMConfig
from metalm.nn.losses import linear_cross_entropy
from metalm.segments import Batch, Document, Span, Text, make_batch

PATCHES, SIDE, VOCABULARY = 64, 128, 8192
NODE = 8  # GPUs that NVLink joins


def build_small() -> MetaLM:
    torch.manual_seed(0)
    stack = {"norm": "rms", "mlp": "swiglu", "positions": "rotary", "bias": False}
    vit = {"type": "vit", "layers": 4, "width": 192, "heads": 3, "image_size": SIDE, "patch_size": 16}
    config = {
        "decoder": {"layers": 4, "width": 256, "heads": 4, "vocab_size": VOCABULARY, **stack},
        "encoders": {"image": {**vit, "connector": {"type": "linear"}}},
    }
    return MetaLM(build(MetaLMConfig, config, "benchmark")).bfloat16()


def text(length: int) -> Text:
    return Text(torch.randint(VOCABULARY, (length,)).tolist())


def image() -> Span:
    return Span("image", {"image": torch.randint(256, (3, SIDE, SIDE), dtype=torch.uint8)}, PATCHES)


def seconds(step: Callable[[], None], rounds: int) -> float:
    step()
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        step()
        taken.append(time.perf_counter() - start)
    return median(taken)


def model_step(model: MetaLM, rows: list[list[Document]], length: int) -> tuple[Callable[[], None], int]:
    """A step on these rows, and its positions."""
    batch: Batch = make_batch(rows, model.processors, length)

    def step() -> None:
        (model(batch) / batch.num_targets).backward()
        model.zero_grad()

    return step, batch.num_positions


def curves(longest: int) -> Iterator[tuple[str, str, Callable[[int], tuple[Callable[[], None], int]], list[int]]]:
    """(name, what is counted, a maker of the step of a size and its number of positions, sizes)."""
    model = build_small()
    lengths = [length for length in (512, 1024, 2048, 4096, 8192, 16384) if length <= longest]

    def one_text(length: int):
        return model_step(model, [[Document([text(length)])]], length)

    def many_texts(length: int):
        return model_step(model, [[Document([text(128)]) for _ in range(length // 128)]], length)

    def images(count: int):
        segments = [part for _ in range(count) for part in (image(), text(16))]
        return model_step(model, [[Document(segments)]], count * (PATCHES + 16))

    def rows(count: int):
        return model_step(model, [[Document([image(), text(64)])] for _ in range(count)], PATCHES + 64)

    def vocabulary(size: int):
        hidden = torch.randn(2048, 256).bfloat16().requires_grad_()
        weight = torch.randn(size, 256).bfloat16().requires_grad_()
        targets = torch.randint(size, (2048,))
        return lambda: linear_cross_entropy(hidden, weight, targets).backward(), size

    yield "length of one text", "position", one_text, lengths
    yield "length of a row of texts of 128", "position", many_texts, lengths
    yield "images of a sample", "position", images, [1, 2, 4, 8, 16, 32]
    yield "rows", "position", rows, [1, 2, 4, 8, 16, 32]
    yield "vocabulary (the loss alone, 2,048 targets)", "word", vocabulary, [1024, 4096, 16384, 65536, 131072]


def measure(rounds: int = 3, longest: int = 16384) -> list[dict]:
    """A point a size of every curve: {curve, size, seconds, unit, each}."""
    points = []
    for name, unit, make, sizes in curves(longest):
        for size in sizes:
            step, positions = make(size)
            taken = seconds(step, rounds)
            points.append({"curve": name, "size": size, "seconds": taken, "unit": unit, "each": taken / positions})
            print(f"{name}: {size:,}  {taken:.3f} s", flush=True)
    return points


def processes(
    rounds: int, counts: tuple[int, ...] = (1, 2), stages: tuple[int, ...] = (0, 2, 3)
) -> tuple[dict[int, list[float]], float]:
    """By ZeRO stage the positions/s of so many processes together, each with a thread and 24 rows of its own; and the largest
    share of the matrix rate that one alone reached."""
    rates: dict[int, list[float]] = {stage: [] for stage in stages}
    shares = []
    for stage, count in ((stage, count) for stage in stages for count in counts):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
        run = ["-m", "benchmarks.mfu", "demo/pretrain.yaml", "data.rows=24", f"training.deepspeed=zero{stage}"]
        command = [*launcher, *run, f"--rounds={rounds}", "--steps=2"]
        out = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True, text=True)
        each = [float(rate.replace(",", "")) for rate in re.findall(r"([\d,]+) positions/s", out.stdout)]
        rates[stage].append(sum(each))
        shares += [float(share) / 100 for share in re.findall(r"= ([\d.]+)% of", out.stdout)] if count == 1 else []
        print(f"{count} processes, ZeRO-{stage}: {sum(each):,.0f} positions/s", flush=True)
    return rates, max(shares)


def gpu_seconds(parameters: float, positions: float, share: float, rate: float) -> float:
    """What a step takes: 6 FLOPs a parameter and position, at a share of the GPU's matrix rate in FLOP/s."""
    return 6 * parameters * positions / (share * rate)


def zero_efficiency(
    gpus: int, stage: int, parameters: float, step_seconds: float, inside: float = 450e9, between: float = 50e9
) -> float:
    """The share of its time that a GPU computes, when each has a step of its own and nothing overlaps: the worst case.

    A step moves 2 values a parameter under stages 0 to 2 (the gradients' reduce-scatter, an all-gather), 3 under stage 3,
    2 bytes each, all but 1 / gpus of them; through NVLink at `inside` bytes/s up to 8 GPUs, beyond through the network at
    `between`. Source: ZeRO (arXiv 1910.02054), section 7.
    """
    values = (3 if stage == 3 else 2) * parameters * (gpus - 1) / gpus
    communicated = 2 * values / (inside if gpus <= NODE else between)
    return step_seconds / (step_seconds + communicated)


def bends(points: list[dict]) -> dict[str, int | None]:
    """By curve the least size beyond its cheapest at which a position costs half as much again as there; None: nowhere."""
    found: dict[str, int | None] = {}
    for name in dict.fromkeys(point["curve"] for point in points):
        own = [point for point in points if point["curve"] == name]
        best = min(own, key=lambda point: point["each"])
        dear = [p["size"] for p in own if p["size"] > best["size"] and p["each"] > 1.5 * best["each"]]
        found[name] = min(dear, default=None)
    return found


def plot(points: list[dict], gpus: list[tuple[int, int, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for name in dict.fromkeys(point["curve"] for point in points):
        own = [point for point in points if point["curve"] == name]
        least = min(point["each"] for point in own)
        left.plot([p["size"] / own[0]["size"] for p in own], [p["each"] / least for p in own], marker="o", label=name)
    left.set(xscale="log", yscale="log", xlabel="size, of the first", ylabel="cost of a position, of the least")
    left.legend(fontsize=8, loc="upper left")
    for stage in sorted({stage for _, stage, _ in gpus}):
        own = [(count, share) for count, of, share in gpus if of == stage]
        right.plot(*zip(*own), marker="o", label=f"ZeRO-{stage}")
    right.set(xscale="log", ylim=(0, 1.02), xlabel="GPUs", ylabel="share of time computing (model, nothing overlaps)")
    right.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's default")
    parser.add_argument("--longest", type=int, default=16384)
    parser.add_argument("--parameters", type=float, default=1.3e9, help="of the model of the last curve")
    parser.add_argument("--positions", type=float, default=32768, help="of a step of it on each GPU")
    parser.add_argument("--gpu-rate", type=float, default=800e12, help="FLOP/s of a GPU's large matrix products")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    points = measure(arguments.rounds, arguments.longest)
    found: dict = {"points": points}
    (arguments.out / "growth.json").write_text(json.dumps(found, indent=1))
    rates, share = processes(arguments.rounds)
    step_seconds = gpu_seconds(arguments.parameters, arguments.positions, share, arguments.gpu_rate)
    gpus = [
        (count, stage, zero_efficiency(count, stage, arguments.parameters, step_seconds))
        for stage in (2, 3)
        for count in (8, 16, 32, 64, 128, 256, 512, 1024)
    ]
    plot(points, gpus, arguments.out / "growth.png")
    found |= {"processes": rates, "share": share, "step_seconds": step_seconds, "gpus": gpus}
    (arguments.out / "growth.json").write_text(json.dumps(found, indent=1))
    table = Table(title=f"{torch.get_num_threads()} threads")
    for column in ("curve", "size", "seconds", "each, µs"):
        table.add_column(column, justify="left" if column == "curve" else "right")
    for point in points:
        table.add_row(point["curve"], f"{point['size']:,}", f"{point['seconds']:.3f}", f"{1e6 * point['each']:.1f}")
    console = Console()
    console.print(table)
    for name, size in bends(points).items():
        console.print(f"{name}: " + (f"no longer linear from {size:,} on" if size else "linear throughout"))
    for stage, (one, two) in rates.items():
        console.print(f"ZeRO-{stage}: two processes reach {two / (2 * one):.0%} of twice one's positions/s")
    console.print(f"a process reached {share:.0%} of the matrix rate: {step_seconds:.2f} s a step of the GPUs' model")
    for count, stage, computing in gpus:
        if count in (8, 64, 1024):
            console.print(f"ZeRO-{stage} on {count:,} GPUs: {computing:.0%} of the time computing, nothing overlapped")


if __name__ == "__main__":
    main()
