"""Infilling: `prompt [hole] suffix -> text`, scored by exact match, in the format of HumanEval's infilling files.

    {"task_id": "…", "prompt": "…", "suffix": "…", "canonical_solution": "…"}     a line of JSON each, .gz or not

`exact_match` compares what fills the hole as it is, `exact_match_stripped` without the white space around it. `calls` of the
model, one after another, stand beside those of writing the same text from left to right, one a token.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.progress import track

from metalm.data.importers.annotations import read_jsonl
from metalm.data.tokenizer import Tokenizer
from metalm.errors import ConfigError, DataError
from metalm.evaluation.result import Prediction, Result
from metalm.inference.infill import InfillConfig, Infilling, infill
from metalm.objectives.mim import MIM
from metalm.pretrained import load_pretrained


@dataclass
class Infiller:
    """A MIM model that fills holes in texts. Of long contexts it reads what is next to the hole."""

    model: MIM
    tokenizer: Tokenizer
    config: InfillConfig

    @classmethod
    def load(cls, name: str | Path, config: InfillConfig) -> Infiller:
        """From an export, a run, or a Hub id.

        Raises:
            ConfigError: the model reads in one direction only.
        """
        model, tokenizer = load_pretrained(name)
        if not isinstance(model, MIM):
            raise ConfigError(f"{name} holds the model {model.config.type!r}: infilling needs one that reads both ways, 'mim'")
        return cls(model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer, config)

    def __call__(self, prefix: str, suffix: str) -> tuple[str, Infilling]:
        """What fills the hole, as text and with its cost."""
        room = self.model.config.decoder.max_positions - 1 - 2 * self.config.max_new_tokens
        if room < 1:
            raise ConfigError(
                f"max_new_tokens {self.config.max_new_tokens} on either side leave no room for a context in the decoder's "
                f"{self.model.config.decoder.max_positions} positions"
            )
        before, after = self.tokenizer.encode(prefix)[-room:], self.tokenizer.encode(suffix)[:room]
        found = infill(self.model, before, after, self.tokenizer.start, self.tokenizer.document_end, self.config)
        return self.tokenizer.decode(found.tokens), found


def read_holes(path: str | Path, limit: int = 0) -> list[dict]:
    """Rows with a `prompt` and a `suffix`.

    Raises:
        DataError: a row lacks one, or there is no row.
    """
    rows = []
    for number, row in read_jsonl(Path(path)):
        if not isinstance(row.get("prompt"), str) or not isinstance(row.get("suffix"), str):
            raise DataError(f"{path}, line {number}: no prompt and suffix in it (columns: {', '.join(row)})")
        rows.append({"task_id": str(number)} | row)
        if len(rows) == limit:
            break
    if not rows:
        raise DataError(f"{path}: no row in it")
    return rows


def evaluate_infilling(infiller: Infiller, data: str, model: str = "", limit: int = 0) -> Result:
    """Fills every hole of a file whose rows say what was there, as `canonical_solution`."""
    rows, predictions, found = read_holes(data, limit), [], []
    for row in track(rows, "infilling"):
        if not isinstance(row.get("canonical_solution"), str):
            raise DataError(f"{data}: row {row['task_id']!r} has no canonical_solution to compare with")
        text, infilling = infiller(row["prompt"], row["suffix"])
        right = row["canonical_solution"]
        predictions.append(Prediction(row["task_id"], text, [right], float(text == right), type=infilling.ended))
        found.append(infilling)
    written = sum(len(one.tokens) for one in found)
    accepted = [count for one in found for count in one.accepted]
    metrics = {
        "exact_match": sum(p.score for p in predictions) / len(rows),
        "exact_match_stripped": sum(p.prediction.strip() == p.references[0].strip() for p in predictions) / len(rows),
        "met": sum(one.ended == "met" for one in found) / len(rows),
        "calls": sum(one.calls for one in found) / len(rows),
        "calls_left_to_right": written / len(rows),
        "accepted_tokens": sum(accepted) / max(1, len(accepted)),
    }
    return Result("infilling", metrics, model, data, asdict(infiller.config) | {"limit": limit}, predictions)
