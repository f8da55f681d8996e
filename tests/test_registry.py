"""Plug-ins by name, and suggestions for names that are nearly right."""

from __future__ import annotations

import subprocess
import sys

import pytest

from metalm.connectors import CONNECTORS
from metalm.connectors.linear import LinearConnector
from metalm.encoders import ENCODERS
from metalm.errors import ConfigError
from metalm.objectives import OBJECTIVES
from metalm.registry import did_you_mean


@pytest.mark.parametrize("registry", [ENCODERS, CONNECTORS, OBJECTIVES])
def test_every_built_in_name_has_a_class_with_its_config(registry):
    for name in registry.builtin:
        assert name in registry.names()
        assert registry[name].Config is not None


def test_names_give_classes():
    assert CONNECTORS["linear"] is LinearConnector


def test_a_near_miss_is_corrected():
    with pytest.raises(ConfigError, match="no connector is called 'percevier'; did you mean 'perceiver'"):
        CONNECTORS["percevier"]


def test_a_far_miss_lists_what_there_is():
    with pytest.raises(ConfigError, match="no encoder is called 'xyz'; there are: causal, fused, log_mel, naflex, open_clip"):
        ENCODERS["xyz"]


def test_long_lists_are_cut():
    names = [f"model{n}" for n in range(1000)]
    message = did_you_mean("zzz", names)
    assert message.startswith("; there are: model0, model1, ") and message.endswith(" … (1,000 in all)")
    assert len(message) < 250
    assert did_you_mean("x", []) == "; there are: none"


def test_nothing_is_imported_before_it_is_asked_for():
    code = (
        "import sys; from metalm.encoders import ENCODERS; ENCODERS.names(); "
        "assert not {'torch', 'timm', 'open_clip'} & set(sys.modules), 'imported too early'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
