"""The lint of shards: every kind of damage is found, named, and told apart from what is merely odd."""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from rich.console import Console

from metalm.data.check import CheckReport, check_shards
from metalm.data.sample import Question, Sample
from metalm.data.shards import write_shards
from metalm.encoders.video import black_film
from metalm.errors import DataError


def jpeg(width=32, height=24) -> bytes:
    out = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(out, "JPEG")
    return out.getvalue()


def flac(wave_T: torch.Tensor) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, wave_T.numpy(), 8000, format="FLAC")
    return out.getvalue()


def write_tar(path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def findings(report: CheckReport) -> dict[str, str]:
    return {finding.key: finding.reason for finding in report.problems}


def render(report: CheckReport) -> str:
    console = Console(file=io.StringIO(), width=300)
    console.print(report.render())
    return console.file.getvalue()


def test_a_sound_data_set(tmp_path):
    samples = [Sample(f"i{n}", jpeg(32 + n, 24), ["two words", "now three words"]) for n in range(5)]
    samples += [Sample("t", text="words"), Sample("q", jpeg(), questions=[Question("1", "what?", ["this"])] * 2)]
    write_shards(samples, tmp_path / "out", samples_per_shard=2)
    report = check_shards(str(tmp_path / "out"), ranks=2, workers=2)
    assert report.ok and not report.oddities
    counts = (report.shards, report.samples, report.images, report.captions, report.texts, report.questions)
    assert counts == (4, 7, 6, 10, 1, 2)
    assert (report.image_width.min, report.image_width.median, report.image_width.max) == (32, 33.5, 36)
    assert (report.caption_words.min, report.caption_words.median, report.caption_words.max) == (2, 2.5, 3)
    assert report.image_bytes.max == max(len(sample.image) for sample in samples if sample.image)
    text = render(report)
    assert "no problem found; enough shards for 2 ranks x 2 workers" in text
    assert "32 / 34 / 36" in text


def test_broken_samples_are_named(tmp_path):
    whole = jpeg()
    write_tar(
        tmp_path / "bad.tar",
        {
            "cut.jpg": whole[: len(whole) // 2],
            "cut.txt": b"a caption",
            "noise.jpg": b"\xff\xd8 no picture",
            "noise.txt": b"a caption",
            "mute.jpg": whole,
            "mute.json": b"{}",
            "blank.jpg": whole,
            "blank.json": json.dumps({"captions": ["fine", " "]}).encode(),
            "torn.jpg": whole,
            "torn.json": b'{"captions": [',
            "void.json": b"{}",
            "fine.jpg": whole,
            "fine.txt": b"a caption",
        },
    )
    report = check_shards(str(tmp_path / "bad.tar"))
    found = findings(report)
    assert not report.ok and report.samples == 7
    assert found.keys() == {"cut", "noise", "mute", "blank", "torn", "void"}
    assert "does not decode" in found["cut"] and "truncated" in found["cut"].lower()
    assert "does not decode" in found["noise"]
    assert "no text" in found["mute"]
    assert "a caption is empty" in found["blank"]
    assert "unreadable annotation" in found["torn"]
    assert "neither a picture, a sound or a film nor text" in found["void"]
    assert f"{tmp_path}/bad.tar: sample 'torn'" in render(report)


def test_sounds_films_and_further_pictures_are_opened(tmp_path):
    sound, film = flac(torch.rand(12_000)), black_film()
    whole = [
        Sample("heard", audio=sound, captions=["a tone"]),
        Sample("seen", video=film, captions=["a film"]),
        Sample("two", jpeg(), ["two pictures"], more_images=[jpeg()]),
    ]
    write_shards(whole, tmp_path / "whole", samples_per_shard=2)
    report = check_shards(str(tmp_path / "whole"))
    assert report.ok and (report.images, report.sounds, report.films) == (2, 1, 1)
    assert report.sound_seconds.max == 1.5 and "sound seconds" in render(report)
    torn = [
        Sample("heard", audio=sound[: len(sound) // 2], captions=["a tone"]),
        Sample("seen", video=film[: len(film) // 2], captions=["a film"]),
        Sample("two", jpeg(), ["two pictures"], more_images=[jpeg()[:200]]),
    ]
    write_shards(torn, tmp_path / "torn", samples_per_shard=2)
    found = findings(check_shards(str(tmp_path / "torn")))
    assert "sound" in found["heard"]
    assert "film" in found["seen"] and "does not decode" in found["two"]


@pytest.mark.parametrize("size, word", [((1, 1), "tiny"), ((20_000, 20), "very long")])
def test_extreme_pictures_are_odd_but_no_problem(tmp_path, size, word):
    write_shards([Sample("x", jpeg(*size), ["a caption"])], tmp_path / "out")
    report = check_shards(str(tmp_path / "out"))
    assert report.ok and (report.image_width.max, report.image_height.max) == size
    assert [(finding.key, word in finding.reason) for finding in report.oddities] == [("x", True)]


def test_a_question_without_answers_is_odd(tmp_path):
    write_shards([Sample("x", jpeg(), questions=[Question("12", "what?")])], tmp_path / "out")
    report = check_shards(str(tmp_path / "out"))
    assert report.ok and "question '12' has no answer" in report.oddities[0].reason


def test_broken_shards_are_named(tmp_path):
    write_shards([Sample(f"k{n}", jpeg(), ["a caption"]) for n in range(4)], tmp_path / "out", samples_per_shard=1)
    whole = (tmp_path / "out/000000.tar").read_bytes()
    (tmp_path / "out/000001.tar").write_bytes(b"no tar" * 200)
    (tmp_path / "out/000002.tar").write_bytes(bytes(10240))
    (tmp_path / "out/000003.tar").write_bytes(whole[: len(whole) // 4])
    report = check_shards(str(tmp_path / "out"))
    by_shard: dict[str, list[str]] = {}
    for finding in report.problems:
        by_shard.setdefault(finding.where.rpartition("/")[2], []).append(finding.reason)
    assert report.samples == 1
    assert "not a complete tar" in by_shard["000001.tar"][0]
    assert "empty" in by_shard["000002.tar"][0]
    assert "0 samples, but index.json says 1" in by_shard["000002.tar"][1]
    assert "000000.tar" not in by_shard


def test_a_tar_cut_between_samples_is_no_shorter_tar(tmp_path):
    write_shards([Sample(f"k{n}", jpeg(), ["a caption"]) for n in range(4)], tmp_path / "out")
    shard = tmp_path / "out/000000.tar"
    with tarfile.open(shard) as tar:
        offset = tar.getmember("k2.jpg").offset
    shard.write_bytes(shard.read_bytes()[:offset])
    reasons = [finding.reason for finding in check_shards(str(tmp_path / "out")).problems]
    assert f"not a complete tar file (empty header at byte {offset:,})" in reasons[0]
    assert "1 samples, but index.json says 4" in reasons[1]
    (tmp_path / "out/index.json").unlink()
    report = check_shards(str(tmp_path / "out"))
    assert [finding.reason for finding in report.problems] == reasons[:1]
    assert "no index.json" in report.oddities[0].reason


def test_keys_used_twice(tmp_path):
    write_shards([Sample("a", text="x"), Sample("b", text="y")], tmp_path / "one")
    write_shards([Sample("c", text="x"), Sample("a", text="z")], tmp_path / "two")
    report = check_shards([str(tmp_path / "one"), str(tmp_path / "two")])
    assert [(f.key, f.where) for f in report.problems] == [("a", str(tmp_path / "two/000000.tar"))]
    assert f"also in {tmp_path / 'one/000000.tar'}" in report.problems[0].reason


def test_an_index_that_does_not_fit(tmp_path):
    out = tmp_path / "out"
    write_shards([Sample(f"k{n}", text="x") for n in range(6)], out, samples_per_shard=2)
    (out / "000002.tar").rename(out / "000009.tar")
    index = json.loads((out / "index.json").read_text())
    index["shards"]["000000.tar"] = 5
    (out / "index.json").write_text(json.dumps(index))
    reasons = [finding.reason for finding in check_shards(str(out)).problems]
    assert reasons == [
        "2 samples, but index.json says 5; write the data again",
        "lists 000002.tar, which is missing; write the data again",
        "does not list 000009.tar: is it a shard of other data?",
    ]
    (out / "index.json").write_text("[]")
    assert "not an index" in check_shards(str(out)).problems[0].reason


@pytest.mark.parametrize(
    "ranks, workers, remedy",
    [
        (1, 3, None),
        (2, 2, "need 4: write them again with at most 2 samples a shard"),
        (4, 4, "only 9 samples, so take fewer"),
    ],
)
def test_enough_shards_for_the_processes(tmp_path, ranks, workers, remedy):
    write_shards([Sample(f"k{n}", text="x") for n in range(9)], tmp_path / "out", samples_per_shard=3)
    report = check_shards(str(tmp_path / "out"), ranks, workers)
    if remedy is None:
        assert report.ok
        return
    assert len(report.problems) == 1 and remedy in report.problems[0].reason
    assert "3 shards for" in report.problems[0].reason


def test_the_remedy_for_too_few_shards_works(tmp_path):
    samples = [Sample(f"k{n}", text="x") for n in range(9)]
    write_shards(samples, tmp_path / "out", samples_per_shard=2)
    assert check_shards(str(tmp_path / "out"), ranks=2, workers=2).ok


def test_long_lists_of_problems_are_shortened_in_print_only(tmp_path):
    write_tar(tmp_path / "bad.tar", {f"k{n}.json": b"{" for n in range(30)})
    report = check_shards(str(tmp_path / "bad.tar"))
    assert len(report.problems) == 30
    text = render(report)
    assert "problems (30):" in text and "… and 10 more" in text and "'k19'" in text and "'k20'" not in text


def test_no_shards_at_all(tmp_path):
    with pytest.raises(DataError, match="holds no"):
        check_shards(str(tmp_path))
