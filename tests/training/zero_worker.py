"""One process of a ZeRO test: trains the same tiny model on its share of the same batches at each stage, and writes its
losses. Started by `test_zero.py` with RANK, WORLD_SIZE and MASTER_PORT set. A stage that ends in STORED trains on a frozen
encoder's pictures in one micro-batch and on its stored states in the other."""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist

from metalm.config import build
from metalm.data.prompts import Interface
from metalm.data.scenes import IMAGE_SIZE, draw, random_scene
from metalm.fingerprint import fingerprints
from metalm.model import MetaLM, MetaLMConfig
from metalm.segments import Batch, Document, Span, Text, load_spans, make_batch
from metalm.training.config import TrainingConfig
from metalm.training.engine import Parts, all_sum, full_weights, make_engine, setup_distributed, train_step

STEPS, STORED = 4, "-stored"
MODEL = {
    "decoder": {"layers": 2, "width": 32, "heads": 2, "vocab_size": 40},
    "encoders": {
        "image": {
            "type": "fused",
            "layers": 2,
            "width": 32,
            "heads": 2,
            "image_size": IMAGE_SIZE,
            "patch_size": 16,
            "experts": True,
            "fusion_layers": 1,
            "vocab_size": 40,
            "connector": {"type": "feedforward"},
        },
        "text": {
            "type": "text",
            "layers": 1,
            "width": 16,
            "heads": 2,
            "vocab_size": 40,
            "connector": {"type": "perceiver", "latents": 2, "layers": 1, "heads": 2},
        },
    },
}


def make_batches(model: MetaLM, text_only: bool):
    """A micro-batch with images and text, or with plain text only: then neither encoder has anything to read."""
    import random

    rng = random.Random(int(text_only))
    connectors = {name: encoder.connector for name, encoder in model.config.encoders.items()}
    interface = Interface(None, model.processors, connectors, 64)
    documents = []
    for length in (5, 9, 7):
        tokens = [rng.randrange(40) for _ in range(length)]
        if text_only:
            segments = [Text(tokens)]
        else:
            image = draw(random_scene(rng, None), rng)
            segments = [
                interface.span("image", {"image": image, "tokens": tokens[:3]}),
                Text(tokens[3:]),
                interface.span("text", {"tokens": tokens}, tokens[0]),
                Text(tokens[:2]),
            ]
        documents.append(load_spans(Document(segments), model.processors))
    return make_batch([documents[:2], documents[2:]], model.processors)


FROZEN = MODEL | {
    "encoders": {
        "image": {
            "type": "vit",
            "trainable": "none",
            "layers": 2,
            "width": 32,
            "heads": 2,
            "image_size": IMAGE_SIZE,
            "patch_size": 16,
            "connector": {"type": "perceiver", "latents": 2, "layers": 1, "heads": 2},
        }
    }
}


@torch.no_grad()
def make_frozen_batches(model: MetaLM) -> list[Batch]:
    """Two micro-batches of pictures with text; the second one has their states."""
    import random

    rng, processor = random.Random(0), model.processors["image"]
    batches = []
    for stored in (False, True):
        documents = []
        for length in (5, 9, 7):
            inputs = processor.load({"image": draw(random_scene(rng, None), rng)})
            if stored:
                inputs = {"states": model.encoders["image"](**processor.collate([inputs]).inputs)[0]}
            documents.append(Document([Span("image", inputs, 2), Text([rng.randrange(40) for _ in range(length)])]))
        batches.append(make_batch([documents[:2], documents[2:]], model.processors))
    return batches


def run(stage: str) -> dict:
    torch.manual_seed(0)
    frozen, stage = stage.endswith(STORED), stage.removesuffix(STORED)
    model = MetaLM(build(MetaLMConfig, FROZEN if frozen else MODEL, "test"))
    # The two micro-batches differ in modality and in their number of targets; ranks share them out.
    batches = make_frozen_batches(model) if frozen else [make_batches(model, text_only) for text_only in (False, True)]
    before = fingerprints(model, frozen=True)
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = batches[rank::world]
    # Adam divides by the gradient's size: where a gradient is all rounding (a key's bias, which softmax cancels out), it
    # would blow that up. A large eps keeps the comparison to what is really computed.
    config = TrainingConfig(
        steps=STEPS, lr=1e-2, warmup=0, eps=1e-3, precision="float32", deepspeed=stage, accumulation=len(mine), clip=0.5
    )
    engine = make_engine(model, config, rows=2)
    losses = []
    for _ in range(STEPS):
        share, targets = train_step(engine, mine, Parts())
        losses.append(float(all_sum(share, engine.device)))
    weights = full_weights(engine)
    total = sum(float(w.double().abs().sum()) for w in weights.values())
    shapes_whole = all(w.numel() > 0 for w in weights.values()) and fingerprints(engine.module, frozen=True) == before
    engine.destroy()
    return {"losses": losses, "targets": targets, "weights": total, "whole": shapes_whole}


if __name__ == "__main__":
    torch.set_num_threads(1)
    setup_distributed()
    results = {stage: run(stage) for stage in sys.argv[2:]}
    if dist.get_rank() == 0:
        with open(sys.argv[1], "w") as file:
            json.dump(results, file)
