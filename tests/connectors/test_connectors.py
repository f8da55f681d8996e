"""Every connector keeps the contract: shapes, counts, gradients, and padding that changes nothing."""

from __future__ import annotations

import pytest
import torch

from metalm.config import build
from metalm.connectors import CONNECTORS
from metalm.connectors.base import Connector
from metalm.errors import ConfigError

ENCODER, DECODER = 12, 16
CONFIGS = [
    {"type": "linear"},
    {"type": "feedforward"},
    {"type": "feedforward", "layers": 2, "hidden": 5},
    {"type": "perceiver", "latents": 3, "heads": 4},
    {"type": "perceiver", "latents": 1, "heads": 1, "layers": 1},
]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(params=CONFIGS, ids=lambda c: " ".join(map(str, c.values())))
def connector(request) -> Connector:
    torch.manual_seed(0)
    cls = CONNECTORS[request.param["type"]]
    config = build(cls.Config, request.param, "test")
    made = cls(config, ENCODER, DECODER).double()
    made.num_vectors = config.num_vectors
    return made


def test_built_ins_are_all_tested():
    assert {config["type"] for config in CONFIGS} == set(CONNECTORS.builtin)


def test_shapes_are_as_promised(connector):
    if connector.pointwise:
        assert connector(draw(7, ENCODER)).shape == (7, DECODER)
        assert connector(draw(2, 3, ENCODER)).shape == (2, 3, DECODER)
        assert connector.num_vectors(7) == 7
    else:
        out = connector(draw(4, 7, ENCODER), torch.ones(4, 7, dtype=torch.bool))
        assert out.shape == (4, connector.num_vectors(7), DECODER)
        assert connector.num_vectors(7) == connector.num_vectors(1)


def test_a_span_is_as_it_is_alone(connector):
    """Pointwise: state by state. Else: whatever stands in the padding, and whoever is in the batch."""
    states = draw(3, 6, ENCODER)
    if connector.pointwise:
        alone = torch.stack([torch.stack([connector(state) for state in span]) for span in states])
        torch.testing.assert_close(connector(states), alone)
        return
    lengths = [6, 1, 4]
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    together = connector(states, mask)
    for n, length in enumerate(lengths):
        torch.testing.assert_close(together[n], connector(states[n : n + 1, :length])[0])
    other = torch.where(mask[:, :, None], states, 1e3 * draw(3, 6, ENCODER, seed=1))
    torch.testing.assert_close(connector(other, mask), together)


def test_gradients_reach_states_and_every_parameter(connector):
    states = draw(2, 5, ENCODER).requires_grad_()
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    out = connector(states) if connector.pointwise else connector(states, mask)
    (out * draw(*out.shape, seed=3)).sum().backward()
    reached = states.grad.abs().sum(-1) > 0
    assert torch.equal(reached, torch.ones_like(mask) if connector.pointwise else mask)
    for name, parameter in connector.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any() or "key_value" in name or "query" in name, name


@pytest.mark.parametrize(
    "values, message",
    [
        ({"type": "feedforward", "layers": 1}, "layers must be at least 2; for one use type: linear"),
        ({"type": "perceiver", "latents": 0}, "latents, layers and heads must be at least 1"),
    ],
)
def test_impossible_connectors_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        build(CONNECTORS[values["type"]].Config, values, "test")


def test_heads_must_divide_the_decoder():
    cls = CONNECTORS["perceiver"]
    with pytest.raises(ConfigError, match=r"connector.heads 5 does not divide the decoder's width 16"):
        cls(build(cls.Config, {"type": "perceiver", "heads": 5}, "test"), ENCODER, DECODER)
