"""Transcription: figures are jiwer's, the baseline is the commonest text, silence is not the sound."""

from __future__ import annotations

import jiwer
import pytest
import torch
import yaml

from metalm.data.audio import decode_audio, encode_wav
from metalm.data.sample import Sample
from metalm.data.shards import write_shards
from metalm.errors import DataError
from metalm.evaluation.blind import silence
from metalm.evaluation.predictor import Predictor
from metalm.evaluation.transcription import evaluate_transcription, plain, transcription_metrics
from metalm.inference.generate import GenerationConfig
from metalm.training.config import load_run_config
from metalm.training.loop import train

PITCHES = {"low": 300.0, "middle": 900.0, "high": 2700.0}


def tone(pitch: float, seconds: float = 0.2) -> bytes:
    return encode_wav(0.5 * torch.sin(2 * torch.pi * pitch * torch.arange(round(8000 * seconds)) / 8000), 8000)


@pytest.fixture(scope="module")
def sounds(tmp_path_factory) -> str:
    """Tones of three pitches, the low ones most frequent."""
    folder = tmp_path_factory.mktemp("sounds")
    samples = [
        Sample(f"{name}{n}", captions=[f"{name} tone"], audio=tone(pitch * (1 + 0.01 * n)))
        for name, pitch in PITCHES.items()
        for n in range(8 if name == "low" else 4)
    ]
    write_shards(samples, folder / "tones", 32)
    return str(folder / "tones")


@pytest.fixture(scope="module")
def run(sounds, tmp_path_factory):
    """A model that learns the tones by heart, from the bundled configuration made small."""
    folder = tmp_path_factory.mktemp("run")
    size = {"layers": 1, "width": 32, "heads": 2, "dropout": 0}
    sound = {**size, "mels": 16, "channels": 8}
    overrides = [f"model.decoder.{key}={value}" for key, value in size.items()]
    overrides += [f"model.encoders.sound.{key}={value}" for key, value in sound.items()]
    overrides += [f"variables={yaml.safe_dump({'sounds': sounds, 'val': sounds}, default_flow_style=True).strip()}"]
    overrides += ["data.row_length=128", "data.rows=4", "data.block=16", "data.workers=0", "tokenizer.vocab_size=270"]
    overrides += ["training={steps: 120, lr: 5.0e-3, warmup: 10, precision: float32, checkpoint_every: 0}"]
    return train(load_run_config("configs/audio/transcribe.yaml", [f"out={folder / 'run'}", *overrides]))


def test_a_model_hears_what_it_learned_and_not_in_silence(run, sounds):
    predictor = Predictor.load(run, GenerationConfig(max_new_tokens=16))
    result = evaluate_transcription(predictor, sounds, "run")
    assert result.metrics["exact_match"] > 0.9 and result.metrics["word_error_rate"] < 0.1
    assert result.metrics["commonest_exact_match"] == 0.5  # always "low tone"
    assert result.metrics["commonest_word_error_rate"] == 0.25
    assert len(result.predictions) == 16
    blind = evaluate_transcription(predictor, sounds, "run", blind=True)
    assert len({row.prediction for row in blind.predictions}) == 1
    assert len(evaluate_transcription(predictor, sounds, limit=3).predictions) == 3


def test_metrics_are_jiwers():
    references, hypotheses = ["seven two nine", "one", "four four"], ["seven nine", "one", "for four five"]
    metrics = transcription_metrics(references, hypotheses)
    assert metrics["word_error_rate"] == jiwer.wer(references, hypotheses) == 3 / 6
    assert metrics["character_error_rate"] == jiwer.cer(references, hypotheses)
    assert metrics["exact_match"] == 1 / 3
    with pytest.raises(DataError, match="without words"):
        transcription_metrics([""], ["a"])


def test_texts_are_compared_without_case_and_punctuation():
    assert plain("  Don't stop, PLEASE! ") == "don't stop please"


def test_silence_is_as_long_as_the_sound():
    wave = decode_audio(silence(tone(440, 0.3)), 8000)
    assert len(wave) == 2400 and not wave.any()


def test_shards_without_sounds_are_refused(run, tmp_path):
    write_shards([Sample("a", text="words")], tmp_path / "texts")
    with pytest.raises(DataError, match="no sample has both a sound and its text"):
        evaluate_transcription(Predictor.load(run, GenerationConfig()), str(tmp_path / "texts"))
