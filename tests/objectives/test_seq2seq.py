"""Sequence to sequence on a pseudo-masked encoder: decoding predicts what training does, and a run learns to write."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from metalm.cli import app
from metalm.config import build
from metalm.data.sample import Sample
from metalm.data.shards import write_shards
from metalm.data.tokenizer import Tokenizer
from metalm.errors import ConfigError, DataError
from metalm.evaluation.seq2seq import evaluate_seq2seq
from metalm.inference.write import Writing, write, write_texts
from metalm.objectives.pmlm import PMLMDocument
from metalm.objectives.seq2seq import Seq2Seq, Seq2SeqConfig
from metalm.pretrained import load_pretrained
from metalm.training.config import load_run_config
from metalm.training.loop import train

VOCABULARY, PSEUDO, START, END = 40, 39, 0, 1
SIZE = {"type": "text", "layers": 2, "width": 16, "heads": 2, "max_positions": 64}
STACKS = {
    "learned, bias": {},
    "sinusoidal": {"positions": "sinusoidal", "relative_bias": False},
    "rotary, bias": {"positions": "rotary"},
}


@pytest.fixture(params=STACKS)
def model(request) -> Seq2Seq:
    torch.manual_seed(0)
    encoder = SIZE | STACKS[request.param] | {"vocab_size": VOCABULARY}
    model = Seq2Seq(build(Seq2SeqConfig, {"encoder": encoder, "s_token": START, "pseudo_token": PSEUDO}, "test")).double()
    if model.encoder.transformer.relative_bias is not None:
        torch.nn.init.normal_(model.encoder.transformer.relative_bias.weight)
    return model.eval()


def make_document(source: int, target: int, seed: int = 0) -> PMLMDocument:
    rng = random.Random(seed)
    tokens = [START, *(rng.randrange(2, 39) for _ in range(source - 2)), END]
    written = [rng.randrange(2, 39) for _ in range(target)]
    return PMLMDocument(tokens, list(range(source, source + target)), written, list(range(1, target + 1)), [0] * target)


@torch.inference_mode()
def test_decoding_predicts_what_training_does(model):
    """Unequal sources in one batch, teacher-forced [P] logits against [last token, P] over the cache."""
    documents = [make_document(7, 6), make_document(12, 6, 1), make_document(3, 6, 2)]
    forced = [model.logits(model.layout.collate([[document]], 16)) for document in documents]
    writing = Writing(model, [document.tokens for document in documents], 8)
    last = None
    for i in range(6):
        logits = writing.step(last)
        for b in range(3):
            assert torch.allclose(logits[b].double(), forced[b][i], rtol=0, atol=1e-5)
        last = torch.tensor([document.originals[i] for document in documents])


def test_packed_pairs_are_predicted_as_each_alone(model):
    documents = [make_document(7, 6), make_document(12, 20, 1), make_document(3, 1, 2)]
    alone = torch.cat([model.logits(model.layout.collate([[document]], 16)) for document in documents])
    for rows, length in (([documents], 30), ([documents[:1], documents[1:]], 24)):
        assert torch.allclose(model.logits(model.layout.collate(rows, length)), alone, rtol=0, atol=1e-10)


def test_a_prediction_sees_the_source_and_the_tokens_before_it_alone(model):
    document = make_document(6, 5)
    batch = model.layout.collate([[document]], 6)
    table = model.encoder.embedding.weight
    seen = torch.zeros(5, 5, dtype=torch.bool)
    for j in range(5):
        changed = model.layout.collate([[PMLMDocument(**{**vars(document), "originals": list(document.originals)})]], 6)
        changed.original_BK[0, j] = (document.originals[j] + 7) % 37 + 2
        different = (model.logits(changed) != model.logits(batch)).any(-1)
        seen[:, j] = different
    assert torch.equal(seen, torch.ones(5, 5, dtype=torch.bool).tril(-1))
    gradient = torch.autograd.grad(model.logits(batch)[0].sum(), table)[0]
    assert all(gradient[token].abs().sum() > 0 for token in document.tokens)


def test_the_loss_smooths_its_labels(model):
    batch = model.layout.collate([[make_document(6, 5)]], 6)
    logp = model.logits(batch).float().log_softmax(-1)
    right = logp.gather(1, batch.targets_L[:, None]).sum()
    assert torch.allclose(model(batch), -(0.9 * right + 0.1 * logp.mean(-1).sum()), rtol=1e-5)
    assert torch.allclose(model.parts["nats"][0], -right, rtol=1e-5) and model.parts["nats"][1] == 5


@pytest.fixture(scope="module")
def letters() -> list[str]:
    rng = random.Random(0)
    return [" ".join(rng.sample("abcdef", 3)) for _ in range(64)]


@pytest.fixture(scope="module")
def run(letters, tmp_path_factory) -> Path:
    """From a pretrained encoder; the task is to turn a text around."""
    folder = tmp_path_factory.mktemp("turn")
    samples = [Sample(f"s{i}", text=text, captions=[text[::-1]]) for i, text in enumerate(letters)]
    write_shards(samples, folder / "pairs", 16)

    def write_run(name: str, task: str, model: dict, steps: int, **more) -> Path:
        source = {"shards": str(folder / "pairs"), "task": task}
        plain = {
            "out": str(folder / name),
            "model": model,
            "data": {"row_length": 48, "rows": 4, "block": 64, "workers": 0, "train": [source]},
            "training": {"steps": steps, "lr": 5e-3, "warmup": 10, "precision": "float32", "checkpoint_every": 0},
        } | more
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(plain))
        return train(load_run_config(folder / f"{name}.yaml"))

    encoder = SIZE | {"width": 48}
    pretrained = write_run("pmlm", "text", {"type": "pmlm", "encoder": encoder}, 2, tokenizer={"vocab_size": 270})
    return write_run("turn", "seq2seq", {"type": "seq2seq", "encoder": {"init_from": str(pretrained)}}, 150)


def test_a_run_learns_to_write(run, letters):
    model, tokenizer = load_pretrained(run)
    written = write_texts(model, tokenizer, letters[:32], 12)
    assert sum(text == letters[i][::-1] for i, text in enumerate(written)) >= 30
    command = ["generate", "--model", str(run), "--prompt", letters[0], "--max-new-tokens", "12"]
    told = CliRunner().invoke(app, command)
    assert told.output.strip() == written[0]
    assert "turns text into text, greedily" in str(CliRunner().invoke(app, [*command, "--compile"]).exception)
    assert write_texts(model, tokenizer, letters[:8], 12, batch_size=1) == written[:8]


def test_an_evaluation_does_not_depend_on_the_batch_size(run, tmp_path):
    """Texts of unequal lengths, two of three of which may become what they do."""
    texts = ["a b c", "f e d c b a", "c", "b a", "d f a", "e c b f"]
    other = ["x y z"]
    samples = [Sample(f"s{i}", text=t, captions=other + [t[::-1]] * (i % 3 > 0)) for i, t in enumerate(texts)]
    write_shards(samples, tmp_path / "pairs")
    results = [evaluate_seq2seq(str(run), str(tmp_path / "pairs"), 12, size) for size in (1, 4)]
    assert results[0].metrics == results[1].metrics
    assert results[0].predictions == results[1].predictions
    rows = results[0].predictions
    assert [row.references for row in rows] == [sample.captions for sample in samples]
    right = [row.prediction in row.references for row in rows]
    assert results[0].metrics["exact_match"] == pytest.approx(100 * sum(right) / len(rows)) and any(right)
    assert [row.score == 1 for row in rows] == right
    assert {"bleu_4", "meteor", "rouge_l", "cider"} < set(results[0].metrics)


def test_the_evaluation_is_a_verb_and_leaves_its_predictions(run, tmp_path):
    write_shards([Sample("s", text="a b c", captions=["c b a", "a b c"])], tmp_path / "pairs")
    command = ["evaluate", "seq2seq", "--model", str(run), "--data", str(tmp_path / "pairs"), "--out", str(tmp_path / "o.json")]
    told = CliRunner().invoke(app, [*command, "--max-new-tokens", "12"])
    record = json.loads((tmp_path / "o.json").read_text())
    (row,) = (json.loads(line) for line in (tmp_path / "o.predictions.jsonl").read_text().splitlines())
    assert f"exact_match              {record['metrics']['exact_match']:.4f}" in told.output
    assert (record["task"], record["num_samples"], record["config"]["max_new_tokens"]) == ("seq2seq", 1, 12)
    assert (row["question"], row["references"]) == ("a b c", ["c b a", "a b c"])
    refused = CliRunner().invoke(app, [*command, "--max-new-tokens", "62"])
    assert "max_new_tokens 62 leave no room for a text among the encoder's 64 positions: at most 61" in str(refused.exception)
    write_shards([Sample("s", text="a b c")], tmp_path / "texts")
    with pytest.raises(DataError, match="no sample has both a text and what it becomes"):
        evaluate_seq2seq(str(run), str(tmp_path / "texts"), 12)
    with pytest.raises(ConfigError, match="holds the model 'pmlm': this evaluation is for 'seq2seq'"):
        evaluate_seq2seq(str(run.parent.parent / "pmlm"), str(tmp_path / "pairs"), 12)


def test_what_is_refused(model):
    tokenizer = Tokenizer.train(["a b c"] * 4, 270)
    with pytest.raises(DataError, match="needs a text and what it shall become"):
        list(model.layout.documents(Sample("s", text="a"), tokenizer, 48, random.Random(0)))
    with pytest.raises(DataError, match="exceed the encoder's 64 positions"):
        write(model, [[START, 5, END]], END, 64)
    with pytest.raises(ConfigError, match=r"label_smoothing 1\.5"):
        build(Seq2SeqConfig, {"encoder": SIZE, "label_smoothing": 1.5}, "test")
