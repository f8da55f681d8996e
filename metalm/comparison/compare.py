"""`metalm compare`: ways of pretraining on the same text, judged by the same yardsticks.

    corpus, tokenizer -> of every candidate, budget and seed a run -> of every run a figure by each yardstick -> table, plot

    budget    tokens    every candidate reads the corpus `epochs` times
              flops     every candidate gets the FLOPs that `reference` takes for that; torch counts those of a step

    OUT/corpus/{train,val}   OUT/tokenizer/   OUT/holes.jsonl
    OUT/runs/CANDIDATE/STEPS/SEED/pretraining         a run of `metalm train`
                                 /YARDSTICK           the run that fine-tunes for it, where there is one
                                 /YARDSTICK.json      what `metalm evaluate` says, once it is through
    OUT/comparison.{json,md,html}

What is there is not done again: a comparison that was stopped goes on by the same command, and one that is given another
candidate, seed or yardstick does what is missing.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from metalm.comparison.cells import console, is_done, read_metric, run_cells
from metalm.comparison.config import CompareConfig, folder_name, yardsticks_of
from metalm.comparison.plan import Plan, all_cells, make_plans, prepare, run_folder
from metalm.comparison.report import write_comparison


def compare(config: CompareConfig) -> dict:
    """Does what is missing and writes the comparison; returns what `comparison.json` holds.

    Raises:
        ConfigError, DataError, TrainingError: see `metalm.errors`; what is done stays done.
    """
    out = Path(config.out)
    prepare(config, out)
    plans = make_plans(config, out)
    cells = list(dict.fromkeys(all_cells(config, plans, out)))
    done = sum(is_done(config, cell) for cell in cells)
    console.print(f"{len(cells)} runs, {done} of them done before", highlight=False)
    run_cells(config, [cell for cell in cells if not is_done(config, cell)])
    return write_comparison(out, gather(config, plans, out))


def gather(config: CompareConfig, plans: dict[str, Plan], out: Path) -> dict:
    """All figures: by budget and candidate what it took, and by yardstick, and part of its own validation loss, one a seed."""
    results: dict[str, dict] = {}
    for budget in config.budgets:
        results[budget] = {}
        for name, plan in plans.items():
            steps = plan.steps[budget]
            folders = [run_folder(out, name, steps, seed) for seed in config.seeds]
            validations = [read_validation(folder / "pretraining/metrics.jsonl") for folder in folders]
            results[budget][name] = {
                "parameters": plan.parameters,
                "steps": steps,
                "epochs": steps / plan.epoch,
                "flops": steps * plan.flops,
                "seconds": [sum_seconds(folder / "pretraining/metrics.jsonl") for folder in folders],
                "yardsticks": {
                    title: [read_metric(folder / f"{folder_name(title)}.json", y.metric) for folder in folders]
                    for title, y in yardsticks_of(config, name).items()
                },
                "validation": {part: [one[part] for one in validations] for part in validations[0]},
            }
    return {"config": asdict(config), "results": results}


def read_validation(metrics: Path) -> dict[str, float]:
    """The last validation of a run: its loss and the parts of it."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    last = next(row for row in reversed(rows) if "val_loss" in row)
    return {name.removeprefix("val_"): value for name, value in last.items() if name.startswith("val_")}


def sum_seconds(metrics: Path) -> float:
    return sum(json.loads(line).get("seconds", 0.0) for line in metrics.read_text().splitlines())
