"""A Transformer on log-mel frames, made to be trained from scratch together with the decoder.

    wave -> log-mel [F, M], normalised -> two convolutions of stride 2 -> pre-norm Transformer
         -> a state every 4 frames (40 ms)

The convolutions see frequency as a dimension of space, so that a higher voice is a shift and not another word. Source: Dong et
al., "Speech-Transformer" (2018), section 3.

Shapes: R rows, F frames, M mel bands, C channels, S states of a row, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metalm.data.takes import warp_features
from metalm.encoders.audio import AudioProcessor
from metalm.encoders.base import Encoder, EncoderConfig
from metalm.errors import ConfigError
from metalm.nn.attention import Mask
from metalm.nn.transformer import Transformer, TransformerConfig, init_weights

STRIDE = 4  # frames a state


@dataclass(kw_only=True)
class LogMelConfig(TransformerConfig, EncoderConfig):
    """A stack on `mels` bands of sound at `sample_rate`, a frame every `hop` seconds of a `window` as long.

    Clips longer than `chunk_seconds` are read in chunks. `channels` are those of the convolutions. `normalize` takes the mean
    off the clip as a whole, whose spectrum stays (sounds), or off each band, and with it what a microphone and a voice add
    (speech). What is more than `dynamic_range` decibels below the loudest place counts as silence.
    """

    sample_rate: int = 16000
    mels: int = 80
    hop: float = 0.01
    window: float = 0.025
    chunk_seconds: float = 30.0
    channels: int = 32
    normalize: Literal["clip", "bands"] = "clip"
    dynamic_range: float = 60.0

    def __post_init__(self):
        super().__post_init__()
        if self.relative_bias:
            raise ConfigError("relative_bias is for text: give sound sinusoidal, learned or rotary positions")
        if min(self.sample_rate, self.mels, self.channels) < 1 or not 0 < self.hop <= self.window:
            raise ConfigError("sample_rate, mels and channels must be at least 1, and the hop above 0 and at most the window")
        if not self.hop_samples:
            raise ConfigError(f"a hop of {self.hop} s holds no sample at sample_rate {self.sample_rate}, in samples a second")
        if self.mels > self.fft_size // 2:
            raise ConfigError(
                f"mels {self.mels} are more than the {self.fft_size // 2} frequencies that the window tells apart"
            )
        if self.chunk_seconds <= 0:
            raise ConfigError(f"chunk_seconds is {self.chunk_seconds}, it must be positive")
        if self.dynamic_range <= 0:
            raise ConfigError(f"dynamic_range {self.dynamic_range} is in decibels, above 0")
        needed = states_of(self.frames_of(self.chunk))
        if self.positions == "learned" and needed > self.max_positions:
            raise ConfigError(f"chunk_seconds {self.chunk_seconds} are {needed} states, more than max_positions")

    @property
    def hop_samples(self) -> int:
        return round(self.hop * self.sample_rate)

    @property
    def fft_size(self) -> int:
        """Samples of the window, up to the next power of 2."""
        return 1 << (round(self.window * self.sample_rate) - 1).bit_length()

    @property
    def chunk(self) -> int:
        """Samples of a chunk: a whole number of states."""
        state = STRIDE * self.hop_samples
        return max(1, round(self.chunk_seconds * self.sample_rate / state)) * state

    def frames_of(self, samples: int) -> int:
        return -(-samples // self.hop_samples)


def states_of(frames: int) -> int:
    return -(-frames // STRIDE)


@dataclass
class LogMelProcessor(AudioProcessor):
    config: LogMelConfig
    warps = True

    def frames_of(self, samples: int) -> int:
        return self.config.frames_of(samples)

    def states_of(self, samples: int) -> int:
        return states_of(self.frames_of(samples))

    def features(self, wave_T: Tensor, inputs: dict) -> Tensor:
        log_FM = log_mel(wave_T, self.config)
        warp = inputs["view"].warp if inputs.get("view") else None
        return warp_features(log_FM, warp) if warp else log_FM


def log_mel(wave_T: Tensor, config: LogMelConfig) -> Tensor:
    """Log-mel frames [F, M] of a wave, of mean 0 and standard deviation 1: loudness is no part of them."""
    import torchaudio

    window, size = round(config.window * config.sample_rate), config.fft_size
    spectrum = torch.stft(
        wave_T,
        size,
        config.hop_samples,
        window,
        torch.hann_window(window),
        center=True,
        pad_mode="constant",
        return_complex=True,
    ).abs()[:, : config.frames_of(len(wave_T))]
    filters = torchaudio.functional.melscale_fbanks(
        size // 2 + 1, 20.0, config.sample_rate / 2, config.mels, config.sample_rate, norm="slaney"
    )
    logs_FM = ((spectrum**2).T @ filters + 1e-8).log()
    logs_FM = logs_FM.clamp(min=logs_FM.max() - config.dynamic_range / 10 * math.log(10))
    logs_FM = logs_FM - (logs_FM.mean(0) if config.normalize == "bands" else logs_FM.mean())
    return logs_FM / (logs_FM.std() + 1e-5)


class Subsampling(nn.Module):
    """Frames [R, F, M] to vectors [R, S, D]; frames past a row's length count as silence to every layer."""

    def __init__(self, mels: int, channels: int, width: int):
        super().__init__()
        sizes = (1, channels, channels), (channels, 2 * channels, 2 * channels)
        self.stages = nn.ModuleList(
            nn.ModuleList([nn.Conv2d(before, half, 3, stride=2, padding=1), nn.Conv2d(half, after, 3, padding=1)])
            for before, half, after in sizes
        )
        self.norms = nn.ModuleList(nn.ModuleList(nn.LayerNorm(size) for size in stage[1:]) for stage in sizes)
        self.map = nn.Linear(2 * channels * -(-mels // STRIDE), width)

    def forward(self, audio_RFM: Tensor, length_R: Tensor) -> Tensor:
        x_RCFM = audio_RFM[:, None]
        for (down, same), (down_norm, same_norm) in zip(self.stages, self.norms):
            length_R = (length_R + 1) // 2
            inside_RF = torch.arange(-(-x_RCFM.shape[2] // 2), device=length_R.device) < length_R[:, None]
            inside = inside_RF[:, None, :, None]
            x_RCFM = act(down_norm, down(x_RCFM)) * inside
            x_RCFM = x_RCFM + act(same_norm, same(x_RCFM)) * inside
        return self.map(x_RCFM.transpose(1, 2).flatten(2))


def act(norm: nn.LayerNorm, x_RCFM: Tensor) -> Tensor:
    """The channels of each place normalised, and GELU."""
    return F.gelu(norm(x_RCFM.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


class LogMelEncoder(Encoder):
    Config = LogMelConfig

    def __init__(self, config: LogMelConfig):
        super().__init__()
        self.width = config.width
        self.processor = LogMelProcessor(config.sample_rate, config.chunk, config.hop_samples, config)
        self.subsampling = Subsampling(config.mels, config.channels, config.width)
        self.subsampling.apply(init_weights)
        self.transformer = Transformer(config)

    def forward(self, audio_RF: Tensor, length_R: Tensor) -> Tensor:
        x_RSD = self.subsampling(audio_RF.to(self.subsampling.map.weight.dtype), length_R)
        R, S, _ = x_RSD.shape
        column_S = torch.arange(S, device=x_RSD.device)
        inside_RS = column_S < states_of(length_R)[:, None]
        mask = Mask(lambda b, h, q, k: inside_RS[b, k], R, S, S, x_RSD.device)
        return self.transformer(x_RSD, column_S.expand(R, S), mask)

    def layers(self) -> list[nn.Module]:
        blocks = self.transformer.blocks
        return [*blocks[:-1], nn.ModuleList([blocks[-1], self.transformer.norm])]
