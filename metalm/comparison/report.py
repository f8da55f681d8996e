"""What `metalm compare` found: `comparison.json`, tables of means and standard errors as Markdown, and a page with plots."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import mean, stdev

from metalm.evaluation.report import Figure, Section, Table, Text, write_report

BUDGET = {"tokens": "Equal tokens", "flops": "Equal FLOPs"}
UP, DOWN = "↑", "↓"


def standard_error(values: list[float]) -> float:
    """Of the mean; 0 for a single value."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def spread(values: list[float]) -> str:
    """`12.34 ± 0.56`, to four significant digits of the mean."""
    digits = max(0, 3 - math.floor(math.log10(abs(mean(values)))) if mean(values) else 3)
    error = f" ± {standard_error(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{error}"


def write_comparison(out: Path, comparison: dict) -> dict:
    """Writes `comparison.json`, `.md` and `.html` into `out`; returns the first with means and standard errors filled in.

    Args:
        comparison: {"config", "results"}, as `metalm.comparison.compare.gather` makes it; every figure is a list, one a seed.
    """
    for candidates in comparison["results"].values():
        for row in candidates.values():
            for group in ("yardsticks", "validation"):
                row[group] = {
                    name: {"values": values, "mean": mean(values), "standard_error": standard_error(values)}
                    for name, values in row[group].items()
                }
    (out / "comparison.json").write_text(json.dumps(comparison, indent=1))
    tables = [*(yardstick_table(comparison, budget) for budget in comparison["results"]), validation_table(comparison)]
    (out / "comparison.md").write_text("\n".join(markdown(table) for table in tables))
    config = comparison["config"]
    seeds = ", ".join(map(str, config["seeds"]))
    note = (
        f"Pretrained on {config['data']}, seeds {seeds}; ± is the standard error of the mean. Equal tokens: the corpus is read "
        f"{config['epochs']} times. Equal FLOPs: those that {config['reference']} takes for that."
    )
    sections: list[Section] = [Text(note), *tables, *plots(comparison)]
    write_report(out / "comparison.html", "METALM compare", sections)
    return comparison


def columns(comparison: dict) -> list[str]:
    """The yardsticks, with the direction in which they get better."""
    return [f"{name} {DOWN if lower_is_better(y) else UP}" for name, y in comparison["config"]["yardsticks"].items()]


def lower_is_better(yardstick: dict) -> bool:
    return yardstick["task"] == "perplexity"


def yardstick_table(comparison: dict, budget: str) -> Table:
    rows = []
    for name, row in comparison["results"][budget].items():
        found = row["yardsticks"]
        figures = [spread(found[y]["values"]) if y in found else "" for y in comparison["config"]["yardsticks"]]
        cost = [f"{row['parameters'] / 1e6:.2f} M", f"{row['steps']:,}", f"{row['epochs']:.2f}", f"{row['flops']:.2e}"]
        rows.append([name, *cost, f"{mean(row['seconds']):.0f}", *figures])
    head = ["", "parameters", "steps", "epochs", "FLOPs", "seconds", *columns(comparison)]
    return Table(BUDGET[budget], head, rows)


def validation_table(comparison: dict) -> Table:
    """The parts of each candidate's own validation loss, in nats."""
    rows = [
        [name, BUDGET[budget].lower(), ", ".join(f"{part} {spread(v['values'])}" for part, v in row["validation"].items())]
        for budget, candidates in comparison["results"].items()
        for name, row in candidates.items()
    ]
    return Table("Validation losses of their own", ["", "budget", "nats a target"], rows)


def markdown(table: Table) -> str:
    lines = [f"## {table.title}", "", *("| " + " | ".join(map(str, row)) + " |" for row in [table.columns, *table.rows]), ""]
    lines.insert(3, "|" + "---|" * len(table.columns))
    return "\n".join(lines)


def plots(comparison: dict) -> list[Figure]:
    """A figure a yardstick: means with standard errors, candidate by candidate, both budgets side by side."""
    from matplotlib.figure import Figure as Canvas

    figures = []
    for yardstick, title in zip(comparison["config"]["yardsticks"], columns(comparison)):
        names = [n for n, row in next(iter(comparison["results"].values())).items() if yardstick in row["yardsticks"]]
        if not names:
            continue
        canvas = Canvas(figsize=(5.4, 0.8 + 0.36 * len(names)), layout="constrained")
        axes = canvas.subplots()
        shift = 0.15 * (len(comparison["results"]) - 1)
        for number, (budget, candidates) in enumerate(comparison["results"].items()):
            found = [candidates[name]["yardsticks"][yardstick] for name in names]
            places = [place - shift + 0.3 * number for place in range(len(names))]
            means, errors = [f["mean"] for f in found], [f["standard_error"] for f in found]
            axes.errorbar(means, places, xerr=errors, fmt="o", capsize=3, label=BUDGET[budget].lower())
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
        axes.legend(fontsize="small")
        figures.append(Figure(title, canvas))
    return figures
