"""`metalm data encode`: shards with states, runs on them, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import metalm.encode
from metalm.cli import app
from metalm.config import read_yaml
from metalm.data.check import check_shards
from metalm.data.sample import Sample
from metalm.data.shards import count_samples, list_shards, read_samples, write_shards
from metalm.encode import encode_shards, load_encoder
from metalm.errors import ConfigError, DataError
from metalm.fingerprint import fingerprint
from metalm.pretrained import load_pretrained
from metalm.training.config import load_run_config
from metalm.training.loop import train


@pytest.fixture(scope="module")
def pictures(scenes, tmp_path_factory) -> Path:
    """24 captioned pictures in three shards."""
    out = tmp_path_factory.mktemp("pictures") / "shards"
    samples = [sample for sample, _ in zip(read_samples(str(scenes / "images")), range(24))]
    write_shards(samples, out, samples_per_shard=8)
    return out


@pytest.fixture(scope="module")
def yaml(pictures, tmp_path_factory) -> Path:
    """A run whose picture encoder trains for two steps."""
    path = tmp_path_factory.mktemp("configs") / "run.yaml"
    path.write_text(
        f"""
out: {path.parent}/first
tokenizer: {{vocab_size: 300}}
model:
  decoder: {{layers: 1, width: 16, heads: 2, max_positions: 64}}
  encoders:
    eye: {{type: vit, layers: 1, width: 16, heads: 2, image_size: 32, patch_size: 16, connector: {{type: feedforward}}}}
data:
  row_length: 48
  rows: 2
  block: 16
  workers: 0
  train: [{{shards: "{pictures}", task: captioning}}]
training: {{steps: 2, lr: 1.0e-2, warmup: 0, log_every: 1, checkpoint_every: 2, precision: float32}}
"""
    )
    return path


@pytest.fixture(scope="module")
def first(yaml) -> Path:
    run = load_run_config(yaml)
    train(run)
    return Path(run.out)


@pytest.fixture(scope="module")
def states(first, pictures, tmp_path_factory) -> Path:
    """The pictures' states in float32, without the pictures."""
    out = tmp_path_factory.mktemp("encoded") / "states"
    encode_shards(str(first), "eye", str(pictures), out, dtype="float32", drop_media=True, batch_size=3)
    return out


def frozen(yaml: Path, first: Path, shards: Path, out: Path, *overrides: str):
    start = [f"init_from={first}", "model.encoders.eye.trainable=none", f"data.train[0].shards={shards}", f"out={out}"]
    return load_run_config(yaml, [*start, *overrides])


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in row]


def test_shards_keep_their_samples_with_states_and_say_whose(first, pictures, states):
    before, after = list(read_samples(str(pictures))), list(read_samples(str(states)))
    assert [sample.key for sample in after] == [sample.key for sample in before]
    assert [sample.captions for sample in after] == [sample.captions for sample in before]
    assert all(sample.image is None and sample.states["image"][0].shape == (4, 16) for sample in after)
    encoder, config = load_encoder(str(first), "eye")
    index = json.loads((states / "index.json").read_text())
    assert index["encoders"]["image"] == {
        "fingerprint": fingerprint(encoder, config),
        "dtype": "float32",
        "media": "left out",
        "states_of": 24,
    }
    assert list(index["shards"].values()) == [8, 8, 8] and count_samples(str(states)) == 24
    assert {sample.states["image"][0].encoder for sample in after} == {fingerprint(encoder, config)}
    report = check_shards(str(states))
    assert report.ok and (report.images, report.stored_states) == (0, 24)


def test_a_run_on_states_takes_the_steps_of_one_on_pictures_and_its_export_reads_pictures(
    yaml, first, pictures, states, tmp_path, monkeypatch
):
    raw, stored = tmp_path / "raw", tmp_path / "stored"
    train(frozen(yaml, first, pictures, raw))
    from metalm.encoders.vit import ViT

    with monkeypatch.context() as patch:
        patch.setattr(ViT, "forward", lambda *_, **__: pytest.fail("the encoder ran"))
        train(frozen(yaml, first, states, stored))
    assert losses(stored) == pytest.approx(losses(raw), rel=1e-5)
    weights, expected = (load_file(run / "export/model.safetensors") for run in (stored, raw))
    assert weights.keys() == expected.keys() and any(name.startswith("encoders.eye.") for name in weights)
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-4)

    train(frozen(yaml, first, states, stored, "training.steps=3"))  # resumes, by the encoder of the checkpoint
    assert len(losses(stored)) == 3


def test_the_command_line_from_pictures_to_answers(yaml, first, pictures, tmp_path):
    encoded, run = tmp_path / "encoded", tmp_path / "run"

    def metalm(*arguments: str | Path) -> str:
        result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    said = metalm("data", "encode", "--model", first, "--encoder", "eye", "--data", pictures, "--out", encoded)
    assert "24 samples in 3 shards" in said
    sample = next(read_samples(str(encoded)))
    assert sample.image is not None and sample.states["image"][0].dtype is torch.bfloat16
    overrides = [f"init_from={first}", f"out={run}", f"data.train[0].shards={encoded}", "training.precision=bfloat16"]
    metalm("train", yaml, *overrides, "model.encoders.eye.trainable=none")
    encoder, config = load_encoder(str(run), "eye")
    assert fingerprint(encoder, config) == sample.states["image"][0].encoder, "a run in bfloat16 made it another encoder"

    (tmp_path / "a.png").write_bytes(sample.image)
    metalm("generate", "--model", run, "--image", tmp_path / "a.png", "--prompt", "caption:", "--max-new-tokens", "4")
    scores = []
    for shards in (pictures, encoded):
        out = tmp_path / "result.json"
        metalm(
            "evaluate", "captioning", "--model", run, "--data", shards, "--out", out, "--max-new-tokens", "4", "--limit", "4"
        )
        scores.append(json.loads(out.read_text())["metrics"])
    assert scores[0].keys() == scores[1].keys()


def test_runs_on_states_of_another_encoder_or_with_views_or_training_it_are_refused(yaml, first, states, tmp_path):
    start = (yaml, first, states, tmp_path / "run")
    with pytest.raises(ConfigError, match="'eye' would soon make others: it trains"):
        train(frozen(*start, "model.encoders.eye.trainable=all"))
    with pytest.raises(ConfigError, match="leave crop, mirror"):
        train(frozen(*start, "data.train[0].mirror=true"))
    with pytest.raises(ConfigError, match="encode them anew"):
        anew = ["model.encoders.eye.trainable=none", f"data.train[0].shards={states}", f"out={tmp_path / 'other'}"]
        train(load_run_config(yaml, [*anew, f"tokenizer.path={first}"]))


def test_encoding_goes_on_where_it_was_stopped(first, pictures, states, tmp_path, monkeypatch):
    out, write = tmp_path / "out", metalm.encode.write_shard

    def full(samples, path, url):
        return write(samples if path.name == "000000.tar" else torn(samples), path, url)

    def torn(samples):
        yield next(samples)
        raise OSError(28, "No space left on device")

    arguments = (str(first), "eye", str(pictures), out, "float32", True)
    with monkeypatch.context() as patch:
        patch.setattr(metalm.encode, "write_shard", full)
        with pytest.raises(
            DataError, match=r"000001\.tar: writing stopped \(No space left on device\); free space and run the same"
        ):
            encode_shards(*arguments)
    assert [Path(shard).name for shard in list_shards(str(out))] == ["000000.tar"]
    assert count_samples(str(out)) == 8 and not list(out.glob("*.partial"))

    first_shard = (out / "000000.tar").stat().st_mtime_ns
    index = encode_shards(*arguments)
    assert (out / "000000.tar").stat().st_mtime_ns == first_shard
    assert index == json.loads((states / "index.json").read_text())
    for own, expected in zip(read_samples(str(out)), read_samples(str(states)), strict=True):
        found, whole = own.states["image"][0].tensor(), expected.states["image"][0].tensor()
        assert own.key == expected.key
        torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5)

    with pytest.raises(DataError, match=r"holds shards of another encoding \(dtype: float32, now bfloat16\)"):
        encode_shards(*arguments[:4], "bfloat16", True)
    with pytest.raises(DataError, match="already holds shards"):
        (out / "index.json").unlink()
        encode_shards(*arguments)


def test_what_cannot_be_encoded_is_said(yaml, first, pictures, states, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="has no encoder 'eyes'; did you mean 'eye'"):
        encode_shards(str(first), "eyes", str(pictures), out)
    with pytest.raises(ConfigError, match="is a decoder alone"):
        encode_shards("hf:some/decoder", "eye", str(pictures), out)
    with pytest.raises(ConfigError, match="starts from random weights, which every run draws anew"):
        encode_shards(str(yaml), "eye", str(pictures), out)
    with pytest.raises(ConfigError, match="float16"):
        encode_shards(str(first), "eye", str(pictures), out, dtype="float16")
    write_shards([Sample("a", text="no picture")], tmp_path / "texts")
    with pytest.raises(DataError, match=r"no sample has what the encoder 'eye' reads \(image\)"):
        encode_shards(str(first), "eye", str(tmp_path / "texts"), out)
    shutil.rmtree(out)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no \*\.tar"):
        encode_shards(str(first), "eye", str(tmp_path / "empty"), out)
    (tmp_path / "empty/000000.tar").write_bytes(bytes(10240))
    with pytest.raises(DataError, match="no sample is left of it"):
        encode_shards(str(first), "eye", str(tmp_path / "empty"), out)
    samples = [Sample("good", next(read_samples(str(pictures))).image), Sample("torn", b"\xff\xd8 torn")]
    write_shards(samples, tmp_path / "torn")
    with pytest.raises(DataError, match=r"1 broken samples, more than --max-broken 0; the last: .*'torn'"):
        encode_shards(str(first), "eye", str(tmp_path / "torn"), tmp_path / "whole", max_broken=0)
    assert encode_shards(str(first), "eye", str(tmp_path / "torn"), tmp_path / "whole")["num_samples"] == 1


@pytest.mark.parametrize("encoder", [{"type": "text"}, {"type": "fused", "image_size": 32}])
def test_encoders_that_read_texts_are_refused(yaml, tmp_path, encoder):
    values = read_yaml(yaml)
    values["model"]["encoders"]["eye"] = {**encoder, "layers": 1, "width": 16, "heads": 2, "connector": {"type": "linear"}}
    path = tmp_path / "text.yaml"
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"encoders\.eye reads texts, which are laid out anew each time"):
        load_encoder(str(path), "eye")


def test_a_configuration_is_encoded_by_the_weights_that_its_run_would_start_from(yaml, first, tmp_path):
    """Its own, or those of a run: not by what training will make of the decoder, but by the same encoder."""
    expected = fingerprint(*load_encoder(str(first), "eye"))
    for where in (("init_from",), ("model", "encoders", "eye", "init_from")):
        values = read_yaml(yaml)
        inner = values
        for key in where[:-1]:
            inner = inner[key]
        inner[where[-1]] = str(first)
        path = tmp_path / "start.yaml"
        path.write_text(json.dumps(values))
        assert fingerprint(*load_encoder(str(path), "eye")) == expected
    model, _ = load_pretrained(first)
    assert fingerprint(model.encoders["eye"], model.config.encoders["eye"]) == expected
