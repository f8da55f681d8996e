"""Peak memory of the loss over a large vocabulary, forward and backward: METALM's against dense logits.

    python -m benchmarks.memory [--vocabulary 32768] [--positions 4096] [--width 512]

Each side runs once in a process of its own, in bfloat16 as models are trained; what counts is the most that the process held
beyond states, matrix and their gradients' own size, which both need. `dense` is what Hugging Face's models do: logits of all
positions, in float32 for the cross-entropy.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import resource
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from metalm.nn.losses import linear_cross_entropy


def dense(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    logits = torch.nn.functional.linear(hidden_ND, weight_VD).float()
    return torch.nn.functional.cross_entropy(logits, targets_N, reduction="sum")


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"metalm": linear_cross_entropy, "dense": dense}


def peak() -> int:
    """The most that this process ever held, in bytes, not counting what it was when its parent forked it."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text()).group(1)) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def step(side: str, positions: int, width: int, vocabulary: int, out) -> None:
    torch.manual_seed(0)
    LOSSES[side](*inputs(8, width, 64)).backward()  # threads and kernels are there before it counts
    hidden_ND, weight_VD, targets_N = inputs(positions, width, vocabulary)
    hidden_ND.grad, weight_VD.grad = torch.ones_like(hidden_ND), torch.ones_like(weight_VD)
    before = peak()
    loss = LOSSES[side](hidden_ND, weight_VD, targets_N)
    loss.backward()
    out.put((peak() - before, loss.item()))


def inputs(positions: int, width: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    hidden_ND = torch.randn(positions, width).bfloat16().requires_grad_()
    weight_VD = (torch.randn(vocabulary, width) / width**0.5).bfloat16().requires_grad_()
    return hidden_ND, weight_VD, torch.randint(vocabulary, (positions,))


def measure(positions: int = 4096, width: int = 512, vocabulary: int = 32768) -> dict[str, float]:
    """Bytes of either side, and their ratio; the losses are the same."""
    context = multiprocessing.get_context("spawn")
    used, losses = {}, {}
    for side in LOSSES:
        out = context.Queue()
        process = context.Process(target=step, args=(side, positions, width, vocabulary, out))
        process.start()
        used[side], losses[side] = out.get()
        process.join()
    torch.testing.assert_close(losses["metalm"], losses["dense"], rtol=1e-3, atol=0)
    return used | {"ratio": used["metalm"] / used["dense"]}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.partition("\n")[0])
    parser.add_argument("--positions", type=int, default=4096)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=32768)
    arguments = parser.parse_args()
    result = measure(arguments.positions, arguments.width, arguments.vocabulary)
    print(f"METALM {result['metalm'] / 2**20:,.0f} MiB, dense {result['dense'] / 2**20:,.0f} MiB: {result['ratio']:.2f} x")


if __name__ == "__main__":
    main()
