"""webdataset shards in and out.

A data set is a folder of tar files (`000000.tar`, …) with an `index.json` that counts them; a list of folders, tars,
brace patterns (`shards/{0000..0099}.tar`) or URLs that webdataset opens (`pipe:…`, `http…`) works as well.
Reading never decodes pictures: bytes go through until a worker lays the sample out.
"""

from __future__ import annotations

import itertools
import json
import re
import tarfile
import zlib
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
        DataError: `out` already holds shards, two samples share a key, there is no sample at all, or the disk is full.
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
    except OSError as error:
        remedy = f"free space, remove {out} and run again"
        raise DataError(f"{out}: writing stopped after {len(keys) - 1} samples ({error.strerror}); {remedy}") from error
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


def public_name(spec: str) -> str:
    """What strangers may read of a name of shards, or of any other string of a configuration: no command, no signature and no
    password.

    pipe:curl -H "Token: x" https://h/a-{00..99}.tar?k=y    pipe:… a-{00..99}.tar
    https://user:password@host/a.tar?signature=…            https://host/a.tar
    """
    if spec.lstrip().startswith("pipe:"):
        return " ".join(["pipe:…", *re.findall(r"[^\s/\\'\"=?&#@:;|<>]+\.(?:tar|tgz)\b(?:\.\w+)?", spec)])
    if "://" not in spec:
        return spec
    return re.sub(r"(://)[^/\s]*@", r"\1", re.split(r"[?#]", spec, maxsplit=1)[0])


def count_samples(spec: str | list[str]) -> int | None:
    """How many samples the folders of a `list_shards` name hold by their indices; None where one has none."""
    from braceexpand import braceexpand

    total = 0
    for entry in [spec] if isinstance(spec, str) else spec:
        if "://" in entry or entry.startswith("pipe:"):
            return None
        for folder in braceexpand(entry):
            if not (Path(folder) / INDEX).is_file():
                return None
            total += json.loads((Path(folder) / INDEX).read_text())["num_samples"]
    return total


class _StrictTarInfo(tarfile.TarInfo):
    """Makes an error of a header that tarfile, and webdataset with it, takes for the end of the tar.

    A whole tar ends in a block of zeros. One that was cut between two members, or overwritten there, does not.
    """

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} at byte {tar.offset:,}") from error


def _read_files(url: str) -> Iterator[dict]:
    """The files of a tar from front to back, as webdataset groups them.

    Of a file on disk each member is read in one piece; a pipe or a URL cannot be sought in and comes through tarfile's buffer.
    """
    from webdataset.gopen import gopen

    opened = gopen(url)
    mode = "r:*" if hasattr(opened, "seekable") and opened.seekable() else "r|*"
    with tarfile.open(fileobj=opened, mode=mode, tarinfo=_StrictTarInfo) as tar:
        for info in tar:
            if info.isreg():
                yield {"fname": info.name, "data": _read_member(tar, info, mode), "__url__": url}
            tar.members = []  # tarfile would remember all


def _read_member(tar: tarfile.TarFile, info: tarfile.TarInfo, mode: str) -> bytes:
    if mode == "r|*" or info.issparse():
        return tar.extractfile(info).read()
    tar.fileobj.seek(info.offset_data)
    data = tar.fileobj.read(info.size)
    if len(data) < info.size:
        raise tarfile.ReadError("unexpected end of data")
    return data


def read_members(url: str) -> Iterator[dict]:
    """The samples of one shard as their tar members: {extension: bytes}, and their name under `__key__`.

    Raises:
        DataError: after what could be read: the shard cannot be opened, is no tar, is cut short or damaged, or is
            empty. A sample at the cut, which may lack members, is withheld.
    """
    import webdataset as wds
    from webdataset.tariterators import group_by_keys

    empty = True
    try:
        for members in group_by_keys(_read_files(url), handler=wds.handlers.reraise_exception):
            empty = False
            yield members
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise DataError(f"shard {url}: not a complete tar file ({error}); write it again or remove it") from error
    except Exception as error:  # whatever the opener raised; webdataset appends to the arguments of errors
        reason = error if isinstance(error, OSError) or not error.args else error.args[0]
        raise DataError(f"shard {url}: cannot be read ({reason})") from error
    if empty:
        raise DataError(f"shard {url}: empty (no sample in it); remove it or write it again")


def read_shard(url: str, start: int = 0, on_error: Callable[[Exception], None] | None = None) -> Iterator[tuple[int, Sample]]:
    """The samples of one shard with their number, from the `start`-th on.

    Args:
        on_error: takes the `DataError` of a broken sample or tar, after which reading goes on with what is left;
            without it the error is raised.
    """

    def report(error: DataError) -> None:
        if on_error is None:
            raise error
        on_error(error)

    stream = read_members(url)
    for number in itertools.count():
        try:
            members = next(stream)
        except StopIteration:
            return
        except DataError as error:
            report(error)
            return
        if number < start:
            continue
        try:
            sample = sample_from_members(members)
        except DataError as error:
            report(DataError(f"shard {url}: {error}"))
            continue
        yield number, sample


def read_samples(spec: str | list[str]) -> Iterator[Sample]:
    """Every sample of a data set in order; a broken one raises `DataError`."""
    for url in list_shards(spec):
        for _, sample in read_shard(url):
            yield sample
