"""DeepSpeed over processes: every ZeRO stage trains as one process does, mixed modalities never hang."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("zero_worker.py")
STAGES = ("zero0", "zero1", "zero2", "zero3", "zero2-offload", "zero3-offload")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(world: int, out: Path, stages: tuple[str, ...]) -> dict:
    port = str(free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(out), *stages],
            env=os.environ
            | {"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(world)}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for r in range(world)
    ]
    outputs = []
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(outputs)[-3000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> dict:
    return launch(1, tmp_path_factory.mktemp("zero") / "one.json", STAGES[:1])["zero0"]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> dict:
    return launch(2, tmp_path_factory.mktemp("zero") / "two.json", STAGES)


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_train_as_one_does_although_one_has_images_and_the_other_only_text(stage, one_process, two_processes):
    assert two_processes[stage]["targets"] == one_process["targets"]
    assert two_processes[stage]["losses"] == pytest.approx(one_process["losses"], rel=1e-5)
    assert one_process["losses"][-1] < one_process["losses"][0] - 0.1


@pytest.mark.parametrize("stage", STAGES)
def test_whole_weights_are_gathered_and_equal(stage, one_process, two_processes):
    assert two_processes[stage]["whole"]
    assert two_processes[stage]["weights"] == pytest.approx(one_process["weights"], rel=1e-5)
