"""Encoded sounds (WAV, FLAC, Ogg, MP3) to mono waveforms of one rate."""

from __future__ import annotations

import io
import math
from typing import Any

import torch
from torch import Tensor

from metalm.errors import ConfigError, DataError


def import_soundfile() -> Any:
    """The library, at need; raises `ConfigError` where it or libsndfile, which it calls, is missing."""
    try:
        import soundfile
    except (ImportError, OSError) as error:
        raise ConfigError(f"sounds need soundfile and libsndfile: pip install soundfile ({error})") from error
    return soundfile


def decode_audio(encoded: bytes, sample_rate: int) -> Tensor:
    """float32 [samples] in [-1, 1], channels averaged, resampled to `sample_rate`.

    Raises:
        DataError: the bytes are no sound, or one without samples.
    """
    soundfile = import_soundfile()

    try:
        samples_TC, own_rate = soundfile.read(io.BytesIO(encoded), dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError, ValueError) as error:
        raise DataError(f"not a complete sound ({_reason(error)})") from error
    if not len(samples_TC):
        raise DataError("a sound without samples")
    wave = torch.from_numpy(samples_TC).mean(1)
    if own_rate != sample_rate:
        import torchaudio

        wave = torchaudio.functional.resample(wave, own_rate, sample_rate)
    return wave


def num_samples(encoded: bytes, sample_rate: int) -> int:
    """How many samples `decode_audio` gives, by the header alone.

    Raises:
        DataError: the bytes are no sound, or one without samples.
    """
    soundfile = import_soundfile()

    try:
        info = soundfile.info(io.BytesIO(encoded))
    except (soundfile.SoundFileError, OSError, ValueError) as error:
        raise DataError(f"not a complete sound ({_reason(error)})") from error
    if not info.frames:
        raise DataError("a sound without samples")
    if info.frames >= 1 << 48:  # what a FLAC has that was written into a pipe
        raise DataError("a sound whose header does not say how long it is: write it to a file again")
    divisor = math.gcd(info.samplerate, sample_rate)
    return -(-info.frames * (sample_rate // divisor) // (info.samplerate // divisor))


def encode_wav(wave: Tensor, sample_rate: int) -> bytes:
    """A 16-bit WAV of a waveform [samples] in [-1, 1]."""
    soundfile = import_soundfile()

    out = io.BytesIO()
    soundfile.write(out, wave.numpy(), sample_rate, format="WAV", subtype="PCM_16")
    return out.getvalue()


def _reason(error: Exception) -> str:
    """Without the address of the buffer that soundfile names."""
    return str(error).rpartition(": ")[2]
