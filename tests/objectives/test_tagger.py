"""Tags for words: layout, the random field against all tag sequences, packing, real training, evaluation."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
import yaml

from metalm.config import build
from metalm.data.importers import import_dataset
from metalm.data.sample import Sample
from metalm.data.shards import read_samples, write_shards
from metalm.data.tokenizer import Tokenizer
from metalm.errors import ConfigError, DataError
from metalm.evaluation.tagging import evaluate_tagging, tag
from metalm.objectives.tagger import Tagger, TaggerConfig
from metalm.training.config import load_run_config
from metalm.training.loop import train

TAGS = ["O", "B-place", "I-place"]
SIZE = {"layers": 1, "width": 32, "heads": 2, "max_positions": 48}
SAMPLES = [
    Sample("a", text="he is in New York", tags=["O", "O", "O", "B-place", "I-place"]),
    Sample("b", text="Paris", tags=["B-place"]),
    Sample("c", text="from Paris to New Delhi .", tags=["O", "B-place", "O", "B-place", "I-place", "O"]),
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([f" {sample.text}" for sample in SAMPLES] * 2, 290)


def make_model(tokenizer: Tokenizer, encoder: str = "text") -> Tagger:
    torch.manual_seed(0)
    values = {"encoder": {"type": encoder, **SIZE}, "tags": TAGS, "projection": 8, "lstm": 8, "s_token": tokenizer.start}
    config = build(TaggerConfig, values, "test")
    config.set_vocab_size(tokenizer.size)
    return Tagger(config).double().eval()


@pytest.mark.parametrize("encoder", ["text", "two_tower"])
def test_words_are_read_off_their_first_tokens(tokenizer, encoder):
    layout = make_model(tokenizer, encoder).layout
    for sample in SAMPLES:
        (document,) = layout.documents(sample, tokenizer, 48)
        tokens = document.segments[0].tokens
        ends = [*document.words[1:], len(tokens) - 1 - layout.both_ends]
        pieces = [tokenizer.decode(tokens[start:end]).strip() for start, end in zip(document.words, ends)]
        assert pieces == sample.text.split()
        assert [TAGS[number] for number in document.tags] == sample.tags
        assert (tokens[-1] == tokenizer.start) == (encoder == "two_tower")


def test_the_loss_is_that_of_all_tag_sequences(tokenizer):
    model = make_model(tokenizer)
    (document,) = model.layout.documents(SAMPLES[0], tokenizer, 48)
    batch = model.layout.collate([[document]], 0)
    emissions = model.emissions(batch)[0]

    def score(tags: tuple[int, ...]) -> torch.Tensor:
        total = model.crf.start_transitions[tags[0]] + model.crf.end_transitions[tags[-1]]
        total = total + sum(emissions[i, t] for i, t in enumerate(tags))
        return total + sum(model.crf.transitions[a, b] for a, b in itertools.pairwise(tags))

    every = list(itertools.product(range(3), repeat=5))
    scores = torch.stack([score(tags) for tags in every])
    assert torch.allclose(model(batch), scores.logsumexp(0) - score(document.tags), rtol=1e-10)
    assert tag(model, [document])[0] == [TAGS[t] for t in every[int(scores.argmax())]]


@pytest.mark.parametrize("encoder", ["text", "two_tower"])
def test_packed_texts_are_tagged_as_each_alone(tokenizer, encoder):
    model = make_model(tokenizer, encoder)
    documents = [next(model.layout.documents(sample, tokenizer, 48)) for sample in SAMPLES]
    alone = sum(model(model.layout.collate([[document]], 0)) for document in documents)
    for rows, length in (([documents], 64), ([documents[1:], documents[:1]], 48)):
        batch = model.layout.collate(rows, length)
        assert torch.allclose(model(batch), alone, rtol=1e-10)
        assert batch.num_targets == 12
    assert tag(model, documents, batch_size=1) == tag(model, documents)


def test_what_does_not_fit_is_left_off_or_refused(tokenizer):
    layout = make_model(tokenizer).layout
    (document,) = layout.documents(SAMPLES[2], tokenizer, 6)
    assert len(document) <= 6 and 0 < len(document.words) == len(document.tags) < 6
    for sample, message in (
        (Sample("x", text="two words", tags=["O"]), "found 1 for 2 words"),
        (Sample("x", text="Rome", tags=["B-plase"]), r"'B-plase' is none of model\.tags; did you mean 'B-place'"),
        (Sample("x", text="y" * 100, tags=["O"]), "does not fit"),
    ):
        with pytest.raises(DataError, match=message):
            list(layout.documents(sample, tokenizer, 48))
    for change in ({"tags": ["O"]}, {"encoder": {"type": "vit", "layers": 1, "width": 8, "heads": 1}}):
        with pytest.raises(ConfigError, match=next(iter(change))):
            build(TaggerConfig, {"encoder": {"type": "text", **SIZE}, "tags": TAGS, **change}, "test")


def write_conll(path: Path) -> str:
    lines = []
    for _ in range(6):
        for sample in SAMPLES:
            lines += [f"{word}\t{mark}" for word, mark in zip(sample.text.split(), sample.tags)] + [""]
    path.write_text("\n".join(lines))
    write_shards(import_dataset("conll", path=path), path.parent / "tagged", 4)
    return str(path.parent / "tagged")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_run_learns_to_tag_with_a_slower_encoder(tmp_path, precision):
    shards = write_conll(tmp_path / "tags.txt")
    assert [(s.text, s.tags) for s in read_samples(shards)][:3] == [(s.text, s.tags) for s in SAMPLES]
    model = {"type": "tagger", "encoder": {"type": "text", **SIZE}, "tags": TAGS, "projection": 16, "lstm": 16}
    plain = {
        "out": str(tmp_path / "run"),
        "tokenizer": {"vocab_size": 290},
        "model": model,
        "data": {"row_length": 64, "rows": 2, "block": 16, "workers": 0, "train": [{"shards": shards, "task": "tagging"}]},
        "training": {
            "steps": 80,
            "lr": 1e-2,
            "warmup": 5,
            "precision": precision,
            "checkpoint_every": 0,
            "part_lr": {"encoder": 0.1},
        },
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(plain))
    run = train(load_run_config(tmp_path / "run.yaml"))
    result = evaluate_tagging(str(run), shards)
    assert result.metrics["f1"] == result.metrics["word_accuracy"] == 1
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.2 * losses[0]


def test_real_tags(shared):
    samples = list(import_dataset("conll", path=shared / "data/text/wnut17.train.conll.gz"))
    assert len(samples) == 3394
    assert sum(tag == "B-person" for sample in samples for tag in sample.tags) == 660
    assert all(len(sample.text.split()) == len(sample.tags) for sample in samples)


def test_bad_columns(tmp_path):
    (tmp_path / "a.txt").write_text("word\n")
    with pytest.raises(DataError, match="line 1: no word and tag in columns 0 and -1"):
        list(import_dataset("conll", path=tmp_path / "a.txt"))
    (tmp_path / "b.txt").write_text("a b\n")
    with pytest.raises(DataError, match="line 1: no word and tag in columns 0 and 5"):
        list(import_dataset("conll", path=tmp_path / "b.txt", tag="5"))
    with pytest.raises(DataError, match="columns are numbers"):
        list(import_dataset("conll", path=tmp_path / "b.txt", tag="last"))
