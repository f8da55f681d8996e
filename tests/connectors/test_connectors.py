"""Every connector keeps the contract, and does what it is called after."""

from __future__ import annotations

import pytest
import torch

from metalm.config import build
from metalm.connectors import CONNECTORS
from metalm.connectors.base import Connector, ConnectorConfig
from metalm.errors import ConfigError
from metalm.testing import check_connector

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


def test_built_ins_are_all_tested():
    assert {config["type"] for config in CONFIGS} == set(CONNECTORS.builtin)


@pytest.mark.parametrize("values", CONFIGS, ids=lambda c: " ".join(map(str, c.values())))
def test_every_built_in_keeps_the_contract(values):
    cls = CONNECTORS[values["type"]]
    check_connector(cls, build(cls.Config, values, "test"), lengths=SQUARES.get(values["type"], (6, 1, 4)))


class Averaging(Connector):
    """Takes the padding into its mean."""

    Config = ConnectorConfig
    pointwise = False

    def __init__(self, config, encoder_width, decoder_width):
        super().__init__()
        self.map = torch.nn.Linear(encoder_width, decoder_width)

    def forward(self, states, mask_NS=None):
        return self.map(states + states.mean(1, keepdim=True))


class Deaf(Averaging):
    """Hears the first state alone, and has a weight that does nothing."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.idle = torch.nn.Parameter(torch.zeros(1))

    def forward(self, states, mask_NS=None):
        return self.map(states[:, :1].expand_as(states))


class Short(Averaging):
    def forward(self, states, mask_NS=None):
        return self.map(states[:, :-1])


@pytest.mark.parametrize(
    "cls, message",
    [(Averaging, "depend on the batch"), (Deaf, "has no influence"), (Short, r"shape \(3, 5, 16\), not \(3, 6, 16\)")],
)
def test_what_breaks_the_contract_is_said(cls, message):
    with pytest.raises(AssertionError, match=message):
        check_connector(cls, ConnectorConfig("broken"))


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
