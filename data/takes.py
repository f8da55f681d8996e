"""Random takes of the sounds a model learns from, so that no visit sounds the same.

    wave -> silence around it, noise over all (any encoder) -> log-mel frames -> another pitch, tempo and colour, gaps (log_mel)

Shapes: T samples, F frames, M mel bands.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

QUIET = 60.0  # decibels below a sound at which noise is no longer heard


@dataclass(frozen=True)
class Take:
    """A sound as it is heard once: after and before so many seconds of silence, in noise, and warped."""

    before: float = 0.0
    after: float = 0.0
    noise: Noise | None = None
    warp: Warp | None = None

    def samples(self, samples: int, sample_rate: int) -> int:
        """Length of a sound of so many samples, with what is around it."""
        return samples + sum(self.around(sample_rate))

    def around(self, sample_rate: int) -> tuple[int, int]:
        return round(self.before * sample_rate), round(self.after * sample_rate)

    def record(self, wave_T: Tensor, sample_rate: int) -> Tensor:
        """The wave with what is around it, in its noise."""
        wave_T = F.pad(wave_T, self.around(sample_rate))
        return self.noise.over(wave_T) if self.noise else wave_T


@dataclass(frozen=True)
class Noise:
    """Noise `decibels` below the sound's loudest tenth. Its amplitude goes with frequency to the power of `color`: -1 is brown,
    0 white, 1 violet."""

    decibels: float
    color: float
    seed: int

    def over(self, wave_T: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        white_T = torch.randn(len(wave_T), generator=generator)
        spectrum = torch.fft.rfft(white_T)
        frequency = torch.arange(1.0, len(spectrum) + 1)
        noise_T = torch.fft.irfft(spectrum * frequency**self.color, n=len(wave_T))
        loud = wave_T.abs().topk(-(-len(wave_T) // 10)).values.mean()
        return wave_T + noise_T * loud * 10 ** (-self.decibels / 20) / (noise_T.square().mean().sqrt() + 1e-8)


@dataclass(frozen=True)
class Warp:
    """How a sound's frames are changed, as numbers in [-1, 1] or [0, 1] of which `warp_features` makes so much as there is.

    `pitch` stretches the frequencies, `speed` the time about its middle, `tempo` its first half against its second; `tilt`
    makes high frequencies louder than low ones; the masks, each with its middle and its width, are overwritten by silence.
    """

    pitch: float
    speed: float
    tempo: float
    tilt: float
    bands: tuple[float, float]
    times: tuple[float, float]


def draw_take(pad: float, noise: float | None, perturb: float, rng: random.Random) -> Take:
    """Up to `pad` seconds of silence on either side; noise at least `noise` decibels below the sound, none where that is None;
    frames changed by at most `perturb`: 0.2 stretches by a fifth, tilts by a fifth of the clip's range, and overwrites up to a
    fifth of the bands and of the time.

    Source: SpecAugment (arXiv 1904.08779), with vocal tract length perturbation for its lack of another voice.
    """
    before, after = rng.uniform(0, pad), rng.uniform(0, pad)
    heard = None if noise is None else Noise(rng.uniform(noise, QUIET), rng.uniform(-1, 1), rng.getrandbits(32))
    return Take(before, after, heard, draw_warp(perturb, rng) if perturb else None)


def draw_warp(strength: float, rng: random.Random) -> Warp:
    pitch, speed, tempo, tilt = (rng.uniform(-strength, strength) for _ in range(4))
    bands, times = ((rng.random(), rng.uniform(0, strength)) for _ in range(2))
    return Warp(pitch, speed, tempo, tilt, bands, times)


def warp_features(log_FM: Tensor, warp: Warp) -> Tensor:
    """Log-mel frames [F, M] changed, as many as there were."""
    frames, M = log_FM.shape
    half = (frames - 1) / 2
    time_F = torch.arange(frames, dtype=torch.float32)
    bent = half * (1 + warp.tempo)  # where the middle comes from
    time_F = torch.where(time_F <= half, time_F * bent / max(half, 1e-6), bent + (time_F - half) * (2 - bent / max(half, 1e-6)))
    time_F = half + (time_F - half) * (1 + warp.speed)
    band_M = torch.arange(M, dtype=torch.float32) * (1 + warp.pitch)
    warped = pick(pick(log_FM, time_F).T, band_M).T
    warped = warped + warp.tilt * (log_FM.max() - log_FM.min()) * torch.linspace(-0.5, 0.5, M)
    silence = warped.min()
    for size, (middle, width), rows in ((frames, warp.times, warped), (M, warp.bands, warped.T)):
        start = round((middle - width / 2) * size)
        rows[max(0, start) : max(0, start + round(width * size))] = silence
    return warped


def pick(rows_NX: Tensor, index_K: Tensor) -> Tensor:
    """Rows at fractional places, those beyond the ends repeated."""
    index_K = index_K.clamp(0, len(rows_NX) - 1)
    low_K = index_K.floor().long()
    share_K1 = (index_K - low_K)[:, None]
    high_K = (low_K + 1).clamp(max=len(rows_NX) - 1)
    return rows_NX[low_K] * (1 - share_K1) + rows_NX[high_K] * share_K1
