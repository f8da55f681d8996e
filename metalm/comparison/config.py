"""What is compared: candidates, the yardsticks they are judged by, and what all of them have in common."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from metalm.config import build, read_yaml
from metalm.errors import ConfigError
from metalm.registry import did_you_mean

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


def folder_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_.+" else "-" for c in name)


def yardsticks_of(config: CompareConfig, candidate: str) -> dict[str, Yardstick]:
    return {n: y for n, y in config.yardsticks.items() if not y.candidates or candidate in y.candidates}
