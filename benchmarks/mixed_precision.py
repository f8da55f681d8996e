"""AdamW on float32 master weights for a model in bfloat16: the same scheme for METALM and for its peers.

    gradients (bfloat16) -> float32, clipped -> fused AdamW on the master weights -> model (bfloat16)

It is what DeepSpeed's bf16 engine does at ZeRO stage 0, without the engine: a model of another library takes it as well.
Memory: 2 + 2 bytes a parameter for weights and gradients, 16 for master weights, their gradients and both moments.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MasterAdamW:
    """AdamW for a bfloat16 model; `step` also clears the gradients."""

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
    ):
        self.weights = [p for p in model.parameters() if p.requires_grad]
        self.master = [p.detach().float().clone() for p in self.weights]
        for master in self.master:
            master.grad = torch.zeros_like(master)
        self.gradients = [master.grad for master in self.master]
        self.max_grad_norm = max_grad_norm
        self.adamw = torch.optim.AdamW(self.master, lr, betas, weight_decay=weight_decay, fused=True)

    def set_lr(self, lr: float) -> None:
        for group in self.adamw.param_groups:
            group["lr"] = lr

    @torch.no_grad()
    def step(self) -> Tensor:
        """One update; returns the gradients' norm before clipping. A weight without a gradient counts as zero."""
        for gradient, weight in zip(self.gradients, self.weights):
            if weight.grad is None:
                gradient.zero_()
            else:
                gradient.copy_(weight.grad)
            weight.grad = None
        norm = nn.utils.clip_grad_norm_(self.master, self.max_grad_norm)
        self.adamw.step()
        torch._foreach_copy_(self.weights, self.master)
        return norm
