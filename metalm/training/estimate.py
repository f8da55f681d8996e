"""`dry_run`: parameters by part, memory by ZeRO stage, FLOPs a step, without allocating a weight.

Memory counts model states alone (weights and gradients in the training precision, Adam's two moments and, for bfloat16,
a float32 master copy); activations come on top. FLOPs are counted by torch while a step runs on the meta device.
"""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from metalm.data.prompts import Interface
from metalm.errors import ConfigError
from metalm.model import MetaLM
from metalm.segments import Document, Text, load_spans, make_batch
from metalm.training.config import RunConfig


def model_state_bytes(parameters: int, trainable: int, precision: str, world: int) -> dict[str, float]:
    """Bytes a rank by ZeRO stage. Source: ZeRO (arXiv 1910.02054), section 3.1."""
    size = 2 if precision == "bfloat16" else 4
    weights, gradients = size * parameters, size * trainable
    optimizer = (12 if precision == "bfloat16" else 8) * trainable
    return {
        "ZeRO-0": weights + gradients + optimizer,
        "ZeRO-1": weights + gradients + optimizer / world,
        "ZeRO-2": weights + (gradients + optimizer) / world,
        "ZeRO-3": (weights + gradients + optimizer) / world,
    }


def flops_per_step(config: RunConfig, model: MetaLM) -> int:
    """Forward and backward FLOPs of one rank's step on full rows, counted on the meta device.

    Each row holds as many documents as fit of what the model can read: an image with 16 tokens of text, 64 more for an encoder
    of text alone, and 48 to predict, or what there is room for.
    """
    from metalm.encoders.image import one_pixel_png

    interface = Interface.of(model, None, 1 << 30)
    image = one_pixel_png() if interface.image or interface.fused else None
    length, words = config.data.row_length, interface.text_room
    prompt = interface.read(image, [0] * min(16, words))
    if interface.text and interface.text != interface.fused:
        prompt.append(interface.read_tokens([0] * max(1, min(64, words, (length - sum(map(len, prompt))) // 2))))
    room = length - sum(map(len, prompt))
    if room < 1:
        raise ConfigError(f"data.row_length={length} does not hold what the encoders make of an image and a few words")
    document = load_spans(Document([*prompt, Text([0] * min(48, room))]), model.processors)
    row = [document] * (length // len(document))
    batch = make_batch([row] * config.data.rows, model.processors, length)
    targets = batch.num_targets
    with FlopCounterMode(display=False) as counter:
        model.hidden(batch.to("meta")).sum().backward()
    head = 6 * targets * model.config.decoder.width * model.config.decoder.vocab_size
    return (counter.get_total_flops() + head) * config.training.accumulation


def estimate(config: RunConfig, world: int) -> dict:
    """Plain figures for `dry_run`; the model's vocabulary must be set."""
    with torch.device("meta"):
        model = MetaLM(config.model)
    parts = model.parameters_by_part()
    total, trainable = (sum(column) for column in zip(*parts.values()))
    return {
        "parameters": {name: {"all": a, "trainable": t} for name, (a, t) in parts.items()},
        "total": {"all": total, "trainable": trainable},
        "model_state_bytes": {
            str(w): model_state_bytes(total, trainable, config.training.precision, w) for w in sorted({world, 8, 64})
        },
        "flops_per_step_and_rank": flops_per_step(config, model),
        "positions_per_step": config.data.row_length * config.data.rows * config.training.accumulation * world,
    }


def print_estimate(config: RunConfig) -> None:
    """Prints `estimate` as tables; the vocabulary is the tokenizer's, or what it will be trained to."""
    import os

    from rich.console import Console
    from rich.table import Table

    from metalm.data.tokenizer import Tokenizer

    path = config.tokenizer.path
    config.model.set_vocab_size(Tokenizer.load(path).size if path else config.tokenizer.vocab_size)
    figures = estimate(config, int(os.environ.get("WORLD_SIZE", 1)))
    console = Console()
    parameters = Table("part", "parameters", "trainable", title="Parameters")
    for name, counts in [*figures["parameters"].items(), ("total", figures["total"])]:
        parameters.add_row(name, f"{counts['all']:,}", f"{counts['trainable']:,}")
    console.print(parameters)
    memory = Table("ranks", *figures["model_state_bytes"]["8"], title="Model states, GiB a rank (activations come on top)")
    for world, stages in figures["model_state_bytes"].items():
        memory.add_row(world, *(f"{size / 2**30:.2f}" for size in stages.values()))
    console.print(memory)
    console.print(f"positions a step: {figures['positions_per_step']:,}", highlight=False)
    console.print(f"FLOPs a step and rank: {figures['flops_per_step_and_rank']:.3e}", highlight=False)
