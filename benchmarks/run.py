"""All benchmarks: a table of ratios against peers measured in the same run, and `runs/bench/results.json`.

    python -m benchmarks.run [--rounds 5]           # or `make bench`

results.json is a list of {name, value, unit, peer, at_least}: `value` is METALM's figure over the peer's where the unit is
"x", and `at_least` the bar it should reach (null: none). A ratio below its bar is marked, and is no failure of the run:
machines differ, and a shared one is noisy.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import generation, loader, train_step

OUT = Path("runs/bench/results.json")
LLAVA = "transformers LlavaForConditionalGeneration"
OPEN_CLIP = "open_clip_train get_wds_dataset"
DECODING = "decoding and resizing alone"
GENERATE = "transformers generate, Llama"


def training(rounds: int) -> list[dict]:
    """Training positions/s against LLaVA: a fixed batch, and captions as they come."""
    measured = train_step.measure(rounds)
    results = []
    for name, result in measured.items():
        results += [
            entry(f"train_step/{name}", result["ratio"], "x", LLAVA, at_least=1.0),
            entry(f"train_step/{name}/processor_time", result["cpu_ratio"], "x", LLAVA),
            entry(f"train_step/{name}/metalm", result["metalm"], "positions/s"),
            entry(f"train_step/{name}/peer", result["peer"], "positions/s", LLAVA),
        ]
    return results


def loading(rounds: int) -> list[dict]:
    """Samples/s of the data stream against open_clip's pipeline and against its limit, and the time to the first batch."""
    measured = loader.measure(rounds)
    return [
        entry("loader", measured["ratio"], "x", OPEN_CLIP, at_least=1.3),
        entry("loader/limit", measured["share"], "x", DECODING, at_least=0.85),
        entry("loader/first_batch", measured["first_ratio"], "x", OPEN_CLIP),
        entry("loader/metalm", measured["metalm"], "samples/s"),
        entry("loader/peer", measured["open_clip"], "samples/s", OPEN_CLIP),
        entry("loader/decoding", measured["limit"], "samples/s", DECODING),
    ]


def generating(rounds: int) -> list[dict]:
    """Tokens/s of greedy text against transformers' `generate`, and ranked answers against a full pass for each."""
    bars = {"bfloat16/batch_1": 1.8, "bfloat16/batch_8": 2.0, "int8/batch_1": 2.5, "draft/int8/80%": 2.5}
    bars |= {"ranking/full_passes": 2.5, "ranking/llava": 2.5}
    results = []
    for name, result in generation.measure(rounds).items():
        unit, peer = ("questions/s", LLAVA) if name.startswith("ranking") else ("tokens/s", GENERATE)
        peer = "METALM, a pass for each answer" if name == "ranking/full_passes" else peer
        results += [
            entry(f"generation/{name}", result["ratio"], "x", peer, at_least=bars.get(name)),
            entry(f"generation/{name}/processor_time", result["cpu_ratio"], "x", peer),
            entry(f"generation/{name}/metalm", result["metalm"], unit),
            entry(f"generation/{name}/peer", result["peer"], unit, peer),
        ]
    return results


def entry(name: str, value: float, unit: str, peer: str = "", at_least: float | None = None) -> dict:
    return {"name": name, "value": value, "unit": unit, "peer": peer, "at_least": at_least}


def table(results: list[dict]) -> Table:
    out = Table(title=f"{torch.get_num_threads()} threads", caption=f"peers: {LLAVA}; {GENERATE}; {OPEN_CLIP}")
    out.add_column("benchmark", no_wrap=True)
    out.add_column("value", justify="right")
    out.add_column("unit")
    out.add_column("at least")
    for result in results:
        value = f"{result['value']:,.2f}" if result["unit"] == "x" else f"{result['value']:,.0f}"
        bar = result["at_least"]
        verdict = "" if bar is None else f"{bar:.2f} " + ("[green]reached" if result["value"] >= bar else "[red]below")
        out.add_row(result["name"], value, result["unit"], verdict)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="of both sides; 0: torch's default")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    results = training(arguments.rounds) + generating(arguments.rounds) + loading(arguments.rounds)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=1))
    console = Console()
    console.print(table(results))
    below = [result["name"] for result in results if result["at_least"] and result["value"] < result["at_least"]]
    console.print(f"below the bar: {', '.join(below)}" if below else "all bars reached")


if __name__ == "__main__":
    main()
