"""A comparison is fair, tells what was measured, and does nothing twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from metalm.comparison.compare import compare
from metalm.comparison.config import CompareConfig, load_compare_config
from metalm.comparison.holes import write_holes
from metalm.comparison.plan import all_cells, make_plans, prepare
from metalm.comparison.report import spread, standard_error
from metalm.config import build
from metalm.data.sample import Question, Sample
from metalm.data.shards import read_samples, write_shards
from metalm.errors import ConfigError, TrainingError
from metalm.evaluation.perplexity import evaluate_perplexity

STACK = "{layers: 1, width: 16, heads: 1, positions: rotary, max_positions: 32}"
ENCODER = "{type: text, layers: 1, width: 16, heads: 1, max_positions: 32}"


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict:
    """A comparison of three candidates by two yardsticks, as YAML holds it."""
    folder = tmp_path_factory.mktemp("compare")
    colors = ("red", "blue", "green", "grey")
    lines = [" ".join(f"the {colors[(n + k) % 4]} dog number {n + k} runs ." for k in range(12)) for n in range(40)]
    (folder / "story.txt").write_text("\n\n".join(lines))
    labelled = [
        Sample(f"{word}{n}", text=f"a {word} dog", questions=[Question("0", "", [label])])
        for n in range(8)
        for word, label in (("red", "warm"), ("blue", "cold"))
    ]
    write_shards(labelled, folder / "labels", 8)
    head = [
        f"variables={{train: {folder / 'labels'}, val: {folder / 'labels'}}}",
        "model.labels=[warm, cold]",
        "model.pool=ends",
        "data.row_length=32",
        "data.workers=0",
        "training={steps: 2, checkpoint_every: 0}",
    ]
    return {
        "out": str(folder / "out"),
        "data": str(folder / "story.txt"),
        "vocab_size": 280,
        "seeds": [0, 1],
        "reference": "causal",
        "jobs": 2,
        "settings": [
            "data.rows=2",
            "data.row_length=32",
            "data.workers=0",
            "training={steps: 1, warmup: 2, lr: 3.0e-3, precision: float32, checkpoint_every: 0}",
        ],
        "candidates": {
            "causal": {"config": "text/causal.yaml", "settings": [f"model.decoder={STACK}"]},
            "meet: in the middle": {
                "config": "text/mim.yaml",
                "settings": [f"model.decoder={STACK}", "data.row_length=65"],
            },
            "PMLM": {"config": "text/pmlm.yaml", "settings": [f"model.encoder={ENCODER}"]},
        },
        "yardsticks": {
            "perplexity": {"task": "perplexity", "metric": "perplexity", "candidates": ["causal", "meet: in the middle"]},
            "labels": {
                "task": "classification",
                "metric": "accuracy",
                "data": str(folder / "labels"),
                "config": "text/classify.yaml",
                "settings": head,
                "candidates": ["causal", "PMLM"],
            },
        },
    }


def make(settings: dict, **changes) -> CompareConfig:
    return build(CompareConfig, settings | changes, "test")


@pytest.fixture(scope="module")
def finished(settings) -> dict:
    return compare(make(settings, budgets=["tokens"]))


def test_budgets_are_equal(settings, tmp_path):
    config = make(settings, out=str(tmp_path), epochs=3)
    prepare(config, tmp_path)
    plans = make_plans(config, tmp_path)
    budget = plans["causal"].steps["tokens"] * plans["causal"].flops
    for plan in plans.values():
        assert plan.steps["tokens"] == 3 * plan.epoch
        assert abs(plan.steps["flops"] * plan.flops - budget) <= plan.flops / 2
    assert plans["causal"].steps["flops"] == plans["causal"].steps["tokens"]
    # MIM reads every text twice, in rows twice as long: twice the FLOPs a token and, in a stack so narrow, more for attention.
    mim = plans["meet: in the middle"]
    assert mim.parameters == plans["causal"].parameters + 16  # one more token
    assert 2 < mim.steps["tokens"] / mim.steps["flops"] < 3.5
    # What comes to the same run is run once.
    cells = list(dict.fromkeys(all_cells(config, plans, tmp_path)))
    assert sum(cell.candidate == "causal" for cell in cells) == len(config.seeds)
    assert sum(cell.candidate == "PMLM" for cell in cells) == 2 * len(config.seeds)


def test_figures_are_those_of_the_runs(settings, finished):
    out = Path(settings["out"])
    row = finished["results"]["tokens"]["meet: in the middle"]
    for seed, value in enumerate(row["yardsticks"]["perplexity"]["values"]):
        run = out / "runs/meet--in-the-middle" / str(row["steps"]) / str(seed) / "pretraining"
        own = evaluate_perplexity(str(run), str(out / "corpus/val")).metrics["perplexity"]
        assert value == pytest.approx(own, rel=1e-6)
    one, other = row["yardsticks"]["perplexity"]["values"]
    assert one != other  # seeds differ
    assert row["yardsticks"]["perplexity"]["mean"] == pytest.approx((one + other) / 2)
    assert row["yardsticks"]["perplexity"]["standard_error"] == pytest.approx(abs(one - other) / 2)
    assert set(row["validation"]) == {"loss", "forward", "backward", "total_variation"}
    assert "labels" not in row["yardsticks"]
    assert all(0 <= v <= 1 for v in finished["results"]["tokens"]["PMLM"]["yardsticks"]["labels"]["values"])
    assert json.loads((out / "comparison.json").read_text()) == finished


def test_table_and_page(settings, finished):
    out = Path(settings["out"])
    table = (out / "comparison.md").read_text()
    found = finished["results"]["tokens"]["causal"]["yardsticks"]["perplexity"]["values"]
    assert "| causal |" in table and "perplexity ↓" in table and f"| {spread(found)} |" in table
    page = (out / "comparison.html").read_text()
    assert page.count("<svg") == 2 and "Equal tokens" in page and "meet: in the middle" in page


def test_what_is_done_is_not_done_again(settings, finished, capsys):
    out = Path(settings["out"])
    stamps = {
        path: path.stat().st_mtime_ns for path in out.rglob("*.json") if path.name not in ("comparison.json", "basis.json")
    }
    figure = next(path for path in stamps if path.name == "labels.json" and "PMLM" in str(path))
    figure.unlink()  # as if it had been stopped before this one
    again = compare(make(settings, budgets=["tokens"]))
    assert again == finished
    assert "6 runs, 5 of them done before" in capsys.readouterr().out
    after = {path: path.stat().st_mtime_ns for path in stamps}
    assert [path for path in stamps if stamps[path] != after[path]] == [figure]


def test_holes_add_up_to_the_text(tmp_path):
    texts = [" ".join(f"w{n}.{i}" for i in range(60)) for n in range(3)]
    write_shards([Sample(str(n), text=text) for n, text in enumerate([*texts, "too short"])], tmp_path / "texts", 2)
    assert write_holes(str(tmp_path / "texts"), tmp_path / "holes.jsonl", count=50, words=4, context=20) == 50
    rows = [json.loads(line) for line in (tmp_path / "holes.jsonl").read_text().splitlines()]
    lengths = set()
    for row in rows:
        assert any(row["prompt"] + row["canonical_solution"] + row["suffix"] in text for text in texts)
        assert len(row["prompt"].split()) == len(row["suffix"].split()) == 20
        lengths.add(len(row["canonical_solution"].split()))
    assert lengths == {1, 2, 3, 4}
    assert sum(1 for _ in read_samples(str(tmp_path / "texts"))) == 4


def test_spread():
    assert (standard_error([1.0]), standard_error([1.0, 3.0])) == (0, 1)
    assert spread([123.456]) == "123.5"
    assert spread([0.5, 0.7]) == "0.6000 ± 0.1000"


def test_what_is_refused(settings, finished, tmp_path):
    for change, message in (
        ({"reference": "casual"}, "did you mean 'causal'"),
        ({"budgets": ["time"]}, "'time' is none of tokens, flops"),
        ({"seeds": []}, "must name at least one"),
        ({"yardsticks": {"a": {"task": "perplexity", "metric": "x", "candidates": ["MIM"]}}}, r"yardsticks\.a: 'MIM' is no"),
        ({"yardsticks": {"a": {"task": "tagging", "metric": "f1"}}}, "needs a config to train a head by"),
        ({"vocab_size": 290}, "holds a comparison with another vocab_size"),
        ({"candidates": settings["candidates"] | {"PMLM": {"config": "text/pmlm.yaml"}}}, r"with another candidates\.PMLM"),
        ({"candidates": settings["candidates"] | {"PM LM": {"config": "a"}, "PM-LM": {"config": "a"}}}, "more than signs"),
    ):
        with pytest.raises(ConfigError, match=message):
            compare(make(settings, **change))
    bad = settings["candidates"] | {
        "PMLM": {"config": "text/pmlm.yaml", "settings": [f"model.encoder={ENCODER}", "training.lr=1e9"]}
    }
    broken = make(settings, out=str(tmp_path), candidates=bad, seeds=[0], budgets=["tokens"], jobs=1)
    with pytest.raises(TrainingError, match=r"(?s)did not finish; the end of .*pretraining\.log:.*the loss is"):
        compare(broken)


def test_the_bundled_comparison_is_sound(tmp_path):
    """Every candidate and every head builds; nothing is trained."""
    story = tmp_path / "story.txt"
    story.write_text("\n\n".join(f"document {n} : " + "some words of it " * 40 for n in range(20)))
    config = load_compare_config("compare/text.yaml", [f"data={story}", f"out={tmp_path / 'out'}", "vocab_size=300"])
    prepare(config, tmp_path / "out")
    plans = make_plans(config, tmp_path / "out")
    assert len(plans) == 10
    assert plans["MIM"].parameters == plans["MIM, beta 0"].parameters
    assert all(plan.steps["tokens"] > 0 and plan.flops > 1e8 for plan in plans.values())
    assert yaml.safe_load(Path("configs/compare/text.yaml").read_text())["reference"] == "causal"
