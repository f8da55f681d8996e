"""Pictures or sounds by name out of a folder or a zip, as the bytes that lie there; and sample keys made from their names."""

from __future__ import annotations

import logging
import re
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from metalm.errors import DataError

log = logging.getLogger(__name__)


class MediaSource:
    """Read-only access to the files of a folder or zip (stored or compressed).

    A name is found by its path below the folder or zip, or by its file name alone wherever it lies, since archives
    wrap their pictures in folders of their own (`val2014/…`, `Flicker8k_Dataset/…`).

    Args:
        path: the folder or zip.
        skip_missing: `read` returns None for a file that is not there and notes it in `missing`, in place of raising.
        kind: what errors call a file.

    Raises:
        DataError: the path is neither a folder nor a zip.
    """

    def __init__(self, path: str | Path, skip_missing: bool = False, kind: str = "image"):
        self.path, self.kind = Path(path), kind
        self.skip_missing = skip_missing
        self.missing: list[str] = []
        self._zip: zipfile.ZipFile | None = None
        self._by_file_name: dict[str, list[str]] | None = None
        if self.path.is_dir():
            return
        if not self.path.exists():
            raise DataError(f"{kind}s {str(path)!r}: this path does not exist; give the folder or zip of the {kind}s")
        try:
            self._zip = zipfile.ZipFile(self.path)
        except (OSError, zipfile.BadZipFile) as error:
            raise DataError(f"{kind}s {str(path)!r}: neither a folder nor a zip ({error})") from error

    def read(self, *names: str) -> bytes | None:
        """The bytes of the first of these names that is there; None if none is and `skip_missing` is set.

        Raises:
            DataError: the file is missing, two files have its name, or it cannot be read.
        """
        for name in names:
            member = self._find(name)
            if member is None:
                continue
            try:
                data = (self.path / member).read_bytes() if self._zip is None else self._zip.read(member)
            except (OSError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
                raise DataError(f"{self.kind} {member!r} in {self.path}: cannot be read ({error})") from error
            if not data:
                raise DataError(f"{self.kind} {member!r} in {self.path}: the file is empty")
            return data
        if not self.skip_missing:
            raise DataError(
                f"{self.kind} {' or '.join(map(repr, names))} is not in {self.path}; complete the {self.kind}s, or leave out "
                f"the samples without one (skip_missing)"
            )
        self.missing.append(names[0])
        return None

    def report_missing(self) -> None:
        """Says at the end of an import how many files were skipped."""
        if self.missing:
            log.warning("%d %ss not in %s were skipped, first %r", len(self.missing), self.kind, self.path, self.missing[0])

    def _find(self, name: str) -> str | None:
        if self._zip is None:
            if (self.path / name).is_file():
                return name
        elif name in self._zip.NameToInfo:
            return name
        if self._by_file_name is None:
            self._by_file_name = self._list_by_file_name()
        found = self._by_file_name.get(PurePosixPath(name).name, [])
        within = [member for member in found if member.endswith("/" + name)] or found
        if len(within) > 1:
            raise DataError(
                f"{self.kind} {name!r}: {self.path} has {len(within)} files of this name ({within[0]}, {within[1]}, …); "
                f"name it by its path"
            )
        return within[0] if within else None

    def _list_by_file_name(self) -> dict[str, list[str]]:
        if self._zip is None:
            members = [path.relative_to(self.path).as_posix() for path in self.path.rglob("*") if path.is_file()]
        else:
            members = [name for name in self._zip.namelist() if not name.endswith("/") and "__MACOSX/" not in name]
        by_file_name: dict[str, list[str]] = {}
        for member in sorted(members):
            by_file_name.setdefault(PurePosixPath(member).name, []).append(member)
        return by_file_name


def open_media(images: str | Path | MediaSource, skip_missing: bool = False) -> MediaSource:
    """The source of images at a path; one that is open already (to look at its `missing` afterwards) stays as it is."""
    return images if isinstance(images, MediaSource) else MediaSource(images, skip_missing)


def sample_key(name: str, taken: set[str]) -> str:
    """A key for the file `name` that is not in `taken`, to which it is added.

    It is the file's stem with everything but letters, digits, `_` and `-` as `_`; if that is taken, with a number.
    """
    stem = re.sub(r"[^\w-]+", "_", PurePosixPath(name).stem) or "image"
    key, number = stem, 1
    while key in taken:
        number += 1
        key = f"{stem}-{number}"
    taken.add(key)
    return key
