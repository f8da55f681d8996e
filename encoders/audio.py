"""What encoders of sound share: decoding, and long clips in chunks that are read one by one.

    clip of 65 s, chunks of 30 s  ->  rows of 30 s, 30 s and 5 s  ->  the states of all three, one after another

Shapes: R rows (chunks of all clips), T samples, F frames, S states of a row.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from metalm.data.audio import decode_audio, encode_wav, num_samples
from metalm.encoders.base import Collated, Processor
from metalm.errors import ConfigError, DataError


@dataclass
class AudioProcessor(Processor):
    """Decodes to mono at `sample_rate`; a row is a chunk of at most `chunk` samples.

    A chunk shorter than `shortest` samples, as the last of a clip may be, is filled up with silence.
    """

    sample_rate: int
    chunk: int
    shortest: int
    reads = frozenset({"audio"})
    warps: ClassVar[bool] = False  # whether a take's `Warp` changes what is read

    def __post_init__(self):
        if self.chunk < self.shortest:
            raise ConfigError(f"chunks of {self.chunk} samples are shorter than the {self.shortest} that make a state")

    @abstractmethod
    def states_of(self, samples: int) -> int:
        """How many states the encoder makes of a chunk."""

    @abstractmethod
    def features(self, wave_T: Tensor, inputs: dict) -> Tensor:
        """What the encoder reads of a whole clip, [F, …]; it is cut into chunks after that."""

    @abstractmethod
    def frames_of(self, samples: int) -> int:
        """Length of the features of a chunk of so many samples."""

    def chunks(self, samples: int) -> list[int]:
        """Samples of each of the clip's chunks."""
        whole, rest = divmod(samples, self.chunk)
        return [self.chunk] * whole + [max(rest, self.shortest)] * bool(rest)

    def num_states(self, inputs: dict) -> int:
        return sum(map(self.states_of, self.chunks(self.num_samples(inputs))))

    def num_samples(self, inputs: dict) -> int:
        """Length of a clip, loaded or not."""
        if "samples" in inputs:
            return inputs["samples"]
        samples, take = num_samples(inputs["audio"], self.sample_rate), inputs.get("view")
        return take.samples(samples, self.sample_rate) if take else samples

    def load(self, inputs: dict) -> dict:
        wave_T = decode_audio(inputs["audio"], self.sample_rate)
        announced = num_samples(inputs["audio"], self.sample_rate)
        if len(wave_T) != announced:
            raise DataError(f"a sound that breaks off: {len(wave_T):,} of {announced:,} samples are there")
        if take := inputs.get("view"):
            wave_T = take.record(wave_T, self.sample_rate)
        chunks = self.chunks(len(wave_T))
        padded_T = torch.nn.functional.pad(wave_T, (0, sum(chunks) - len(wave_T)))
        return {"audio": self.features(padded_T, inputs), "samples": len(wave_T)}

    def collate(self, loaded: list[dict]) -> Collated:
        rows, lengths, states = [], [], []
        for inputs in loaded:
            start = 0
            for samples in self.chunks(inputs["samples"]):
                frames = self.frames_of(samples)
                rows.append(inputs["audio"][start : start + frames])
                lengths.append(frames)
                states.append(self.states_of(samples))
                start += self.frames_of(self.chunk)
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        S = max(states)
        source = torch.cat([torch.arange(r * S, r * S + count) for r, count in enumerate(states)])
        return Collated({"audio_RF": padded, "length_R": torch.tensor(lengths)}, source)

    def blank(self) -> dict:
        return {"audio": encode_wav(torch.zeros(self.shortest), self.sample_rate)}

    def largest(self, share: float = 1.0) -> dict:
        samples = max(self.shortest, round(self.chunk * share))
        return {"audio": encode_wav(torch.zeros(samples), self.sample_rate)}
