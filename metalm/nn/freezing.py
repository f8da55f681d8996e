"""Which layers train: all, none, the last n (the paper freezes all but the last two of the language encoder), or biases."""

from __future__ import annotations

from typing import Literal

from torch import nn

from metalm.errors import ConfigError

Trainable = Literal["all", "none", "biases"] | int


def set_trainable(module: nn.Module, layers: list[nn.Module], trainable: Trainable, name: str) -> None:
    """Freezes a module: "all" trains, "none" does, all but its last n layers are frozen, or all but its biases (BitFit, arXiv
    2106.10199).

    Args:
        layers: the module's blocks from input to output.
        name: the module's key in the configuration, for the error.
    """
    if isinstance(trainable, int) and not 0 <= trainable <= len(layers):
        raise ConfigError(f"{name}.trainable is {trainable}, but there are {len(layers)} layers")
    module.requires_grad_(trainable == "all")
    for parameter_name, parameter in module.named_parameters() if trainable == "biases" else ():
        parameter.requires_grad_(parameter_name.endswith("bias"))
    if isinstance(trainable, int) and trainable > 0:
        for layer in layers[-trainable:]:
            layer.requires_grad_(True)


def is_frozen(module: nn.Module) -> bool:
    """Whether nothing of it trains."""
    return not any(parameter.requires_grad for parameter in module.parameters())
