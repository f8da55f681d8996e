"""`dry_run`: its figures, for every configuration that comes with the package."""

from __future__ import annotations

from pathlib import Path

import pytest

import metalm.configs
from metalm.errors import ConfigError
from metalm.training.config import load_run_config
from metalm.training.estimate import estimate, fill_in_tokens, model_state_bytes, print_estimate

FOLDER = Path(metalm.configs.__path__[0])
CONFIGS = sorted(str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*.yaml") if path.parent.name != "compare")  # of runs
WHOLE = [name for name in CONFIGS if "init_from" not in (FOLDER / name).read_text()]


def load(name: str, *overrides: str):
    config = load_run_config(name, [*overrides])
    fill_in_tokens(config)
    return config


@pytest.mark.parametrize("name", WHOLE)
def test_every_configuration_can_be_estimated(name):
    config = load(name)
    figures = estimate(config, world=2)
    total = sum(part["all"] for part in figures["parameters"].values())
    assert figures["total"]["all"] == total > 0
    assert figures["positions_per_step"] == 2 * config.data.rows * config.data.row_length * config.training.accumulation
    # Each position runs through the decoder alone or through an encoder as well: 6 FLOPs a weight and position, about.
    part = getattr(config.model, "decoder", None) or config.model.encoder
    stack = figures["parameters"]["decoder" if hasattr(config.model, "decoder") else "encoder"]["all"]
    decoder = stack - part.vocab_size * part.width
    positions = config.data.rows * config.data.row_length * config.training.accumulation
    assert 4 * decoder * positions < figures["flops_per_step_and_rank"] < 30 * total * positions


def test_the_configurations_are_found():
    assert {"demo/pretrain.yaml", "photos/pretrain.yaml", "paper/language.yaml"} <= set(WHOLE) < set(CONFIGS)


def test_twice_the_rows_are_twice_the_flops():
    one, two = (estimate(load("demo/pretrain.yaml", f"data.rows={rows}"), 1)["flops_per_step_and_rank"] for rows in (8, 16))
    assert two == 2 * one


def test_zero_divides_what_it_says():
    states = model_state_bytes(parameters=100, trainable=80, precision="bfloat16", world=4)
    assert states == {
        "ZeRO-0": 200 + 160 + 960,
        "ZeRO-1": 200 + 160 + 240,
        "ZeRO-2": 200 + 40 + 240,
        "ZeRO-3": 50 + 40 + 240,
    }
    assert model_state_bytes(100, 80, "float32", 1)["ZeRO-0"] == 400 + 320 + 640


def test_a_dry_run_prints_the_parts_and_trains_nothing(tmp_path, capsys):
    out = tmp_path / "run"
    print_estimate(load_run_config("demo/pretrain.yaml", [f"out={out}"]))
    said = capsys.readouterr().out
    assert all(word in said for word in ("decoder", "encoders.image", "ZeRO-3", "FLOPs a step and rank"))
    assert not out.exists()


def test_rows_too_short_for_a_picture_are_said():
    with pytest.raises(ConfigError, match="row_length=32 does not hold what the encoders make of an image"):
        estimate(load("photos/pretrain.yaml", "data.row_length=32"), 1)
    assert estimate(load("photos/pretrain.yaml", "model.encoders.text.max_positions=8"), 1)["flops_per_step_and_rank"] > 0
