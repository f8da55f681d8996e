"""`training.fp8`: the products of the blocks in 8-bit floats, by torchao; weights, gradients and optimizer stay as they are.

    x, W     float8 e4m3, each scaled by its largest value     forward
    dL/dy    float8 e5m2, the same                             backward, with x and W as they were

For GPUs that have such products, and blocks wide enough to repay the scaling, which `training.compile` fuses. Maps that do not
train, and low-rank adapters, stay as they are. Source: Micikevicius et al. 2022 (arXiv 2209.05433).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from metalm.errors import ConfigError
from metalm.nn.transformer import Block
from metalm.training.compiling import APART

FP8 = Literal["none", "float8", "emulated"]  # YAML would read "on" and "off" as truth values
MULTIPLE = 16  # of a map's inputs and outputs, which the products need
CAPABILITY = (8, 9)


def use_fp8(model: nn.Module, kind: FP8, stage: int) -> None:
    """From now on the linear maps in the blocks of the model's own stacks multiply in 8 bits.

    Args:
        stage: of ZeRO.

    Raises:
        ConfigError: torchao or such a GPU is missing, the stage is 3, or no map has a fitting size.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise ConfigError("training.fp8 needs torchao: pip install 'metalm[fp8]'") from error
    if kind == "float8" and not (torch.cuda.is_available() and torch.cuda.get_device_capability() >= CAPABILITY):
        raise ConfigError(
            "training.fp8: there is no GPU with 8-bit floats here (compute capability 8.9: L40S, H100, H200, or later); "
            "training.fp8=emulated rounds the same anywhere, slowly"
        )
    if stage == 3:
        raise ConfigError("training.fp8: under ZeRO-3 a map's weights are elsewhere; take training.deepspeed=zero2")
    config = Float8LinearConfig(emulate=kind == "emulated", pad_inner_dim=True)

    def fits(module: nn.Module, name: str) -> bool:
        sizes = module.weight.shape if type(module) is nn.Linear and "lora_" not in name else (1, 1)
        return sizes[0] % MULTIPLE == sizes[1] % MULTIPLE == 0 and module.weight.requires_grad

    blocks = [m for name, m in model.named_modules() if isinstance(m, Block) and not name.startswith(APART)]
    if not any(fits(module, name) for block in blocks for name, module in block.named_modules()):
        raise ConfigError(f"training.fp8: no block has linear maps whose sizes are multiples of {MULTIPLE}")
    for block in blocks:
        convert_to_float8_training(block, config=config, module_filter_fn=fits)
