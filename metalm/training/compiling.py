"""`training.compile`: what the blocks of a stack compute around attention becomes few fused kernels, by torch.compile.

    norm, product, rotation  ->  attention, a kernel of its own  ->  product, residual, norm, MLP, residual

Attention stays as it is: its masks come in many forms, and none of them should cost a compilation. Encoders stay as they are,
too: a batch brings another number of spans each time, where rows of text have one shape.
"""

from __future__ import annotations

import torch
from torch import nn

from metalm.nn.transformer import Block

APART = ("encoders.", "connectors.", "fusion.")


def compile_blocks(model: nn.Module) -> None:
    """From now on the blocks of the model's own stacks run compiled; the first step takes the time for it."""
    for name, module in model.named_modules():
        if isinstance(module, Block) and not name.startswith(APART):
            module.before, module.after = torch.compile(module.before), torch.compile(module.after)
