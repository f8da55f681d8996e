"""The configuration of a run: model, tokenizer, data, training, and where it goes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from metalm.config import build, plugin, read_yaml
from metalm.data.stream import DataConfig
from metalm.errors import ConfigError
from metalm.models import MODELS
from metalm.pretrained import FOREIGN, inherit, read_model_config
from metalm.training.adapters import AdaptersConfig
from metalm.training.distill import DistillConfig
from metalm.training.fp8 import FP8


@dataclass
class TokenizerConfig:
    """`path`: a tokenizer.json, a run, or a Hugging Face id; empty: one is trained on the run's texts, of `vocab_size` pieces
    of words (`type: bpe`) or whole words (`words`)."""

    path: str = ""
    type: Literal["bpe", "words"] = "bpe"
    vocab_size: int = 8192


@dataclass
class TrainingConfig:
    """How long, how fast, how precisely, and how often to log and save.

    `deepspeed` names a bundled DeepSpeed configuration (zero0, zero1, zero2, zero3, zero2-offload, zero3-offload) or a JSON
    file in DeepSpeed's own format; batch sizes, precision and clipping are filled in from here.
    `optimizer` is AdamW, by `betas` and `eps`, or stochastic gradient descent with Nesterov's `momentum`; `min_lr` is the
    fraction of `lr` that the schedule ends at; `part_lr` gives parts, by the beginning of their parameters' names, a multiple
    of `lr`: {encoder: 0.01}. `adapters` puts low-rank adapters on linear maps, and freezes these; `distill` has a larger
    model teach. `compile` has torch.compile make the blocks faster, for half a minute or so at the start; `fp8: float8` has
    them multiply in 8-bit floats on GPUs that can. Intervals of 0 switch a thing off.
    """

    steps: int
    lr: float = 1e-3
    warmup: int = 100
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    min_lr: float = 0.0
    optimizer: Literal["adamw", "nesterov"] = "adamw"
    momentum: float = 0.99
    part_lr: dict[str, float] = field(default_factory=dict)
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    eps: float = 1e-6
    weight_decay: float = 0.01
    clip: float = 1.0
    accumulation: int = 1
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    compile: bool = False
    fp8: FP8 = "none"
    deepspeed: str = "zero0"
    seed: int = 0
    log_every: int = 10
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    validate_every: int = 0
    tensorboard: bool = False
    adapters: AdaptersConfig | None = None
    distill: DistillConfig | None = None

    def __post_init__(self):
        for name in ("steps", "accumulation", "log_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, it must be at least 1")
        if not 0 < self.momentum < 1:
            raise ConfigError(f"momentum is {self.momentum}, it must be between 0 and 1")
        if self.lr <= 0:
            raise ConfigError(f"lr is {self.lr}, it must be positive")
        if len(self.betas) != 2:
            raise ConfigError(f"betas is {self.betas}, it takes two numbers")


@dataclass
class RunConfig:
    """A run: `metalm train CONFIG.yaml key=value …`.

    `init_from` starts from another run's export: its model and tokenizer are taken over, and `model` need only hold what
    differs (which layers train, say). `variables` are there to be referred to, as `${variables.name}`. With `resume: auto` a
    run that was stopped goes on where its last checkpoint was.
    """

    out: str
    data: DataConfig
    training: TrainingConfig
    model: Any = plugin(MODELS)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    variables: dict[str, str] = field(default_factory=dict)
    init_from: str = ""
    resume: Literal["auto", "never"] = "auto"
    dry_run: bool = False

    def __post_init__(self):
        if self.training.validate_every and not self.data.validation:
            raise ConfigError("training.validate_every is set, but data.validation names no source")
        self.model.check_row_length(self.data.row_length)


def load_run_config(path: str | Path, overrides: list[str] = ()) -> RunConfig:
    """The typed configuration of a YAML file with `key=value` overrides."""
    values = read_yaml(path, overrides)
    if values.get("init_from"):
        values["model"] = merge(read_model_config(values["init_from"]), values.get("model") or {})
        values.setdefault("tokenizer", {"path": values["init_from"]})
    model = values.get("model")
    for name, holder, key in parts(model) if isinstance(model, dict) else ():
        start = holder[key].get("init_from")
        if start:
            holder[key] = inherit(holder[key], start, name)
            values.setdefault("tokenizer", {"path": start.removeprefix(FOREIGN)})
    return build(RunConfig, values, str(path))


def parts(model: dict) -> Iterator[tuple[str, dict, str]]:
    """The decoder and the encoders of a plain configuration, each by its name, the mapping that holds it, and its key there."""
    encoders = model.get("encoders") if isinstance(model.get("encoders"), dict) else {}
    single = (("decoder", model, "decoder"), ("encoder", model, "encoder"))
    for name, holder, key in (*single, *((f"encoders.{name}", encoders, name) for name in encoders)):
        if isinstance(holder.get(key), dict):
            yield name, holder, key


def merge(base: dict, changes: dict) -> dict:
    """`base` with `changes` over it, mappings merged key by key."""
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged
