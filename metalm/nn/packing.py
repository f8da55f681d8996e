"""Bin packing of sequences into rows: hardly any padding, nothing cut."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of sequence numbers whose lengths sum to at most `capacity`, by best fit decreasing.

    The longest sequence goes first, each into the fullest row that still takes it: O(n log n), within 22 % of the optimum
    in the worst case and within a per cent or so for a few hundred captions.

    Raises:
        ValueError: a sequence is longer than a row.
    """
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (free places, row), sorted
    for n in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        if lengths[n] > capacity:
            raise ValueError(f"a sequence of {lengths[n]} positions does not fit a row of {capacity}")
        i = bisect_left(free, (lengths[n], -1))
        if i == len(free):
            rows.append([])
            free.append((capacity, len(rows) - 1))
        places, row = free.pop(i)
        rows[row].append(n)
        insort(free, (places - lengths[n], row))
    return rows
