"""Where DeepSpeed's extensions are built, and locks that a killed build left."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from metalm.training.extensions import STALE, prepare_extensions


def test_each_environment_has_a_folder_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "whatever it was, so that it is put back")
    folders = set()
    for prefix in ("/one", "/other", "/one"):
        del os.environ["TORCH_EXTENSIONS_DIR"]
        monkeypatch.setattr(sys, "prefix", prefix)
        assert prepare_extensions() == []
        folders.add(os.environ["TORCH_EXTENSIONS_DIR"])
    assert len(folders) == 2 and all(Path(folder).is_relative_to(tmp_path) for folder in folders)


def test_a_folder_that_was_named_stays_as_it_is(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "lock"
    lock.touch()
    os.utime(lock, (0, 0))
    assert prepare_extensions() == [] and lock.exists()
    assert os.environ["TORCH_EXTENSIONS_DIR"] == str(tmp_path)


def test_old_locks_go_and_new_ones_stay(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "whatever it was, so that it is put back")
    del os.environ["TORCH_EXTENSIONS_DIR"]
    prepare_extensions()
    folder = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    old, new = (folder / "py311" / name / "lock" for name in ("old", "new"))
    for lock in (old, new):
        lock.parent.mkdir(parents=True)
        lock.touch()
    long_ago = int(time.time()) - STALE - 60
    os.utime(old, (long_ago, long_ago))
    messages = prepare_extensions()
    assert not old.exists() and new.exists()
    assert len(messages) == 1 and messages[0].startswith(f"removed {old}")
