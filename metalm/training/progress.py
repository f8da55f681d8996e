"""What a run tells: a progress bar (lines where there is no terminal), `metrics.jsonl`, TensorBoard if wanted."""

from __future__ import annotations

import json
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Reporter:
    """Rank 0 reports, the others are silent; use it as a context."""

    def __init__(self, run: Path, steps: int, first_step: int, active: bool, tensorboard: bool):
        self.active = active
        self.run, self.steps, self.first_step = run, steps, first_step
        self.console = Console()
        self.file = self.bar = self.board = None
        self.started = time.monotonic()
        self.last_line = 0.0
        if active:
            self.file = open(run / "metrics.jsonl", "a")  # noqa: SIM115 (closed in __exit__)
            if tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(str(run / "tensorboard"))

    def __enter__(self) -> Reporter:
        if self.active and self.console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self.console,
            )
            self.bar.start()
            self.task = self.bar.add_task(self.run.name, total=self.steps, completed=self.first_step, text="")
        return self

    def __exit__(self, *exception) -> None:
        if self.bar:
            self.bar.stop()
        if self.file:
            self.file.close()
        if self.board:
            self.board.close()

    def message(self, text: str) -> None:
        """A line for the person at the terminal."""
        if self.active:
            self.console.print(text, highlight=False, markup=False)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Writes a line of `metrics.jsonl` and shows loss and speed."""
        if not self.active:
            return
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        for name, value in values.items():
            if self.board:
                self.board.add_scalar(name, value, step)
        names = {"loss": "loss {:.3f}", "val_loss": "val_loss {:.4f}", "tokens_per_second": "{:,.0f} tokens/s"}
        text = "  ".join(form.format(values[name]) for name, form in names.items() if name in values)
        if "val_loss" in values:
            self.message(f"step {step:,}  {text}")
        elif self.bar:
            self.bar.update(self.task, completed=step, text=text)
        elif time.monotonic() - self.last_line > 15 or step == self.steps:
            self.last_line = time.monotonic()
            left = (self.last_line - self.started) / max(1, step - self.first_step) * (self.steps - step)
            self.message(f"{self.run.name}  step {step:,}/{self.steps:,}  {text}  {left / 60:.1f} min left")
