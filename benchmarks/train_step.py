"""Positions/s of one training step, METALM against Hugging Face's LLaVA of the same shape, in turns.

    python -m benchmarks.train_step [--rounds 5] [--steps 1] [--threads 1] [--compile]

`fixed`: 16 documents of 64 patches + 64 text tokens for both, one a row of 128. `captions`: 64 patches and a caption with the
lengths of Flickr8k; METALM packs them into 20 rows of 160 as its data stream would, two a row, whose attention is cheap; the
peer pads as many to the longest; useful positions count, padding does not. `pictures`: five such captions a picture, as
Flickr8k has them. METALM reads a picture once and lets its captions branch off, which is the loss and the gradients of a
document each (`metalm.segments`), in 5 rows of 384; the peer has a row for each of as many captions; captions count. Forward,
backward, and the same AdamW on float32 master weights for both; data are in memory. The ratio is the median over rounds of
METALM's rate to the peer's in that round, so that whatever else runs on the machine hits both. `cpu_ratio` is the same in
processor time: with `--threads 1` it hardly depends on the other load at all (more threads wait for each other in a loop that
counts as work). Each side has a process of its own: METALM's keeps the memory that it frees, as `metalm train` does; the peer's
does what Python does. `--compile` is METALM as `training.compile` runs it; the peer stays as its `Trainer` runs it by default.
`mfu` is the share of the rate of a large matrix product that the FLOPs of METALM's own products make, counted by torch without
the optimizer.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.apart import Apart
from benchmarks.mfu import matrix_rate
from benchmarks.mixed_precision import MasterAdamW
from benchmarks.peer_llava import TEXT, VISION, VOCABULARY, build_llava, num_parameters
from metalm.config import build
from metalm.model import MetaLM, MetaLMConfig
from metalm.nn.packing import pack
from metalm.segments import IGNORE, Batch, Document, Span, Text, make_batch
from metalm.training.compiling import compile_blocks
from metalm.training.engine import keep_freed_memory

PATCHES = (VISION["image_size"] // VISION["patch_size"]) ** 2
IMAGE_TOKEN = VOCABULARY - 1
CAPTIONS = 5  # a picture
# Captions of Flickr8k's training split by their number of BPE tokens (vocabulary 8,192, end token included), per mille.
CAPTION_LENGTHS = {
    5: 4, 6: 9, 7: 25, 8: 52, 9: 78, 10: 90, 11: 103, 12: 107, 13: 104, 14: 95, 15: 79, 16: 70, 17: 50, 18: 38, 19: 28,
    20: 21, 21: 15, 22: 11, 23: 6, 24: 5, 25: 4, 26: 3, 27: 2, 28: 1,
}  # fmt: skip


def build_metalm(seed: int = 0) -> MetaLM:
    """METALM at the peer's shape: a ViT of timm, a two-layer connector, a Llama-like decoder with tied softmax."""
    torch.manual_seed(seed)
    config = {
        "decoder": {
            "layers": TEXT["num_hidden_layers"],
            "width": TEXT["hidden_size"],
            "heads": TEXT["num_attention_heads"],
            "ffn": TEXT["intermediate_size"],
            "norm": "rms",
            "mlp": "swiglu",
            "positions": "rotary",
            "bias": False,
            "vocab_size": VOCABULARY,
        },
        "encoders": {
            "image": {
                "type": "timm",
                "name": "vit_tiny_patch16_224",
                "image_size": VISION["image_size"],
                "arguments": {
                    "depth": VISION["num_hidden_layers"],
                    "embed_dim": VISION["hidden_size"],
                    "num_heads": VISION["num_attention_heads"],
                },
                "connector": {"type": "feedforward", "layers": 2},
            }
        },
    }
    return MetaLM(build(MetaLMConfig, config, "benchmark"))


def noise_image() -> Span:
    side = VISION["image_size"]
    return Span("image", {"image": torch.randint(256, (3, side, side), dtype=torch.uint8)}, PATCHES)


def random_text(length: int) -> Text:
    return Text(torch.randint(IMAGE_TOKEN, (length,)).tolist())


def random_documents(lengths: list[int]) -> list[Document]:
    """An image of noise and a text of random tokens of each length."""
    return [Document([noise_image(), random_text(length)]) for length in lengths]


def branching_documents(lengths: list[int]) -> list[Document]:
    """An image of noise for every `CAPTIONS` of the texts, which branch off from it."""
    texts = [[random_text(length)] for length in lengths]
    return [Document([noise_image()], branches=texts[n : n + CAPTIONS]) for n in range(0, len(texts), CAPTIONS)]


def packed(model: MetaLM, documents: list[Document], row_length: int, rows: int) -> Batch:
    """The first `rows` rows in which the data stream would pack the documents."""
    packing = pack([len(document) for document in documents], row_length)
    random.Random(0).shuffle(packing)
    return make_batch([[documents[n] for n in row] for row in packing[:rows]], model.processors, row_length)


def padded(documents: list[Document]) -> dict[str, torch.Tensor]:
    """The documents as LLaVA takes them: one a row, padded to the longest, loss on the text alone."""
    shape = (len(documents), max(map(len, documents)))
    input_ids, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, IGNORE)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    for b, document in enumerate(documents):
        tokens = torch.tensor(document.segments[1].tokens)
        end = len(document)
        input_ids[b, :PATCHES] = IMAGE_TOKEN
        input_ids[b, PATCHES:end] = labels[b, PATCHES:end] = tokens
        attention_mask[b, :end] = 1
    pixels = torch.stack([document.segments[0].inputs["image"] for document in documents])
    pixel_values = (pixels / 127.5 - 1).bfloat16()
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels, "pixel_values": pixel_values}


def metalm_step(model: MetaLM, batch: Batch) -> Callable[[], None]:
    optimizer = MasterAdamW(model.train(), lr=1e-4)

    def step() -> None:
        (model(batch) / batch.num_targets).backward()
        optimizer.step()

    return step


def llava_step(model: nn.Module, inputs: dict[str, torch.Tensor]) -> Callable[[], None]:
    optimizer = MasterAdamW(model.train(), lr=1e-4)

    def step() -> None:
        model(**inputs).loss.backward()
        optimizer.step()

    return step


def metalm_side(batch: Batch, compiled: bool) -> Callable[[], None]:
    """METALM's step as `metalm train` takes it."""
    keep_freed_memory()
    model = build_metalm().bfloat16()
    if compiled:
        compile_blocks(model)
    return metalm_step(model, batch)


def llava_side(inputs: dict[str, torch.Tensor]) -> Callable[[], None]:
    """The peer's step, in a process left as it is."""
    return llava_step(make_peer(), inputs)


def make_peer() -> nn.Module:
    """LLaVA of the 37M shape, in bfloat16."""
    return build_llava(VISION, TEXT, VOCABULARY, IMAGE_TOKEN, tied=True).bfloat16()


def seconds(step: Callable[[], object], steps: int) -> tuple[float, float]:
    """Wall-clock and processor seconds a step, of this process or of the one where it runs (`benchmarks.apart`)."""
    processor_time = step.processor_time if isinstance(step, Apart) else time.process_time
    wall, processor = time.perf_counter(), processor_time()
    for _ in range(steps):
        step()
    return (time.perf_counter() - wall) / steps, (processor_time() - processor) / steps


def compare(
    ours: Callable[[], object], peer: Callable[[], object], positions: tuple[int, int], rounds: int, steps: int
) -> dict[str, float]:
    """Medians over rounds of both rates in positions/s, and of their ratio; `positions` a step of ours and of the peer's."""
    ours(), peer()
    taken: dict[Callable, list[tuple[float, float]]] = {ours: [], peer: []}
    for round_ in range(rounds):
        # Who goes first alternates, so that neither always finds the machine as the other left it.
        for step in (ours, peer) if round_ % 2 == 0 else (peer, ours):
            taken[step].append(seconds(step, steps))
    more = positions[0] / positions[1]
    return {
        "metalm": median(positions[0] / wall for wall, _ in taken[ours]),
        "peer": median(positions[1] / wall for wall, _ in taken[peer]),
        "ratio": median(more * other / wall for (wall, _), (other, _) in zip(taken[ours], taken[peer])),
        "cpu_ratio": median(more * other / own for (_, own), (_, other) in zip(taken[ours], taken[peer])),
    }


def measure(rounds: int = 5, steps: int = 1, compiled: bool = False) -> dict[str, dict[str, float]]:
    """The comparisons by name, with the parameters and the share of useful positions of either side."""
    metalm = build_metalm().bfloat16()
    parameters = {"metalm_parameters": num_parameters(metalm), "peer_parameters": num_parameters(make_peer())}
    results = {}
    torch.manual_seed(0)
    fixed = random_documents([64] * 16)
    mix = random.Random(0).choices(list(CAPTION_LENGTHS), list(CAPTION_LENGTHS.values()), k=510)
    captioned = random_documents(mix)
    single, branching = packed(metalm, captioned, 160, 20), packed(metalm, branching_documents(mix), 384, 5)
    captions = CAPTIONS * len(branching.keys)
    for name, batch, inputs in (
        ("fixed", packed(metalm, fixed, 128, 16), padded(fixed)),
        ("captions", single, padded(captioned[: len(single.keys)])),
        ("pictures", branching, padded(captioned[:captions])),
    ):
        with FlopCounterMode(display=False) as counter:
            (metalm(batch) / batch.num_targets).backward()
        positions = (batch.num_positions, int(inputs["attention_mask"].sum()))
        useful = (captions, captions) if name == "pictures" else positions
        shares = {
            "metalm_useful": positions[0] / batch.tokens_BT.numel(),
            "peer_useful": positions[1] / inputs["input_ids"].numel(),
        }
        with Apart(metalm_side, batch, compiled) as ours, Apart(llava_side, inputs) as peer:
            timed = compare(ours, peer, useful, rounds, steps)
        rate = max(matrix_rate(torch.device("cpu"), 1024) for _ in range(5))
        mfu = counter.get_total_flops() * timed["metalm"] / useful[0] / rate
        results[name] = timed | parameters | shares | {"mfu": mfu}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_step", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1, help="a round")
    parser.add_argument("--threads", type=int, default=0, help="of both sides; 0: torch's default")
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    for name, result in measure(arguments.rounds, arguments.steps, arguments.compile).items():
        print(
            f"{name}: METALM {result['ratio']:.2f} x LLaVA ({result['cpu_ratio']:.2f} in processor time), "
            f"{result['mfu']:.1%} of the matrix rate"
        )
        counted = "captions/s" if name == "pictures" else "useful positions/s"
        for side in ("metalm", "peer"):
            print(
                f"  {side:6s} {result[side]:7,.0f} {counted}  {result[f'{side}_parameters']:,} parameters  "
                f"{result[f'{side}_useful']:.1%} of the positions useful"
            )


if __name__ == "__main__":
    main()
