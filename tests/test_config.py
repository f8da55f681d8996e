"""Configurations: typed, closed, and with errors that name the key, the file, and the right name."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

import metalm.configs
from metalm.config import build, find_config, plugin, read_yaml, to_plain
from metalm.connectors import CONNECTORS
from metalm.connectors.perceiver import PerceiverConfig
from metalm.encoders.timm_tower import TimmConfig
from metalm.errors import ConfigError
from metalm.model import MetaLMConfig
from metalm.nn.transformer import TransformerConfig


@dataclass
class Inner:
    size: int
    rate: float = 0.5


@dataclass
class Outer:
    name: str
    inner: Inner
    kind: Literal["red", "green"] = "red"
    last: Literal["all", "none"] | int = "all"
    sizes: list[int] = field(default_factory=list)
    several: list[Inner] = field(default_factory=list)
    options: dict[str, int | float | bool | str] | None = None
    connector: Any = plugin(CONNECTORS, default=None)
    connectors: dict[str, Any] = plugin(CONNECTORS, default_factory=dict)

    def __post_init__(self):
        if self.name == "impossible":
            raise ConfigError("name cannot be 'impossible'")


GOOD = {"name": "run", "inner": {"size": 3}}


def test_values_take_their_types():
    made = build(
        Outer,
        {
            **GOOD,
            "last": 2,
            "inner": {"size": 3, "rate": 1},
            "sizes": [1, 2],
            "several": [{"size": 1}, {"size": 2}],
            "options": {"depth": 2, "drop": 0.1, "flag": True, "pool": "avg"},
            "connector": {"type": "perceiver", "latents": 4},
            "connectors": {"a": {"type": "linear"}},
        },
        "run.yaml",
    )
    assert made.last == 2 and made.several[1].size == 2
    assert made.inner.rate == 1.0 and isinstance(made.inner.rate, float)
    assert made.options == {"depth": 2, "drop": 0.1, "flag": True, "pool": "avg"} and made.options["flag"] is True
    assert made.connector == PerceiverConfig("perceiver", latents=4)
    assert made.connectors["a"].type == "linear"
    assert build(Outer, GOOD, "run.yaml").connector is None


@pytest.mark.parametrize(
    "change, message",
    [
        ({"nmae": "x"}, r"run.yaml: unknown key 'nmae'; did you mean 'name'\?"),
        ({"inner": {"size": 3, "rtae": 1}}, r"run.yaml: unknown key 'inner.rtae'; did you mean 'rate'\?"),
        ({"zzz": 1}, "run.yaml: unknown key 'zzz'; there are: name, inner, kind"),
        ({"inner": {}}, "run.yaml: inner lacks the key 'size'"),
        ({"inner": None}, r"run.yaml: inner takes keys \(size, rate\), not None"),
        ({"inner": 3}, r"run.yaml: inner takes keys \(size, rate\), not 3"),
        ({"inner": {"size": "3"}}, "run.yaml: inner.size must be int, not str '3'"),
        ({"inner": {"size": 3.0}}, "run.yaml: inner.size must be int, not float 3.0"),
        ({"inner": {"size": True}}, "run.yaml: inner.size must be int, not bool True"),
        ({"inner": {"size": 3, "rate": "1"}}, "run.yaml: inner.rate must be float, not str '1'"),
        ({"inner": {"size": 3, "rate": False}}, "run.yaml: inner.rate must be float, not bool False"),
        ({"name": 5}, "run.yaml: name must be str, not int 5"),
        ({"name": None}, "run.yaml: name must be str, not NoneType None"),
        ({"kind": "gren"}, r"run.yaml: kind cannot be 'gren'; did you mean 'green'\?"),
        ({"last": "al"}, r"run.yaml: last cannot be 'al'; did you mean 'all'\?"),
        ({"last": True}, "run.yaml: last cannot be True; there are: all, none"),
        ({"sizes": [1, "2"]}, r"run.yaml: sizes\[1\] must be int, not str '2'"),
        ({"sizes": 1}, "run.yaml: sizes must be list"),
        ({"several": [{"size": 1}, {"siez": 2}]}, r"run.yaml: unknown key 'several\[1\].siez'; did you mean 'size'\?"),
        ({"options": {"depth": [1]}}, "run.yaml: options"),
        (
            {"connector": {"type": "liner"}},
            r"run.yaml: connector.type: no connector is called 'liner'; did you mean 'linear'\?",
        ),
        ({"connector": {"type": ["linear"]}}, "run.yaml: connector.type: no connector is called"),
        (
            {"connector": {"latents": 3}},
            "run.yaml: connector needs a key 'type', one of: convolution, feed",
        ),
        ({"connector": {}}, "run.yaml: connector needs a key 'type'"),
        ({"connector": {"a": {"type": "linear"}}}, "run.yaml: connector needs a key 'type'"),
        ({"connector": "linear"}, "run.yaml: connector needs a key 'type'"),
        ({"connector": {"type": "perceiver", "latent": 3}}, r"unknown key 'connector.latent'; did you mean 'latents'\?"),
        ({"connector": {"type": "feedforward", "layers": 1}}, "run.yaml: connector: layers must be at least 2"),
        ({"connectors": {"a": {"latents": 3}}}, "run.yaml: connectors.a needs a key 'type'"),
        ({"connectors": {"type": "linear"}}, "run.yaml: connectors takes connectors by a name of your choice"),
        ({"connectors": None}, "run.yaml: connectors takes connectors by a name of your choice"),
        ({"name": "impossible"}, "run.yaml: name cannot be 'impossible'"),
    ],
)
def test_errors_name_the_key_the_file_and_the_right_name(change, message):
    with pytest.raises(ConfigError, match=message):
        build(Outer, {**GOOD, **change}, "run.yaml")


def test_a_missing_key_at_the_top():
    with pytest.raises(ConfigError, match=r"run\.yaml: the top level lacks the key 'inner'"):
        build(Outer, {"name": "x"}, "run.yaml")


DECODER = {"layers": 2, "width": 16, "heads": 4}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"heads": 3}, "width 16 is not divisible by heads 3"),
        ({"kv_heads": 3}, "heads 4 is not divisible by kv_heads 3"),
        ({"layers": 0}, "layers is 0, it must be at least 1"),
        ({"heads": 0}, "heads is 0, it must be at least 1"),
        ({"width": -16}, "width is -16, it must be at least 1"),
        ({"max_positions": 0}, "max_positions is 0"),
        ({"dropout": 1.0}, r"dropout 1.0 is not in \[0, 1\)"),
        ({"width": 12, "positions": "rotary"}, "rotary positions need an even head width, not width / heads = 3"),
        ({"relative_bias": True}, "relative_bias is for encoders"),
    ],
)
def test_impossible_models_are_refused(change, message):
    with pytest.raises(ConfigError, match=f"run.yaml: decoder: {message}"):
        build(MetaLMConfig, {"decoder": {**DECODER, **change}}, "run.yaml")


def test_plain_and_back():
    values = {
        "decoder": {**DECODER, "positions": "rotary", "trainable": 1},
        "encoders": {
            "eye": {"type": "timm", "name": "vit_tiny", "arguments": {"depth": 2}, "connector": {"type": "linear"}},
            "ear": {"type": "text", **DECODER, "connector": {"type": "perceiver"}, "trainable": "none"},
        },
    }
    config = build(MetaLMConfig, values, "run.yaml")
    assert isinstance(config.encoders["eye"], TimmConfig)
    assert config.decoder.ffn == 64 and config.decoder.kv_heads == 4
    assert build(MetaLMConfig, to_plain(config), "again") == config
    assert to_plain(TransformerConfig(**DECODER))["norm"] == "layer"


YAML = """\
lr: 1e-4
model: {layers: 2, width: 8}
data:
  train:
    - {shards: a, weight: 1}
    - {shards: b, weight: 1}
again: ${model.width}
"""


@pytest.fixture
def file(tmp_path) -> Path:
    (tmp_path / "run.yaml").write_text(YAML)
    return tmp_path / "run.yaml"


@pytest.mark.parametrize(
    "override, expected",
    [
        ("lr=3e-5", lambda v: v["lr"] == 3e-5),
        ("model.width=16", lambda v: v["model"] == {"layers": 2, "width": 16} and v["again"] == 16),
        ("model.new=[1, two]", lambda v: v["model"]["new"] == [1, "two"]),
        ("model={width: 4}", lambda v: v["model"] == {"layers": 2, "width": 4}),
        ("data.train[1].shards=c", lambda v: [s["shards"] for s in v["data"]["train"]] == ["a", "c"]),
        ("data.train.0.weight=3", lambda v: v["data"]["train"][0] == {"shards": "a", "weight": 3}),
        ("data.train=[{shards: d}]", lambda v: v["data"]["train"] == [{"shards": "d"}]),
        ("lr=${model.layers}", lambda v: v["lr"] == 2),
        ("note=key=value", lambda v: v["note"] == "key=value"),
        ("new.deep.key=true", lambda v: v["new"]["deep"]["key"] is True),
    ],
)
def test_overrides(file, override, expected):
    assert expected(read_yaml(file, [override]))


def test_numbers_in_scientific_notation_are_numbers(file):
    assert read_yaml(file)["lr"] == 1e-4


def test_later_overrides_win(file):
    assert read_yaml(file, ["lr=1", "lr=2"])["lr"] == 2


@pytest.mark.parametrize(
    "override, message",
    [
        ("lr", "override 'lr': write it as key=value"),
        ("data.train[7].shards=c", r"override 'data.train\[7\].shards=c': list index out of range"),
        ("lr={", "override 'lr={'"),
        ("lr=${nothing}", "run.yaml: Interpolation key 'nothing' not found"),
    ],
)
def test_bad_overrides_are_named(file, override, message):
    with pytest.raises(ConfigError, match=message):
        read_yaml(file, [override])


@pytest.mark.parametrize("content", ["a: [", "- 1\n- 2\n", "a: 1\n b: 2\n", "\ta: 1", "a: ${b}"])
def test_bad_files_are_named(tmp_path, content):
    (tmp_path / "bad.yaml").write_text(content)
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        read_yaml(tmp_path / "bad.yaml", ["x=1"])


def test_bundled_configurations_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bundled = Path(metalm.configs.__path__[0])
    for name in ("configs/demo/pretrain.yaml", "demo/pretrain.yaml"):
        assert find_config(name) == bundled / "demo/pretrain.yaml"
    own = tmp_path / "configs/demo/pretrain.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("a: 1")
    assert read_yaml("configs/demo/pretrain.yaml") == {"a": 1}  # one's own file comes first


@pytest.mark.parametrize("name", ["demo/pretrian.yaml", "runs/demo/pretrain.yaml"])
def test_a_file_that_is_nowhere_is_not_replaced_by_another(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"no configuration file '{name}'; did you mean 'demo/pretrain.yaml'"):
        find_config(name)
