"""torchaudio's wav2vec 2.0, HuBERT and WavLM: a state every 20 ms of sound at 16 kHz."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metalm.encoders.audio import AudioProcessor
from metalm.encoders.base import Encoder, EncoderConfig, layers_up_to
from metalm.errors import ConfigError
from metalm.registry import did_you_mean

SAMPLE_RATE = 16000
FAMILIES = ("wav2vec2", "hubert", "wavlm")


@dataclass(kw_only=True)
class SpeechConfig(EncoderConfig):
    """`name` of a function of `torchaudio.models`, e.g. `wav2vec2_base`, `hubert_large`, `wavlm_base`.

    `pretrained` names a bundle of `torchaudio.pipelines` whose weights it gets, e.g. `WAV2VEC2_BASE`, or a file of such
    weights; empty: none. `layer` is the one whose states are taken, as they are; 0 takes the model's own output. Clips
    longer than `chunk_seconds` are read in chunks. `arguments` go to the function as they are: dropout rates, or all of the
    shape for `wav2vec2_model`.
    """

    name: str
    pretrained: str = ""
    layer: int = 0
    chunk_seconds: float = 20.0
    arguments: dict[str, Any] | None = None


@dataclass
class WaveProcessor(AudioProcessor):
    """Waves as they are; `kernels` are the sizes and strides of the convolutions that read them."""

    kernels: list[tuple[int, int]]
    normalize: bool

    def frames_of(self, samples: int) -> int:
        return samples

    def states_of(self, samples: int) -> int:
        for size, stride in self.kernels:
            samples = (samples - size) // stride + 1
        return samples

    def features(self, wave_T: Tensor, inputs: dict) -> Tensor:
        return torch.nn.functional.layer_norm(wave_T, wave_T.shape) if self.normalize else wave_T


class SpeechEncoder(Encoder):
    """A torchaudio model's states.

    Models that normalise over time (`group_norm`: the base models), and WavLM, which takes no mask, read rows of unequal length
    apart, so that padding has no part in their states: they run once for each length in a rank's batch.
    """

    Config = SpeechConfig

    def __init__(self, config: SpeechConfig):
        super().__init__()
        self.model = make_speech_model(config)
        transformer = self.model.encoder.transformer
        convolutions = self.model.feature_extractor.conv_layers
        over_time = isinstance(convolutions[0].layer_norm, nn.GroupNorm)
        self.runs_vary = over_time or hasattr(transformer.layers[0].attention, "rel_attn_embed")
        self.norm_at_end = not transformer.layer_norm_first  # torchaudio's flag says where the norm of the whole stack is
        if config.layer:
            transformer.layers = layers_up_to(transformer.layers, config.layer, config.name)
            if self.norm_at_end:
                transformer.layer_norm = nn.Identity()
        kernels = [(c.kernel_size, c.stride) for c in convolutions]
        self.width = self.model.encoder.feature_projection.projection.out_features
        shortest = 1
        for size, stride in reversed(kernels):
            shortest = (shortest - 1) * stride + size
        chunk = round(config.chunk_seconds * SAMPLE_RATE)
        # Models that normalise each frame were trained on normalised waves.
        self.processor = WaveProcessor(SAMPLE_RATE, chunk, shortest, kernels, normalize=not over_time)

    def forward(self, audio_RF: Tensor, length_R: Tensor) -> Tensor:
        audio_RF = audio_RF.to(next(self.model.parameters()).dtype)
        if not self.runs_vary:
            return self.states(audio_RF, length_R)
        if audio_RF.is_meta:
            return self.states(audio_RF, None)
        states_RSD = None
        for length in length_R.unique().tolist():
            rows = length_R == length
            own = self.states(audio_RF[rows, :length], None)
            if states_RSD is None:
                states_RSD = own.new_zeros(len(rows), self.processor.states_of(audio_RF.shape[1]), self.width)
            padded = nn.functional.pad(own, (0, 0, 0, states_RSD.shape[1] - own.shape[1]))
            states_RSD = states_RSD.index_copy(0, rows.nonzero()[:, 0], padded)
        return states_RSD

    def states(self, audio_RF: Tensor, length_R: Tensor | None) -> Tensor:
        return self.model(audio_RF, length_R)[0]

    def layers(self) -> list[nn.Module]:
        transformer = self.model.encoder.transformer
        if not self.norm_at_end:
            return list(transformer.layers)
        return [*transformer.layers[:-1], nn.ModuleList([transformer.layers[-1], transformer.layer_norm])]


def make_speech_model(config: SpeechConfig) -> nn.Module:
    """Raises `ConfigError` where torchaudio has no such model or weights, or they do not fit."""
    import torchaudio

    names = [name for name in dir(torchaudio.models) if name.startswith(FAMILIES) and "pretrain" not in name]
    if config.name not in names:
        raise ConfigError(f"torchaudio has no speech model {config.name!r}{did_you_mean(config.name, names)}")
    try:
        make = getattr(torchaudio.models, config.name)
        # A layer that is dropped on one rank alone would leave the others waiting for it.
        model = make(**{"encoder_layer_drop": 0.0} | (config.arguments or {}))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"torchaudio's {config.name} cannot be made: {error}") from error
    model.aux = None  # predicts letters
    if config.pretrained:
        weights = read_speech_weights(config.pretrained)
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise ConfigError(f"the weights {config.pretrained} are not those of {config.name}: {error}") from error
    return model


def read_speech_weights(name: str) -> dict[str, Tensor]:
    """Weights of a bundle of `torchaudio.pipelines`, which is downloaded, or of a file; without what predicts letters."""
    import torchaudio
    from safetensors.torch import load_file

    if Path(name).is_file():
        try:
            weights = load_file(name) if name.endswith(".safetensors") else torch.load(name, "cpu", weights_only=True)
        except Exception as error:  # of torch, pickle or safetensors
            reason = str(error).splitlines()[0]
            raise ConfigError(f"weights {name!r} cannot be loaded: no whole file of a state dict ({reason})") from error
    else:
        bundles = [bundle for bundle in dir(torchaudio.pipelines) if bundle.startswith(tuple(f.upper() for f in FAMILIES))]
        if name not in bundles:
            raise ConfigError(f"torchaudio has no bundle, and there is no file, {name!r}{did_you_mean(name, bundles)}")
        try:
            weights = getattr(torchaudio.pipelines, name).get_model().state_dict()
        except (RuntimeError, OSError) as error:
            raise ConfigError(f"torchaudio's bundle {name} cannot be fetched: {error}") from error
    weights = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    return {name: tensor for name, tensor in weights.items() if not name.startswith("aux.")}
