"""Two readings of one token agree: cross-entropy in both directions and their total variation, without [positions, vocabulary].

    p = softmax(f W^T), q = softmax(b W^T)
    L = sum_n  -log p_n[x_n] - log q_n[x_n] + beta TV(p_n, q_n),     TV(p, q) = 1/2 sum_z |p(z) - q(z)|
    dTV/df_z = p_z (s_z - <p, s>),  dTV/db_z = -q_z (s_z - <q, s>),  s = sign(p - q) / 2

Source: "Meet in the Middle" (arXiv 2303.07295), section 2. Chunks and the fused backward are those of `linear_cross_entropy`:
one softmax serves the loss, the agreement and both gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metalm.nn import losses


class _Agreement(torch.autograd.Function):
    @staticmethod
    def forward(ctx, forward_ND: Tensor, backward_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, beta: float):
        accumulate = torch.float64 if forward_ND.dtype == torch.float64 else torch.float32
        chunk = max(1, losses.CHUNK_LOGITS // (2 * weight_VD.shape[0]))
        need = any(ctx.needs_input_grad[:3])
        parts = forward_ND.new_zeros(3, dtype=accumulate)
        grads = [torch.empty_like(side) if need else None for side in (forward_ND, backward_ND)]
        grad_weight = torch.zeros_like(weight_VD, dtype=accumulate) if need else None
        for start in range(0, forward_ND.shape[0], chunk):
            sides = [side[start : start + chunk] for side in (forward_ND, backward_ND)]
            t = targets_N[start : start + chunk, None]
            probabilities = []
            for n, side in enumerate(sides):
                logits = (side @ weight_VD.T).to(accumulate)
                normaliser = logits.logsumexp(dim=1, keepdim=True)
                parts[n] += (normaliser - logits.gather(1, t)).sum()
                probabilities.append(logits.sub_(normaliser).exp_())
            p, q = probabilities
            if beta or not need:
                difference = p - q
                parts[2] += difference.abs().sum() / 2
                sign = difference.sign_().div_(2)
            if not need:
                continue
            for n, (side, own, direction) in enumerate(zip(sides, probabilities, (beta, -beta))):
                if beta:
                    grad = sign - (own * sign).sum(dim=1, keepdim=True)
                    grad = grad.mul_(direction).add_(1).mul_(own)
                else:
                    grad = own
                grad.scatter_add_(1, t, torch.full_like(grad[:, :1], -1.0))
                grad = grad.to(side.dtype)
                grads[n][start : start + chunk] = grad @ weight_VD
                grad_weight += grad.T @ side
        ctx.save_for_backward(*grads, grad_weight)
        ctx.dtype = weight_VD.dtype
        loss = parts[0] + parts[1] + beta * parts[2]
        ctx.mark_non_differentiable(parts)
        return loss, parts

    @staticmethod
    def backward(ctx, grad: Tensor, _: Tensor):
        forward, backward, weight = ctx.saved_tensors
        return forward * grad.to(forward.dtype), backward * grad.to(backward.dtype), (weight * grad).to(ctx.dtype), None, None


def agreement_loss(
    forward_ND: Tensor, backward_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, beta: float = 0.1
) -> tuple[Tensor, Tensor]:
    """The loss, and its three sums for the log: cross-entropy forward, backward, total variation (all in nats but the last).

    Args:
        forward_ND, backward_ND: states that predict the same token from the left and from the right.
        weight_VD: the softmax's matrix, which both share.
        targets_N: int64, each in [0, V).
        beta: weight of the agreement; with 0 its sum is not computed while training.
    """
    if not torch.is_grad_enabled():
        forward_ND, backward_ND, weight_VD = forward_ND.detach(), backward_ND.detach(), weight_VD.detach()
    return _Agreement.apply(forward_ND, backward_ND, weight_VD, targets_N, beta)
