"""webdataset shards in and out.

A data set is a folder of tar files (`000000.tar`, …) with an `index.json` that counts them; a list of folders, tars,
brace patterns (`shards/{0000..0099}.tar`) or URLs that webdataset opens (`pipe:…`, `http…`) works as well.
Reading never decodes pictures: bytes go through until a worker lays the sample out.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from metalm.data.sample import Sample, sample_from_members, sample_to_members
from metalm.errors import DataError

INDEX = "index.json"


def write_shards(samples: Iterable[Sample], out: str | Path, samples_per_shard: int = 512, source: str = "") -> dict:
    """Write samples as numbered shards and their index; returns the index.

    Args:
        out: folder to make; it must not hold shards already.
        samples_per_shard: small enough that there are at least as many shards as data-loading workers on all ranks.
        source: a line on where the data come from, kept in the index.

    Raises:
        DataError: `out` already holds shards, two samples share a key, or there is no sample at all.
    """
    import webdataset as wds

    out = Path(out)
    if list(out.glob("*.tar")):
        raise DataError(f"{out} already holds shards: remove it or choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    shards: dict[str, int] = {}
    keys: set[str] = set()
    writer = None
    try:
        for number, sample in enumerate(samples):
            if sample.key in keys:
                raise DataError(f"two samples have the key {sample.key!r}: keys must be unique in a data set")
            keys.add(sample.key)
            if number % samples_per_shard == 0:
                if writer:
                    writer.close()
                name = f"{number // samples_per_shard:06d}.tar"
                writer = wds.TarWriter(str(out / name), mtime=0)
                shards[name] = 0
            writer.write(sample_to_members(sample))
            shards[name] += 1
    finally:
        if writer:
            writer.close()
    if not shards:
        raise DataError(f"no sample to write to {out}: check the importer's arguments")
    index = {"source": source, "num_samples": len(keys), "shards": shards}
    (out / INDEX).write_text(json.dumps(index, indent=1))
    return index


def list_shards(spec: str | list[str]) -> list[str]:
    """The shards that a folder, a tar, a brace pattern, a URL, or a list of these names, in order.

    Raises:
        DataError: nothing is there.
    """
    from braceexpand import braceexpand

    shards: list[str] = []
    for entry in [spec] if isinstance(spec, str) else spec:
        if "://" in entry or entry.startswith("pipe:"):
            shards += braceexpand(entry)
            continue
        for path in map(Path, braceexpand(entry)):
            found = sorted(str(tar) for tar in path.glob("*.tar")) if path.is_dir() else [str(path)]
            if not found or not Path(found[0]).exists():
                what = "holds no *.tar" if path.is_dir() else "does not exist"
                raise DataError(f"shards {str(path)!r}: this path {what}; make shards with `metalm data scenes|import`")
            shards += found
    return shards


def read_shard(
    url: str, start: int = 0, on_error: Callable[[Exception], None] | None = None
) -> Iterator[tuple[int, Sample]]:
    """The samples of one shard with their number, from the `start`-th on.

    Args:
        on_error: takes the `DataError` of a broken sample or tar, after which reading goes on with what is left;
            without it the error is raised.
    """
    import webdataset as wds
    from webdataset.tariterators import tarfile_to_samples

    def report(error: Exception) -> None:
        if on_error is None:
            raise error
        on_error(error)

    def explain(error: Exception) -> DataError:
        if isinstance(error, tarfile.TarError | EOFError | ValueError):
            return DataError(f"shard {url}: not a complete tar file ({error}); write it again or remove it")
        return DataError(f"shard {url}: cannot be read ({error})")

    stream = tarfile_to_samples(handler=wds.handlers.reraise_exception)([{"url": url}])
    number = -1
    while True:
        try:
            members = next(stream)
        except StopIteration:
            break
        except Exception as error:  # webdataset wraps whatever the opener or tarfile raised
            report(explain(error))
            break
        number += 1
        if number < start:
            continue
        try:
            sample = sample_from_members(members)
        except DataError as error:
            report(DataError(f"shard {url}: {error}"))
            continue
        yield number, sample
    if number < 0 and start == 0:
        report(DataError(f"shard {url}: empty (no sample in it); remove it or write it again"))


def read_samples(spec: str | list[str]) -> Iterator[Sample]:
    """Every sample of a data set in order; a broken one raises `DataError`."""
    for url in list_shards(spec):
        for _, sample in read_shard(url):
            yield sample
