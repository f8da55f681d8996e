"""`dry_run`: its figures, for every configuration that comes with the package."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

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
    assert all(word in said for word in ("decoder", "encoders.image", "ZeRO-3", "FLOPs a step and rank", "counted on rows of"))
    assert not out.exists()


EYES = {
    "tiles": (
        {
            "type": "timm",
            "name": "vit_tiny_patch16_224",
            "image_size": 32,
            "arguments": {"depth": 2, "embed_dim": 48},
            "tiles": 6,
        },
        "tiles",
        lambda tiles: 4 * (1 + tiles),
    ),
    "naflex": (
        {"type": "naflex", "name": "naflexvit_base_patch16_gap", "arguments": {"depth": 2, "embed_dim": 48, "num_heads": 2}},
        "max_patches",
        lambda patches: patches,
    ),
}


@pytest.mark.parametrize("kind", EYES)
def test_pictures_of_many_sizes_count_at_their_largest(kind, tmp_path):
    """A model of one picture and words: its encoder's FLOPs are those of the most patches that a picture has."""
    eye, key, states_of = EYES[kind]
    plain = {
        "out": str(tmp_path),
        "model": {
            "decoder": {"layers": 1, "width": 16, "heads": 2, "positions": "rotary"},
            "encoders": {"eye": {**eye, "connector": {"type": "linear"}}},
        },
        "data": {"train": [{"shards": "none", "task": "captioning"}], "row_length": 256, "rows": 1},
        "training": {"steps": 1},
        "tokenizer": {"vocab_size": 100},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(plain))

    def figures(budget: int, row_length: int = 256) -> dict:
        config = load_run_config(path, [f"model.encoders.eye.{key}={budget}", f"data.row_length={row_length}"])
        fill_in_tokens(config)
        return estimate(config, 1)

    for budget in (2, 6, 35):
        said = figures(budget)["flops_of"]
        assert said.startswith(f"eye of {states_of(budget)} states, media at their largest")
    # One picture a row: the row's end is empty, so only the encoder's and its positions' FLOPs differ.
    few, many = (figures(budget, states_of(budget) + 70)["flops_per_step_and_rank"] for budget in (3, 30))
    assert many > 3 * few
    said = figures(35, 100)["flops_of"]  # rows that do not hold the largest
    assert "media at 50% of their largest, which rows hold" in said if kind == "tiles" else "at their largest" in said


def test_sounds_count_a_chunk_at_a_time():
    assert "states, media at" in estimate(load("audio/transcribe.yaml"), 1)["flops_of"]


def test_rows_too_short_for_a_picture_are_said():
    with pytest.raises(ConfigError, match="row_length=32 does not hold what the encoders make of an image"):
        estimate(load("photos/pretrain.yaml", "data.row_length=32"), 1)
    assert estimate(load("photos/pretrain.yaml", "model.encoders.text.max_positions=8"), 1)["flops_per_step_and_rank"] > 0
