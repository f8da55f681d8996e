"""Read speech that people recorded: decoded, resampled, cut into chunks and batched."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch

from benchmarks.families import WAV2VEC2
from metalm.config import build
from metalm.data.audio import decode_audio, num_samples
from metalm.encoders import ENCODERS
from metalm.encoders.base import Encoder


@pytest.fixture(scope="module")
def folder(shared) -> Path:
    return shared / "data/audio_speech"


@pytest.fixture(scope="module")
def clips(folder) -> list[tuple[bytes, float]]:
    """All 242 clips, encoded, each with the seconds that its list gives."""
    rows = [json.loads(line) for line in (folder / "transcripts.jsonl").read_text().splitlines()]
    with zipfile.ZipFile(folder / "audio.zip") as archive:
        return [(archive.read(row["audio"]), row["seconds"]) for row in rows]


@pytest.mark.parametrize("rate", [8000, 16000, 22050])
def test_clips_are_as_long_as_their_headers_and_their_list_say(clips, rate):
    for encoded, seconds in clips if rate == 16000 else clips[::6]:
        wave_T = decode_audio(encoded, rate)
        assert len(wave_T) == num_samples(encoded, rate)
        assert len(wave_T) / rate == pytest.approx(seconds, abs=0.02)
        assert wave_T.isfinite().all() and 0.01 < wave_T.abs().max() <= 1.5  # resampled Ogg may overshoot
    assert len(clips) == 242


def log_mel(**more) -> Encoder:
    return make({"type": "log_mel", "layers": 2, "width": 32, "heads": 2, "positions": "rotary", **more})


def make(values: dict) -> Encoder:
    torch.manual_seed(0)
    cls = ENCODERS[values["type"]]
    return cls(build(cls.Config, values, "test")).eval()


@torch.no_grad()
def states(encoder: Encoder, clips: list[bytes]) -> list[torch.Tensor]:
    """Of each clip, read in one batch."""
    processor = encoder.processor
    loaded = [processor.load({"audio": clip}) for clip in clips]
    collated = processor.collate(loaded)
    flat = encoder(**collated.inputs).flatten(0, 1)[collated.source]
    return list(flat.split([processor.num_states(inputs) for inputs in loaded]))


@pytest.mark.parametrize("kind", ["log_mel", "speech"])
def test_a_batch_of_clips_in_chunks_equals_clip_by_clip(clips, kind):
    speech = {"type": "speech", "name": "wav2vec2_model", "arguments": WAV2VEC2}
    encoder = log_mel(chunk_seconds=1.5) if kind == "log_mel" else make({**speech, "chunk_seconds": 1.5})
    chosen = [encoded for encoded, _ in clips[::40]]
    together = states(encoder, chosen)
    assert [len(one) for one in together] == [encoder.processor.num_states({"audio": clip}) for clip in chosen]
    assert max(len(encoder.processor.chunks(num_samples(clip, 16000))) for clip in chosen) >= 3
    for clip, batched in zip(chosen, together):
        torch.testing.assert_close(batched, states(encoder, [clip])[0], rtol=1e-4, atol=1e-4)
        assert batched.std(0).mean() > 1e-3  # states follow the sound


def test_chunks_of_any_length_make_a_state_every_40_ms(clips):
    for encoded, seconds in clips[::11]:
        for chunk_seconds in (0.7, 2.0, 30.0):
            assert log_mel(chunk_seconds=chunk_seconds).processor.num_states({"audio": encoded}) == pytest.approx(
                seconds / 0.04, abs=2 + seconds / chunk_seconds
            )
