"""Linear maps with their weights laid out for inference, in place of `nn.Linear`.

A token at a time, a linear map takes as long as its weights take to be read from memory. Two layouts read them faster:

    PackedLinear    the same numbers in oneDNN's blocked layout, for bfloat16 on CPU: a plain matrix is repacked at every call
    Int8Linear      w_oi ~ scale_o q_oi with q in -127 .. 127, half the bytes of bfloat16; inputs stay as they are

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Weights = Literal["as they are", "int8"]
FEW_ROWS = 16  # up to so many, reading int8 weights costs less than turning them into floats


class PackedLinear(nn.Module):
    """x W^T + b with W in oneDNN's layout; the result is that of `F.linear`."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None):
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach())
        self.bias = bias_O

    @property
    def weight(self) -> Tensor:
        """[O, I]"""
        return self.packed.to_dense()

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


class Int8Linear(nn.Module):
    """x W^T + b with W rounded to 255 steps for each output, from minus to plus its largest weight."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None):
        super().__init__()
        weight_OI = weight_OI.detach()
        largest_O = weight_OI.abs().amax(dim=1).clamp(min=torch.finfo(weight_OI.dtype).tiny)
        self.register_buffer("scale_O", largest_O / 127)  # as rounded in the weights' type: q makes up for it
        exact = torch.promote_types(weight_OI.dtype, torch.float32)
        steps_OI = (weight_OI.to(exact) / self.scale_O.to(exact)[:, None]).round().clamp(-127, 127)
        self.register_buffer("steps_OI", steps_OI.to(torch.int8))
        self.bias = bias_O

    @property
    def weight(self) -> Tensor:
        """[O, I]"""
        return self.steps_OI.to(self.scale_O.dtype) * self.scale_O[:, None]

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        if len(flat) > FEW_ROWS or x.device.type != "cpu" or x.dtype == torch.float64:
            return F.linear(x, self.weight, self.bias)
        out = torch._weight_int8pack_mm(flat, self.steps_OI, self.scale_O).view(*x.shape[:-1], -1)
        return out if self.bias is None else out + self.bias


def can_pack() -> bool:
    """Whether this processor has oneDNN's products of bfloat16, without which `PackedLinear` cannot be."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def replace_linear(module: nn.Module, make: Callable[[Tensor, Tensor | None], nn.Module]) -> None:
    """Puts `make(weight, bias)` in the place of every linear map inside a module."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                setattr(parent, name, make(child.weight.detach(), None if child.bias is None else child.bias.detach()))
