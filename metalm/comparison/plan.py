"""What a comparison takes: its corpus, tokenizer and holes, every candidate's steps by budget, and the runs that come of it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from metalm.comparison.config import Candidate, CompareConfig, folder_name
from metalm.comparison.holes import write_holes
from metalm.data.corpus import write_corpus
from metalm.data.prompts import Interface
from metalm.data.stream import PackedStream, SourceConfig
from metalm.data.tokenizer import Tokenizer
from metalm.errors import ConfigError
from metalm.models import MODELS, fit_to_tokenizer
from metalm.training.config import load_run_config
from metalm.training.estimate import flops_per_step
from metalm.training.loop import texts


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
        plans[name] = Plan(parameters, epoch, flops_per_step(run, model)[0])
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
