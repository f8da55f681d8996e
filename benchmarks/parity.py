"""What METALM loads, and how near it comes to the public implementation: the table in README.md.

    python -m benchmarks.parity [--write README.md] [--only NAME ...]        # or `make parity`

For each family of `benchmarks/families.py` a small randomly initialised checkpoint is written by the public implementation in
its real format and loaded by METALM; both then read the same input in float32, and decoders go on from eight prompts. Exits
with 1 where a family fails.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.families import FAMILIES, NEW_TOKENS, Family
from metalm.card import table

TOLERANCE = 1e-4
START, END = "<!-- parity: written by `make parity` -->", "<!-- parity ends -->"


@dataclass
class Parity:
    """What was found about a family, as far as it came; `problem` says what stopped it."""

    family: Family
    builds: bool = False
    loads: bool = False
    difference: float = float("nan")
    same_text: bool | None = None
    problem: str = ""

    @property
    def holds(self) -> bool:
        return not self.problem and self.difference <= TOLERANCE and self.same_text is not False

    def row(self) -> list[str]:
        """Name, kind, builds, loads, largest difference, same text; a cell that was not reached is empty."""
        family, problem = self.family, f"no: {self.problem}"
        builds = "yes" if self.builds else problem
        loads = f"yes ({family.format})" if self.loads else problem if self.builds else ""
        difference = f"{self.difference:.1e}" + ("" if self.difference <= TOLERANCE else " (too large)") if self.loads else ""
        if self.loads and self.problem:
            difference = problem
        text = {True: "yes", False: "no", None: ""}[self.same_text]
        return [family.name, family.kind, builds, loads, difference, text]


@torch.no_grad()
def measure(family: Family) -> Parity:
    """Writes, builds, loads and compares one family; what is raised on the way becomes its problem."""
    found = Parity(family)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            theirs = family.make().float()
            family.save(theirs, folder)
            family.build(folder)
            found.builds = True
            ours = family.load(folder).float()
            found.loads = True
            expected, own = family.answers(theirs, ours)
            if expected.shape != own.shape:
                raise ValueError(f"shapes {tuple(own.shape)}, theirs {tuple(expected.shape)}")
            found.difference = (expected - own).abs().max().item()
            found.same_text = family.same_text(theirs, ours)
        except Exception as error:  # whatever it is, it is what the table has to say
            found.problem = f"{type(error).__name__}: {error}".splitlines()[0].replace("|", "/")
    return found


def markdown(found: Sequence[Parity]) -> str:
    head = ["family", "kind", "builds", "loads its files", "largest difference", f"same {NEW_TOKENS} greedy tokens"]
    return table(head, [one.row() for one in found])


def put(text: str, content: str) -> str:
    """A text with what stands between the two markers replaced.

    Raises:
        ValueError: it has no such place.
    """
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise ValueError(f"there must be a place for the table, between {START!r} and {END!r}")
    return f"{before}{START}\n{content}\n{END}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parity", description=__doc__.partition("\n")[0])
    parser.add_argument("--write", type=Path, help="a Markdown file with a place for the table")
    parser.add_argument("--only", nargs="+", choices=[family.name for family in FAMILIES], help="measure these, write nothing")
    options = parser.parse_args(arguments)
    if options.write and options.only:
        parser.error("--write is for the whole table")
    os.environ["HF_HUB_OFFLINE"] = "1"  # everything is made here
    found = [measure(family) for family in FAMILIES if family.name in (options.only or [family.name])]
    print(markdown(found))
    if options.write:
        options.write.write_text(put(options.write.read_text(), markdown(found)))
    failed = [one.family.name for one in found if not one.holds]
    if failed:
        print(f"parity fails: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
