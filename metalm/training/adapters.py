"""Low-rank adapters (LoRA, DoRA) by peft, on any linear maps of a model that a pattern names.

    W x  ->  W x + (alpha / rank) B A x        W is frozen, B and A train

A run's export is the plain model with the adapters merged into it; beside it lie the adapters alone, for another run to start
from. Sources: LoRA (arXiv 2106.09685), DoRA (arXiv 2402.09353).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metalm.errors import CheckpointError, ConfigError
from metalm.pretrained import ADAPTERS, fill, find_export

WEIGHTS, CONFIG = ADAPTERS


@dataclass
class AdaptersConfig:
    """Adapters of `rank` on the linear maps whose whole names match the regular expression `targets`; `init_from`: an export
    that has adapters to start from."""

    targets: str
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    dora: bool = False
    init_from: str = ""

    def __post_init__(self):
        if self.rank < 1:
            raise ConfigError(f"rank {self.rank} must be at least 1")
        try:
            re.compile(self.targets)
        except re.error as error:
            raise ConfigError(f"targets {self.targets!r} is no regular expression: {error}") from error


def add_adapters(model: nn.Module, config: AdaptersConfig) -> None:
    """Puts adapters on a model; they train, and of the rest what trained before and has none.

    Raises:
        ConfigError: peft is not installed, or the pattern meets no linear map.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError("adapters need peft: pip install 'metalm[adapters]'") from error

    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    met = [name for name in linear if re.fullmatch(config.targets, name)]
    if not met:
        some = ", ".join(linear[:3])
        raise ConfigError(f"training.adapters.targets {config.targets!r} is no linear map's whole name; there are {some}, …")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    trained -= {f"{name}.{kind}" for name in met for kind in ("weight", "bias")}
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        use_dora=config.dora,
        target_modules="|".join(map(re.escape, met)),
    )
    inject_adapter_in_model(lora, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name) or name in trained)


def is_adapter(name: str) -> bool:
    return ".lora_" in name


def load_adapters(model: nn.Module, name: str | Path) -> None:
    """Fills a model's adapters with those of an export.

    Raises:
        CheckpointError: it has none, or they do not fit.
    """
    from safetensors.torch import load_file

    path = find_export(name) / WEIGHTS
    if not path.exists():
        raise CheckpointError(f"{name} has no adapters ({WEIGHTS}) to start from")
    own = {n: parameter for n, parameter in model.state_dict().items() if not is_adapter(n)}
    fill(model, own | load_file(path), path)


def save_adapters(weights: Mapping[str, Tensor], config: AdaptersConfig, folder: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: t.contiguous() for name, t in weights.items() if is_adapter(name)}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(asdict(config) | {"init_from": ""}, indent=1))


@torch.no_grad()
def merge_adapters(weights: Mapping[str, Tensor], model_config: Any, config: AdaptersConfig) -> dict[str, Tensor]:
    """The plain model's state dict, from that of the model with adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    from metalm.models import MODELS

    model = MODELS[model_config.type](model_config)
    add_adapters(model, config)
    model.load_state_dict(weights)
    for module in list(model.modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
    return {name.replace(".base_layer.", "."): t for name, t in model.state_dict().items() if not is_adapter(name)}
