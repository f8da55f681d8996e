"""Cross-entropy of tied or untied heads without ever holding [positions, vocabulary].

    L = sum_n  logsumexp(h_n W^T) - h_n W^T[target_n]                    (of s tanh(h_n W^T / s), under a soft cap s)

The positions go through in chunks. Forward computes each chunk's loss and, with p - onehot at hand, its gradients too,
so backward only scales them: the arithmetic of the dense form, the memory of one chunk's logits plus dW.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metalm.nn.attention import soft_cap

CHUNK_LOGITS = 1 << 24  # logits held at a time
CACHED_LOGITS = 1 << 18  # of them, that a core turns into gradients at a time, in float32, while they are in its cache


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, importance_N: Tensor | None, softcap: float):
        chunk = max(1, CHUNK_LOGITS // weight_VD.shape[0])
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        accumulate = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
        nats_N = hidden_ND.new_empty(len(targets_N), dtype=accumulate)
        grad_hidden = torch.empty_like(hidden_ND) if need_hidden else None
        grad_weight = torch.zeros_like(weight_VD, dtype=accumulate) if need_weight else None
        for start in range(0, hidden_ND.shape[0], chunk):
            h = hidden_ND[start : start + chunk]
            grad = h @ weight_VD.T  # logits as yet
            cached = max(1, CACHED_LOGITS // weight_VD.shape[0]) * torch.get_num_threads()
            block = cached if h.device.type == "cpu" else chunk
            for first in range(start, start + len(h), block):
                these = slice(first, min(first + block, start + len(h)))
                scores, t = grad[first - start : these.stop - start], targets_N[these, None]
                logits = soft_cap(scores.to(accumulate), softcap)
                slope = 1 - (logits / softcap).square() if softcap else None  # of the cap
                logp = logits.log_softmax(dim=1)
                del logits
                nats_N[these] = -logp.gather(1, t)[:, 0]
                if need_hidden or need_weight:
                    logp.exp_().scatter_add_(1, t, torch.full_like(logp[:, :1], -1.0))
                    if slope is not None:
                        logp *= slope
                    if importance_N is not None:
                        logp *= importance_N[these, None]
                    scores.copy_(logp)
            if need_hidden:
                grad_hidden[start : start + chunk] = grad @ weight_VD
            if need_weight:
                grad_weight += grad.T @ h
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtype = weight_VD.dtype
        ctx.mark_non_differentiable(nats_N)
        return (nats_N if importance_N is None else nats_N * importance_N).sum(), nats_N

    @staticmethod
    def backward(ctx, grad: Tensor, _: Tensor):
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad.to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * grad).to(ctx.dtype),
            None,
            None,
            None,
        )


def linear_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, softcap: float = 0.0) -> Tensor:
    """Summed cross-entropy in nats, a float32 scalar (float64 for float64 input).

    Args:
        hidden_ND: states of the target positions alone.
        weight_VD: the softmax's matrix.
        targets_N: int64, each in [0, V).
        softcap: of the logits (`metalm.nn.attention.soft_cap`), 0 for none.
    """
    return weighted_cross_entropy(hidden_ND, weight_VD, targets_N, softcap=softcap)[0]


def weighted_cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, importance_N: Tensor | None = None, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """`linear_cross_entropy` with a weight for each target (None: 1), and the nats [N] of each, unweighted, which carry no
    gradient."""
    if not torch.is_grad_enabled():  # else its forward would make gradients that nobody asked for
        hidden_ND, weight_VD = hidden_ND.detach(), weight_VD.detach()
    return _LinearCrossEntropy.apply(hidden_ND, weight_VD, targets_N, importance_N, softcap)
