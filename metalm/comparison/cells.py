"""The runs of a comparison, side by side: each pretrains, then is judged by every yardstick, by commands of `metalm` itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

from rich.console import Console

from metalm.comparison.config import CompareConfig, folder_name, yardsticks_of
from metalm.comparison.plan import Cell, settings_of
from metalm.errors import ConfigError, TrainingError
from metalm.pretrained import read_model_config
from metalm.registry import did_you_mean

console = Console()


def is_done(config: CompareConfig, cell: Cell) -> bool:
    figures = [cell.folder / f"{folder_name(name)}.json" for name in yardsticks_of(config, cell.candidate)]
    return all(path.exists() for path in [cell.folder / "pretraining/export", *figures])


class Processes:
    """Commands of several threads, each with a log; stopped together."""

    def __init__(self, jobs: int):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.environment = {"OMP_NUM_THREADS": str(max(1, cores // jobs))} | os.environ
        self.running: set[subprocess.Popen] = set()
        self.lock = threading.Lock()
        self.stopped = False

    def run(self, command: list[str], log: Path) -> None:
        """`metalm` with these arguments.

        Raises:
            TrainingError: it failed; with the end of its log.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a") as file:
            with self.lock:
                if self.stopped:
                    raise TrainingError("stopped")
                arguments = [sys.executable, "-m", "metalm", *command]
                process = subprocess.Popen(arguments, stdout=file, stderr=subprocess.STDOUT, env=self.environment)
                self.running.add(process)
            code = process.wait()
            with self.lock:
                self.running.discard(process)
        if code:
            end = "\n  ".join(log.read_text(errors="replace").splitlines()[-5:])
            raise TrainingError(f"metalm {' '.join(command)}\ndid not finish; the end of {log}:\n  {end}")

    def stop(self) -> None:
        """Ends what runs; runs of `metalm train` save a checkpoint first."""
        with self.lock:
            self.stopped = True
            for process in self.running:
                process.terminate()


def run_cells(config: CompareConfig, cells: list[Cell]) -> None:
    processes = Processes(config.jobs)
    with ThreadPoolExecutor(config.jobs) as pool:
        futures = [pool.submit(run_cell, config, cell, processes) for cell in cells]
        try:
            finished, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in finished:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            processes.stop()
            raise


def run_cell(config: CompareConfig, cell: Cell, processes: Processes) -> None:
    """Pretrains, and judges by every yardstick."""
    out, name, pretraining = Path(config.out), f"{cell.candidate}, seed {cell.seed}", cell.folder / "pretraining"
    candidate = config.candidates[cell.candidate]
    if not (pretraining / "export").exists():
        console.print(f"{name}: {cell.steps:,} steps", highlight=False)
        length = [f"training.steps={cell.steps}", f"training.validate_every={cell.steps}", f"training.seed={cell.seed}"]
        settings = [*settings_of(config, candidate, out), *length, f"out={pretraining}"]
        processes.run(["train", candidate.config, *settings], cell.folder / "pretraining.log")
    for title, yardstick in yardsticks_of(config, cell.candidate).items():
        path = cell.folder / f"{folder_name(title)}.json"
        if path.exists():
            continue
        model = pretraining
        if yardstick.config:
            model = path.with_suffix("")
            settings = [*yardstick.settings, f"training.seed={cell.seed}", f"out={model}", encoder_of(pretraining)]
            if not (model / "export").exists():
                processes.run(["train", yardstick.config, *settings], path.with_suffix(".log"))
        data = yardstick.data or str(out / ("holes.jsonl" if yardstick.task == "infilling" else "corpus/val"))
        command = ["evaluate", yardstick.task, "--model", str(model), "--data", data, "--out", str(path), *yardstick.options]
        processes.run(command, path.with_suffix(".log"))
        console.print(f"{name}: {title} {read_metric(path, yardstick.metric):.4g}", highlight=False)


def encoder_of(run: Path) -> str:
    """The setting by which a head reads a run: its encoder of text or, where it has none, its decoder."""
    model = read_model_config(run)
    if "encoder" in model or "text" in model.get("encoders", {}):
        return f"model.encoder={{init_from: {run}}}"
    return f"model.encoder={{type: causal, init_from: {run}}}"


def read_metric(path: Path, metric: str) -> float:
    """Raises `ConfigError` where the evaluation has no such metric."""
    metrics = json.loads(path.read_text())["metrics"]
    if metric not in metrics:
        raise ConfigError(f"{path} has no metric {metric!r}{did_you_mean(metric, list(metrics))}")
    return metrics[metric]
