"""Infilling: `prompt [hole] suffix -> text`, scored by exact match, in the format of HumanEval's infilling files.

    {"task_id": "…", "prompt": "…", "suffix": "…", "canonical_solution": "…"}     a line of JSON each, .gz or not

`exact_match` compares what fills the hole as it is, `exact_match_stripped` without the white space around it. `calls` of the
model, one after another, that a hole takes stand beside those of writing the same text from left to right, one a token.
`sequential_calls` are all that were made, which holes of a batch share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.progress import track

from metalm.data.importers.annotations import read_jsonl
from metalm.data.tokenizer import Tokenizer
from metalm.errors import ConfigError, DataError
from metalm.evaluation.result import Prediction, Result
from metalm.inference.generate import batched
from metalm.inference.infill import Hole, InfillConfig, Infilling, infill
from metalm.model import MetaLM
from metalm.pretrained import load_pretrained


@dataclass
class Infiller:
    """A model that fills holes in texts, `batch_size` at a time. Of long contexts it reads what is next to the hole."""

    model: MetaLM
    tokenizer: Tokenizer
    config: InfillConfig
    batch_size: int = 64

    @classmethod
    def load(cls, name: str | Path, config: InfillConfig, batch_size: int = 64) -> Infiller:
        """From an export, a run, or a Hub id.

        Raises:
            ConfigError: the model has no decoder.
        """
        model, tokenizer = load_pretrained(name)
        if not isinstance(model, MetaLM):
            raise ConfigError(f"{name} holds the model {model.config.type!r}, which does not write; infilling needs 'mim'")
        return cls(model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer, config, batch_size)

    def __call__(self, texts: Sequence[tuple[str, str]], what: str = "") -> tuple[list[tuple[str, Infilling]], int]:
        """What fills the holes between prefixes and suffixes, each as text and with its cost, and the model's calls in all.

        Args:
            what: names the work on the progress bar.
        """
        room = self.model.config.decoder.max_positions - 1 - 2 * self.config.max_new_tokens
        if room < 1:
            raise ConfigError(
                f"max_new_tokens {self.config.max_new_tokens} on either side leave no room for a context in the decoder's "
                f"{self.model.config.decoder.max_positions} positions"
            )
        encode, start, end = self.tokenizer.encode, self.tokenizer.start, self.tokenizer.document_end
        holes = [Hole(encode(prefix)[-room:], encode(suffix)[:room]) for prefix, suffix in texts]
        filled: dict[int, tuple[str, Infilling]] = {}
        all_calls = 0
        groups = list(batched(holes, self.batch_size))
        for numbers in track(groups, what) if what else groups:
            found, calls = infill(self.model, [holes[n] for n in numbers], start, end, self.config)
            all_calls += calls
            filled |= {n: (self.tokenizer.decode(one.tokens), one) for n, one in zip(numbers, found)}
        return [filled[n] for n in range(len(holes))], all_calls


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
    rows = read_holes(data, limit)
    for row in rows:
        if not isinstance(row.get("canonical_solution"), str):
            raise DataError(f"{data}: row {row['task_id']!r} has no canonical_solution to compare with")
    filled, calls = infiller([(row["prompt"], row["suffix"]) for row in rows], "infilling")
    predictions = []
    for row, (text, one) in zip(rows, filled):
        right = row["canonical_solution"]
        predictions.append(Prediction(row["task_id"], text, [right], float(text == right), type=one.ended))
    found = [one for _, one in filled]
    written = sum(len(one.tokens) for one in found)
    accepted = [count for one in found for count in one.accepted]
    metrics = {
        "exact_match": sum(p.score for p in predictions) / len(rows),
        "exact_match_stripped": sum(p.prediction.strip() == p.references[0].strip() for p in predictions) / len(rows),
        "met": sum(one.ended == "met" for one in found) / len(rows),
        "calls": sum(one.calls for one in found) / len(rows),
        "calls_left_to_right": written / len(rows),
        "sequential_calls": float(calls),
        "accepted_tokens": sum(accepted) / max(1, len(accepted)),
    }
    config = asdict(infiller.config) | {"limit": limit, "batch_size": infiller.batch_size}
    return Result("infilling", metrics, model, data, config, predictions)
