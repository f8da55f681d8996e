"""Captioning metrics: parity with pycocoevalcap called as its README shows, hand-worked values, and what goes wrong."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

import psutil
import pytest

from metalm.errors import ConfigError, DataError
from metalm.evaluation.caption_metrics import MetricError, caption_metrics, ptb_tokenize

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="no java on the PATH")
FAST = ("bleu", "rouge_l", "cider")


@pytest.fixture(scope="module")
def official(shared):
    """The official example of coco-caption: {id: prediction}, {id: references}."""
    path = shared / "data" / "coco_vqa" / "cococaption_fakecap_results.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is missing")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {row["image_id"]: row["caption"] for row in rows}, {row["image_id"]: row["refs"] for row in rows}


def running_meteors() -> list[psutil.Process]:
    """METEOR programs that this process started and that still run."""
    return [child for child in psutil.Process().children() if any("meteor-1.5.jar" in arg for arg in child.cmdline())]


@needs_java
def test_equals_pycocoevalcap_on_the_official_example(official, capfd):
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    predictions, references = official
    corpus, samples = caption_metrics(predictions, references)
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")
    assert running_meteors() == []

    gts = PTBTokenizer().tokenize({id_: [{"caption": text} for text in refs] for id_, refs in references.items()})
    res = PTBTokenizer().tokenize({id_: [{"caption": text}] for id_, text in predictions.items()})
    bleu, bleu_samples = Bleu(4).compute_score(gts, res)
    expected = {f"bleu_{n}": (bleu[n - 1], bleu_samples[n - 1]) for n in range(1, 5)}
    expected["meteor"] = Meteor().compute_score(gts, res)
    expected["rouge_l"] = Rouge().compute_score(gts, res)
    expected["cider"] = Cider().compute_score(gts, res)

    assert set(corpus) == {*expected, "exact_match"}
    assert list(samples) == list(predictions)
    for name, (score, scores) in expected.items():
        assert corpus[name] == pytest.approx(100 * score, rel=1e-12), name
        assert [row[name] for row in samples.values()] == pytest.approx([100 * s for s in scores], rel=1e-12), name
    if len(predictions) == 126:
        rounded = {name: round(score, 1) for name, score in corpus.items()}
        assert rounded == {
            "exact_match": 0.0,
            "bleu_1": 58.5,
            "bleu_2": 40.5,
            "bleu_3": 28.3,
            "bleu_4": 19.8,
            "meteor": 20.5,
            "rouge_l": 40.8,
            "cider": 62.8,
        }


@needs_java
def test_hand_worked_values():
    # 1: equal to its reference but for case and punctuation.  2: "the cat sat" against "the cat sat down".
    # BLEU-1 of 2: precision 1, brevity exp(1 - 4/3).  ROUGE-L of 2: P 1, R 3/4, F with beta 1.2.  CIDEr of 1: 10 x 100.
    corpus, samples = caption_metrics(
        {"1": "A red circle, on top!", "2": "the cat sat"},
        {"1": ["a red circle on top"], "2": ["the cat sat down"]},
        names=FAST,
    )
    assert samples["1"] == pytest.approx(
        {"exact_match": 100, "rouge_l": 100, "cider": 1000} | {f"bleu_{n}": 100 for n in range(1, 5)}, rel=1e-6
    )
    assert samples["2"]["bleu_1"] == pytest.approx(100 * math.exp(1 - 4 / 3), rel=1e-6)
    assert samples["2"]["rouge_l"] == pytest.approx(100 * 2.44 * 0.75 / (0.75 + 1.44))
    assert samples["2"]["exact_match"] == 0
    # Corpus BLEU pools: 8 tokens predicted, 9 in the references, all unigrams right.
    assert corpus["bleu_1"] == pytest.approx(100 * math.exp(1 - 9 / 8), rel=1e-6)
    assert corpus["exact_match"] == 50
    assert corpus["cider"] == pytest.approx((samples["1"]["cider"] + samples["2"]["cider"]) / 2)


@needs_java
def test_empty_and_odd_predictions_score_zero_and_shift_nothing(capfd):
    tag = "<x href='|||'>"  # the tokenizer leaves METEOR's field separator whole inside a markup tag
    bird = "a bird\r\nflies\u2028high\x85up\x0bnow"
    predictions = {1: "", 2: tag, 3: "\n \u2028", 4: "...", 5: bird, 6: "\ud800", 7: ""}
    references = {
        1: ["a dog runs"],
        2: ["a cat sits", tag + " cat"],
        3: ["a red car", "a car"],
        4: ["two men eat"],
        5: ["A bird flies high up now."],
        6: ["a café"],
        7: ["a tree", "..."],
    }
    corpus, samples = caption_metrics(predictions, references)
    for empty in (1, 3, 4, 6):
        assert set(samples[empty].values()) == {0.0}, empty
    assert samples[7]["exact_match"] == 0
    assert samples[5]["exact_match"] == 100
    assert samples[5]["cider"] == pytest.approx(1000)
    assert samples[5]["meteor"] == pytest.approx(100)
    assert all(math.isfinite(score) for score in corpus.values())
    assert running_meteors() == []
    assert capfd.readouterr() == ("", "")


@needs_java
def test_all_predictions_empty():
    corpus, _ = caption_metrics({1: "", 2: ""}, {1: ["a dog runs"], 2: ["a cat sits"]})
    assert set(corpus.values()) == {0.0}


@needs_java
def test_tokenizer_keeps_one_line_a_caption():
    assert ptb_tokenize(["A café — it's 2.5 m, isn't it?", "", "x\ny", "(brackets)"]) == [
        "a café it 's 2.5 m is n't it",
        "",
        "x y",
        "-lrb- brackets -rrb-",  # as the official code: it drops "-LRB-", but -lowerCase comes first
    ]
    assert ptb_tokenize([]) == []


def test_ids_that_do_not_fit_and_unknown_names_are_refused():
    with pytest.raises(DataError, match="no predictions"):
        caption_metrics({}, {})
    with pytest.raises(DataError, match="1 of 2 predictions have no references, first 'b'"):
        caption_metrics({"a": "x", "b": "y"}, {"a": ["x"]})
    with pytest.raises(DataError, match="1 of 2 samples have no prediction, first 'b'"):
        caption_metrics({"a": "x"}, {"a": ["x"], "b": ["y"]})
    with pytest.raises(ConfigError, match="unknown captioning metric 'cidre'"):
        caption_metrics({"a": "x"}, {"a": ["x"]}, names=("cidre",))


@needs_java
def test_references_without_a_word_are_refused():
    with pytest.raises(DataError, match="sample 'b': its references hold no word"):
        caption_metrics({"a": "x", "b": "y"}, {"a": ["x"], "b": ["...", ""]})
    with pytest.raises(DataError, match="sample 'b'"):
        caption_metrics({"a": "x", "b": "y"}, {"a": ["x"], "b": []})


def test_missing_java_is_said_plainly(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MetricError, match="no `java` found: captioning metrics need Java"):
        caption_metrics({1: "a dog"}, {1: ["a dog"]})


def put_java_on_path(folder: Path, script: str, monkeypatch) -> None:
    program = folder / "java"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_java_that_does_not_run_is_said_plainly(monkeypatch, tmp_path):
    put_java_on_path(tmp_path, "echo 'Unable to locate a Java Runtime.' >&2; exit 1", monkeypatch)
    with pytest.raises(MetricError, match=r"PTB tokenizer failed \(Unable to locate a Java Runtime"):
        caption_metrics({1: "a dog"}, {1: ["a dog"]})


@needs_java
@pytest.mark.timeout(60)
def test_meteor_that_dies_is_said_plainly_and_does_not_hang(monkeypatch, tmp_path):
    real = shutil.which("java")
    script = f'case "$*" in *meteor*) read line; echo "heap too large" >&2; exit 1;; esac; exec {real} "$@"'
    put_java_on_path(tmp_path, script, monkeypatch)
    with pytest.raises(MetricError, match=r"METEOR failed \(heap too large\)"):
        caption_metrics({1: "a dog", 2: "a cat"}, {1: ["a dog"], 2: ["a cat"]}, names=("meteor",))
    assert running_meteors() == []


@needs_java
def test_spice_without_its_models_and_without_network(monkeypatch):
    import pycocoevalcap.spice.spice as spice

    if list(Path(spice.__file__).parent.glob("lib/stanford-corenlp-3.6.0.jar")):
        pytest.skip("SPICE's models are installed")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nothing listens there: a machine without a network
    with pytest.raises(MetricError, match="SPICE's models are not there and their download failed"):
        caption_metrics({1: "a dog", 2: "a cat"}, {1: ["a dog"], 2: ["a cat"]}, spice=True, names=("cider",))
