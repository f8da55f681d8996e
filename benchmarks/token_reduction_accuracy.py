"""What fewer tokens cost: questions on pictures by how many patches merge, perplexity of a text by the decoder's window.

    python -m benchmarks.token_reduction_accuracy pictures [--merge 0,4,6] [--steps 300]
    python -m benchmarks.token_reduction_accuracy text --text tinyshakespeare.txt[.gz] [--window 0,128,32] [--steps 300]

Every setting trains the same small model from scratch (bfloat16, AdamW with float32 master weights) on the same samples in the
same order.

pictures    the embedded world's scenes with up to four questions each, 16 pictures a step, and VQA on 300 new ones: a `vit` of
            3 layers on 36 patches of 8 pixels, an encoder of questions of 1, a decoder of 2, all 64 wide. --apply scores the
            first setting's model again with its tower merging so many: what merging does to a tower that never saw it.
text        a decoder of 4 layers 128 wide on rows of 256 tokens, 12 a step; perplexity on the last tenth of the text, in rows
            that follow each other.
"""

from __future__ import annotations

import argparse
import math
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.mixed_precision import MasterAdamW
from benchmarks.nanogpt import read_text
from metalm.config import build
from metalm.data.prompts import Interface, vqa
from metalm.data.sample import Sample
from metalm.data.scenes import ask, draw, random_scene
from metalm.data.shards import write_shards
from metalm.data.tokenizer import Tokenizer
from metalm.evaluation.predictor import Predictor
from metalm.evaluation.vqa import evaluate_vqa
from metalm.inference.generate import GenerationConfig
from metalm.model import MetaLM, MetaLMConfig
from metalm.nn.packing import pack
from metalm.segments import Batch, Document, Text, make_batch

SMALL = {"width": 64, "heads": 4}
SIZE = {"layers": 4, "width": 128, "heads": 4}
ROW, ROWS = 256, 12
PICTURES, TEST_PICTURES = 16, 300  # a step, and to score


def scenes(part: str, numbers: range) -> Iterator[Sample]:
    for i in numbers:
        rng = random.Random(f"{part} {i}")
        scene = random_scene(rng, held_out=None)
        yield Sample(f"{part}-{i:06d}", draw(scene, rng), questions=ask(scene, rng, 4))


def make_reader(merge: int, tokenizer: Tokenizer) -> MetaLM:
    connector = {"type": "feedforward", "layers": 2}
    eye = {"type": "vit", **SMALL, "layers": 3, "image_size": 48, "patch_size": 8, "merge": merge, "connector": connector}
    rotary = {"positions": "rotary", "max_positions": ROW, "vocab_size": tokenizer.size}
    words = {"type": "text", **SMALL, **rotary, "layers": 1, "relative_bias": False, "connector": connector}
    decoder = {**SMALL, **rotary, "layers": 2}
    return MetaLM(build(MetaLMConfig, {"decoder": decoder, "encoders": {"image": eye, "text": words}}, "benchmark"))


def train(model: MetaLM, batch: Callable[[int], Batch], steps: int, lr: float = 2e-3) -> float:
    """Trains in bfloat16, with a tenth of the steps to warm up and a linear way down; returns the seconds it took."""
    model.bfloat16().train()
    optimizer = MasterAdamW(model, lr, weight_decay=0.1)
    started = time.perf_counter()
    for step in range(steps):
        optimizer.set_lr(lr * min(10 * (step + 1) / steps, (steps - step) / (0.9 * steps)))
        one = batch(step)
        loss = model(one) / one.num_targets
        loss.backward()
        optimizer.step()
        if (step + 1) % 50 == 0:
            print(f"    step {step + 1}: loss {float(loss.detach()):.3f}, {time.perf_counter() - started:.0f} s", flush=True)
    model.float().eval()
    return time.perf_counter() - started


def score(model: MetaLM, tokenizer: Tokenizer, folder: str) -> dict[str, float]:
    predictor = Predictor(model, Interface.of(model, tokenizer, ROW), GenerationConfig(max_new_tokens=6))
    return evaluate_vqa(predictor, folder).metrics


def pictures(merges: list[int], applied: list[int], steps: int, seed: int) -> None:
    samples = scenes("words", range(1000))
    texts = [text for s in samples for q in s.questions for text in (f"question: {q.question} answer:", q.best_answer)]
    tokenizer = Tokenizer.train(texts, 400)
    with tempfile.TemporaryDirectory() as folder:
        write_shards(scenes("test", range(TEST_PICTURES)), folder, TEST_PICTURES)
        for merge in merges:
            torch.manual_seed(seed)
            model = make_reader(merge, tokenizer)
            interface = Interface.of(model, tokenizer, ROW)

            def batch(step: int, model: MetaLM = model, interface: Interface = interface) -> Batch:
                ours = scenes(f"train {seed}", range(step * PICTURES, (step + 1) * PICTURES))
                documents = [interface.load(d) for sample in ours for d in vqa(interface, sample, random.Random(0))]
                rows = pack([len(document) for document in documents], ROW)
                return make_batch([[documents[n] for n in row] for row in rows], model.processors, ROW)

            states = model.processors["image"].row_states
            seconds = train(model, batch, steps)
            report(f"merge {merge}, {states} states, {seconds:.0f} s of training", score(model, tokenizer, folder))
            if merge == merges[0]:
                for other in applied:
                    again = make_reader(other, tokenizer)
                    again.load_state_dict(model.state_dict())
                    left = again.processors["image"].row_states
                    report(f"the same weights, merge {other}, {left} states", score(again.eval(), tokenizer, folder))


def report(what: str, metrics: dict[str, float]) -> None:
    kinds = "  ".join(f"{n.removeprefix('accuracy/')} {v:.1%}" for n, v in metrics.items() if n.startswith("accuracy/"))
    print(f"{what}: accuracy {metrics['accuracy']:.1%}, majority answer {metrics['majority']:.1%}  {kinds}", flush=True)


def text(path: Path, windows: list[int], steps: int, seed: int) -> None:
    whole = read_text(path)
    cut = int(0.9 * len(whole))
    tokenizer = Tokenizer.train([whole[:cut]], 1024)
    training, held_out = (torch.tensor(tokenizer.encode(part)) for part in (whole[:cut], whole[cut:]))
    for window in windows:
        torch.manual_seed(seed)
        decoder = {**SIZE, "positions": "rotary", "max_positions": ROW, "vocab_size": tokenizer.size, "window": window}
        model = MetaLM(build(MetaLMConfig, {"decoder": decoder}, "benchmark"))
        places = random.Random(seed)

        def batch(step: int, places: random.Random = places) -> Batch:
            first = [places.randrange(len(training) - ROW) for _ in range(ROWS)]
            return make_batch([[Document([Text(training[i : i + ROW].tolist())])] for i in first], {})

        seconds = train(model, batch, steps)
        print(
            f"window {window or 'none'}, {seconds:.0f} s of training: perplexity {perplexity(model, held_out):.2f}", flush=True
        )


@torch.no_grad()
def perplexity(model: MetaLM, tokens: torch.Tensor) -> float:
    nats, count = 0.0, 0
    for group in tokens[: len(tokens) // ROW * ROW].view(-1, ROW).split(ROWS):
        batch = make_batch([[Document([Text(row)])] for row in group.tolist()], {})
        nats, count = nats + float(model(batch)), count + int(batch.num_targets)
    return math.exp(nats / count)


def numbers(values: str) -> list[int]:
    return [int(value) for value in values.split(",") if value]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.token_reduction_accuracy", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("what", choices=["pictures", "text"])
    parser.add_argument("--merge", type=numbers, default=[0, 4, 6])
    parser.add_argument("--apply", type=numbers, default=[4, 6])
    parser.add_argument("--window", type=numbers, default=[0, 128, 32])
    parser.add_argument("--text", type=Path, help="a text file, or one as .gz")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's default")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.what == "pictures":
        pictures(arguments.merge, arguments.apply, arguments.steps, arguments.seed)
    elif arguments.text is None:
        parser.error("text needs --text FILE")
    else:
        text(arguments.text, arguments.window, arguments.steps, arguments.seed)


if __name__ == "__main__":
    main()
