"""From shards to packed batches: a weighted mixture, shuffled, split over ranks and workers, and resumable exactly.

Each reader (a worker of a rank) owns every R-th shard and goes through them in an order drawn anew each epoch. It draws
samples from its sources by weight until a block of documents is full, packs the block into rows by best fit and shuffles
the rows. A block is thus the unit of shuffling, of packing and of resuming: the state is where each source stood when the
block began and how many of its rows have gone out. Resuming reads the block again and drops those rows, so no sample is
repeated or skipped, and nothing but a few integers is ever saved.

Pictures are decoded when their row goes out, not when the block is filled.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.synchronize import Event
from typing import Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from metalm.config import plugin
from metalm.data.prompts import TASKS, Interface
from metalm.data.sample import Sample
from metalm.data.shards import list_shards, read_shard
from metalm.data.takes import QUIET, Take, draw_take
from metalm.data.views import View, draw_view
from metalm.errors import ConfigError, DataError, MetalmError, about
from metalm.nn.packing import pack
from metalm.objectives import OBJECTIVES
from metalm.segments import Batch, Document


@dataclass
class SourceConfig:
    """One part of the mixture: shards, the task that lays them out, and how often it is drawn.

    `weight` may have a schedule, [[step, weight], …], with straight lines between, looked up at the beginning of a block;
    `loss_weight` is that of its targets in the loss. `objective` is for the task `text` alone, which cannot do without unless
    the model itself is a way of learning texts;
    `captions` of an image are learned at each visit, by the tasks `image_text` and `captioning`; `prefix` is how often the task
    `image_text` gives a caption's beginning to the encoder, as the paper always does: what is said first, the subject, is
    otherwise seldom predicted from the image alone. `crop` below 1 shows a part of the image, drawn anew at each visit, of at
    least this share of either side; `mirror` shows every second one mirrored, which is for captions without left and right;
    sounds may be heard with up to `pad` seconds of silence on either side, in `noise` that is at least so many decibels below
    them, and `perturb`ed: with another pitch and tempo, brighter or darker, by up to this share, and with as wide gaps.
    """

    shards: str | list[str]
    task: str
    weight: float | list[list[float]] = 1.0
    loss_weight: float = 1.0
    captions: int = 1
    prefix: float = 1.0
    crop: float = 1.0
    mirror: bool = False
    pad: float = 0.0
    noise: float | None = None
    perturb: float = 0.0
    objective: object = plugin(OBJECTIVES, default=None)

    def __post_init__(self):
        if self.task not in TASKS:
            from metalm.registry import did_you_mean

            raise ConfigError(f"no task is called {self.task!r}{did_you_mean(self.task, list(TASKS))}")
        self.check_weights()
        if self.captions < 1 or (self.captions > 1 and self.task not in ("image_text", "captioning")):
            raise ConfigError(f"captions {self.captions} must be at least 1, and 1 for tasks but image_text and captioning")
        if not 0 <= self.prefix <= 1 or (self.prefix < 1 and self.task != "image_text"):
            raise ConfigError(f"prefix {self.prefix} is a share of the captions of the task image_text, from 0 to 1")
        if not 0 < self.crop <= 1:
            raise ConfigError(f"crop {self.crop} is the least share of a side that is kept, above 0 and at most 1")
        if not 0 <= self.perturb < 1:
            raise ConfigError(f"perturb {self.perturb} is the most by which a sound is changed, from 0 to below 1")
        if self.pad < 0:
            raise ConfigError(f"pad {self.pad} is how many seconds of silence a sound has at most on either side, at least 0")
        if self.noise is not None and self.noise > QUIET:
            raise ConfigError(f"noise {self.noise} is how many decibels it is below a sound at least, at most {QUIET:g}")
        if self.task != "text" and self.objective is not None:
            raise ConfigError(f"the task {self.task!r} takes no objective")

    def check_weights(self) -> None:
        points = self.weight if isinstance(self.weight, list) else [[0, self.weight]]
        if not points or any(len(point) != 2 for point in points):
            raise ConfigError(f"weight {self.weight} is neither a number nor a list of [step, weight]")
        steps, weights = zip(*points)
        if list(steps) != sorted(set(steps)) or min(weights) < 0 or max(weights) == 0:
            raise ConfigError(f"weight {self.weight} must be positive; the steps of a schedule must rise")
        if self.loss_weight <= 0:
            raise ConfigError(f"loss_weight {self.loss_weight} must be positive")

    def weight_at(self, step: float) -> float:
        """The weight in the mixture at a step of training."""
        if not isinstance(self.weight, list):
            return self.weight
        return float(np.interp(step, *zip(*self.weight)))


@dataclass
class DataConfig:
    """The training mixture, the validation set, and the shape of a batch.

    `row_length` positions a row, `rows` rows a micro-batch and rank, `workers` data workers a rank; `block` documents are
    shuffled and packed together; more than `max_broken` broken samples stop a reader.

    `path` is a text file, a .jsonl, either as .gz, or a folder of these, which is imported into the run's own folder before
    training: its documents (`per` says what one is: document, line, or file) but the last `held_out` become `RUN/data/train`,
    the others `RUN/data/val`, for the sources to name.
    """

    train: list[SourceConfig]
    validation: list[SourceConfig] = field(default_factory=list)
    row_length: int = 256
    rows: int = 8
    workers: int = 1
    block: int = 512
    max_broken: int = 100
    path: str = ""
    per: Literal["document", "line", "file"] = "document"
    held_out: float = 0.1

    def __post_init__(self):
        if not 0 <= self.held_out < 1:
            raise ConfigError(f"held_out {self.held_out} is not in [0, 1)")
        if not self.train:
            raise ConfigError("train is empty: name at least one source")
        if any(isinstance(source.weight, list) for source in self.validation):
            raise ConfigError("validation reads everything once: its sources have no weight with a schedule")
        for name in ("row_length", "rows", "block"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1")


def check_fits(source: SourceConfig, interface: Interface) -> None:
    """Raises `ConfigError` where a model cannot learn what a source holds."""
    own = interface.layout.task if interface.layout else None
    if own and (source.task != own or source.objective):
        what = "an objective" if source.task == own else f"the task {source.task!r}"
        raise ConfigError(f"{source.shards}: {what} is for the model 'metalm'; this model has a task of its own, {own!r}")
    if own and source.loss_weight != 1:
        raise ConfigError(f"{source.shards}: loss_weight is for the model 'metalm'")
    if source.task in ("classification", "tagging", "seq2seq") and not own:
        raise ConfigError(f"{source.shards}: the task {source.task!r} is for a model of its own, see metalm.models")
    reader = interface.readers.get("audio") if source.perturb else None
    if reader and not getattr(interface.processors[reader], "warps", False):
        raise ConfigError(
            f"{source.shards}: perturb changes log-mel bands, and the encoder {reader!r} reads waves: take pad and noise"
        )
    if source.task == "text" and not interface.layout and not source.objective:
        raise ConfigError(f"{source.shards}: the task text needs an objective, one of: {', '.join(OBJECTIVES.names())}")


@dataclass
class Position:
    """Where a source stands: `offset` samples into the `shard`-th of this reader's shards in this `epoch`."""

    epoch: int = 0
    shard: int = 0
    offset: int = 0


class Source:
    """The samples of one source for one reader, epoch after epoch, from a position on."""

    def __init__(self, config: SourceConfig, shards: list[str], seed: str, reader: int, readers: int, repeat: bool):
        self.config, self.shards = config, shards
        self.seed, self.reader, self.readers, self.repeat = seed, reader, readers, repeat
        self.position = Position()
        self.errors: list[DataError] = []
        if len(self.shards) < readers:
            raise DataError(
                f"{config.shards}: {len(self.shards)} shards are too few for {readers} readers (ranks x data workers), each "
                "needs its own: lower data.workers or the number of processes, or import the data again with a smaller "
                "--samples-per-shard"
            )

    def epoch_shards(self, epoch: int) -> list[str]:
        shards = list(self.shards)
        if self.repeat:
            random.Random(f"{self.seed} {epoch}").shuffle(shards)
        return shards[self.reader :: self.readers]

    def __iter__(self) -> Iterator[Sample]:
        """Samples; `position` always tells where the next one starts. Broken ones are collected in `errors`."""
        while True:
            yielded = self.position.shard > 0 or self.position.offset > 0
            for number, url in list(enumerate(self.epoch_shards(self.position.epoch)))[self.position.shard :]:
                offset = self.position.offset if number == self.position.shard else 0
                self.position = Position(self.position.epoch, number, offset)
                for index, sample in read_shard(url, offset, self.errors.append):
                    self.position = Position(self.position.epoch, number, index + 1)
                    yielded = True
                    yield sample
            if not self.repeat:
                return
            if not yielded:
                raise DataError(f"{self.config.shards}: a whole epoch without a readable sample; the last: {self.errors[-1:]}")
            self.position = Position(self.position.epoch + 1)


class PackedStream(IterableDataset):
    """Batches of packed rows for one rank; iterate it through `Loader`."""

    def __init__(
        self,
        sources: list[SourceConfig],
        interface: Interface,
        config: DataConfig,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        repeat: bool = True,
        accumulation: int = 1,
    ):
        """Args: accumulation: batches that a rank takes a step, by which the steps of schedules are counted."""
        self.accumulation = accumulation
        self.sources, self.interface, self.config = sources, interface, config
        self.seed, self.rank, self.world, self.repeat = seed, rank, world, repeat
        for source in sources:
            check_fits(source, interface)
        self.objectives = [OBJECTIVES[s.objective.type](s.objective) if s.objective else None for s in sources]
        self.shards = [list_shards(source.shards) for source in sources]  # once: all readers divide the same ones
        self.states: dict[int, dict] = {}  # by reader
        self.first_slot = 0
        self.make_sources(0, world * max(config.workers, 1))  # complains about too few shards before any worker starts

    def make_sources(self, reader: int, readers: int) -> list[Source]:
        # Seeded by number, not by path: the data may lie elsewhere when a run resumes.
        return [
            Source(config, shards, f"{self.seed} {i}", reader, readers, self.repeat)
            for i, (config, shards) in enumerate(zip(self.sources, self.shards))
        ]

    def __iter__(self) -> Iterator[Batch | MetalmError]:
        """The batches; in a worker process an error is handed over as an item, since raising would wrap it in a traceback."""
        if get_worker_info() is None:
            yield from self.batches()
            return
        try:
            yield from self.batches()
        except MetalmError as error:
            yield error

    def batches(self) -> Iterator[Batch]:
        worker = get_worker_info()
        workers, slot = (worker.num_workers, worker.id) if worker else (1, 0)
        slot = (slot + self.first_slot) % workers
        reader = self.rank * workers + slot
        rows: list[list[Document]] = []
        broken: list[str] = []
        for row, state, messages in self.rows(reader, self.world * workers):
            broken += messages
            if row:
                rows.append(row)
            if len(rows) == self.config.rows:
                yield self.batch(rows, state, broken)
                rows, broken = [], []
        if rows:
            yield self.batch(rows, state, broken)

    def batch(self, rows: list[list[Document]], state: dict, broken: list[str]) -> Batch:
        batch = self.interface.collate(rows, self.config.row_length)
        batch.state, batch.broken = state, broken
        return batch

    def rows(self, reader: int, readers: int) -> Iterator[tuple[list[Document], dict, list[str]]]:
        """Loaded rows, each with the state after it and the messages of samples found broken on the way."""
        fresh = {"block": 0, "row": 0, "positions": None, "broken": 0, "before": 0, "weights": None}
        state = fresh | self.states.get(reader, {})
        sources = self.make_sources(reader, readers)
        if state["positions"]:
            for source, position in zip(sources, state["positions"]):
                source.position = Position(**position)
        iterators = [iter(source) for source in sources]
        block, skip, broken, before = (state[name] for name in ("block", "row", "broken", "before"))
        ended = [False] * len(sources)
        drawn = state["weights"] if skip else None  # of a block that is read again: by the weights by which it was drawn
        while not all(ended):
            # A reader's batches are every `readers / world`-th of its rank's.
            step = before / self.config.rows * (readers / self.world) / self.accumulation
            now = drawn or [source.config.weight_at(step) for source in sources]
            weights, drawn = [0.0 if end else weight for end, weight in zip(ended, now)], None
            if not any(weights):
                raise DataError(f"at step {step:,.0f} no source has a weight above 0, see the schedules of data.train")
            positions = [vars(source.position) for source in sources]
            rng = random.Random(f"{self.seed} {reader} {block}")
            documents, messages = [], []
            while len(documents) < self.config.block and any(weights):
                i = rng.choices(range(len(sources)), weights)[0]
                sample = next(iterators[i], None)
                messages += [str(error) for error in sources[i].errors]
                sources[i].errors.clear()
                if sample is None:
                    ended[i], weights[i] = True, 0.0
                    continue
                try:
                    with about(f"sample {sample.key!r}"):
                        documents += self.lay_out(i, sample, sources[i].position.epoch)
                except DataError as error:
                    messages.append(str(error))
                # In a block that is read again (skip), these are counted already.
                self.check_broken(broken + (0 if skip else len(messages)), messages)
            if not documents and messages and block == 0:
                raise DataError(f"not one document came of the data; the last error: {messages[-1]}")
            rows = pack([len(document) for document in documents], self.config.row_length)
            rng.shuffle(rows)
            for r, members in enumerate(rows):
                if r < skip:
                    messages = []
                    continue
                row = []
                for n in members:
                    try:
                        row.append(self.interface.load(documents[n]))
                    except DataError as error:
                        messages.append(str(error))
                broken += len(messages)
                self.check_broken(broken, messages)
                after = {
                    "block": block,
                    "row": r + 1,
                    "positions": positions,
                    "broken": broken,
                    "before": before,
                    "weights": now,
                }
                yield row, {"reader": reader, **after}, messages
                messages = []
            block, skip, before = block + 1, 0, before + len(rows)

    def check_broken(self, broken: int, messages: list[str]) -> None:
        if broken > self.config.max_broken:
            last = "\n  ".join(messages[-3:])
            raise DataError(
                f"{broken} broken samples, more than data.max_broken={self.config.max_broken}; the last:\n  {last}\n"
                "find them with `metalm data check`, or raise data.max_broken"
            )

    def lay_out(self, i: int, sample: Sample, epoch: int) -> list[Document]:
        """The sample's documents; chance depends on seed, epoch and key alone, not on who reads it."""
        rng = random.Random(f"{self.seed} {epoch} {i} {sample.key}")
        arguments = {"objective": self.objectives[i]} if self.objectives[i] else {}
        if self.sources[i].captions > 1:
            arguments["captions"] = self.sources[i].captions
        if self.sources[i].prefix < 1:
            arguments["prefix"] = self.sources[i].prefix
        views = self.draw_views(i, f"{self.seed} {epoch} {i} {sample.key} view")
        interface = replace(self.interface, views=views) if views else self.interface
        documents = list(TASKS[self.sources[i].task](interface, sample, rng, **arguments))
        if not self.interface.layout:
            learned = "text" if self.sources[i].task == "text" else modality(sample)  # captions alone are text, too
            own = {"weight": self.sources[i].loss_weight, "modality": learned}
            documents = [replace(document, **own) for document in documents]
        for document in documents:
            if len(document) > self.config.row_length:
                raise DataError(
                    f"sample {document.key!r}: {len(document)} positions do not fit data.row_length={self.config.row_length}"
                )
        return documents

    def draw_views(self, i: int, seed: str) -> dict[str, View | Take]:
        """By medium, how a sample of the i-th source is seen or heard; nothing where it is as it is."""
        source = self.sources[i]
        seen, heard = source.crop < 1 or source.mirror, source.pad or source.noise is not None or source.perturb
        rng = random.Random(seed) if seen or heard else None
        views: dict[str, View | Take] = {}
        if seen:
            views["image"] = views["video"] = draw_view(source.crop, source.mirror, rng)
        if heard:
            views["audio"] = draw_take(source.pad, source.noise, source.perturb, rng)
        return views


def modality(sample: Sample) -> str:
    """What a sample is made of: "image", "audio", "video", several of them, or "text"."""
    return "+".join(dict.fromkeys(kind for kind, _ in sample.media)) or "text"


def leave_signals_to_the_trainer(ending: Event, worker: int) -> None:
    """A launcher signals whole process groups; a worker that died of it would take the trainer along before it has saved.

    Once the trainer is `ending`, SIGTERM is its own word, and it waits for workers to obey.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if ending.is_set() else None)


class Loader:
    """Iterates a stream's batches in worker processes and knows its state after each.

    `state_dict` is of the batches handed out, not of those the workers have prepared ahead. A second iteration goes on
    there; that of a stream which does not repeat starts over.
    """

    def __init__(self, stream: PackedStream, pin_memory: bool = False):
        self.stream = stream
        self.workers = stream.config.workers
        self.handed_out = 0
        self.pin_memory = pin_memory

    def __iter__(self) -> Iterator[Batch]:
        # The next batch is due from the worker after the last one's.
        self.stream.first_slot = self.handed_out % max(self.workers, 1)
        ending = multiprocessing.Event()
        atexit.register(ending.set)  # called before multiprocessing ends the workers
        loader = DataLoader(
            self.stream,
            batch_size=None,
            num_workers=self.workers,
            prefetch_factor=4 if self.workers else None,
            worker_init_fn=partial(leave_signals_to_the_trainer, ending),
            pin_memory=self.pin_memory and torch.cuda.is_available(),
        )
        for batch in loader:
            if isinstance(batch, MetalmError):
                raise batch
            self.handed_out += 1
            state = dict(batch.state)
            reader = state.pop("reader")
            if self.stream.repeat:
                self.stream.states[reader] = state
            yield batch

    def division(self) -> dict:
        """What decides which reader gets which samples and how it blocks and packs them."""
        stream, config = self.stream, self.stream.config
        return {
            "training.seed": stream.seed,
            "number of processes": stream.world,
            "data.workers": self.workers,
            "data.block": config.block,
            "data.row_length": config.row_length,
            "number of shards by source": [len(shards) for shards in stream.shards],
        }

    def state_dict(self) -> dict:
        return {"handed_out": self.handed_out, "division": self.division(), "readers": dict(self.stream.states)}

    def load_state_dict(self, state: dict) -> None:
        """Goes on where `state_dict` was taken, by as many readers of as many shards.

        Raises:
            ConfigError: the samples are now divided in another way, so that some would come twice and others never.
        """
        for name, now in self.division().items():
            if state["division"][name] != now:
                raise ConfigError(
                    f"the run was saved with {name} = {state['division'][name]}, now it is {now}: that divides the samples "
                    "in another way, so resume with the same, or begin a new run with init_from"
                )
        self.handed_out = state["handed_out"]
        self.stream.states = {int(reader): dict(s) for reader, s in state["readers"].items()}
