"""A corpus by path: what is trained on, what is held out, and that nothing is lost between them."""

from __future__ import annotations

import gzip

import pytest

from metalm.data.corpus import PIECE, write_corpus
from metalm.data.shards import list_shards, read_samples
from metalm.errors import DataError


def write(tmp_path, text: str):
    path = tmp_path / "corpus.txt.gz"
    path.write_bytes(gzip.compress(text.encode()))
    return str(path)


def texts(folder) -> list[str]:
    return [sample.text for sample in read_samples(str(folder))]


def test_the_last_documents_are_held_out(tmp_path):
    documents = [f"document number {n}" for n in range(50)]
    write_corpus(write(tmp_path, "\n\n".join(documents)), "document", 0.1, tmp_path / "out")
    assert texts(tmp_path / "out/train") == documents[:45]
    assert texts(tmp_path / "out/val") == documents[45:]
    assert len(list_shards(str(tmp_path / "out/train"))) > 8  # enough for a few readers


def test_a_single_document_is_cut_and_comes_in_pieces(tmp_path):
    whole = "".join(f"line {n}\n" for n in range(30_000))
    write_corpus(write(tmp_path, whole), "file", 0.1, tmp_path / "out")
    train, val = texts(tmp_path / "out/train"), texts(tmp_path / "out/val")
    assert "".join([*train, *val]) == whole.rstrip("\n")
    assert len(train) > 1 and max(map(len, train)) == PIECE
    assert len("".join(val)) == pytest.approx(0.1 * len(whole), abs=2)


def test_nothing_held_out_leaves_no_validation_part(tmp_path):
    write_corpus(write(tmp_path, "a\n\nb"), "document", 0.0, tmp_path / "out")
    assert texts(tmp_path / "out/train") == ["a", "b"] and not (tmp_path / "out/val").exists()


def test_too_little_text_and_no_file(tmp_path):
    with pytest.raises(DataError, match=r"too little text to hold out 10%"):
        write_corpus(write(tmp_path, "a"), "document", 0.1, tmp_path / "out")
    with pytest.raises(DataError, match=r"nowhere\.txt"):
        write_corpus(str(tmp_path / "nowhere.txt"), "document", 0.1, tmp_path / "out")
