"""Shards: what is written comes back to the byte, and damage is reported, never passed over in silence."""

from __future__ import annotations

import io
import json
import resource
import tarfile

import pytest
from PIL import Image

from metalm.data.sample import Question, Sample, sample_from_members, sample_to_members
from metalm.data.shards import list_shards, read_samples, read_shard, write_shards
from metalm.errors import DataError


def encode(size=(16, 12), kind="JPEG", color="red") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, color).save(out, kind)
    return out.getvalue()


def captioned(count: int) -> list[Sample]:
    return [Sample(f"s{i}", encode(color=(i, 0, 0)), [f"picture number {i}"]) for i in range(count)]


def read_all(path) -> tuple[list[Sample], list[str]]:
    errors: list[Exception] = []
    samples = [sample for _, sample in read_shard(str(path), on_error=errors.append)]
    return samples, [str(error) for error in errors]


def test_round_trip_is_exact(tmp_path):
    samples = [
        Sample("photo", encode(), ["a red field", "ein rotes Feld, größer als „nichts“"]),
        Sample("drawing", encode(kind="PNG"), questions=[Question("7", "what color?", ["red"] * 9 + ["pink"], type="what")]),
        Sample(
            "web",
            encode(kind="WEBP"),
            ["a field"],
            questions=[Question("8", "why?", soft_answers={"so": 1.0, "": 0.3})],
        ),
        Sample("words", text="One.\n\nTwo. 語"),
        Sample("asked", questions=[Question("9", "what is 2 + 2?", ["4"])]),
    ]
    index = write_shards(samples, tmp_path / "out", samples_per_shard=2, source="test")
    assert index == {"source": "test", "num_samples": 5, "shards": {"000000.tar": 2, "000001.tar": 2, "000002.tar": 1}}
    assert json.loads((tmp_path / "out/index.json").read_text()) == index
    assert list(read_samples(str(tmp_path / "out"))) == samples
    with tarfile.open(tmp_path / "out/000000.tar") as tar:
        assert tar.getnames() == ["photo.jpg", "photo.json", "drawing.json", "drawing.png"]
        assert tar.extractfile("photo.jpg").read() == samples[0].image
    with tarfile.open(tmp_path / "out/000001.tar") as tar:
        assert "web.webp" in tar.getnames()


def test_reading_starts_at_a_sample(tmp_path):
    samples = captioned(5)
    write_shards(samples, tmp_path / "out")
    shard = str(tmp_path / "out/000000.tar")
    assert list(read_shard(shard, start=3)) == [(3, samples[3]), (4, samples[4])]


def test_public_layouts_are_read(tmp_path):
    """An image's .txt is its caption; `caption` may be a string; upper-case extensions count."""
    with tarfile.open(tmp_path / "public.tar", "w") as tar:
        for name, data in [
            ("a.JPG", encode()),
            ("a.txt", b"a red field"),
            ("b.png", encode(kind="PNG")),
            ("b.json", b'{"caption": "red", "questions": [{"id": 3, "question": "color?", "answers": "red"}]}'),
            ("c.txt", b"only words"),
        ]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    first, second, third = read_samples(str(tmp_path / "public.tar"))
    assert (first.key, first.captions) == ("a", ["a red field"])
    assert second.captions == ["red"] and second.questions == [Question("3", "color?", ["red"])]
    assert (third.text, third.image) == ("only words", None)


def test_shards_are_listed_in_order(tmp_path):
    for name in ("000001", "000000"):
        (tmp_path / f"{name}.tar").touch()
    both = [str(tmp_path / "000000.tar"), str(tmp_path / "000001.tar")]
    assert list_shards(str(tmp_path)) == both
    assert list_shards(str(tmp_path / "{000000..000001}.tar")) == both
    assert list_shards(["pipe:cat {0..1}.tar", both[0]]) == ["pipe:cat 0.tar", "pipe:cat 1.tar", both[0]]
    with pytest.raises(DataError, match="does not exist"):
        list_shards(str(tmp_path / "nothing.tar"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no"):
        list_shards(str(tmp_path / "empty"))


def test_a_pipe_is_read_like_a_file(tmp_path):
    write_shards(captioned(3), tmp_path / "out")
    assert list(read_samples(f"pipe:cat {tmp_path}/out/000000.tar")) == captioned(3)


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_a_compressed_tar_is_read_like_a_plain_one(tmp_path, mode):
    write_shards(captioned(3), tmp_path / "out")
    with tarfile.open(tmp_path / "out/000000.tar") as plain, tarfile.open(tmp_path / "packed.tar", mode) as packed:
        for member in plain:
            packed.addfile(member, plain.extractfile(member))
    assert list(read_samples(str(tmp_path / "packed.tar"))) == captioned(3)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_all_forms_of_tars_are_read(tmp_path, form):
    """With long names, which take a record of their own, with folders and links between the members."""
    folder = "f" * 60 + "/" + "g" * 60
    with tarfile.open(tmp_path / "any.tar", "w", format=form) as tar:
        for n in range(3):
            directory = tarfile.TarInfo(f"{folder}/{n}")
            directory.type = tarfile.DIRTYPE
            tar.addfile(directory)
            for extension, data in (("jpg", encode()), ("txt", b"a red field")):
                info = tarfile.TarInfo(f"{folder}/{n}.{extension}")
                info.size, info.mtime = len(data), 1.5 if form == tarfile.PAX_FORMAT else 1
                tar.addfile(info, io.BytesIO(data))
    read = list(read_samples(str(tmp_path / "any.tar")))
    assert [sample.key for sample in read] == [f"{folder}/{n}" for n in range(3)]
    assert all(sample.image == encode() and sample.captions == ["a red field"] for sample in read)
    assert list(read_samples(f"pipe:cat {tmp_path}/any.tar")) == read


def test_no_cut_goes_unnoticed(tmp_path):
    """Wherever a tar is cut, either all samples come or an error, and never a sample that lacks a member."""
    samples = captioned(4)
    write_shards(samples, tmp_path / "out")
    whole = (tmp_path / "out/000000.tar").read_bytes()
    with tarfile.open(tmp_path / "out/000000.tar") as tar:
        last = tar.getmembers()[-1]
        end = last.offset_data + 512
    cut = tmp_path / "cut.tar"
    for length in range(0, end + 1, 256):
        cut.write_bytes(whole[:length])
        read, errors = read_all(cut)
        assert read == samples[: len(read)] and len(read) < 4, length
        assert len(errors) == 1 and "not a complete tar file" in errors[0] and str(cut) in errors[0], length


def test_damage_between_samples_is_reported(tmp_path):
    samples = captioned(4)
    write_shards(samples, tmp_path / "out")
    shard = tmp_path / "out/000000.tar"
    with tarfile.open(shard) as tar:
        offset = tar.getmember("s2.jpg").offset
    # No header any more: tarfile by itself would take this for the end.
    data = bytearray(shard.read_bytes())
    data[offset : offset + 512] = b"\xaa" * 512
    shard.write_bytes(data)
    read, errors = read_all(shard)
    assert read == samples[:1]
    assert f"invalid header at byte {offset:,}" in errors[0]


@pytest.mark.parametrize("content, message", [(b"no tar at all" * 999, "not a complete tar"), (bytes(10240), "empty")])
def test_a_shard_that_is_none_is_reported(tmp_path, content, message):
    (tmp_path / "bad.tar").write_bytes(content)
    assert read_all(tmp_path / "bad.tar")[0] == []
    with pytest.raises(DataError, match=f"bad.tar.*{message}"):
        list(read_samples(str(tmp_path / "bad.tar")))


def test_a_missing_shard_is_reported(tmp_path):
    with pytest.raises(DataError, match=r"gone.tar.*No such file"):
        list(read_shard(str(tmp_path / "gone.tar")))


@pytest.mark.parametrize(
    "annotation, message",
    [
        (b"{", "JSONDecodeError"),
        (b"[]", "AttributeError"),
        (b'{"captions": [1, 2]}', "a string was expected, found 1"),
        (b'{"text": {}}', "a string was expected"),
        (b'{"captions": ["a"], "questions": [{"id": "1"}]}', "question"),
        (b'{"captions": ["a"], "questions": [{"id": "1", "question": "q", "soft_answers": ["x"]}]}', "AttributeError"),
        (b"{}", "neither a picture, a sound or a film nor text"),
    ],
)
def test_a_broken_annotation_names_the_sample(annotation, message):
    with pytest.raises(DataError, match=f"sample 'k': .*{message}"):
        sample_from_members({"__key__": "k", "json": annotation})


def test_what_cannot_be_read_is_not_written(tmp_path):
    with pytest.raises(DataError, match="without dots"):
        sample_to_members(Sample("a.b", text="x"))
    with pytest.raises(DataError, match="sample 'a': neither"):
        sample_to_members(Sample("a"))
    with pytest.raises(DataError, match="two samples have the key 'a'"):
        write_shards([Sample("a", text="x"), Sample("a", text="y")], tmp_path / "twice")
    with pytest.raises(DataError, match="no sample to write"):
        write_shards([], tmp_path / "none")
    write_shards(captioned(1), tmp_path / "out")
    with pytest.raises(DataError, match="already holds shards"):
        write_shards(captioned(1), tmp_path / "out")


def test_a_full_disk_is_a_clear_error(tmp_path):
    """A limit on the size of files stands in for the disk: the system refuses the write in the same way."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(DataError, match=r"writing stopped after [0-9]+ samples .*; free space"):
            write_shards((Sample(f"s{i}", text="word " * 1000) for i in range(100)), tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "out/index.json").exists()
