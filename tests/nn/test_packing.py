"""Packing: every sequence once, no row over its capacity, and hardly any padding."""

from __future__ import annotations

import itertools
import json
import random

import pytest

from metalm.data.tokenizer import Tokenizer
from metalm.nn.packing import best_fill, pack

# Row length by image states before each caption. A last row that is half empty costs 1 / (2 x rows).
ROWS = {0: 256, 64: 1024, 100: 1024}


def useful(lengths: list[int], rows: list[list[int]], capacity: int) -> float:
    """The share of positions that carry something; checks that the packing is one."""
    assert sorted(n for row in rows for n in row) == list(range(len(lengths)))
    assert all(row and sum(lengths[n] for n in row) <= capacity for row in rows)
    return sum(lengths) / (len(rows) * capacity)


def test_every_sequence_is_in_one_row_that_holds_it():
    for seed in range(20):
        rng = random.Random(seed)
        capacity = rng.randint(1, 300)
        lengths = [rng.randint(1, capacity) for _ in range(rng.randint(0, 200))]
        useful([*lengths, capacity], pack([*lengths, capacity], capacity), capacity)
        assert pack(lengths, capacity) == pack(lengths, capacity)


def test_a_row_is_filled_as_well_as_any_subset_can():
    for seed in range(30):
        rng = random.Random(seed)
        lengths = [rng.randint(1, 30) for _ in range(10)]
        room = rng.randint(0, 100)
        sums = (sum(c) for r in range(11) for c in itertools.combinations(lengths, r))
        best = max(s for s in sums if s <= room)
        chosen = best_fill({n: lengths.count(n) for n in lengths}, room)
        assert sum(length * count for length, count in chosen.items()) == best
        assert all(count <= lengths.count(length) for length, count in chosen.items())


def test_a_sequence_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="11 positions does not fit a row of 10"):
        pack([3, 11], 10)


@pytest.mark.parametrize("patches", ROWS)
def test_captions_of_usual_lengths_fill_97_percent(patches):
    """Captions have 8 to 20 tokens, some many more; `patches` image states go before each."""
    rng = random.Random(0)
    lengths = [patches + min(max(3, round(rng.lognormvariate(2.5, 0.35))), 60) for _ in range(1500)]
    assert useful(lengths, pack(lengths, ROWS[patches]), ROWS[patches]) >= 0.97


@pytest.mark.parametrize("patches", ROWS)
def test_real_captions_fill_97_percent(shared, patches):
    with open(shared / "data/flickr8k/captions.jsonl") as file:
        captions = [" " + caption for line in itertools.islice(file, 300) for caption in json.loads(line)["captions"]]
    tokenizer = Tokenizer.train(captions, 2000)
    lengths = [patches + len(tokens) + 1 for tokens in tokenizer.encode_batch(captions)]
    assert len(lengths) == 1500
    assert useful(lengths, pack(lengths, ROWS[patches]), ROWS[patches]) >= 0.97
