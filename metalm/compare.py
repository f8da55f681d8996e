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
import math
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from metalm.config import build, read_yaml
from metalm.data.corpus import write_corpus
from metalm.data.prompts import Interface
from metalm.data.stream import PackedStream, SourceConfig
from metalm.data.tokenizer import Tokenizer
from metalm.errors import ConfigError, TrainingError
from metalm.evaluation.holes import write_holes
from metalm.models import MODELS, fit_to_tokenizer
from metalm.pretrained import read_model_config
from metalm.registry import did_you_mean
from metalm.training.config import load_run_config
from metalm.training.estimate import flops_per_step
from metalm.training.loop import texts

console = Console()
BUDGETS = ("tokens", "flops")
Task = Literal["perplexity", "infilling", "classification", "tagging"]


@dataclass
class Candidate:
    """A way of pretraining: a configuration of `metalm train`, with `settings` (key=value) over it."""

    config: str
    settings: list[str] = field(default_factory=list)


@dataclass
class Yardstick:
    """What every candidate, or `candidates` alone, is judged by: the `metric` of the evaluation `task` on `data`, with more
    `options` of `metalm evaluate`.

    With a `config`, a head is first trained on the run's encoder (its decoder, where it has none) by this configuration of
    `metalm train` with `settings` over it. Without `data`, perplexity is that of the corpus' held-out part, and infilling
    that of holes in it.
    """

    task: Task
    metric: str
    data: str = ""
    options: list[str] = field(default_factory=list)
    config: str = ""
    settings: list[str] = field(default_factory=list)
    candidates: list[str] = field(default_factory=list)


@dataclass
class CompareConfig:
    """A comparison: candidates, yardsticks, and what all have in common.

    `data` is the corpus, as `data.path` of a training run; `settings` are every candidate's. `jobs` runs go on side by side.
    """

    out: str
    data: str
    candidates: dict[str, Candidate]
    yardsticks: dict[str, Yardstick]
    reference: str
    epochs: int = 1
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    budgets: list[str] = field(default_factory=lambda: list(BUDGETS))
    vocab_size: int = 4096
    per: Literal["document", "line", "file"] = "document"
    held_out: float = 0.1
    settings: list[str] = field(default_factory=list)
    variables: dict[str, str] = field(default_factory=dict)
    jobs: int = 1

    def __post_init__(self):
        if self.reference not in self.candidates:
            raise ConfigError(
                f"reference {self.reference!r} is no candidate{did_you_mean(self.reference, list(self.candidates))}"
            )
        if unknown := sorted(set(self.budgets) - set(BUDGETS)):
            raise ConfigError(f"budgets: {unknown[0]!r} is none of {', '.join(BUDGETS)}")
        for names in (self.candidates, self.yardsticks):
            if len({folder_name(name) for name in names}) < len(names):
                raise ConfigError(f"names must differ in more than signs, which folders do not have: {', '.join(names)}")
        if not (self.seeds and self.budgets) or min(self.epochs, self.jobs) < 1:
            raise ConfigError("seeds and budgets must name at least one, and epochs and jobs be at least 1")
        for name, yardstick in self.yardsticks.items():
            if unknown := sorted(set(yardstick.candidates) - set(self.candidates)):
                near = did_you_mean(unknown[0], list(self.candidates))
                raise ConfigError(f"yardsticks.{name}: {unknown[0]!r} is no candidate{near}")
            if yardstick.task in ("classification", "tagging") and not (yardstick.config and yardstick.data):
                raise ConfigError(
                    f"yardsticks.{name}: {yardstick.task} needs a config to train a head by, and data to score it on"
                )


def load_compare_config(path: str | Path, overrides: list[str] = ()) -> CompareConfig:
    return build(CompareConfig, read_yaml(path, overrides), str(path))


@dataclass(frozen=True)
class Plan:
    """What a candidate takes.

    Attributes:
        parameters: that train.
        epoch: steps in which it reads the corpus once.
        flops: of a step.
        steps: by budget.
    """

    parameters: int
    epoch: int
    flops: int
    steps: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """A candidate's run of so many steps under a seed, with all that it is judged by."""

    candidate: str
    steps: int
    seed: int
    folder: Path


def compare(config: CompareConfig) -> dict:
    """Does what is missing and writes the comparison; returns what `comparison.json` holds.

    Raises:
        ConfigError, DataError, TrainingError: see `metalm.errors`; what is done stays done.
    """
    from metalm.evaluation.comparison import write_comparison

    out = Path(config.out)
    prepare(config, out)
    plans = make_plans(config, out)
    cells = list(dict.fromkeys(all_cells(config, plans, out)))
    done = sum(is_done(config, cell) for cell in cells)
    console.print(f"{len(cells)} runs, {done} of them done before", highlight=False)
    run_cells(config, [cell for cell in cells if not is_done(config, cell)])
    return write_comparison(out, gather(config, plans, out))


def prepare(config: CompareConfig, out: Path) -> None:
    """Corpus, tokenizer and holes, once.

    Raises:
        ConfigError: the folder holds a comparison on other data, or a candidate or yardstick of the same name that is another.
    """
    path = out / "basis.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    plain = asdict(config)
    basis = {name: plain[name] for name in ("data", "per", "held_out", "vocab_size", "settings")}
    basis |= {f"candidates.{name}": value for name, value in plain["candidates"].items()}
    basis |= {f"yardsticks.{name}": value for name, value in plain["yardsticks"].items()}
    for name, value in basis.items():
        if before.get(name, value) != value:
            raise ConfigError(f"{out} holds a comparison with another {name}: choose another out, or another name")
    if not before:
        shutil.rmtree(out / "corpus", ignore_errors=True)  # of a start that was stopped
        write_corpus(config.data, config.per, config.held_out, out / "corpus")
        tokenizer = Tokenizer.train(texts([SourceConfig(str(out / "corpus/train"), "text")]), config.vocab_size)
        (out / "tokenizer").mkdir(exist_ok=True)
        tokenizer.save(out / "tokenizer")
        write_holes(str(out / "corpus/val"), out / "holes.jsonl")
    path.write_text(json.dumps(before | basis))


def settings_of(config: CompareConfig, candidate: Candidate, out: Path) -> list[str]:
    """What a candidate's run has set, but for its length, seed and folder."""
    return [
        f"tokenizer={{path: {out / 'tokenizer'}}}",
        f"data.train[0].shards={out / 'corpus/train'}",
        f"data.validation[0].shards={out / 'corpus/val'}",
        *config.settings,
        *candidate.settings,
    ]


def make_plans(config: CompareConfig, out: Path) -> dict[str, Plan]:
    """Every candidate's plan: its steps an epoch are those of its own layout of the corpus, its FLOPs those of its own step."""
    tokenizer = Tokenizer.load(out / "tokenizer")
    plans = {}
    for name, candidate in config.candidates.items():
        run = load_run_config(candidate.config, settings_of(config, candidate, out))
        fit_to_tokenizer(run.model, Tokenizer.load(out / "tokenizer"))
        with torch.device("meta"):
            model = MODELS[run.model.type](run.model)
        data = replace(run.data, workers=0)
        interface = Interface.of(model, tokenizer, data.row_length)
        micro_batches = sum(1 for _ in PackedStream(data.train, interface, data, repeat=False))
        epoch = math.ceil(micro_batches / run.training.accumulation)
        parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        plans[name] = Plan(parameters, epoch, flops_per_step(run, model))
    budget = config.epochs * plans[config.reference].epoch * plans[config.reference].flops
    return {
        name: replace(plan, steps={"tokens": config.epochs * plan.epoch, "flops": max(1, round(budget / plan.flops))})
        for name, plan in plans.items()
    }


def all_cells(config: CompareConfig, plans: dict[str, Plan], out: Path) -> Iterator[Cell]:
    """Seed by seed, so that what is stopped has whole tables; budgets that come to the same steps share a run."""
    for seed in config.seeds:
        for budget in config.budgets:
            for name, plan in plans.items():
                steps = plan.steps[budget]
                yield Cell(name, steps, seed, run_folder(out, name, steps, seed))


def run_folder(out: Path, candidate: str, steps: int, seed: int) -> Path:
    return out / "runs" / folder_name(candidate) / str(steps) / str(seed)


def folder_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_.+" else "-" for c in name)


def yardsticks_of(config: CompareConfig, candidate: str) -> dict[str, Yardstick]:
    return {n: y for n, y in config.yardsticks.items() if not y.candidates or candidate in y.candidates}


def is_done(config: CompareConfig, cell: Cell) -> bool:
    figures = [cell.folder / f"{folder_name(name)}.json" for name in yardsticks_of(config, cell.candidate)]
    return all(path.exists() for path in [cell.folder / "pretraining/export", *figures])


class Processes:
    """Commands of several threads, each with a log; stopped together."""

    def __init__(self, jobs: int):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.environment = {"OMP_NUM_THREADS": str(max(1, cores // jobs))} | os.environ
        self.running: set[subprocess.Popen] = set()
        self.lock = threading.Lock()
        self.stopped = False

    def run(self, command: list[str], log: Path) -> None:
        """`metalm` with these arguments.

        Raises:
            TrainingError: it failed; with the end of its log.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a") as file:
            with self.lock:
                if self.stopped:
                    raise TrainingError("stopped")
                arguments = [sys.executable, "-m", "metalm", *command]
                process = subprocess.Popen(arguments, stdout=file, stderr=subprocess.STDOUT, env=self.environment)
                self.running.add(process)
            code = process.wait()
            with self.lock:
                self.running.discard(process)
        if code:
            end = "\n  ".join(log.read_text(errors="replace").splitlines()[-5:])
            raise TrainingError(f"metalm {' '.join(command)}\ndid not finish; the end of {log}:\n  {end}")

    def stop(self) -> None:
        """Ends what runs; runs of `metalm train` save a checkpoint first."""
        with self.lock:
            self.stopped = True
            for process in self.running:
                process.terminate()


def run_cells(config: CompareConfig, cells: list[Cell]) -> None:
    processes = Processes(config.jobs)
    with ThreadPoolExecutor(config.jobs) as pool:
        futures = [pool.submit(run_cell, config, cell, processes) for cell in cells]
        try:
            finished, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in finished:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            processes.stop()
            raise


def run_cell(config: CompareConfig, cell: Cell, processes: Processes) -> None:
    """Pretrains, and judges by every yardstick."""
    out, name, pretraining = Path(config.out), f"{cell.candidate}, seed {cell.seed}", cell.folder / "pretraining"
    candidate = config.candidates[cell.candidate]
    if not (pretraining / "export").exists():
        console.print(f"{name}: {cell.steps:,} steps", highlight=False)
        length = [f"training.steps={cell.steps}", f"training.validate_every={cell.steps}", f"training.seed={cell.seed}"]
        settings = [*settings_of(config, candidate, out), *length, f"out={pretraining}"]
        processes.run(["train", candidate.config, *settings], cell.folder / "pretraining.log")
    for title, yardstick in yardsticks_of(config, cell.candidate).items():
        path = cell.folder / f"{folder_name(title)}.json"
        if path.exists():
            continue
        model = pretraining
        if yardstick.config:
            model = path.with_suffix("")
            settings = [*yardstick.settings, f"training.seed={cell.seed}", f"out={model}", encoder_of(pretraining)]
            if not (model / "export").exists():
                processes.run(["train", yardstick.config, *settings], path.with_suffix(".log"))
        data = yardstick.data or str(out / ("holes.jsonl" if yardstick.task == "infilling" else "corpus/val"))
        command = ["evaluate", yardstick.task, "--model", str(model), "--data", data, "--out", str(path), *yardstick.options]
        processes.run(command, path.with_suffix(".log"))
        console.print(f"{name}: {title} {read_metric(path, yardstick.metric):.4g}", highlight=False)


def encoder_of(run: Path) -> str:
    """The setting by which a head reads a run: its encoder of text or, where it has none, its decoder."""
    model = read_model_config(run)
    if "encoder" in model or "text" in model.get("encoders", {}):
        return f"model.encoder={{init_from: {run}}}"
    return f"model.encoder={{type: causal, init_from: {run}}}"


def read_metric(path: Path, metric: str) -> float:
    """Raises `ConfigError` where the evaluation has no such metric."""
    metrics = json.loads(path.read_text())["metrics"]
    if metric not in metrics:
        raise ConfigError(f"{path} has no metric {metric!r}{did_you_mean(metric, list(metrics))}")
    return metrics[metric]


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
