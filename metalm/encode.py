"""`metalm data encode`: a frozen encoder reads all media of a data set once, and shards keep its states.

    shard -> samples -> media, decoded by threads -> encoder, a batch at a time -> the samples with their states -> shard

Each shard becomes one of as many samples, in a file that appears when it is whole, and is listed in the index then: the same
command goes on where it was stopped. What it takes on disk: S x D numbers a medium, 300 KB for the 196 states of a ViT-B/16 in
bfloat16, a few times the size of its JPEG.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from metalm.config import build_plugin
from metalm.data.sample import Sample, sample_to_members
from metalm.data.shards import INDEX, count_samples, list_shards, public_name, read_shard
from metalm.data.states import pack_states, unpack_states
from metalm.encoders import ENCODERS
from metalm.encoders.base import Encoder, EncoderConfig
from metalm.errors import ConfigError, DataError, about
from metalm.fingerprint import fingerprint
from metalm.pretrained import FOREIGN, find_export, load_weights, read_model_config, read_part
from metalm.registry import did_you_mean
from metalm.training.config import load_run_config

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def load_encoder(model: str, name: str) -> tuple[Encoder, EncoderConfig]:
    """The encoder of this name, as a run that starts from the model has it.

    Args:
        model: a run, an export, a Hub id, or a run's configuration (`.yaml`) whose encoder starts from weights.

    Raises:
        ConfigError: the model has no such encoder, it reads no media alone, or its weights are drawn by chance.
    """
    if str(model).startswith(FOREIGN):
        raise ConfigError(f"{model} is a decoder alone: name a run, an export or a configuration that has encoders")
    start = ""
    if str(model).endswith((".yaml", ".yml")):
        run = load_run_config(model)
        configs = getattr(run.model, "encoders", {})
        start = run.init_from or getattr(configs.get(name), "init_from", "")
    else:
        plain = read_model_config(model).get("encoders", {})
        configs = {own: build_plugin(ENCODERS, plain[own], str(model), f"encoders.{own}") for own in plain}
        start = str(find_export(model))
    if name not in configs:
        raise ConfigError(f"{model} has no encoder {name!r}{did_you_mean(name, list(configs))}")
    config = configs[name]
    if hasattr(config, "vocab_size"):
        raise_reads_text(name)
    encoder = make(config, 0)
    if {*encoder.processor.reads} & {"text"} or len(encoder.processor.reads) != 1:
        raise_reads_text(name)
    if start:
        own = config.init_from or start
        load_weights(encoder, own, read_part(own, f"encoders.{name}")[0] + ".")
    elif fingerprint(encoder, config) != fingerprint(make(config, 1), config):
        raise ConfigError(
            f"encoders.{name} of {model} starts from random weights, which every run draws anew: give it pretrained ones or an "
            "init_from, or name an export"
        )
    return encoder.eval(), config


def make(config: EncoderConfig, seed: int) -> Encoder:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ENCODERS[config.type](config)


def raise_reads_text(name: str) -> None:
    raise ConfigError(
        f"encoders.{name} reads texts, which are laid out anew each time: there are states to keep of encoders of images, "
        "sounds or films alone"
    )


@dataclass
class MediaEncoder:
    """A frozen encoder that gives samples the states of their media, `kind` of `image`, `audio` or `video`.

    Samples whose media are broken are left out, and told to `report`; of what is kept, `drop_media` keeps states alone.
    """

    encoder: Encoder
    kind: str
    fingerprint: str
    dtype: torch.dtype
    batch_size: int
    drop_media: bool
    pool: ThreadPoolExecutor
    report: Callable[[DataError], None]
    media: int = 0  # so far

    def __call__(self, samples: Iterator[Sample]) -> Iterator[Sample]:
        """While the encoder reads a group of samples, the media of the next one are decoded."""
        ahead: list[tuple[Sample, list[Future]]] = []
        while group := list(islice(samples, self.batch_size)):
            submitted = [(sample, [self.pool.submit(self.load, data) for data in self.find(sample)]) for sample in group]
            yield from self.encode(ahead)
            ahead = submitted
        yield from self.encode(ahead)

    def find(self, sample: Sample) -> list[bytes]:
        found = sample.encoded[self.kind]
        if not found and any(states.encoder != self.fingerprint for states in sample.states.get(self.kind, ())):
            raise DataError(
                f"sample {sample.key!r}: of its media ({self.kind}) there are only the states of another encoder; encode the "
                "shards from which these were made"
            )
        return found

    def load(self, data: bytes) -> dict:
        return self.encoder.processor.load({self.kind: data})

    def encode(self, group: list[tuple[Sample, list[Future]]]) -> Iterator[Sample]:
        samples, loaded = [], []
        for sample, futures in group:
            try:
                with about(f"sample {sample.key!r}"):
                    own = [future.result() for future in futures]
            except DataError as error:
                self.report(error)
                continue
            samples.append((sample, len(own)))
            loaded += own
        states = iter(
            [one for at in range(0, len(loaded), self.batch_size) for one in self.states(loaded[at:][: self.batch_size])]
        )
        for sample, count in samples:
            yield self.with_states(sample, list(islice(states, count)))

    @torch.no_grad()
    def states(self, loaded: list[dict]) -> list[Tensor]:
        """Those of each medium, [S, D]."""
        processor = self.encoder.processor
        collated = processor.collate(loaded)
        device = next(self.encoder.parameters()).device
        flat_MD = self.encoder(**{name: x.to(device) for name, x in collated.inputs.items()}).flatten(0, 1)
        chosen_MD = flat_MD[collated.source.to(device)].to("cpu", self.dtype)
        return list(chosen_MD.split([processor.num_states(one) for one in loaded]))

    def with_states(self, sample: Sample, states: list[Tensor]) -> Sample:
        if not states:
            return sample
        self.media += len(states)
        fields = {"image": {"image": None, "more_images": []}}.get(self.kind, {self.kind: None}) if self.drop_media else {}
        stored = unpack_states(pack_states(states, self.fingerprint))
        return replace(sample, states=sample.states | {self.kind: stored}, **fields)


def encode_shards(
    model: str,
    name: str,
    data: str,
    out: str | Path,
    dtype: str = "bfloat16",
    drop_media: bool = False,
    batch_size: int = 32,
    max_broken: int = 100,
    device: str = "",
) -> dict:
    """Writes the data set with the states of its media; returns the index of it, and goes on with what was begun so.

    Args:
        model, name: see `load_encoder`.
        dtype: in which the encoder computes and states are kept; a run's `training.precision`, where they shall be the same.
        drop_media: leave the media themselves out.
        max_broken: so many samples may have broken media; they are left out.
        device: empty: the GPU if there is one.

    Raises:
        ConfigError: see `load_encoder`; or the dtype is none of these.
        DataError: `out` holds other shards, nothing is there to encode, the disk is full, or too many samples are broken.
    """
    from rich.progress import Progress

    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r}: bfloat16 or float32")
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}, it must be at least 1")
    urls, out = list_shards(data), Path(out)
    encoder, config = load_encoder(model, name)
    [kind] = encoder.processor.reads
    record = {"fingerprint": fingerprint(encoder, config), "dtype": dtype, "media": "left out" if drop_media else "kept"}
    index = begin(out, data, kind, record)
    broken = 0

    def report(error: DataError) -> None:
        nonlocal broken
        broken += 1
        if broken > max_broken:
            raise DataError(f"{broken} broken samples, more than --max-broken {max_broken}; the last: {error}")
        progress.console.print(f"left out: {error}", markup=False)

    encoder.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    for parameter in encoder.parameters():  # not buffers: what normalises pixels stays as precise as it is in training
        parameter.data = parameter.data.to(DTYPES[dtype])
    with ThreadPoolExecutor(os.cpu_count()) as pool, Progress() as progress:
        encode = MediaEncoder(encoder, kind, record["fingerprint"], DTYPES[dtype], batch_size, drop_media, pool, report)
        task = progress.add_task(f"{kind} states", total=count_samples(data), completed=index["num_samples"])
        for number, url in enumerate(urls):
            shard = f"{number:06d}.tar"
            if shard in index["shards"]:
                continue
            before = encode.media
            samples = (sample for _, sample in read_shard(url, on_error=report))
            written = (progress.advance(task) or sample_to_members(sample) for sample in encode(samples))
            index["shards"][shard] = write_shard(written, out / shard, url)
            index["num_samples"] += index["shards"][shard]
            index["encoders"][kind]["states_of"] += encode.media - before
            write_index(index, out)
    if not index["encoders"][kind]["states_of"]:
        raise DataError(f"{data}: no sample has what the encoder {name!r} reads ({kind}); remove {out}")
    return index


def begin(out: Path, data: str, kind: str, record: dict) -> dict:
    """The index of what is there of this encoding, perhaps nothing yet.

    Raises:
        DataError: there are shards of something else.
    """
    source = f"{public_name(data)}, encoded"
    before = Path(data) / INDEX
    others = json.loads(before.read_text()).get("encoders", {}) if before.is_file() else {}
    fresh = {"source": source, "num_samples": 0, "shards": {}, "encoders": others | {kind: record | {"states_of": 0}}}
    if (out / INDEX).is_file():
        index = json.loads((out / INDEX).read_text())
        own = index.get("encoders", {}).get(kind, {})
        for key, value in (record | {"source": source}).items():
            found = index.get("source") if key == "source" else own.get(key)
            if found != value:
                raise DataError(
                    f"{out} holds shards of another encoding ({key}: {found}, now {value}): choose another --out, or remove it"
                )
        return index
    if list(out.glob("*.tar")):
        raise DataError(f"{out} already holds shards: remove it or choose another --out")
    return fresh


def write_shard(samples: Iterator[dict], path: Path, url: str) -> int:
    """Writes a whole shard, of samples as tar members, or none; returns how many there are."""
    import webdataset as wds

    partial, count = path.with_suffix(".partial"), 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with wds.TarWriter(str(partial), mtime=0) as writer:
            for sample in samples:
                writer.write(sample)
                count += 1
        if not count:
            raise DataError(f"shard {url}: no sample is left of it; write it again, or name the other shards alone")
        partial.rename(path)
    except OSError as error:
        raise DataError(
            f"{path}: writing stopped ({error.strerror}); free space and run the same command again, which goes on here"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return count


def write_index(index: dict, out: Path) -> None:
    partial = out / f"{INDEX}.partial"
    try:
        partial.write_text(json.dumps(index, indent=1))
        partial.rename(out / INDEX)
    except OSError as error:
        raise DataError(
            f"{out / INDEX}: writing stopped ({error.strerror}); free space and run the same command again"
        ) from error
