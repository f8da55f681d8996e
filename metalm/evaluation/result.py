"""The outcome of an evaluation, as `out.json` and a JSON Lines file of predictions beside it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass
class Prediction:
    """One answered sample: what was said, what was right, and the score in [0, 1] (CIDEr for captions, ROUGE-L for texts)."""

    id: str
    prediction: str
    references: list[str] | dict[str, float]
    score: float
    question: str = ""
    type: str = ""
    image: str = ""


@dataclass
class Result:
    """`{"task", "metrics", "num_samples", "model", "data", "config", "predictions"}`."""

    task: str
    metrics: dict[str, float]
    model: str
    data: str
    config: dict
    predictions: list[Prediction] = field(default_factory=list)

    def write(self, out: str | Path) -> Path:
        """Writes `out` and, next to it, `<name>.predictions.jsonl`; returns the latter."""
        out = Path(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        lines = out.with_suffix(".predictions.jsonl")
        with open(lines, "w") as file:
            for prediction in self.predictions:
                row = {name: value for name, value in asdict(prediction).items() if value != ""}
                file.write(json.dumps({"prediction": prediction.prediction} | row, ensure_ascii=False) + "\n")
        record = {**vars(self), "num_samples": len(self.predictions), "predictions": str(lines)}
        out.write_text(json.dumps(record, indent=1, ensure_ascii=False))
        return lines
