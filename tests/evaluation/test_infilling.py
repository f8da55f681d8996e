"""Infilling from a run: real text in, real text out, and what it costs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from metalm.cli import app
from metalm.errors import ConfigError, DataError
from metalm.evaluation.infilling import Infiller, evaluate_infilling, read_holes
from metalm.inference.infill import InfillConfig
from metalm.training.config import load_run_config
from metalm.training.loop import train

WORDS = (
    "alfa bravo charlie delta echo foxtrot golf hotel india juliett kilo lima mike november oscar papa quebec romeo sierra "
    "tango uniform victor whiskey xray yankee zulu one two three four five six seven eight nine ten eleven twelve thirteen "
    "fourteen"
)
TEXT = " ".join([WORDS] * 12)  # any hole in it can be filled with certainty


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("infilling")
    (folder / "text.txt").write_text(TEXT)
    overrides = [
        f"out={folder / 'run'}",
        f"data.path={folder / 'text.txt'}",
        "tokenizer.vocab_size=600",
        "model.decoder={layers: 2, width: 64, heads: 2, positions: rotary, max_positions: 192}",
        "data.row_length=193",
        "data.rows=6",
        "data.workers=0",
        "data.validation=[]",
        "training={steps: 200, lr: 5.0e-3, warmup: 10, precision: float32, checkpoint_every: 0, validate_every: 0}",
    ]
    train(load_run_config("text/mim.yaml", overrides))
    return folder / "run"


def holes(path: Path) -> Path:
    words = TEXT.split(" ")
    rows = []
    for start, length in ((54, 34), (110, 35), (171, 36)):
        hole = " ".join(["", *words[start : start + length]])
        end = start + length
        before, after = " ".join(words[start - 10 : start]), " ".join(["", *words[end : end + 10]])
        rows.append({"task_id": f"t/{start}", "prompt": before, "suffix": after, "canonical_solution": hole})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_text_learned_by_heart_is_filled_in_at_most_0_6_of_the_calls_from_left_to_right(run, tmp_path):
    infiller = Infiller.load(run, InfillConfig(max_new_tokens=40, ngram=4))
    result = evaluate_infilling(infiller, str(holes(tmp_path / "holes.jsonl")), "count")
    assert result.metrics["exact_match"] == result.metrics["met"] == 1
    assert result.metrics["calls"] <= 0.6 * result.metrics["calls_left_to_right"]
    assert [row.score for row in result.predictions] == [1, 1, 1]
    # The three holes share their calls, in a batch; the same come out one by one, in all the calls that each takes.
    assert result.metrics["calls"] <= result.metrics["sequential_calls"] < 2 * result.metrics["calls"]
    infiller.batch_size = 1
    one_by_one = evaluate_infilling(infiller, str(tmp_path / "holes.jsonl"), "count")
    assert one_by_one.predictions == result.predictions
    assert one_by_one.metrics["sequential_calls"] == pytest.approx(3 * result.metrics["calls"])


def test_infill_and_evaluate_as_verbs(run, tmp_path):
    from typer.testing import CliRunner

    file, out = holes(tmp_path / "holes.jsonl"), tmp_path / "filled.jsonl"
    runner = CliRunner()
    arguments = ["infill", "--model", str(run), "--file", str(file), "--out", str(out), "--max-new-tokens", "40"]
    arguments += ["--batch-size", "2"]
    assert runner.invoke(app, arguments).exit_code == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["infilling"] for row in rows] == [row["canonical_solution"] for row in rows]
    assert all(row["ended"] == "met" and 0 < row["calls"] < row["tokens"] for row in rows)
    one = [
        "infill",
        "--model",
        str(run),
        "--prefix",
        rows[0]["prompt"],
        "--suffix",
        rows[0]["suffix"],
        "--max-new-tokens",
        "40",
    ]
    assert rows[0]["canonical_solution"] in runner.invoke(app, one).output
    scored = ["evaluate", "infilling", "--model", str(run), "--data", str(file), "--out", str(tmp_path / "out.json")]
    assert runner.invoke(app, [*scored, "--max-new-tokens", "40"]).exit_code == 0
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["task"] == "infilling" and record["num_samples"] == 3 and record["metrics"]["exact_match"] == 1


def test_what_cannot_be_filled_is_named(run, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl, line 1: no prompt and suffix"):
        read_holes(tmp_path / "bad.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="no row in it"):
        read_holes(tmp_path / "empty.jsonl")
    with pytest.raises(ConfigError, match=r"max_new_tokens 96 .* 192 positions"):
        Infiller.load(run, InfillConfig(max_new_tokens=96))([("a", "b")])


def test_a_model_that_reads_one_way_only_is_refused(tiny_yaml, tmp_path):
    train(load_run_config(tiny_yaml, [f"out={tmp_path / 'run'}", "training.steps=1", "training.checkpoint_every=0"]))
    infiller = Infiller.load(tmp_path / "run", InfillConfig(max_new_tokens=8))
    with pytest.raises(ConfigError, match=r"'metalm' reads from left to right only"):
        infiller([("a", "b")])


def test_real_holes_are_read(shared):
    folder = shared / "data/text"
    assert len(read_holes(folder / "HumanEval-SingleLineInfilling.jsonl.gz")) == 1033
    row = read_holes(folder / "HumanEval-RandomSpanInfillingLight.jsonl.gz", limit=1)[0]
    assert {"task_id", "prompt", "suffix", "canonical_solution"} <= set(row)
