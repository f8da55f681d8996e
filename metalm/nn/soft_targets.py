"""Distillation of a softmax: what a teacher thinks of every word, without ever holding [positions, vocabulary].

    L = sum_n  w_n T^2 KL(softmax(t_n / T) || softmax(s_n / T)),   s = h W^T, t = g U^T
    dL/ds_n = w_n T (softmax(s_n / T) - softmax(t_n / T))

In chunks, with the gradients made in the forward pass, as `metalm.nn.losses` does. Source: Hinton et al., "Distilling the
Knowledge in a Neural Network" (arXiv 1503.02531).

Shapes: N positions, V vocabulary, D and E widths of student and teacher.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metalm.nn import losses
from metalm.nn.attention import soft_cap


class _SoftCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND: Tensor, weight_VD: Tensor, teacher_NE: Tensor, teacher_VE: Tensor, w_N: Tensor, T, softcaps):
        accumulate = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
        chunk = max(1, losses.CHUNK_LOGITS // (2 * weight_VD.shape[0]))
        total = hidden_ND.new_zeros((), dtype=accumulate)
        grad_hidden, grad_weight = torch.empty_like(hidden_ND), torch.zeros_like(weight_VD, dtype=accumulate)
        for start in range(0, len(hidden_ND), chunk):
            part = slice(start, start + chunk)
            logits = soft_cap((hidden_ND[part] @ weight_VD.T).to(accumulate), softcaps[0])
            own = (logits / T).log_softmax(1)
            theirs = (soft_cap((teacher_NE[part] @ teacher_VE.T).to(accumulate), softcaps[1]) / T).log_softmax(1)
            wanted, w_N1 = theirs.exp(), w_N[part, None].to(accumulate)
            total += (w_N1 * wanted * (theirs - own)).sum() * T**2
            grad = (own.exp() - wanted) * (w_N1 * T)
            if softcaps[0]:
                grad *= 1 - (logits / softcaps[0]).square()
            grad = grad.to(hidden_ND.dtype)
            grad_hidden[part] = grad @ weight_VD
            grad_weight += grad.T @ hidden_ND[part]
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtype = weight_VD.dtype
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):
        hidden, weight = ctx.saved_tensors
        return hidden * grad.to(hidden.dtype), (weight * grad).to(ctx.dtype), None, None, None, None, None


def soft_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    teacher_NE: Tensor,
    teacher_VE: Tensor,
    w_N: Tensor,
    temperature: float = 1.0,
    softcaps: tuple[float, float] = (0.0, 0.0),
) -> Tensor:
    """T^2 times the divergence of the student's distributions from the teacher's, summed, in nats: a float32 scalar.

    Args:
        hidden_ND, weight_VD: the student's states and the matrix of its softmax.
        teacher_NE, teacher_VE: the teacher's, which get no gradient.
        w_N: the positions' weights.
        softcaps: of the student's and of the teacher's logits, 0 for none.
    """
    return _SoftCrossEntropy.apply(hidden_ND, weight_VD, teacher_NE, teacher_VE, w_N, temperature, softcaps)
