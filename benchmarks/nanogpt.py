"""Characters of Shakespeare: `configs/text/shakespeare-char.yaml` against nanoGPT's own model and loop, at the same setting.

    python -m benchmarks.nanogpt --checkout NANOGPT --text tinyshakespeare.txt[.gz] [--threads 2]

NANOGPT is a checkout of github.com/karpathy/nanoGPT, of which `model.py` is used: the loop below is that of its `train.py`
for the documented CPU run (4 layers, 4 heads, width 128, block 64, batch 12, 2,000 iterations, no dropout, no compilation),
without its pauses to evaluate. Both sides then score the whole of the last tenth of the text, in blocks that follow each
other. Ours is `metalm train` in a process of its own; its seconds are those of its steps, as it logs them.

    bars    val_loss <= 1.88, and no more seconds than nanoGPT
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from metalm.errors import DataError

SHAPE = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "bias": False, "dropout": 0.0}
ROWS, LR, MIN_LR, WARMUP = 12, 1e-3, 1e-4, 100


def load_model_file(checkout: Path) -> ModuleType:
    """nanoGPT's `model.py`, with its `GPT` and `GPTConfig`."""
    path = checkout / "model.py"
    if not path.is_file():
        raise DataError(f"{path}: there is no such file; --checkout takes a checkout of nanoGPT")
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def read_text(path: Path) -> str:
    return (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode()


def peer(checkout: Path, text: str, steps: int) -> dict[str, float]:
    """nanoGPT's loop: its validation loss, and the seconds of its iterations."""
    nanogpt = load_model_file(checkout)
    torch.manual_seed(1337)
    characters = sorted(set(text))
    number = {character: i for i, character in enumerate(characters)}
    data = torch.tensor([number[character] for character in text])
    cut = int(0.9 * len(data))
    train, validation = data[:cut], data[cut:]
    model = nanogpt.GPT(nanogpt.GPTConfig(vocab_size=len(characters), **SHAPE)).train()
    optimizer = model.configure_optimizers(0.1, LR, (0.9, 0.99), "cpu")
    block = SHAPE["block_size"]
    started = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        first = torch.randint(len(train) - block, (ROWS,))
        x = torch.stack([train[i : i + block] for i in first])
        y = torch.stack([train[i + 1 : i + 1 + block] for i in first])
        _, loss = model(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - started
    return {"val_loss": validation_loss(model, validation, block), "seconds": seconds}


def learning_rate(step: int, steps: int) -> float:
    if step < WARMUP:
        return LR * (step + 1) / (WARMUP + 1)
    return MIN_LR + 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (steps - WARMUP))) * (LR - MIN_LR)


@torch.no_grad()
def validation_loss(model: torch.nn.Module, data: Tensor, block: int) -> float:
    model.eval()
    count = (len(data) - 1) // block
    x_NT, y_NT = data[: count * block].view(count, block), data[1 : count * block + 1].view(count, block)
    total = sum(float(model(x, y)[1]) * len(x) for x, y in zip(x_NT.split(64), y_NT.split(64)))
    return total / count


def ours(text: Path, steps: int, threads: int) -> dict[str, float]:
    """`metalm train`: its `val_loss`, and the seconds of its steps."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"data.path={text}", f"out={folder}/run", f"training.steps={steps}", f"training.validate_every={steps}"]
        command = [sys.executable, "-m", "metalm", "train", "text/shakespeare-char.yaml", *overrides]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
        rows = [json.loads(line) for line in (Path(folder) / "run/metrics.jsonl").read_text().splitlines()]
    logged = [row for row in rows if "seconds" in row]
    return {
        "val_loss": next(row["val_loss"] for row in rows if "val_loss" in row),
        "seconds": sum(r["seconds"] for r in logged),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.nanogpt", description=__doc__.partition("\n")[0])
    parser.add_argument("--checkout", type=Path, required=True, help="of nanoGPT")
    parser.add_argument("--text", type=Path, required=True, help="tinyshakespeare")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of both sides")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/nanogpt.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result = {
        "nanogpt": peer(arguments.checkout, read_text(arguments.text), arguments.steps),
        "metalm": ours(arguments.text, arguments.steps, arguments.threads),
    }
    result["ratio"] = result["nanogpt"]["seconds"] / result["metalm"]["seconds"]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
