"""Encoders of sound: torchaudio's own states and files, chunks of long clips, and learning to hear."""

from __future__ import annotations

import random
import sys

import pytest
import torch
import torchaudio

from benchmarks.families import WAV2VEC2, WAV2VEC2_LARGE, WAVLM, WAVLM_LARGE
from metalm.config import build
from metalm.connectors.base import ConnectorConfig
from metalm.data.audio import encode_wav
from metalm.data.prompts import Interface
from metalm.data.sample import Sample
from metalm.data.shards import write_shards
from metalm.data.stream import DataConfig, PackedStream
from metalm.data.takes import Take, Warp, draw_take
from metalm.data.tokenizer import Tokenizer
from metalm.encoders import ENCODERS
from metalm.encoders.base import Encoder
from metalm.errors import ConfigError

MEL = {"type": "log_mel", "layers": 1, "width": 16, "heads": 2, "sample_rate": 8000}


def make(values: dict) -> Encoder:
    torch.manual_seed(0)
    cls = ENCODERS[values["type"]]
    return cls(build(cls.Config, values, "test")).eval()


def speech(name: str = "wav2vec2_model", shape: dict = WAV2VEC2, **more) -> Encoder:
    return make({"type": "speech", "name": name, "arguments": shape, **more})


def hiss(samples: int, rate: int = 16000) -> bytes:
    return encode_wav(0.1 * torch.randn(samples, generator=torch.Generator().manual_seed(samples)), rate)


@torch.no_grad()
def states(encoder: Encoder, *clips: bytes) -> torch.Tensor:
    """Of all clips, one after another."""
    collated = encoder.processor.collate([encoder.processor.load({"audio": clip}) for clip in clips])
    return encoder(**collated.inputs).flatten(0, 1)[collated.source]


MODELS = [
    ("wav2vec2_model", WAV2VEC2),
    ("wav2vec2_model", WAV2VEC2_LARGE),
    ("wavlm_model", WAVLM),
    ("wavlm_model", WAVLM_LARGE),
]


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("name, shape", MODELS)
def test_states_are_torchaudios(name, shape, layer):
    """Its output, or those of a layer; models that normalise frames get a normalised wave, as its bundles give them."""
    encoder = speech(name, shape, layer=layer)
    torch.manual_seed(0)
    model = getattr(torchaudio.models, name)(**shape).eval()
    wave = encoder.processor.load({"audio": hiss(4000)})["audio"]
    if shape in (WAV2VEC2_LARGE, WAVLM_LARGE):
        assert abs(wave.mean()) < 1e-6 and abs(wave.std() - 1) < 1e-3
    with torch.no_grad():
        expected = model.extract_features(wave[None])[0][layer - 1][0] if layer else model(wave[None])[0][0]
    torch.testing.assert_close(states(encoder, hiss(4000)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["wav2vec2_base", "hubert_base", "wavlm_base"])
def test_the_published_shapes_have_a_state_every_20_ms(name):
    with torch.device("meta"):
        encoder = make({"type": "speech", "name": name})
    assert encoder.width == 768 and len(encoder.layers()) == 12
    assert encoder.processor.states_of(16000) == 49 and encoder.processor.shortest == 400


@pytest.mark.parametrize("form", ["pth", "safetensors"])
def test_files_of_weights_load(tmp_path, form):
    """As torchaudio's bundles are stored; one that was fine-tuned also predicts letters, which is left out."""
    from safetensors.torch import save_file

    torch.manual_seed(1)
    published = torchaudio.models.wav2vec2_model(**WAV2VEC2 | {"aux_num_out": 29}).eval()
    path = tmp_path / f"wav2vec2.{form}"
    torch.save(published.state_dict(), path) if form == "pth" else save_file(published.state_dict(), path)
    loaded = speech(pretrained=str(path))
    own = {name: tensor for name, tensor in published.state_dict().items() if not name.startswith("aux.")}
    assert own.keys() == loaded.model.state_dict().keys()
    assert all(torch.equal(tensor, own[name]) for name, tensor in loaded.model.state_dict().items())


def test_a_long_clip_is_read_in_chunks_each_on_its_own():
    for encoder in (speech(chunk_seconds=0.1), make({**MEL, "sample_rate": 16000, "chunk_seconds": 0.1})):
        chunk = encoder.processor.chunk
        clip = hiss(2 * chunk + chunk // 2)
        together = states(encoder, clip)
        assert len(together) == encoder.processor.num_states({"audio": clip})
        assert len(together) == 2 * encoder.processor.states_of(chunk) + encoder.processor.states_of(chunk // 2)
    encoder, clip = speech(chunk_seconds=0.1), hiss(4000)  # whose wave is cut as it is
    wave = encoder.processor.load({"audio": clip})["audio"]
    with torch.no_grad():
        parts = [encoder.states(part[None], None)[0] for part in wave.split(encoder.processor.chunk)]
    torch.testing.assert_close(states(encoder, clip), torch.cat(parts), rtol=1e-5, atol=1e-5)


def test_loudness_is_no_part_of_the_features_and_the_rate_is_the_encoders():
    encoder = make(MEL)
    wave = 0.3 * torch.sin(2 * torch.pi * 500 * torch.arange(4000) / 8000)
    loud, quiet = (encoder.processor.load({"audio": encode_wav(gain * wave, 8000)})["audio"] for gain in (1.0, 0.5))
    assert (loud - quiet).abs().max() < 0.3 < loud.std()
    assert abs(loud.mean()) < 1e-5 and loud.shape == (50, 80)
    finer = encode_wav(torchaudio.functional.resample(wave, 8000, 48000), 48000)
    assert encoder.processor.num_states({"audio": finer}) == 13 == -(-50 // 4)
    resampled = encoder.processor.load({"audio": finer})["audio"]
    assert (resampled[5:-5].mean(0).argmax() - loud[5:-5].mean(0).argmax()).abs() <= 1


def test_bands_of_mean_0_do_not_hear_a_microphones_colour():
    clip = 0.1 * torch.randn(8000, generator=torch.Generator().manual_seed(0)) * torch.linspace(0, 1, 8000)
    dull = torchaudio.functional.lowpass_biquad(clip, 8000, 1000, 0.3)

    def heard(normalize: str) -> list[torch.Tensor]:
        processor = make({**MEL, "normalize": normalize}).processor
        return [processor.load({"audio": encode_wav(wave, 8000)})["audio"] for wave in (clip, dull)]

    (clear, muffled), (clear_bands, muffled_bands) = heard("clip"), heard("bands")
    assert clear_bands.mean(0).abs().max() < 1e-5 and clear.mean(0).abs().max() > 0.1
    assert (clear_bands - muffled_bands).abs().mean() < 0.5 * (clear - muffled).abs().mean()


def test_what_is_60_db_below_the_loudest_is_silence():
    encoder = make(MEL)
    wave = torch.cat([0.5 * torch.randn(4000, generator=torch.Generator().manual_seed(0)), torch.zeros(4000)])
    noise = 1e-5 * torch.randn(8000, generator=torch.Generator().manual_seed(1))
    silent, hissing = (encoder.processor.load({"audio": encode_wav(x, 8000)})["audio"] for x in (wave, wave + noise))
    assert (silent[60:] - hissing[60:]).abs().max() < 1e-3 < silent.std()


def test_a_view_is_heard_in_training():
    processor = make(MEL).processor
    clip = hiss(8000, 8000)
    plain = processor.load({"audio": clip})
    warped = processor.load({"audio": clip, "view": Take(warp=Warp(0.1, 0.1, 0.1, 0.1, (0.5, 0.2), (0.5, 0.2)))})
    assert plain["audio"].shape == warped["audio"].shape and not torch.equal(plain["audio"], warped["audio"])


@pytest.mark.parametrize("kind", ["log_mel", "speech"])
def test_states_of_a_take_are_counted_as_they_are_made(kind):
    processor = make(MEL).processor if kind == "log_mel" else speech().processor
    for seed in range(20):
        rng = random.Random(seed)
        take = draw_take(0.5, 5.0, 0.2 if processor.warps else 0.0, rng)
        inputs = {"audio": hiss(rng.randrange(800, 20_000)), "view": take}
        loaded = processor.load(inputs)
        assert processor.num_states(inputs) == processor.num_states(loaded) == len(processor.collate([loaded]).source)
        assert not torch.equal(loaded["audio"], processor.load({"audio": inputs["audio"]})["audio"])


def test_gradients_reach_every_weight():
    for encoder in (*(speech(name, shape) for name, shape in MODELS), make(MEL)):
        collated = encoder.processor.collate([encoder.processor.load({"audio": hiss(n)}) for n in (3000, 5000)])
        weights = torch.randn(encoder.width)
        (encoder.train()(**collated.inputs).flatten(0, 1)[collated.source] @ weights).square().sum().backward()
        assert [name for name, parameter in encoder.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize(
    "values, message",
    [
        ({"type": "speech", "name": "wav2vec2_bas"}, "no speech model 'wav2vec2_bas'; did you mean 'wav2vec2_base'"),
        ({"type": "speech", "name": "hubert_base", "pretrained": "HUBERT_BAS"}, "did you mean 'HUBERT_BASE'"),
        ({"type": "speech", "name": "wav2vec2_model", "arguments": {"depth": 1}}, "wav2vec2_model cannot be made: .*'depth'"),
        ({"type": "speech", "name": "wav2vec2_model", "arguments": WAV2VEC2, "layer": 4}, "has 3 layers"),
        ({"type": "speech", "name": "wav2vec2_model", "arguments": WAV2VEC2, "chunk_seconds": 0.001}, "shorter than the 40"),
        ({**MEL, "hop": 0.05}, "at most the window"),
        ({**MEL, "sample_rate": 50, "mels": 1}, "a hop of 0.01 s holds no sample at sample_rate 50, in samples a second"),
        ({**MEL, "mels": 2000}, "mels 2000 are more than the 128 frequencies"),
        ({**MEL, "chunk_seconds": 0}, "chunk_seconds is 0.0, it must be positive"),
        ({**MEL, "relative_bias": True}, "relative_bias is for text"),
        ({**MEL, "positions": "learned", "max_positions": 10}, "more than max_positions"),
    ],
)
def test_what_cannot_be_made_is_said(values, message):
    with pytest.raises(ConfigError, match=message):
        make(values)


@pytest.mark.parametrize("name, shape", MODELS)
def test_models_that_run_once_a_length_are_refused_where_processes_would_hang(name, shape):
    from torch import nn

    from metalm.training.engine import check_runs

    encoder, runs = speech(name, shape), []
    encoder.model.encoder.transformer.layers[0].register_forward_hook(lambda *_: runs.append(1))
    clips = [encoder.processor.load({"audio": hiss(samples)}) for samples in (2000, 3000, 4000)]
    encoder(**encoder.processor.collate(clips).inputs)
    assert len(runs) == (3 if encoder.runs_vary else 1)
    model = nn.ModuleDict({"encoders": nn.ModuleDict({"ear": encoder})})
    for stage, world in ((3, 1), (2, 8)):
        check_runs(model, stage, world)
    if encoder.runs_vary:
        with pytest.raises(ConfigError, match=r"encoders\.ear runs once for each length in a batch.* all 2 processes: .*zero2"):
            check_runs(model, 3, 2)
    else:
        check_runs(model, 3, 2)


@pytest.mark.parametrize("form", ["pth", "safetensors"])
def test_torn_weights_are_named(tmp_path, form):
    (tmp_path / f"torn.{form}").write_text("no weights")
    with pytest.raises(ConfigError, match=rf"torn\.{form}' cannot be loaded: no whole file of a state dict"):
        speech(pretrained=str(tmp_path / f"torn.{form}"))


@torch.no_grad()
def test_without_soundfile_it_is_said_what_to_install(monkeypatch):
    clip, processor = hiss(4000), make(MEL).processor
    monkeypatch.setitem(sys.modules, "soundfile", None)
    for call in (lambda: processor.load({"audio": clip}), lambda: processor.num_states({"audio": clip}), processor.blank):
        with pytest.raises(ConfigError, match="sounds need soundfile and libsndfile: pip install soundfile"):
            call()


def test_weights_of_another_shape_are_refused(tmp_path):
    torch.save(torchaudio.models.wav2vec2_model(**WAV2VEC2 | {"encoder_num_layers": 2}).state_dict(), tmp_path / "two.pth")
    with pytest.raises(ConfigError, match="are not those of wav2vec2_model"):
        speech(pretrained=str(tmp_path / "two.pth"))


def test_waves_are_not_perturbed(tmp_path):
    write_shards([Sample("a", audio=hiss(4000), captions=["hiss"])], tmp_path, samples_per_shard=1)
    source = {"shards": str(tmp_path), "task": "captioning", "perturb": 0.2, "pad": 0.1, "noise": 5}
    data = build(DataConfig, {"train": [source], "workers": 0}, "test")
    for wrong in ({"pad": -1}, {"noise": 61}, {"perturb": 1}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            build(DataConfig, {"train": [source | wrong]}, "test")
    tokenizer = Tokenizer.train(["hiss"], 280)
    for encoder in (make(MEL), speech()):
        interface = Interface(tokenizer, {"ear": encoder.processor}, {"ear": ConnectorConfig("linear")}, 256)
        if encoder.processor.warps:
            assert next(iter(PackedStream(data.train, interface, data))).num_targets > 0
        else:
            with pytest.raises(ConfigError, match="the encoder 'ear' reads waves"):
                PackedStream(data.train, interface, data)
