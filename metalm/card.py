"""The model card: `README.md` of an export, as the Hub shows it, from what a run knows of itself.

    ---  front matter  ---      what the Hub files a model under
    what it is                  parts, parameters, tokens
    how to load it
    data, metrics, configuration where a run made it
    evaluation                  where results are given (`metalm push --results`)

The license is left to whoever publishes the model.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from metalm.config import to_plain
from metalm.data.shards import count_samples, public_name
from metalm.errors import DataError

NAME = "HUB_ID_OR_FOLDER"  # stands in a card that has not been pushed yet
PIPELINES = {
    "metalm": "text-generation",  # of text alone
    "pmlm": "fill-mask",
    "cloze": "fill-mask",
    "classifier": "text-classification",
    "tagger": "token-classification",
    "mim": "text-generation",
    "seq2seq": "text-generation",
}


def model_card(model: nn.Module, weights: Mapping[str, Tensor], vocab_size: int, run: Any = None) -> str:
    """The card of a model.

    Args:
        weights: its state dict, whole; a model in training may hold a share of it, or adapters.
        vocab_size: the number of the tokenizer's tokens.
        run: the `RunConfig` that made it, whose `metrics.jsonl` is read; None where no run did.
    """
    title = Path(run.out).name if run else "A METALM"
    sections = [front_matter(model), f"# {title}", overview(model, weights, vocab_size), usage(model)]
    if run:
        sections += [data_section(run), metrics_section(run), configuration(run)]
    return "\n\n".join(section for section in sections if section) + "\n"


def media_of(model: nn.Module) -> set[str]:
    """What a model reads beside text: of "image", "audio", "video"."""
    return set().union(*(processor.reads for processor in model.processors.values())) - {"text"}


def front_matter(model: nn.Module) -> str:
    kind, media = model.config.type, sorted(media_of(model))
    pipeline = PIPELINES.get(kind, "")
    if kind == "metalm" and media:
        pipeline = f"{media[0]}-text-to-text" if len(media) == 1 else "any-to-any"
    lines = ["---", "library_name: metalm", *([f"pipeline_tag: {pipeline}"] if pipeline else []), "tags:"]
    lines += [f"- {tag}" for tag in dict.fromkeys(["metalm", kind, *media])]
    return "\n".join([*lines, "# license: yours to choose", "---"])


def overview(model: nn.Module, weights: Mapping[str, Tensor], vocab_size: int) -> str:
    """The parts, each with its configuration in a few words and the number of its weights."""
    counts: Counter[str] = Counter()
    for name, tensor in weights.items():
        words = name.split(".")
        counts[".".join(words[: 2 if words[0] in ("encoders", "connectors") else 1])] += tensor.numel()
    plain = to_plain(model.config)
    rows = [(f"`{part}`", in_words(part, plain), f"{count:,}") for part, count in counts.items()]
    reads = ", ".join(["text", *sorted(media_of(model))])
    return (
        f"A [METALM](https://arxiv.org/abs/2206.06336) model of the type `{model.config.type}`; it reads {reads}, has "
        f"{counts.total():,} parameters, and its tokenizer {vocab_size:,} tokens.\n\n"
        + table(("part", "what it is", "parameters"), rows)
    )


def in_words(part: str, model: dict) -> str:
    """A part of a plain model configuration by its type, name, layers and width, as far as it says."""
    kind, _, name = part.partition(".")
    values = model.get("encoders", {}).get(name, {}) if name else model.get(kind)
    values = values.get("connector") if kind == "connectors" else values
    if not isinstance(values, dict):
        return ""
    words = [f"`{values[key]}`" for key in ("type", "name") if values.get(key)]
    words += [f"{values['layers']} layer{'s' if values['layers'] > 1 else ''}"] if values.get("layers") else []
    words += [f"width {values['width']}"] if values.get("width") else []
    return ", ".join(words)


def usage(model: nn.Module) -> str:
    cls = type(model)
    return f'```python\nfrom {cls.__module__} import {cls.__name__}\nmodel = {cls.__name__}.from_pretrained("{NAME}")\n```'


def data_section(run: Any) -> str:
    rows = []
    for use, sources in (("training", run.data.train), ("validation", run.data.validation)):
        for source in sources:
            shards = [source.shards] if isinstance(source.shards, str) else source.shards
            count = count_samples(shards)
            size = "" if count is None else f"{count:,}"
            rows.append(
                (use, ", ".join(f"`{public_name(shard)}`" for shard in shards), source.task, weight_of(source.weight), size)
            )
    return "## Data\n\n" + table(("for", "shards", "task", "weight", "samples"), rows)


def weight_of(weight: float | list[list[float]]) -> str:
    if not isinstance(weight, list):
        return f"{weight:g}"
    return ", ".join(f"{value:g} at step {step:,.0f}" for step, value in weight)


def metrics_section(run: Any) -> str:
    """The last loss that the run wrote down, and all of its last validation."""
    path = Path(run.out) / "metrics.jsonl"
    last: dict[str, tuple[int, float]] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:  # a line that a crash tore
            continue
        last |= {name: (row["step"], value) for name, value in row.items() if name == "loss" or name.startswith("val_")}
    rows = [(f"`{name}`", f"{step:,}", f"{value:.4f}") for name, (step, value) in last.items()]
    return (
        "## Metrics\n\nThe last of the run; losses are in nats a target.\n\n" + table(("metric", "step", "value"), rows)
        if rows
        else ""
    )


def configuration(run: Any) -> str:
    """The run's configuration; without `variables`, which are where they were used, and without secrets."""
    import yaml

    plain = public({key: value for key, value in to_plain(run).items() if key != "variables"})
    text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True).strip()
    return f"## Configuration\n\nAs `metalm train` takes it.\n\n```yaml\n{text}\n```"


def public(plain: Any) -> Any:
    """A plain configuration whose strings anybody may read; see `metalm.data.shards.public_name`."""
    if isinstance(plain, dict):
        return {key: public(value) for key, value in plain.items()}
    if isinstance(plain, list):
        return [public(value) for value in plain]
    return public_name(plain) if isinstance(plain, str) else plain


def fill_in(card: str, name: str, results: Sequence[str | Path] = ()) -> str:
    """A card with the name that the model is loaded by, and what `metalm evaluate` wrote about it.

    Raises:
        DataError: a file is no result.
    """
    card = re.sub(r'(\.from_pretrained\()".*"\)', lambda match: f'{match[1]}"{name}")', card)
    rows = []
    for path in results:
        try:
            result = json.loads(Path(path).read_text())
            for metric, value in result["metrics"].items():
                rows.append(
                    (result["task"], f"`{public_name(result['data'])}`", f"{result['num_samples']:,}", metric, f"{value:.4f}")
                )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is no result of `metalm evaluate` ({type(error).__name__}: {error})") from error
    if not rows:
        return card
    card, _, _ = card.partition("\n## Evaluation\n")
    return f"{card}\n## Evaluation\n\n{table(('task', 'data', 'samples', 'metric', 'value'), rows)}\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])
