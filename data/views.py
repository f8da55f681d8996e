"""Random views of what a model learns from, so that no visit shows the same: a crop of a picture, perhaps mirrored; a sound
with another pitch and tempo, and with gaps."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class View:
    """A part of an upright picture, its edges as shares of the sides; `mirrored` exchanges left and right."""

    left: float
    top: float
    right: float
    bottom: float
    mirrored: bool = False


def draw_view(crop: float, mirror: bool, rng: random.Random) -> View:
    """A view that keeps at least `crop` of either side, each drawn on its own, anywhere in the picture."""
    width, height = rng.uniform(crop, 1), rng.uniform(crop, 1)
    left, top = rng.uniform(0, 1 - width), rng.uniform(0, 1 - height)
    return View(left, top, left + width, top + height, mirror and rng.random() < 0.5)


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


def draw_warp(strength: float, rng: random.Random) -> Warp:
    """Changes of at most `strength`: 0.2 stretches by a fifth, tilts by a fifth of the clip's range, and overwrites up to a
    fifth of the bands and of the time.

    Source: SpecAugment (arXiv 1904.08779), with vocal tract length perturbation for its lack of another voice.
    """
    pitch, speed, tempo, tilt = (rng.uniform(-strength, strength) for _ in range(4))
    bands, times = ((rng.random(), rng.uniform(0, strength)) for _ in range(2))
    return Warp(pitch, speed, tempo, tilt, bands, times)


def warp_features(log_FM: Tensor, warp: Warp) -> Tensor:
    """Log-mel frames [F, M] changed, as many as there were."""
    F, M = log_FM.shape
    half = (F - 1) / 2
    time_F = torch.arange(F, dtype=torch.float32)
    bent = half * (1 + warp.tempo)  # where the middle comes from
    time_F = torch.where(time_F <= half, time_F * bent / max(half, 1e-6), bent + (time_F - half) * (2 - bent / max(half, 1e-6)))
    time_F = half + (time_F - half) * (1 + warp.speed)
    band_M = torch.arange(M, dtype=torch.float32) * (1 + warp.pitch)
    warped = pick(pick(log_FM, time_F).T, band_M).T
    warped = warped + warp.tilt * (log_FM.max() - log_FM.min()) * torch.linspace(-0.5, 0.5, M)
    silence = warped.min()
    for size, (middle, width), rows in ((F, warp.times, warped), (M, warp.bands, warped.T)):
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
