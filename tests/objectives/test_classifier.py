"""Labels read off an encoder: layout, packing, real training from a docked encoder, evaluation, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from metalm.config import build
from metalm.data.importers import import_dataset
from metalm.data.sample import Question, Sample
from metalm.data.shards import write_shards
from metalm.data.tokenizer import Tokenizer
from metalm.errors import ConfigError, DataError
from metalm.evaluation.classification import classify, evaluate_classification
from metalm.objectives.classifier import Classifier, ClassifierConfig
from metalm.pretrained import load_pretrained
from metalm.training.config import load_run_config
from metalm.training.loop import train

WORDS = {"good": ("great", "fine", "lovely"), "bad": ("awful", "poor", "dull")}
SIZE = {"layers": 1, "width": 32, "heads": 2, "max_positions": 64}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["a great fine lovely awful poor dull film ."] * 4, 300)


def make_model(tokenizer: Tokenizer, encoder: str = "text", pool: str = "first") -> Classifier:
    torch.manual_seed(0)
    values = {"encoder": {"type": encoder, **SIZE}, "labels": ["good", "bad"], "pool": pool, "s_token": tokenizer.start}
    config = build(ClassifierConfig, values, "test")
    config.set_vocab_size(tokenizer.size)
    return Classifier(config).double().eval()


def sample(text: str, second: str = "", label: str = "good") -> Sample:
    return Sample("s", text=text, questions=[Question("0", second, [label])])


@pytest.mark.parametrize(
    ("pool", "second", "tokens", "pooled"),
    [
        ("first", "", "<s>a film</d>", "<s>"),
        ("ends", "", "<s>a film</d><s>", "<s><s>"),
        ("ends", "fine", "<s>a film</s>fine</d><s>", "<s><s>"),
        ("ends, separator", "fine", "<s>a film</s>fine</d><s>", "<s><s></s>"),
    ],
)
def test_layouts(tokenizer, pool, second, tokens, pooled):
    layout = make_model(tokenizer, pool=pool).layout
    (document,) = layout.documents(sample("a film", second, "bad"), tokenizer, 64)
    laid_out = document.segments[0].tokens
    assert tokenizer.backend.decode(laid_out, skip_special_tokens=False) == tokens
    assert tokenizer.backend.decode([laid_out[i] for i in document.pooled], skip_special_tokens=False) == pooled
    assert document.label == 1


def test_long_texts_lose_the_end_of_the_longer_one(tokenizer):
    layout = make_model(tokenizer).layout
    (document,) = layout.documents(sample("a fine film " * 30, "a dull film"), tokenizer, 32)
    text = tokenizer.backend.decode(document.segments[0].tokens, skip_special_tokens=False)
    assert len(document) == 32 and text.endswith("</s>a dull film</d>") and text.startswith("<s>a fine film a fine")


@pytest.mark.parametrize(
    ("encoder", "pool"),
    [("text", "first"), ("two_tower", "ends"), ("two_tower", "ends, separator"), ("causal", "ends, separator")],
)
def test_packed_texts_are_labelled_as_each_alone(tokenizer, encoder, pool):
    model = make_model(tokenizer, encoder, pool)
    samples = [sample("a film", "a great film"), sample("dull", "poor"), sample("a lovely film .", "fine")]
    documents = [next(model.layout.documents(one, tokenizer, 64)) for one in samples]
    alone = torch.cat([model.logits(model.layout.collate([[document]], 0)) for document in documents])
    for rows, length in (([documents], 64), ([documents[:2], documents[2:]], 40)):
        assert torch.allclose(model.logits(model.layout.collate(rows, length)), alone, rtol=0, atol=1e-12)
    assert classify(model, documents, batch_size=2) == alone.argmax(-1).tolist()


def write_reviews(folder: Path, count: int = 64) -> str:
    """Every combination of an opinion with its place in the sentence."""
    rows = ["sentence\tlabel"]
    for number in range(count):
        label = ("good", "bad")[number % 2]
        word = WORDS[label][number // 2 % 3]
        rows.append(f"{('a film', 'film a', 'a a film .')[number % 3]} {word}\t{'01'[label == 'bad']}")
    (folder / "reviews.tsv").write_text("\n".join(rows) + "\n")
    samples = import_dataset("labelled", path=folder / "reviews.tsv", text="sentence", label="label", names="0=good,1=bad")
    write_shards(samples, folder / "reviews", 16)
    return str(folder / "reviews")


def write_run(folder: Path, name: str, model: dict, sources: dict, steps: int, **more) -> Path:
    plain = {
        "out": str(folder / name),
        "tokenizer": {"vocab_size": 300},
        "model": model,
        "data": {"row_length": 64, "rows": 4, "block": 64, "workers": 0, **sources},
        "training": {"steps": steps, "lr": 3e-3, "warmup": 5, "precision": "float32", "checkpoint_every": 0},
    } | more
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(plain))
    return folder / f"{name}.yaml"


@pytest.mark.parametrize(("mode", "encoder", "pool"), [("pmlm", "text", "first"), ("cloze", "two_tower", "ends")])
def test_a_pretrained_encoder_learns_labels(tmp_path, mode, encoder, pool):
    shards = write_reviews(tmp_path)
    text = {"train": [{"shards": shards, "task": "text"}]}
    pretrained = train(
        load_run_config(write_run(tmp_path, mode, {"type": mode, "encoder": {"type": encoder, **SIZE}}, text, 3))
    )
    source = {"shards": shards, "task": "classification"}
    model = {"type": "classifier", "encoder": {"init_from": str(pretrained)}, "labels": ["good", "bad"], "pool": pool}
    config = write_run(tmp_path, "labels", model, {"train": [source], "validation": [source]}, 60)
    config.write_text(config.read_text().replace("tokenizer:\n  vocab_size: 300\n", ""))
    run = train(load_run_config(config, ["training.validate_every=60"]))
    assert load_pretrained(run)[1].agrees_with(load_pretrained(pretrained)[1])
    result = evaluate_classification(str(run), shards)
    assert result.metrics == {"accuracy": 1.0, "majority": 0.5}
    lines = [json.loads(line) for line in (tmp_path / "labels/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["val_accuracy"] == 1.0 and "accuracy" in lines[0]
    assert {row.prediction for row in result.predictions} == {"good", "bad"}


def test_what_is_refused(tokenizer, tmp_path):
    layout = make_model(tokenizer).layout
    with pytest.raises(DataError, match=r"label 'goood' is none of model\.labels \(good, bad\); did you mean 'good'"):
        list(layout.documents(sample("a film", label="goood"), tokenizer, 64))
    with pytest.raises(DataError, match="needs a text with a label"):
        list(layout.documents(Sample("s", text="a film"), tokenizer, 64))
    encoder = {"type": "text", **SIZE}
    for change, message in (
        ({"labels": ["one"]}, "two or more"),
        ({"labels": ["one", "one"]}, "all different"),
        ({"encoder": {"type": "vit", "layers": 1, "width": 8, "heads": 1}}, "one of: text, two_tower, causal"),
        ({"encoder": encoder | {"connector": {"type": "linear"}}}, r"encoder\.connector"),
    ):
        with pytest.raises(ConfigError, match=message):
            build(ClassifierConfig, {"encoder": encoder, "labels": ["a", "b"], **change}, "test")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": "sentense"}, r"line 2: no column 'sentense' \(columns: sentence, label\); did you mean 'sentence'"),
        ({"names": "0:good"}, "write it as 0=negative"),
    ],
)
def test_bad_imports(tmp_path, options, message):
    (tmp_path / "a.tsv").write_text("sentence\tlabel\na film\t1\n")
    with pytest.raises(DataError, match=message):
        list(import_dataset("labelled", **{"path": tmp_path / "a.tsv", "text": "sentence", "label": "label", **options}))
    (tmp_path / "b.tsv").write_text("sentence\tlabel\na film\n")
    with pytest.raises(DataError, match=r"line 2: 1 cells under a header of 2"):
        list(import_dataset("labelled", path=tmp_path / "b.tsv", text="sentence", label="label"))


def test_real_pairs(shared):
    path = shared / "data/text/rte.train.tsv.gz"
    names = "0=entailment,1=not"
    samples = list(import_dataset("labelled", path=path, text="sentence1", second="sentence2", label="label", names=names))
    assert len(samples) == 2490 and samples[0].questions[0].question == "Weapons of Mass Destruction Found in Iraq."
    assert {sample.questions[0].best_answer for sample in samples} == {"entailment", "not"}
