"""What a text-side mode trained becomes a part of METALM: weights arrive, states are the source's, and mismatches are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from metalm.data.prompts import Interface
from metalm.data.stream import PackedStream
from metalm.errors import CheckpointError, ConfigError
from metalm.evaluation.predictor import Predictor
from metalm.inference.generate import GenerationConfig
from metalm.nn.words import AdaptiveSoftmax
from metalm.pretrained import load_pretrained
from metalm.segments import Document, Text, make_batch
from metalm.training.config import load_run_config
from metalm.training.loop import train

STORY = "\n\n".join(f"the {color} dog number {n} runs over the {color} hill ." for n in range(40) for color in ("red", "blue"))
STACK = {"layers": 2, "width": 32, "heads": 2, "max_positions": 64}
SPELLED = {"type": "two_tower", **STACK, "characters": {"width": 8, "filters": [8, 16], "max_length": 12}}


def write_run(folder: Path, name: str, model: dict, source: dict, **more) -> Path:
    """A configuration of a two-step run on `STORY`."""
    text = folder / "story.txt"
    text.write_text(STORY)
    data = {n: [{"shards": "${out}/data/" + n, "task": "text", **source}] for n in ("train", "val")}
    data["validation"] = data.pop("val")
    plain = {
        "out": str(folder / name),
        "model": model,
        "data": {"path": str(text), "row_length": 64, "rows": 2, "block": 16, "workers": 0} | data,
        "training": {"steps": 2, "warmup": 1, "precision": "float32", "checkpoint_every": 0, "validate_every": 2},
    } | more
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(plain))
    return path


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    """A run of every text-side mode."""
    folder = tmp_path_factory.mktemp("sources")
    models = {
        "mim": {"type": "mim", "decoder": STACK},
        "pmlm": {"type": "pmlm", "encoder": {"type": "text", **STACK}},
        "cloze": {"type": "cloze", "encoder": {"type": "two_tower", **STACK, "layers": 1}},
        "words": {"type": "cloze", "encoder": SPELLED, "cutoffs": [10, 20]},
        "spelled pieces": {"type": "cloze", "encoder": SPELLED, "cutoffs": [20]},
    }
    tokenizers = {n: {"type": "words" if n == "words" else "bpe", "vocab_size": 300} for n in models}
    runs = {n: write_run(folder, n, model, {}, tokenizer=tokenizers[n]) for n, model in models.items()}
    return {n: train(load_run_config(path)) for n, path in runs.items()}


def start_from(folder: Path, name: str, part: dict, encoder: str = "") -> Path:
    """Two steps of METALM with a part that starts from a run."""
    encoders = {encoder: {**part, "connector": {"type": "linear"}}} if encoder else {}
    decoder = {"layers": 1, "width": 16, "heads": 1} if encoder else part
    objective = {"type": "semicausal", "min_length": 4, "max_length": 8} if encoder else {"type": "causal"}
    return write_run(folder, name, {"decoder": decoder, "encoders": encoders}, {"objective": objective})


def test_mim_becomes_a_decoder_with_the_same_logits(sources, tmp_path):
    config = load_run_config(start_from(tmp_path, "docked", {"init_from": str(sources["mim"])}), ["training.lr=1e-30"])
    assert config.model.decoder.width == STACK["width"]
    source, tokenizer = load_pretrained(sources["mim"], torch.float64)
    docked, own = load_pretrained(train(config), torch.float64)
    assert type(docked).__name__ == "MetaLM" and own.agrees_with(tokenizer)
    tokens = [tokenizer.start, *tokenizer.encode("the red dog")]
    batch = make_batch([[Document([Text(tokens)])]], {})
    assert torch.equal(docked.decoder.logits(docked.hidden(batch)), source.decoder.logits(source.hidden(batch)))


def test_a_model_without_a_decoder_gives_no_answers(sources):
    with pytest.raises(ConfigError, match="holds the model 'pmlm', which has no decoder to answer with"):
        Predictor.load(sources["pmlm"], GenerationConfig())


def test_mim_goes_on_with_synchronous_attention_and_still_docks(sources, tmp_path):
    """The second stage by the bundled configuration; it adds no parameter."""
    second = "configs/text/mim-synchronous.yaml"
    overrides = [f"out={tmp_path / 'second'}", f"init_from={sources['mim']}", f"data.path={tmp_path / 'story.txt'}"]
    (tmp_path / "story.txt").write_text(STORY)
    overrides += ["training.steps=2", "training.warmup=1", "training.lr=1e-30", "data.row_length=64", "data.workers=0"]
    run = train(load_run_config(second, [*overrides, "training.validate_every=2", "training.precision=float32"]))
    model, _ = load_pretrained(run, torch.float64)
    first, tokenizer = load_pretrained(sources["mim"], torch.float64)
    assert model.config.synchronous == 0.3 and model.layout.hole_share
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(model.parameters(), first.parameters(), strict=True))
    assert "val_with_hole" in (tmp_path / "second/metrics.jsonl").read_text()
    docked = load_run_config(start_from(tmp_path, "docked", {"init_from": str(run)}), ["training.lr=1e-30"])
    decoder, _ = load_pretrained(train(docked), torch.float64)
    batch = make_batch([[Document([Text([tokenizer.start, *tokenizer.encode("the red dog")])])]], {})
    assert torch.allclose(decoder.hidden(batch), first.hidden(batch), rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", ["pmlm", "cloze", "words", "spelled pieces"])
def test_an_encoder_of_text_becomes_metalms_with_the_same_states(sources, tmp_path, mode):
    part = {"init_from": str(sources[mode])}
    config = load_run_config(start_from(tmp_path, "docked", part, "text"), ["training.lr=1e-30"])
    source, tokenizer = load_pretrained(sources[mode], torch.float64)
    docked, _ = load_pretrained(train(config), torch.float64)
    inputs = docked.processors["text"].collate([{"tokens": tokenizer.encode("the red dog")}]).inputs
    assert torch.equal(docked.encoders["text"](**inputs), source.encoder(**inputs))
    assert docked.config.encoders["text"].init_from == ""  # the export stands alone


@pytest.mark.parametrize("choices", [{"positions": "rotary", "tied": False}, {"positions": "learned", "scaled": True}, {}])
def test_a_decoder_is_read_as_a_causal_encoder_with_the_same_states(sources, tmp_path, choices):
    stack = {"type": "mim", "decoder": {**STACK, **choices}}
    run = train(load_run_config(write_run(tmp_path, "mim", stack, {}, tokenizer={"vocab_size": 300})))
    part = {"type": "causal", "init_from": str(run)}
    config = load_run_config(start_from(tmp_path, "docked", part, "text"), ["training.lr=1e-30"])
    source, tokenizer = load_pretrained(run, torch.float64)
    docked, _ = load_pretrained(train(config), torch.float64)
    texts = [tokenizer.encode(text) for text in ("the red dog", "the blue hill . dog")]
    collated = docked.processors["text"].collate([{"tokens": tokens} for tokens in texts])
    states = docked.encoders["text"](**collated.inputs).flatten(0, 1)[collated.source]
    alone = [source.hidden(make_batch([[Document([Text(tokens)])]], {}))[0] for tokens in texts]
    assert torch.allclose(states, torch.cat(alone), rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", ["words", "spelled pieces"])
def test_spellings_are_in_the_export(sources, mode):
    source, tokenizer = load_pretrained(sources[mode])
    table_VC, spellings = source.encoder.embedding.table_VC, tokenizer.spellings()
    for word in tokenizer.encode("the red dog number 7"):
        written = [code - 1 for code in table_VC[word].tolist() if 0 < code <= 256]
        assert bytes(written).decode() == spellings[word] in " the red dog number 7"


def test_words_are_predicted_by_an_export_as_by_its_run(sources):
    """The last digit of the validation loss, and all of it from the export alone."""
    folder = sources["words"].parent
    config = load_run_config(folder.parent / "words.yaml")
    *_, last = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    model, tokenizer = load_pretrained(sources["words"])
    interface = Interface.of(model, tokenizer, config.data.row_length)
    batches = list(PackedStream(config.data.validation, interface, config.data, seed=0, repeat=False))
    with torch.no_grad():
        nats = sum(float(model(batch)) for batch in batches)
    assert last["val_loss"] == nats / sum(batch.num_targets for batch in batches) > 0
    assert isinstance(model.softmax, AdaptiveSoftmax) and tokenizer.spellings()[4] == " the"


def test_shape_is_the_sources_and_use_is_ones_own(sources, tmp_path):
    part = {"init_from": str(sources["pmlm"]), "type": "text", "layers": 7, "width": 8, "trainable": 1, "dropout": 0.2}
    text = load_run_config(start_from(tmp_path, "docked", part, "text")).model.encoders["text"]
    assert (text.layers, text.width, text.heads) == (STACK["layers"], STACK["width"], STACK["heads"])
    assert (text.trainable, text.dropout, text.connector.type) == (1, 0.2, "linear")


def test_a_docked_part_learns_on(sources, tmp_path):
    config = load_run_config(start_from(tmp_path, "docked", {"init_from": str(sources["pmlm"])}, "text"))
    source, _ = load_pretrained(sources["pmlm"])
    docked, _ = load_pretrained(train(config))
    assert not torch.equal(docked.encoders["text"].embedding.weight, source.encoder.embedding.weight)


def test_an_encoder_of_a_metalm_is_taken_by_its_name(sources, tmp_path):
    first = train(load_run_config(start_from(tmp_path, "first", {"init_from": str(sources["pmlm"])}, "text")))
    config = load_run_config(start_from(tmp_path, "second", {"init_from": str(first)}, "text"), ["training.lr=1e-30"])
    once, twice = load_pretrained(first)[0], load_pretrained(train(config))[0]
    assert torch.equal(once.encoders["text"].embedding.weight, twice.encoders["text"].embedding.weight)


def test_what_does_not_fit_is_named(sources, tmp_path):
    with pytest.raises(CheckpointError, match=r"has no decoder to start from; it has encoder"):
        load_run_config(start_from(tmp_path, "a", {"init_from": str(sources["pmlm"])}))
    with pytest.raises(CheckpointError, match=r"has no encoders\.text to start from; it has decoder"):
        load_run_config(start_from(tmp_path, "b", {"init_from": str(sources["mim"])}, "text"))
    with pytest.raises(ConfigError, match=r"unknown key 'model\.decoder\.widht'; did you mean 'width'"):
        load_run_config(start_from(tmp_path, "c", {"init_from": str(sources["mim"]), "widht": 48}))
    other = load_run_config(start_from(tmp_path, "d", {"init_from": str(sources["mim"])}), ["tokenizer={vocab_size: 290}"])
    other.tokenizer.path = ""
    with pytest.raises(CheckpointError, match=r"decoder\.init_from: .* another tokenizer"):
        train(other)
