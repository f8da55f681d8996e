"""The chunked head's loss and gradients are those of the dense form."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from metalm.nn import losses
from metalm.nn.losses import linear_cross_entropy, weighted_cross_entropy


def problem(N=11, D=5, V=7, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = (3 * torch.randn(N, D, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(V, (N,), generator=generator)


@pytest.mark.parametrize("logits_at_a_time", [1, 7, 21, 76, 77, 1 << 24])
def test_equals_dense_cross_entropy(monkeypatch, logits_at_a_time):
    monkeypatch.setattr(losses, "CHUNK_LOGITS", logits_at_a_time)  # chunks of 1, 1, 3, 10, 11 and all positions
    monkeypatch.setattr(losses, "CACHED_LOGITS", logits_at_a_time // 2)
    hidden, weight, targets = problem()
    loss = linear_cross_entropy(hidden, weight, targets)
    dense = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    torch.testing.assert_close(loss, dense, rtol=1e-13, atol=0)
    ours = torch.autograd.grad(loss * 0.37, (hidden, weight))
    theirs = torch.autograd.grad(dense * 0.37, (hidden, weight))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("logits_at_a_time", [21, 1 << 24])
def test_targets_count_by_their_weights(monkeypatch, logits_at_a_time):
    monkeypatch.setattr(losses, "CHUNK_LOGITS", logits_at_a_time)
    monkeypatch.setattr(losses, "CACHED_LOGITS", logits_at_a_time // 2)
    hidden, weight, targets = problem()
    importance = torch.rand(len(targets), dtype=torch.float64)
    loss, nats = weighted_cross_entropy(hidden, weight, targets, importance)
    each = F.cross_entropy(hidden @ weight.T, targets, reduction="none")
    torch.testing.assert_close(nats, each.detach())
    torch.testing.assert_close(loss, (importance * each).sum())
    ours = torch.autograd.grad(loss, (hidden, weight))
    torch.testing.assert_close(ours, torch.autograd.grad((importance * each).sum(), (hidden, weight)))
    assert not nats.requires_grad


@pytest.mark.parametrize("logits_at_a_time", [21, 1 << 24])
def test_capped_logits_and_their_gradients_are_those_of_the_dense_form(monkeypatch, logits_at_a_time):
    monkeypatch.setattr(losses, "CHUNK_LOGITS", logits_at_a_time)
    monkeypatch.setattr(losses, "CACHED_LOGITS", logits_at_a_time // 2)
    hidden, weight, targets = problem()
    loss = linear_cross_entropy(hidden, weight, targets, softcap=2.0)
    dense = F.cross_entropy(2 * torch.tanh(hidden @ weight.T / 2), targets, reduction="sum")
    torch.testing.assert_close(loss, dense, rtol=1e-13, atol=0)
    torch.testing.assert_close(torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(dense, (hidden, weight)))
    assert (loss - linear_cross_entropy(hidden, weight, targets)).abs() > 1


def test_gradcheck(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 21)
    hidden, weight, targets = problem()
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, targets), (hidden, weight))


@pytest.mark.parametrize("frozen", [0, 1])
def test_only_what_trains_gets_a_gradient(frozen):
    inputs = list(problem())
    inputs[frozen] = inputs[frozen].detach()
    loss = linear_cross_entropy(*inputs)
    dense = F.cross_entropy(inputs[0] @ inputs[1].T, inputs[2], reduction="sum")
    torch.testing.assert_close(torch.autograd.grad(loss, inputs[1 - frozen]), torch.autograd.grad(dense, inputs[1 - frozen]))


def test_tied_weights_add_both_gradients():
    _, weight, targets = problem(N=7)
    torch.testing.assert_close(
        torch.autograd.grad(linear_cross_entropy(weight * 2, weight, targets), weight),
        torch.autograd.grad(F.cross_entropy(2 * weight @ weight.T, targets, reduction="sum"), weight),
    )


def test_no_target_costs_nothing():
    hidden, weight, targets = problem()
    loss = linear_cross_entropy(hidden[:0], weight, targets[:0])
    loss.backward()
    assert loss == 0 and torch.equal(weight.grad, torch.zeros_like(weight))


def test_bfloat16_sums_in_float32():
    hidden, weight, targets = problem(N=3000, dtype=torch.bfloat16)
    loss = linear_cross_entropy(hidden, weight, targets)
    exact = F.cross_entropy(hidden.double() @ weight.double().T, targets, reduction="sum")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=3e-3, atol=0)
    (grad,) = torch.autograd.grad(loss, weight)
    (exact_grad,) = torch.autograd.grad(exact, weight)
    assert grad.dtype == torch.bfloat16
    torch.testing.assert_close(grad.double(), exact_grad.double(), rtol=0.02, atol=0.02 * float(exact_grad.abs().max()))


def test_extreme_logits_stay_finite():
    hidden, weight, targets = problem()
    loss = linear_cross_entropy(hidden * 1e4, weight, targets)
    torch.testing.assert_close(loss, F.cross_entropy(1e4 * hidden @ weight.T, targets, reduction="sum"))


def test_without_gradients_none_are_made(monkeypatch):
    """Validation pays for the logits alone."""
    made = []
    zeros_like = torch.zeros_like
    monkeypatch.setattr(losses.torch, "zeros_like", lambda *a, **k: made.append(1) or zeros_like(*a, **k))
    hidden, weight, targets = problem()
    with torch.no_grad():
        linear_cross_entropy(hidden, weight, targets)
    assert not made
    linear_cross_entropy(hidden, weight, targets)
    assert made
