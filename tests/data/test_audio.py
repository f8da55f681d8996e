"""Sounds: decoding, resampling, samples in shards, the importer, and the views that training hears."""

from __future__ import annotations

import io
import json
import random
import zipfile

import numpy as np
import pytest
import soundfile
import torch

from metalm.data.audio import decode_audio, encode_wav, num_samples
from metalm.data.importers import import_dataset
from metalm.data.sample import Sample, extension_of, sample_from_members, sample_to_members
from metalm.data.shards import read_samples, write_shards
from metalm.data.takes import QUIET, Noise, Take, Warp, draw_take, warp_features
from metalm.errors import DataError


def tone(seconds: float, rate: int = 8000, pitch: float = 440.0) -> torch.Tensor:
    return 0.5 * torch.sin(2 * torch.pi * pitch * torch.arange(round(seconds * rate)) / rate)


def encode(wave: np.ndarray, rate: int, kind: str) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, wave, rate, format=kind)
    return out.getvalue()


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3"])
@pytest.mark.parametrize("rate", [8000, 16000, 44100])
def test_every_format_gives_the_tone_at_the_rate_that_is_asked_for(kind, rate):
    encoded = encode(tone(0.5, rate).numpy(), rate, kind)
    wave = decode_audio(encoded, 16000)
    assert wave.dtype == torch.float32 and wave.ndim == 1
    assert len(wave) == num_samples(encoded, 16000) and abs(len(wave) - 8000) < 2500  # MP3 adds silence
    spectrum = torch.fft.rfft(wave * torch.hann_window(len(wave))).abs()
    assert abs(spectrum.argmax() * 16000 / len(wave) - 440) < 5


@pytest.mark.parametrize("frames", [1, 7, 799, 8000, 12345])
@pytest.mark.parametrize("rates", [(8000, 16000), (44100, 16000), (16000, 16000), (22050, 8000)])
def test_the_number_of_samples_is_known_from_the_header(frames, rates):
    encoded = encode_wav(torch.zeros(frames), rates[0])
    assert num_samples(encoded, rates[1]) == len(decode_audio(encoded, rates[1]))


def test_channels_are_averaged():
    left = tone(0.1).numpy()
    wave = decode_audio(encode(np.stack([left, -left], axis=1), 8000, "FLAC"), 8000)
    assert wave.abs().max() < 1e-4


@pytest.mark.parametrize("broken", [b"", b"RIFF", b"no sound at all", encode_wav(torch.zeros(0), 8000)])
def test_what_is_no_sound_is_said(broken):
    for read in (decode_audio, num_samples):
        with pytest.raises(DataError, match=r"not a complete sound|without samples"):
            read(broken, 16000)


def test_media_survive_the_shard(tmp_path):
    jpeg, wav, film = b"\xff\xd8\xff\xe0jpeg", encode_wav(tone(0.1), 8000), b"\0\0\0\x18ftypisom film"
    samples = [
        Sample("said", captions=["seven"], audio=wav),
        Sample("album", jpeg, ["two dogs"], more_images=[b"\x89PNG more", jpeg]),
        Sample("film", captions=["a dog runs"], video=film),
        Sample("ten", jpeg, ["many"], more_images=[jpeg + bytes([n]) for n in range(11)]),
    ]
    write_shards(samples, tmp_path / "shards")
    read = {sample.key: sample for sample in read_samples(str(tmp_path / "shards"))}
    assert [read[sample.key] for sample in samples] == samples
    assert [kind for kind, _ in read["album"].media] == ["image"] * 3
    assert read["said"].media == [("audio", wav)] and read["film"].media == [("video", film)]


def test_the_text_beside_a_sound_is_its_caption():
    wav = encode_wav(tone(0.1), 8000)
    assert sample_from_members({"__key__": "a", "wav": wav, "txt": b"seven"}).captions == ["seven"]
    assert list(sample_to_members(Sample("a", audio=encode(tone(0.1).numpy(), 8000, "OGG")))) == ["__key__", "ogg", "json"]


def test_sounds_and_films_of_unknown_formats_are_refused():
    aiff = encode(tone(0.1).numpy(), 8000, "AIFF")
    for sample in (Sample("a", audio=aiff), Sample("a", video=aiff)):
        with pytest.raises(DataError, match=r"'a': its (audio|video) is of no known format"):
            sample_to_members(sample)


def test_a_sound_that_breaks_off_is_no_surprise_to_the_model():
    from metalm.config import build
    from metalm.encoders import ENCODERS

    whole = encode(tone(3.0).numpy(), 8000, "MP3")
    values = {"type": "log_mel", "layers": 1, "width": 8, "heads": 1, "sample_rate": 8000}
    processor = ENCODERS["log_mel"](build(ENCODERS["log_mel"].Config, values, "test")).processor
    assert processor.load({"audio": whole})["samples"] == num_samples(whole, 8000)
    with pytest.raises(DataError, match="breaks off"):
        processor.load({"audio": whole[: len(whole) // 2]})


@pytest.mark.parametrize(
    "data, extension",
    [
        (encode(tone(0.1).numpy(), 8000, "FLAC"), "flac"),
        (encode(tone(0.1).numpy(), 8000, "MP3"), "mp3"),
        (b"RIFF\0\0\0\0AVI ", "avi"),
        (b"RIFF\0\0\0\0WEBP", "webp"),
        (b"\0\0\0\x14ftypqt  ", "mov"),
        (b"\x1aE\xdf\xa3....webm", "webm"),
        (b"\x1aE\xdf\xa3....matroska", "mkv"),
        (b"\xff\xd8\xff\xe0", "jpg"),
    ],
)
def test_formats_are_told_by_their_first_bytes(data, extension):
    assert extension_of(data) == extension


@pytest.fixture
def digits(tmp_path):
    """Six clips of two speakers, as JSON Lines and a zip."""
    rows = []
    with zipfile.ZipFile(tmp_path / "audio.zip", "w") as archive:
        for speaker in ("ann", "bob"):
            for digit, word in enumerate(("zero", "one", "two")):
                name = f"{digit}_{speaker}.wav"
                archive.writestr(name, encode_wav(tone(0.1 * (digit + 1)), 8000))
                rows.append({"audio": name, "text": word, "speaker": speaker, "digit": digit})
    (tmp_path / "labels.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {"annotations": tmp_path / "labels.jsonl", "audio": tmp_path / "audio.zip"}


def test_sounds_are_chosen_by_their_columns(digits):
    everything = {sample.key: sample for sample in import_dataset("sounds", **digits)}
    assert {key: sample.captions for key, sample in everything.items()} == {
        f"{digit}_{speaker}": [word] for speaker in ("ann", "bob") for digit, word in enumerate(("zero", "one", "two"))
    }
    assert len(decode_audio(everything["1_ann"].audio, 8000)) == 1600
    without = list(import_dataset("sounds", **digits, where="speaker!=ann, digit!=0"))
    assert sorted(sample.key for sample in without) == ["1_bob", "2_bob"]
    assert [s.key for s in import_dataset("sounds", **digits, where="speaker=ann,digit=2")] == ["2_ann"]


def test_a_sorted_list_of_sounds_is_shuffled_the_same_way_each_time(digits):
    orders = [[sample.key for sample in import_dataset("sounds", **digits, seed=seed)] for seed in ("0", "0", "1")]
    assert orders[0] == orders[1] != orders[2] and sorted(orders[0]) == sorted(orders[2])
    assert all(order != sorted(order) for order in orders)


def test_sounds_are_joined_to_sequences(digits):
    options = digits | {"join": "2-4", "count": "30", "gap": "0.05", "sample_rate": "8000", "same": "speaker"}
    samples = list(import_dataset("sounds", **options, text_column="text"))
    lengths = {"zero": 800, "one": 1600, "two": 2400}
    for sample in samples:
        words = sample.captions[0].split()
        assert 2 <= len(words) <= 4
        assert len(decode_audio(sample.audio, 8000)) == sum(lengths[word] for word in words) + 400 * (len(words) - 1)
    assert len(samples) == 30 and len({sample.captions[0] for sample in samples}) > 10
    assert samples == list(import_dataset("sounds", **options))
    assert samples != list(import_dataset("sounds", **options, seed="1"))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"where": "speaker=carl"}, "none of its 6 rows meets 'speaker=carl'"),
        ({"where": "age=7"}, "line 1: no column 'age' to choose by"),
        ({"where": "speaker"}, "'speaker' is not written column=value"),
        ({"join": "5-2"}, "'5-2' is no range"),
        ({"text_column": "words"}, "line 1: it needs a sound in the column 'audio' and a text in words"),
        ({"audio_column": "file"}, "line 1: it needs a sound in the column 'file'"),
        ({"join": "2", "same": "age"}, "same 'age'"),
    ],
)
def test_what_is_wrong_with_an_import_is_said(digits, options, message):
    with pytest.raises(DataError, match=message):
        list(import_dataset("sounds", **digits, **options))


def test_missing_sounds_are_named_or_skipped(digits, tmp_path):
    rows = digits["annotations"].read_text().replace("1_ann.wav", "9_ann.wav")
    digits["annotations"].write_text(rows)
    with pytest.raises(DataError, match=r"sound '9_ann\.wav' is not in"):
        list(import_dataset("sounds", **digits))
    assert len(list(import_dataset("sounds", **digits, skip_missing=True))) == 5
    joined = list(import_dataset("sounds", **digits, skip_missing=True, join="1-2", where="speaker=ann", count=20))
    assert not any("one" in sample.captions[0] for sample in joined)


def test_a_warp_of_nothing_changes_nothing_and_others_keep_the_length():
    log_FM = torch.randn(37, 20, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(warp_features(log_FM, Warp(0, 0, 0, 0, (0.5, 0), (0.5, 0))), log_FM)
    rng = random.Random(0)
    changed = [warp_features(log_FM, draw_take(0, None, 0.3, rng).warp) for _ in range(50)]
    assert all(one.shape == log_FM.shape and one.isfinite().all() for one in changed)
    assert all((one - log_FM).abs().max() > 0.1 for one in changed)
    assert warp_features(log_FM[:1], draw_take(0, None, 0.3, rng).warp).shape == (1, 20)


def test_a_warp_bends_time_and_frequency():
    frames = torch.arange(101.0)[:, None].expand(101, 10).clone()
    late = warp_features(frames, Warp(0, 0, 0.2, 0, (0.5, 0), (0.5, 0)))[:, 0]
    assert (late[0], late[50], late[100]) == (0, 60, 100)
    fast = warp_features(frames, Warp(0, 0.2, 0, 0, (0.5, 0), (0.5, 0)))[:, 0]
    assert (fast[50], fast[60], fast[40], fast[100]) == (50, 62, 38, 100)
    tilted = warp_features(torch.eye(11), Warp(0, 0, 0, 0.4, (0.5, 0), (0.5, 0)))
    torch.testing.assert_close(tilted - torch.eye(11), torch.linspace(-0.2, 0.2, 11).expand(11, 11))
    bands = torch.arange(50.0).expand(3, 50).clone()
    higher = warp_features(bands, Warp(0.2, 0, 0, 0, (0.5, 0), (0.5, 0)))[0]
    assert higher[10] == 12 and higher[-1] == 49
    gaps = warp_features(torch.ones(40, 40) + torch.eye(40), Warp(0, 0, 0, 0, (0.5, 0.25), (0.25, 0.5)))
    assert (gaps[:20] == 1).all() and (gaps[:, 15:25] == 1).all() and gaps[30, 30] == 2


def sine(hertz: float, samples: int = 8000) -> torch.Tensor:
    return torch.sin(2 * torch.pi * hertz * torch.arange(samples) / 8000)


def test_a_take_puts_silence_around_a_sound_and_counts_it():
    take = Take(before=0.1, after=0.25)
    recorded = take.record(sine(440), 8000)
    assert len(recorded) == take.samples(8000, 8000) == 8000 + 800 + 2000
    assert torch.equal(recorded[800:8800], sine(440)) and not recorded[:800].any() and not recorded[8800:].any()


@pytest.mark.parametrize("decibels", [0, 20, 40])
def test_noise_is_so_many_decibels_below_the_loudest_tenth(decibels):
    wave = torch.cat([sine(440), torch.zeros(72_000)])  # a tenth is loud: the mean of its size is 2 / pi
    noise = Noise(decibels, 0.0, 3).over(wave) - wave
    assert 20 * torch.log10(2 / torch.pi / noise.square().mean().sqrt()) == pytest.approx(decibels, abs=0.01)


def test_noise_has_its_color_and_its_seed():
    def slope(color: float) -> float:
        power = torch.fft.rfft(Noise(0, color, 5).over(sine(440, 80_000)) - sine(440, 80_000)).abs().square()
        return (10 * torch.log10(power[20_000:40_000].mean() / power[10_000:20_000].mean())).item()

    assert [slope(color) for color in (-1, 0, 1)] == pytest.approx([-6.02, 0, 6.02], abs=0.3)  # decibels an octave
    wave = sine(300)
    assert torch.equal(Noise(5, 0.3, 1).over(wave), Noise(5, 0.3, 1).over(wave))
    assert not torch.equal(Noise(5, 0.3, 1).over(wave), Noise(5, 0.3, 2).over(wave))
    for samples in (1, 2, 3):
        assert Noise(5, -0.5, 1).over(sine(440, samples)).isfinite().all()


def test_takes_are_drawn_within_what_is_asked():
    takes = [draw_take(0.2, 5.0, 0.1, random.Random(seed)) for seed in range(200)]
    assert 0 <= min(take.before for take in takes) < 0.01 and 0.19 < max(take.after for take in takes) <= 0.2
    assert 5 <= min(take.noise.decibels for take in takes) < 10 and 55 < max(take.noise.decibels for take in takes) <= QUIET
    assert max(abs(take.warp.pitch) for take in takes) <= 0.1
    assert draw_take(0.2, None, 0, random.Random(0)).noise is None and draw_take(0, 5, 0, random.Random(0)).warp is None
