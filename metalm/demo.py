"""`metalm demo`: the main job from nothing to a report, on the embedded world.

    scenes -> pretrain -> VQA zero-shot (and blind) -> fine-tune for captioning -> evaluate -> report.html, summary.json

Every stage that already left its result in the folder is skipped, and training resumes, so a demo that was stopped is
finished by the same command.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from metalm.data.scenes import HELD_OUT, write_scenes
from metalm.data.shards import read_samples
from metalm.errors import TrainingError
from metalm.evaluation.captioning import evaluate_captioning
from metalm.evaluation.predictor import Predictor
from metalm.evaluation.report import Table as ReportTable
from metalm.evaluation.report import Text as ReportText
from metalm.evaluation.report import caption_gallery, loss_curve, vqa_gallery, write_report
from metalm.evaluation.vqa import evaluate_vqa
from metalm.inference.generate import GenerationConfig
from metalm.training.config import load_run_config

console = Console()
MAX_PROCESSES = 8  # the captioning set has so many shards
STOPS = (signal.SIGINT, signal.SIGTERM)


def run_demo(out: Path, seed: int = 0) -> dict:
    """Runs all stages below `out`; returns what `summary.json` holds."""
    scenes, pretrained, captioner = out / "scenes", out / "pretrain", out / "captioning"
    variables = [f"variables.scenes={scenes}", f"training.seed={seed}"]
    seconds: dict[str, float] = {}

    def stage(name: str, work: Callable[[], None], result: Path) -> None:
        if result.exists():
            console.print(f"[bold]{name}[/bold]: done before ({result})")
            return
        console.rule(name)
        started = time.monotonic()
        work()
        seconds[name] = round(time.monotonic() - started, 1)

    def pretrain() -> None:
        train("demo/pretrain.yaml", *variables, f"out={pretrained}")

    def finetune() -> None:
        train("demo/captioning.yaml", *variables, f"out={captioner}", f"init_from={pretrained}")

    def vqa() -> None:
        predictor = Predictor.load(pretrained, GenerationConfig(max_new_tokens=8))
        for name, blind in (("vqa", False), ("vqa-blind", True)):
            evaluate_vqa(predictor, str(scenes / "vqa"), str(pretrained), blind=blind).write(out / f"{name}.json")

    def captioning() -> None:
        predictor = Predictor.load(captioner, GenerationConfig(max_new_tokens=48))
        result = evaluate_captioning(predictor, str(scenes / "captioning-val"), str(captioner))
        result.write(out / "captioning.json")

    stage("data", lambda: write_scenes(scenes, seed), scenes / "captioning-val" / "index.json")
    stage("pretraining", pretrain, pretrained / "export")
    stage("zero-shot VQA", vqa, out / "vqa-blind.json")
    stage("fine-tuning for captioning", finetune, captioner / "export")
    stage("captioning", captioning, out / "captioning.json")
    summary = summarize(out, seconds)
    (out / "summary.json").write_text(json.dumps(summary, indent=1))
    report = report_demo(out, summary)
    print_summary(summary)
    console.print(f"report: {report}", highlight=False)
    return summary


def train(config: str, *overrides: str) -> None:
    """`metalm train` in processes of its own, one a GPU. Without a GPU there are two, with half the cores each: small matrices
    do not keep many threads busy.

    Raises:
        TrainingError: it did not finish, for a reason that it has printed.
    """
    rows = load_run_config(config, [*overrides]).data.rows
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = min(torch.cuda.device_count(), MAX_PROCESSES) if torch.cuda.is_available() else min(2, cores)
    processes = max(n for n in range(1, limit + 1) if rows % n == 0)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*launcher, "-m", "metalm", "train", config, *overrides, f"data.rows={rows // processes}"]
    threads = {"OMP_NUM_THREADS": str(max(1, cores // processes))} | os.environ
    console.print(" ".join([f"OMP_NUM_THREADS={threads['OMP_NUM_THREADS']}", *command]), style="dim", highlight=False)
    process = subprocess.Popen(command, env=threads, start_new_session=True)  # signals come through us alone, once
    before = {number: signal.signal(number, lambda *_: process.send_signal(signal.SIGINT)) for number in STOPS}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait()
    if code:
        raise TrainingError("training did not finish, see above; if it was interrupted, the same command goes on")


def summarize(out: Path, seconds: dict[str, float]) -> dict:
    """`vqa_zero_shot`, `captioning` and `seconds`, from the files that the stages left."""
    vqa, blind, captioning = (read_json(out / f"{name}.json")["metrics"] for name in ("vqa", "vqa-blind", "captioning"))
    path = out / "summary.json"
    before = read_json(path)["seconds"] if path.exists() else {}
    prefix = "accuracy/"
    return {
        "vqa_zero_shot": {
            "accuracy": vqa["accuracy"],
            "by_type": {name.removeprefix(prefix): value for name, value in vqa.items() if name.startswith(prefix)},
            "blind": blind["accuracy"],
            "blind_by_type": {n.removeprefix(prefix): value for n, value in blind.items() if n.startswith(prefix)},
            "majority": vqa["majority"],
        },
        "captioning": {"cider": captioning["cider"], "exact_match": captioning["exact_match"]},
        "seconds": before | seconds,
    }


def summary_rows(summary: dict) -> list[tuple[str, str]]:
    """The summary as lines of (what, figure)."""
    vqa, captioning = summary["vqa_zero_shot"], summary["captioning"]
    rows = [("VQA zero-shot, all questions", f"{100 * vqa['accuracy']:.1f} %")]
    for name, value in vqa["by_type"].items():
        rows.append((f"  {name} (blind)", f"{100 * value:.1f} % ({100 * vqa['blind_by_type'][name]:.1f} %)"))
    rows += [
        ("VQA, blind (pictures blanked)", f"{100 * vqa['blind']:.1f} %"),
        ("VQA, majority answer", f"{100 * vqa['majority']:.1f} %"),
        ("captioning, CIDEr", f"{captioning['cider']:.1f}"),
        ("captioning, exact match", f"{captioning['exact_match']:.1f} %"),
    ]
    rows += [(f"seconds, {name}", f"{value:.0f}") for name, value in summary["seconds"].items()]
    return [*rows, ("seconds, all", f"{sum(summary['seconds'].values()):.0f}")]


def print_summary(summary: dict) -> None:
    table = Table("", "", title="METALM demo", show_header=False)
    for row in summary_rows(summary):
        table.add_row(*row)
    console.print(table)


def report_demo(out: Path, summary: dict) -> Path:
    """Writes `report.html`: figures, curves, and pictures with questions and captions."""
    images = {
        sample.key: sample.image for part in ("vqa", "captioning-val") for sample in read_samples(str(out / "scenes" / part))
    }
    held_out = ", ".join(sorted(f"{color} {shape}" for color, shape in HELD_OUT))
    return write_report(
        out / "report.html",
        "METALM demo",
        [
            ReportText(
                "The model was pretrained on pictures with captions and on texts with questions; it never met a question "
                f"on a picture. Every question below is asked on a picture with a pair ({held_out}) that no training "
                "picture shows."
            ),
            ReportTable("Summary", ["", "figure"], summary_rows(summary)),
            loss_curve(out / "pretrain" / "metrics.jsonl", "Pretraining"),
            vqa_gallery(read_lines(out / "vqa.predictions.jsonl"), images.get, "Zero-shot questions"),
            loss_curve(out / "captioning" / "metrics.jsonl", "Fine-tuning for captioning"),
            caption_gallery(read_lines(out / "captioning.predictions.jsonl"), images.get, "Captions"),
        ],
    )


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
