"""Total variation of two readings: bounds, symmetry, and the gradients of the dense form."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from metalm.nn import losses
from metalm.nn.agreement import agreement_loss


def problem(N=11, D=5, V=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sides = [(2 * torch.randn(N, D, generator=generator, dtype=torch.float64)).requires_grad_() for _ in range(2)]
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64).requires_grad_()
    return *sides, weight, torch.randint(V, (N,), generator=generator)


def dense(forward: Tensor, backward: Tensor, weight: Tensor, targets: Tensor, beta: float) -> tuple[Tensor, list[Tensor]]:
    logits = [side @ weight.T for side in (forward, backward)]
    p, q = (side.softmax(-1) for side in logits)
    parts = [*(F.cross_entropy(side, targets, reduction="sum") for side in logits), (p - q).abs().sum() / 2]
    return parts[0] + parts[1] + beta * parts[2], parts


@pytest.mark.parametrize("beta", [0.0, 0.1, 3.0])
@pytest.mark.parametrize("logits_at_a_time", [1, 42, 1 << 24])
def test_equals_the_dense_form(monkeypatch, beta, logits_at_a_time):
    monkeypatch.setattr(losses, "CHUNK_LOGITS", logits_at_a_time)
    inputs = problem()
    loss, parts = agreement_loss(*inputs, beta)
    expected, expected_parts = dense(*inputs, beta)
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    for part, theirs in list(zip(parts, expected_parts))[: 3 if beta else 2]:
        torch.testing.assert_close(part, theirs.detach(), rtol=1e-12, atol=0)
    ours, theirs = (torch.autograd.grad(0.37 * value, inputs[:3]) for value in (loss, expected))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_gradcheck(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 42)
    *inputs, targets = problem()
    assert torch.autograd.gradcheck(lambda f, b, w: agreement_loss(f, b, w, targets, 0.7)[0], inputs)


@torch.no_grad()
def test_total_variation_is_a_distance():
    for seed in range(20):
        forward, backward, weight, targets = problem(N=1, seed=seed)
        _, (ahead, back, distance) = agreement_loss(forward, backward, weight, targets, 1.0)
        _, (back_first, ahead_second, swapped) = agreement_loss(backward, forward, weight, targets, 1.0)
        assert 0 < distance < 1 and distance == swapped
        assert (ahead, back) == (ahead_second, back_first)
        assert agreement_loss(forward, forward, weight, targets, 1.0)[1][2] == 0
    far = torch.eye(2, dtype=torch.float64) * 1e3
    assert agreement_loss(far[:1], far[1:], far, torch.zeros(1, dtype=torch.long), 1.0)[1][2] == 1


def test_without_agreement_it_is_two_cross_entropies():
    inputs = problem()
    loss, _ = agreement_loss(*inputs, 0.0)
    both = sum(losses.linear_cross_entropy(side, *inputs[2:]) for side in inputs[:2])
    torch.testing.assert_close(loss, both, rtol=1e-13, atol=0)
    for a, b in zip(torch.autograd.grad(loss, inputs[:3]), torch.autograd.grad(both, inputs[:3])):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_no_target_costs_nothing():
    forward, backward, weight, targets = problem()
    loss, parts = agreement_loss(forward[:0], backward[:0], weight, targets[:0])
    loss.backward()
    assert loss == 0 and parts.tolist() == [0, 0, 0] and torch.equal(weight.grad, torch.zeros_like(weight))
