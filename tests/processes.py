"""Starts `training/zero_worker.py` in as many processes as a test wants."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

WORKER = Path(__file__).parent / "training" / "zero_worker.py"
STAGES = ("zero0", "zero1", "zero2", "zero3", "zero2-offload", "zero3-offload")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(world: int, out: Path, stages: tuple[str, ...], gpu: bool = False) -> dict:
    """Runs the worker in `world` processes, on the CPU unless they may have the GPU, and returns what it found."""
    port = str(free_port())
    hidden = {} if gpu else {"CUDA_VISIBLE_DEVICES": ""}
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(out), *stages],
            env=os.environ
            | hidden
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
