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
    {"type": "qformer", "queries": 3, "heads": 4},
    {"type": "qformer", "queries": 2, "heads": 2, "layers": 1, "width": 8},
    {"type": "stack", "size": 4},
    {"type": "pixel_shuffle"},
    {"type": "pixel_shuffle", "scale": 3},
    {"type": "convolution", "side": 2, "layers": 1},
    {"type": "convolution", "side": 3, "width": 8},
]
SQUARES = {"pixel_shuffle": (36, 36, 144), "convolution": (16, 4, 9)}  # lengths of three spans


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(params=CONFIGS, ids=lambda c: " ".join(map(str, c.values())))
def connector(request) -> Connector:
    torch.manual_seed(0)
    cls = CONNECTORS[request.param["type"]]
    config = build(cls.Config, request.param, "test")
    made = cls(config, ENCODER, DECODER).double()
    made.num_vectors = config.num_vectors
    made.lengths = SQUARES.get(request.param["type"], (6, 1, 4))
    return made


def test_built_ins_are_all_tested():
    assert {config["type"] for config in CONFIGS} == set(CONNECTORS.builtin)


def test_shapes_are_as_promised(connector):
    if connector.pointwise:
        assert connector(draw(7, ENCODER)).shape == (7, DECODER)
        assert connector(draw(2, 3, ENCODER)).shape == (2, 3, DECODER)
        assert connector.num_vectors(7) == 7
    else:
        length = max(connector.lengths)
        out = connector(draw(4, length, ENCODER), torch.ones(4, length, dtype=torch.bool))
        assert out.shape == (4, connector.num_vectors(length), DECODER)
        assert torch.equal(out, connector(draw(4, length, ENCODER)))


def test_a_span_is_as_it_is_alone(connector):
    """Pointwise: state by state. Else: whatever stands in the padding, and whoever is in the batch."""
    lengths = connector.lengths
    states = draw(3, max(lengths), ENCODER)
    if connector.pointwise:
        alone = torch.stack([torch.stack([connector(state) for state in span]) for span in states])
        torch.testing.assert_close(connector(states), alone)
        return
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    together = connector(states, mask)
    for n, length in enumerate(lengths):
        alone = connector(states[n : n + 1, :length])[0]
        assert len(alone) == connector.num_vectors(length)
        torch.testing.assert_close(together[n, : len(alone)], alone)
    other = torch.where(mask[:, :, None], states, 1e3 * draw(3, max(lengths), ENCODER, seed=1))
    for one, before, length in zip(connector(other, mask), together, lengths):
        count = connector.num_vectors(length)
        torch.testing.assert_close(one[:count], before[:count])


def test_gradients_reach_states_and_every_parameter(connector):
    lengths = connector.lengths
    states = draw(3, max(lengths), ENCODER).requires_grad_()
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    out = connector(states) if connector.pointwise else connector(states, mask)
    if not connector.pointwise:
        out = torch.cat([one[: connector.num_vectors(length)] for one, length in zip(out, lengths)])
    (out * draw(*out.shape, seed=3)).sum().backward()
    reached = states.grad.abs().sum(-1) > 0
    assert torch.equal(reached, torch.ones_like(mask) if connector.pointwise else mask)
    for name, parameter in connector.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any() or "key_value" in name or "query" in name, name


def test_pixel_shuffle_takes_squares_of_neighbours():
    cls = CONNECTORS["pixel_shuffle"]
    connector = cls(build(cls.Config, {"type": "pixel_shuffle"}, "test"), 1, 4).double()
    torch.nn.init.eye_(connector.map.weight)
    patches = torch.arange(16.0, dtype=torch.float64).view(1, 16, 1)
    corners = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert connector(patches)[0].tolist() == corners


def test_stacked_states_stand_in_their_order_and_the_rest_is_zeros():
    cls = CONNECTORS["stack"]
    connector = cls(build(cls.Config, {"type": "stack", "size": 3}, "test"), 1, 3).double()
    torch.nn.init.eye_(connector.map.weight)
    states = torch.arange(1.0, 6.0, dtype=torch.float64).view(1, 5, 1)
    assert connector(states)[0].tolist() == [[1, 2, 3], [4, 5, 0]]


@pytest.mark.parametrize(
    "values, message",
    [
        ({"type": "feedforward", "layers": 1}, "layers must be at least 2; for one use type: linear"),
        ({"type": "perceiver", "latents": 0}, "latents, layers and heads must be at least 1"),
        ({"type": "qformer", "queries": 0}, "queries, layers and heads must be at least 1"),
        ({"type": "stack", "size": 1}, "size 1 must be at least 2"),
        ({"type": "pixel_shuffle", "scale": 1}, "scale 1 must be at least 2"),
        ({"type": "convolution", "side": 0}, "side and layers must be at least 1"),
    ],
)
def test_impossible_connectors_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        build(CONNECTORS[values["type"]].Config, values, "test")


@pytest.mark.parametrize("kind, states", [("pixel_shuffle", 12), ("pixel_shuffle", 9), ("convolution", 12)])
def test_what_is_no_square_is_refused(kind, states):
    with pytest.raises(ConfigError, match=f"needs a square of states.* not {states} states"):
        build(CONNECTORS[kind].Config, {"type": kind}, "test").num_vectors(states)


def test_heads_must_divide_the_decoder():
    cls = CONNECTORS["perceiver"]
    with pytest.raises(ConfigError, match=r"connector.heads 5 does not divide the decoder's width 16"):
        cls(build(cls.Config, {"type": "perceiver", "heads": 5}, "test"), ENCODER, DECODER)
