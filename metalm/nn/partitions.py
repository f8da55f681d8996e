"""Weights that ZeRO-3 keeps in parts: no process has a whole tensor until all processes ask for it together."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn


def is_partitioned(module: nn.Module) -> bool:
    """Whether its weights are kept in parts: all processes must then run it equally often."""
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())


def whole(tensor: Tensor) -> AbstractContextManager:
    """A context in which the tensor is whole; of one kept in parts all processes must enter it."""
    if not hasattr(tensor, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([tensor])
