"""A side in a process of its own: called there, with this process's threads; its processor time is its own."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from benchmarks.apart import Apart
from benchmarks.train_step import seconds


def writer(path: Path, busy: float):
    def step() -> None:
        until = time.process_time() + busy
        while time.process_time() < until:
            pass
        with path.open("a") as file:
            file.write(f"{os.getpid()} {torch.get_num_threads()}\n")

    return step


def breaking():
    def step() -> None:
        raise ValueError("broken")

    return step


def test_each_call_is_one_there_and_its_time_is_counted(tmp_path):
    path, usual = tmp_path / "calls", torch.get_num_threads()
    torch.set_num_threads(3)  # which no process has by itself here
    try:
        with Apart(writer, path, 0.2) as step:
            with pytest.raises(AssertionError, match="a first call warms up"):
                seconds(step, 1)
            step()
            wall, processor = seconds(step, 2)
    finally:
        torch.set_num_threads(usual)
    calls = path.read_text().splitlines()
    assert len(calls) == 3
    assert len(set(calls)) == 1
    process, threads = calls[0].split()
    assert int(process) != os.getpid()
    assert int(threads) == 3
    assert wall >= processor * 0.9
    assert processor >= 0.2
    assert not step.process.is_alive()


def test_a_side_that_breaks_is_an_error_here():
    with Apart(breaking) as step, pytest.raises(RuntimeError, match="the other side's process has ended"):
        step()
