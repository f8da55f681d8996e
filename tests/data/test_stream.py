"""The packed stream: deterministic, every sample once an epoch, resumable to the batch, and never stuck or silent."""

from __future__ import annotations

import io
import itertools
import json
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from metalm.config import build
from metalm.connectors.base import ConnectorConfig
from metalm.data.prompts import Interface
from metalm.data.sample import Sample
from metalm.data.shards import write_shards
from metalm.data.stream import DataConfig, Loader, PackedStream
from metalm.data.tokenizer import Tokenizer
from metalm.encoders.fused import FusedProcessor
from metalm.errors import ConfigError, DataError
from metalm.objectives.mim import MIMLayout
from metalm.segments import Batch, Document, Span

WORDS = ["a", "red", "green", "blue", "small", "circle", "square", "above", "below", "left", "of", "right", "the", "is"]


def caption(n: int) -> str:
    rng = random.Random(n)
    return f"{n} " + " ".join(rng.choices(WORDS, k=rng.randint(3, 12)))


def picture(color: tuple[int, int, int] = (200, 0, 0)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(out, "PNG")
    return out.getvalue()


PICTURE = picture()


def pairs(count: int, prefix: str = "p") -> list[Sample]:
    return [Sample(f"{prefix}{n}", PICTURE, [caption(n)]) for n in range(count)]


def texts(count: int) -> list[Sample]:
    return [Sample(f"t{n}", text=caption(1000 + n)) for n in range(count)]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """40 image-text pairs in 8 shards, 24 texts in 8 shards."""
    root = tmp_path_factory.mktemp("shards")
    write_shards(pairs(40), root / "pairs", samples_per_shard=5)
    write_shards(texts(24), root / "texts", samples_per_shard=3)
    return root


@pytest.fixture(scope="module")
def interface() -> Interface:
    tokenizer = Tokenizer.train([caption(n) for n in range(50)], 300)
    processor = FusedProcessor(image_size=8, num_patches=4, max_positions=32)
    return Interface(tokenizer, {"fused": processor}, {"fused": ConnectorConfig("linear")}, max_length=64)


def settings(data: Path, **changes) -> DataConfig:
    sources = [
        {"shards": str(data / "pairs"), "task": "image_text", "weight": 2},
        {"shards": str(data / "texts"), "task": "text", "objective": {"type": "prefix"}},
    ]
    return build(DataConfig, {"train": sources, "row_length": 64, "rows": 2, "workers": 0, "block": 10, **changes}, "run.yaml")


def loader(interface: Interface, config: DataConfig, **options) -> Loader:
    return Loader(PackedStream(config.train, interface, config, **options))


def take(batches, count: int) -> list[Batch]:
    return list(itertools.islice(batches, count))


def content(batch: Batch) -> tuple:
    """All that a batch holds, for comparison."""
    tensors = [batch.tokens_BT, batch.document_BT, batch.branch_BT, batch.position_BT, batch.places_L, batch.targets_L]
    for span in batch.spans.values():
        tensors += [span.source, span.lengths, span.positions, *span.inputs.values()]
    return tuple(batch.keys), tuple(batch.broken), *(json.dumps(tensor.tolist()) for tensor in tensors)


def contents(batches) -> list[tuple]:
    return [content(batch) for batch in batches]


def test_equal_seeds_give_equal_batches(data, interface):
    first, again, other = (contents(take(loader(interface, settings(data), seed=seed), 12)) for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_where_the_data_lie_does_not_matter(data, interface, tmp_path):
    """A run may resume on another machine."""
    import shutil

    shutil.copytree(data, tmp_path / "moved")
    here, there = (contents(take(loader(interface, settings(d)), 12)) for d in (data, tmp_path / "moved"))
    assert here == there


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_that_come_later_do_not_change_who_reads_what(data, interface, tmp_path, workers):
    """A folder is looked into once, so that readers which begin at different times divide the same shards."""
    import shutil

    shutil.copytree(data, tmp_path / "growing")
    config = settings(tmp_path / "growing", workers=workers)
    stream = loader(interface, config)
    before = stream.division()
    shutil.copy(data / "pairs/000000.tar", tmp_path / "growing/pairs/000009.tar")
    assert contents(take(stream, 12)) == contents(take(loader(interface, settings(data, workers=workers)), 12))
    assert stream.division() == before


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_what_a_reader_reads(data, interface, workers):
    """Reader r of R reads the same as a worker of one rank, or as a rank without workers."""
    together = take(loader(interface, settings(data, workers=workers)), 8)
    for reader in range(workers):
        alone = loader(interface, settings(data, workers=0), rank=reader, world=workers)
        assert contents(together[reader::workers]) == contents(take(alone, 8 // workers))


@pytest.mark.parametrize("world, workers", [(1, 0), (1, 2), (2, 1), (2, 2)])
def test_every_sample_comes_once_an_epoch(data, interface, world, workers):
    config = settings(data, workers=workers)
    once, twice = Counter(), Counter()
    for rank in range(world):
        for batch in loader(interface, config, rank=rank, world=world, repeat=False):
            once.update(batch.keys)
            assert batch.tokens_BT.shape[1] == 64 and 1 <= len(batch.tokens_BT) <= 2
    assert once == Counter([f"p{n}" for n in range(40)] + [f"t{n}" for n in range(24)])
    # The repeating stream of one reader: of each source, every sample once before any comes again.
    for batch in take(loader(interface, settings(data, block=1, rows=1)), 200):
        twice.update(batch.keys)
    for letter in "pt":
        counts = [count for key, count in twice.items() if key[0] == letter]
        assert max(counts) - min(counts) <= 1 < min(counts)


def test_epochs_differ_in_order_and_in_chance(data, interface):
    config = settings(data, rows=1, block=40, train=[{"shards": str(data / "pairs"), "task": "image_text"}])
    batches, epochs = iter(loader(interface, config)), []
    for _ in range(2):
        keys: list[str] = []
        rows = []
        while len(keys) < 40:
            rows.append(next(batches))
            keys += rows[-1].keys
        assert sorted(keys) == sorted(f"p{n}" for n in range(40))
        epochs.append((keys, contents(rows)))
    assert epochs[0][0] != epochs[1][0]


def test_a_mixture_changes_by_its_schedule_and_resumes_in_it(data, interface):
    """At first pairs alone, from step 20 on texts alone; each step takes two batches of one row."""
    pairs = {"shards": str(data / "pairs"), "task": "image_text", "weight": [[0, 1], [10, 1], [20, 0]]}
    texts = {"shards": str(data / "texts"), "task": "text", "objective": {"type": "prefix"}, "weight": [[10, 0], [20, 1]]}
    config = settings(data, train=[pairs, texts], rows=1, block=4)
    batches = take(loader(interface, config, accumulation=2), 60)
    shares = [sum(key[0] == "t" for key in batch.keys) / len(batch.keys) for batch in batches]
    assert set(shares[:20]) == {0.0} and set(shares[44:]) == {1.0}
    assert 0 < sum(shares[20:44]) < 24
    first = loader(interface, config, accumulation=2)
    before = contents(take(first, 30))
    resumed = loader(interface, config, accumulation=2)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert before + contents(take(resumed, 30)) == contents(batches)


def test_a_block_that_is_read_again_is_drawn_by_the_weights_it_had(data, interface):
    """Although steps are counted in another way after resuming."""
    pairs = {"shards": str(data / "pairs"), "task": "image_text", "weight": [[0, 0.2], [20, 5]]}
    texts = {"shards": str(data / "texts"), "task": "text", "objective": {"type": "prefix"}}
    config = settings(data, train=[pairs, texts], rows=1, block=24)
    first = loader(interface, config)
    take(first, 10)
    expected = contents(take(first, 4))
    begun = loader(interface, config)
    take(begun, 10)
    resumed = loader(interface, config, accumulation=7)
    resumed.load_state_dict(json.loads(json.dumps(begun.state_dict())))
    assert contents(take(resumed, 4)) == expected


def test_validation_has_no_schedule(data):
    scheduled = {"shards": str(data / "pairs"), "task": "image_text", "weight": [[0, 1], [5, 0]]}
    with pytest.raises(ConfigError, match="no weight with a schedule"):
        settings(data, validation=[scheduled])


def test_steps_of_a_schedule_are_those_of_all_readers_together(data, interface):
    pairs = {"shards": str(data / "pairs"), "task": "image_text", "weight": [[0, 1], [9, 1], [10, 0]]}
    texts = {"shards": str(data / "texts"), "task": "text", "objective": {"type": "prefix"}, "weight": [[9, 0], [10, 1]]}
    config = settings(data, train=[pairs, texts], rows=1, block=1, workers=2)
    batches = take(loader(interface, config), 24)
    turn = next(n for n, batch in enumerate(batches) if any(key[0] == "t" for key in batch.keys))
    assert 10 <= turn <= 12


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weight": 0}, "weight 0.0 must be positive"),
        ({"weight": [[0, 1], [0, 2]]}, "the steps of a schedule must rise"),
        ({"weight": [[0, 1, 2]]}, "neither a number nor a list of"),
        ({"weight": []}, "neither a number nor a list of"),
        ({"weight": [[0, 0.0]]}, "must be positive"),
        ({"loss_weight": 0}, "loss_weight 0.0 must be positive"),
    ],
)
def test_weights_that_are_none_are_refused(data, change, message):
    with pytest.raises(ConfigError, match=message):
        settings(data, train=[{"shards": str(data / "pairs"), "task": "image_text", **change}])


def test_a_moment_without_any_source_is_named(data, interface):
    config = settings(data, train=[{"shards": str(data / "pairs"), "task": "image_text", "weight": [[0, 1], [1, 0]]}], block=4)
    with pytest.raises(DataError, match="no source has a weight above 0"):
        take(loader(interface, config), 20)


def test_targets_have_their_sources_weight_and_their_modality(data, interface):
    sources = settings(data).train
    sources[0].loss_weight = 2.5
    weights, kinds = Counter(), Counter()
    for batch in loader(interface, replace(settings(data), train=sources), repeat=False):
        names = list(batch.modalities)
        assert sum(batch.modalities.values()) == batch.num_targets == len(batch.modality_L)
        weight_L = batch.weight_L if batch.weight_L is not None else torch.ones(batch.num_targets)
        assert batch.target_weight == pytest.approx(float(weight_L.sum()))
        for name, weight in zip((names[n] for n in batch.modality_L.tolist()), weight_L.tolist()):
            weights[name, weight] += 1
        kinds.update(batch.modalities)
    assert set(weights) == {("image", 2.5), ("text", 1.0)}
    assert kinds == Counter({name: count for (name, _), count in weights.items()})


def test_captions_that_are_read_as_text_are_logged_as_text(data, interface):
    source = {"shards": str(data / "pairs"), "task": "text", "objective": {"type": "prefix"}}
    batches = list(loader(interface, settings(data, train=[source]), repeat=False))
    assert batches and all(list(batch.modalities) == ["text"] for batch in batches)


def test_views_are_drawn_anew_each_epoch_and_equal_under_a_seed(interface, tmp_path):
    noise = io.BytesIO()
    Image.frombytes("RGB", (32, 32), random.Random(0).randbytes(3 * 32 * 32)).save(noise, "PNG")
    write_shards([Sample(f"p{n}", noise.getvalue(), [caption(n)]) for n in range(10)], tmp_path, samples_per_shard=5)
    whole = {"shards": str(tmp_path), "task": "image_text"}
    viewed = settings(tmp_path, train=[{**whole, "crop": 0.5, "mirror": True}])

    def rows(config: DataConfig, **options) -> list[list[Document]]:
        stream = PackedStream(config.train, interface, config, **options)
        return [row for row, _, _ in itertools.islice(stream.rows(0, 1), 40)]

    def pictures(rows: list[list[Document]]) -> dict[str, set[bytes]]:
        seen: dict[str, set[bytes]] = {}
        for document in (document for row in rows for document in row):
            for span in (segment for segment in document.all_segments if isinstance(segment, Span)):
                seen.setdefault(document.key, set()).add(span.inputs["image"].numpy().tobytes())
        return seen

    as_stored, views = pictures(rows(settings(tmp_path, train=[whole]))), pictures(rows(viewed))
    assert all(len(shown) == 1 for shown in as_stored.values())
    assert sum(len(shown) > 1 for shown in views.values()) > len(views) / 2
    assert views == pictures(rows(viewed)) != pictures(rows(viewed, seed=1))


def test_the_mixture_keeps_its_weights(data, interface):
    counts = Counter()
    for batch in take(loader(interface, settings(data, block=50)), 300):
        counts.update(key[0] for key in batch.keys)
    assert 0.62 < counts["p"] / counts.total() < 0.71  # 2 : 1


def test_rows_are_packed(data, interface):
    """Documents fill the rows; nothing is cut, nothing lies on anything else."""
    batches = take(loader(interface, settings(data, block=800, row_length=256)), 60)
    useful = sum(batch.num_positions for batch in batches) / sum(batch.document_BT.numel() for batch in batches)
    assert useful >= 0.97
    for batch in batches[:5]:
        spans = batch.spans["fused"].positions
        assert len(spans.unique()) == len(spans)
        assert (batch.tokens_BT.flatten()[spans] == 0).all() and (batch.document_BT.flatten()[spans] > 0).all()
        for row, documents in zip(batch.position_BT, batch.document_BT):
            for d in range(1, int(documents.max()) + 1):
                assert torch.equal(row[documents == d], torch.arange(int((documents == d).sum())))


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("stops", [[1], [7], [3, 4, 16]])
def test_a_resumed_stream_goes_on_as_if_never_stopped(data, interface, workers, stops):
    """Blocks are of about 3 rows and epochs of 13 to 40: the stops lie within and at the edges of both."""
    config = settings(data, workers=workers)
    whole = contents(take(loader(interface, config, seed=5), sum(stops) + 24))
    seen: list[tuple] = []
    state = None
    for count in [*stops, 24]:
        stream = loader(interface, config, seed=5)
        if state:
            stream.load_state_dict(json.loads(json.dumps(state)))
        seen += contents(take(stream, count))
        state = stream.state_dict()
    assert seen == whole


def test_every_stop_of_an_epoch_resumes(data, interface):
    config = settings(data, rows=1)
    stream = loader(interface, config, seed=2)
    whole, states = [], [json.dumps(stream.state_dict())]
    for batch in itertools.islice(stream, 50):
        whole.append(content(batch))
        states.append(json.dumps(stream.state_dict()))
    for stop in range(49):
        resumed = loader(interface, config, seed=2)
        resumed.load_state_dict(json.loads(states[stop]))
        assert contents(take(resumed, 2)) == whole[stop : stop + 2], stop


def test_the_state_is_of_what_was_handed_out_not_of_what_is_prepared(data, interface):
    """Workers run ahead; iterating the same loader again goes on where it was left."""
    config = settings(data, workers=2)
    whole = contents(take(loader(interface, config), 12))
    stream = loader(interface, config)
    assert contents(take(stream, 5)) + contents(take(stream, 7)) == whole


def test_a_stream_that_does_not_repeat_starts_over(data, interface):
    stream = loader(interface, settings(data), repeat=False)
    assert contents(stream) == contents(stream) != []


@pytest.mark.parametrize(
    "change, options, message",
    [
        ({"workers": 2}, {}, "data.workers = 0, now it is 2"),
        ({}, {"world": 2}, "number of processes = 1, now it is 2"),
        ({}, {"seed": 1}, "training.seed = 0, now it is 1"),
        ({"block": 9}, {}, "data.block = 10, now it is 9"),
        ({"row_length": 65}, {}, "data.row_length = 64, now it is 65"),
    ],
)
def test_a_state_of_another_division_is_refused(data, interface, change, options, message):
    state = loader(interface, settings(data)).state_dict()
    with pytest.raises(ConfigError, match=f"saved with {message}.*resume with the same"):
        loader(interface, settings(data, **change), **options).load_state_dict(state)


def test_a_state_of_other_shards_is_refused(data, interface):
    state = loader(interface, settings(data)).state_dict()
    fewer = settings(data, train=[{"shards": str(data / "pairs"), "task": "image_text"}])
    with pytest.raises(ConfigError, match=r"shards by source = \[8, 8\], now it is \[8\]"):
        loader(interface, fewer).load_state_dict(state)


def test_too_few_shards_for_the_readers(data, interface):
    with pytest.raises(DataError, match=r"8 shards are too few for 9 readers .* lower data.workers"):
        loader(interface, settings(data, workers=3), world=3)


def damaged(root: Path, kind: str) -> Path:
    """4 shards of 5 pairs, in the second of which two samples are broken in a way."""
    samples = pairs(20)
    for n in (6, 8):
        if kind == "truncated picture":
            samples[n].image = PICTURE[:40]
        elif kind == "no caption":
            samples[n].captions = []
        elif kind == "too long for a row":
            samples[n].captions = ["a red circle " * 100]
    write_shards(samples, root / "pairs", samples_per_shard=5)
    if kind == "annotation":
        tar = root / "pairs/000001.tar"
        tar.write_bytes(tar.read_bytes().replace(b'{"captions": ["6 ', b'{"captions": [[6 ').replace(b'["8 ', b"[[8 "))
    return root / "pairs"


@pytest.mark.parametrize("kind", ["truncated picture", "no caption", "annotation"])
@pytest.mark.parametrize("workers", [0, 2])
def test_broken_samples_are_counted_named_and_skipped(tmp_path, interface, kind, workers):
    sources = [{"shards": str(damaged(tmp_path, kind)), "task": "image_text"}]
    config = settings(tmp_path, train=sources, workers=workers)
    keys, broken = [], []
    for batch in loader(interface, config, repeat=False):
        keys += batch.keys
        broken += batch.broken
    assert sorted(keys) == sorted(f"p{n}" for n in range(20) if n not in (6, 8))
    assert len(broken) == 2 and {key for key in ("'p6'", "'p8'") for line in broken if key in line} == {"'p6'", "'p8'"}


def test_broken_samples_resume_uncounted(tmp_path, interface):
    """What was reported before a stop is not reported again after it, and still counts toward the limit."""
    sources = [{"shards": str(damaged(tmp_path, "truncated picture")), "task": "image_text"}]
    config = settings(tmp_path, train=sources, rows=1, max_broken=1000)
    whole = contents(take(loader(interface, config), 45))
    reports = [line for _, broken, *_ in whole for line in broken]
    assert len(reports) > 6  # the same two samples in every epoch
    for stop in range(0, 45, 4):
        stream = loader(interface, config)
        before = contents(take(stream, stop))
        resumed = loader(interface, config)
        resumed.load_state_dict(json.loads(json.dumps(stream.state_dict())))
        assert before + contents(take(resumed, 45 - stop)) == whole
    counted = resumed.stream.states[0]["broken"]
    assert counted == len(reports)


@pytest.mark.parametrize("kind", ["truncated picture", "no caption"])
@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_broken_samples_stop_the_stream(tmp_path, interface, kind, workers):
    sources = [{"shards": str(damaged(tmp_path, kind)), "task": "image_text"}]
    config = settings(tmp_path, train=sources, workers=workers, max_broken=3)
    with pytest.raises(DataError, match=r"^4 broken samples, more than data.max_broken=3; the last:\n  ") as caught:
        take(loader(interface, config), 1000)
    assert "Traceback" not in str(caught.value)
    assert "'p8'" in str(caught.value) or "'p6'" in str(caught.value)
    assert "metalm data check" in str(caught.value)


@pytest.mark.parametrize("repeat", [True, False])
@pytest.mark.parametrize("workers", [0, 1])
def test_data_that_the_task_cannot_use_stop_at_once(data, interface, repeat, workers):
    """Texts for a task on images: not a batch comes of them, whatever the limit."""
    sources = [{"shards": str(data / "texts"), "task": "image_text"}]
    config = settings(data, train=sources, workers=workers, max_broken=50)
    with pytest.raises(DataError, match="the task image_text needs captions of an image"):
        take(loader(interface, config, repeat=repeat), 1)


@pytest.mark.parametrize("repeat", [True, False])
@pytest.mark.parametrize("content", [b"", b"\0" * 10240, b"no tar at all" * 100])
def test_shards_without_a_sample_stop_at_once(tmp_path, interface, content, repeat):
    for n in range(2):
        (tmp_path / f"{n}.tar").write_bytes(content)
    config = settings(tmp_path, train=[{"shards": str(tmp_path), "task": "image_text"}])
    with pytest.raises(DataError, match=r"(without a readable sample|not one document).*\.tar"):
        take(loader(interface, config, repeat=repeat), 1)


def test_a_row_too_short_for_a_document_says_so(tmp_path, interface):
    sources = [{"shards": str(damaged(tmp_path, "too long for a row")), "task": "image_text"}]
    longer = Interface(interface.tokenizer, interface.processors, interface.connectors, max_length=1000)
    batches = take(loader(longer, settings(tmp_path, train=sources), repeat=False), 100)
    messages = [line for batch in batches for line in batch.broken]
    assert len(messages) == 2
    assert all("positions do not fit data.row_length=64" in line for line in messages)


def test_a_text_of_100_000_tokens_streams(tmp_path, interface):
    write_shards([Sample("book", text=(" ".join(WORDS) + " ") * 5000), *texts(3)], tmp_path / "texts")
    config = settings(tmp_path, train=[{"shards": str(tmp_path / "texts"), "task": "text", "objective": {"type": "causal"}}])
    batches = list(loader(interface, config, repeat=False))
    assert sum(batch.num_positions for batch in batches) > 100_000
    assert {key for batch in batches for key in batch.keys} == {"book", "t0", "t1", "t2"}
    targets = torch.cat([batch.targets_L for batch in batches])
    assert (targets == interface.tokenizer.document_end).sum() == 4


def test_a_stream_of_real_captions_is_packed(shared, tmp_path, interface):
    """Photos with their captions, 64 states an image, in rows of 1,024: at least 97 % of the positions carry something."""
    with open(shared / "data/flickr8k/captions.jsonl") as file:
        records = [json.loads(line) for line in itertools.islice(file, 1000)]
    tokenizer = Tokenizer.train([text for record in records for text in record["captions"]], 2000)
    write_shards((Sample(f"f{n}", PICTURE, record["captions"]) for n, record in enumerate(records)), tmp_path / "photos")
    processor = FusedProcessor(image_size=64, num_patches=64, max_positions=64)
    model = Interface(tokenizer, {"fused": processor}, interface.connectors, max_length=1024)
    sources = [{"shards": str(tmp_path / "photos"), "task": "image_text"}]
    config = settings(tmp_path, train=sources, row_length=1024, rows=8, block=1024)
    batches = list(loader(model, config, repeat=False))
    assert sorted(key for batch in batches for key in batch.keys) == sorted(f"f{n}" for n in range(1000))
    useful = sum(batch.num_positions for batch in batches) / sum(batch.document_BT.numel() for batch in batches)
    assert useful >= 0.97


@pytest.mark.parametrize(
    "source, message",
    [
        (
            {"shards": "x", "task": "image_txt"},
            r"run.yaml: train\[0\]: no task is called 'image_txt'; did you mean 'image_text'",
        ),
        ({"shards": "x", "task": "vqa", "objective": {"type": "causal"}}, "the task 'vqa' takes no objective"),
        ({"shards": "x", "task": "vqa", "weight": 0}, "weight 0.0 must be positive"),
        ({"shards": "x", "task": "vqa", "prefix": 0.5}, "prefix 0.5 is a share of the captions of the task image_text"),
        (
            {"shards": "x", "task": "text", "objective": {"type": "casual"}},
            "no objective is called 'casual'; did you mean 'causal'",
        ),
        ({"shards": "x"}, r"train\[0\] lacks the key 'task'"),
    ],
)
def test_impossible_sources_are_refused(source, message):
    with pytest.raises(ConfigError, match=message):
        build(DataConfig, {"train": [source]}, "run.yaml")


@pytest.mark.parametrize("change", [{"train": []}, {"rows": 0}, {"block": 0}, {"row_length": 0}])
def test_impossible_shapes_are_refused(data, change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        settings(data, **change)


def test_a_text_needs_an_objective_unless_the_model_is_one(data, interface):
    shards = str(data / "texts")
    bare = build(DataConfig, {"train": [{"shards": shards, "task": "text"}]}, "run.yaml")
    with pytest.raises(ConfigError, match=r"the task text needs an objective, one of: causal, prefix, semicausal"):
        loader(interface, bare)
    with pytest.raises(ConfigError, match="'classification' is for a model of its own"):
        loader(interface, build(DataConfig, {"train": [{"shards": shards, "task": "classification"}]}, "run.yaml"))
    both_ways = Interface(interface.tokenizer, {}, {}, max_length=64, layout=MIMLayout(r2l_token=7))
    assert next(iter(loader(both_ways, bare))).branch_BT.max() == 2
    for source, message in (
        ({"shards": shards, "task": "text", "objective": {"type": "causal"}}, "an objective is for the model 'metalm'"),
        (
            {"shards": shards, "task": "captioning"},
            "the task 'captioning' is for the model 'metalm'.* a task of its own, 'text'",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            loader(both_ways, build(DataConfig, {"train": [source]}, "run.yaml"))


def test_missing_shards_are_named(interface, tmp_path):
    config = settings(tmp_path, train=[{"shards": str(tmp_path / "nowhere"), "task": "image_text"}])
    with pytest.raises(DataError, match=r"nowhere.*does not exist; make shards with `metalm data"):
        loader(interface, config)


@pytest.mark.parametrize(
    "source, message",
    [
        ({"task": "vqa", "captions": 2}, "captions 2 must be at least 1, and 1 for tasks but image_text and captioning"),
        ({"task": "image_text", "captions": 0}, "captions 0 must be at least 1"),
    ],
)
def test_options_that_a_task_has_not_are_refused(data, source, message):
    with pytest.raises(ConfigError, match=message):
        settings(data, train=[{"shards": str(data / "pairs"), **source}])


def test_a_program_ends_although_its_workers_are_busy(data):
    """As one does that fails, with the batches that workers have ready still in its hands."""
    program = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_stream import Interface, Tokenizer, FusedProcessor, ConnectorConfig, caption, loader, settings
tokenizer = Tokenizer.train([caption(n) for n in range(50)], 300)
processor = FusedProcessor(image_size=8, num_patches=4, max_positions=32)
interface = Interface(tokenizer, {{"fused": processor}}, {{"fused": ConnectorConfig("linear")}}, max_length=64)
batches = iter(loader(interface, settings(Path({str(data)!r}), workers=2)))
next(batches)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("workers", [0, 1])
def test_a_model_that_cannot_read_the_data_says_so_from_a_worker_too(tmp_path, interface, workers):
    from metalm.data.audio import encode_wav

    sound = encode_wav(torch.zeros(400), 8000)
    write_shards([Sample(f"s{n}", audio=sound, captions=["hum"]) for n in range(4)], tmp_path, samples_per_shard=2)
    config = settings(tmp_path, train=[{"shards": str(tmp_path), "task": "captioning"}], workers=workers)
    with pytest.raises(ConfigError, match=r"^the data hold sounds, but the model has no audio encoder$"):
        take(loader(interface, config), 1)
