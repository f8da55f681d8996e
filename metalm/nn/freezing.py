"""Which layers train: all, none, or the last n (the paper freezes all but the last two of the language encoder)."""

from __future__ import annotations

from typing import Literal

from torch import nn

from metalm.errors import ConfigError

Trainable = Literal["all", "none"] | int


def set_trainable(module: nn.Module, layers: list[nn.Module], trainable: Trainable, name: str) -> None:
    """Freezes a module: "all" trains, "none" does, or all but its last n layers are frozen.

    Args:
        layers: the module's blocks from input to output.
        name: the module's key in the configuration, for the error.
    """
    if isinstance(trainable, int) and not 0 <= trainable <= len(layers):
        raise ConfigError(f"{name}.trainable is {trainable}, but there are {len(layers)} layers")
    module.requires_grad_(trainable == "all")
    if isinstance(trainable, int) and trainable > 0:
        for layer in layers[-trainable:]:
            layer.requires_grad_(True)
