"""Errors that speak to the person who runs METALM.

The command line prints their text alone, without a traceback: each says what was wrong, where, and what to do.
Anything else that is raised is a defect of ours and keeps its traceback.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class MetalmError(Exception):
    """Root of every error that the user can mend."""


class ConfigError(MetalmError):
    """A configuration that names an unknown key, has a wrong type, or cannot work."""


class DataError(MetalmError):
    """A shard, sample, image, or annotation file that cannot be used."""


@contextmanager
def about(what: str) -> Iterator[None]:
    """Says of a `DataError` what it is about: a sample, a file."""
    try:
        yield
    except DataError as error:
        raise DataError(str(error) if what in str(error) else f"{what}: {error}") from error


class CheckpointError(MetalmError):
    """A checkpoint or export that is missing, incomplete, or of another shape."""


class TrainingError(MetalmError):
    """A run that cannot go on: the loss is not finite, a batch has no target, the disk is full."""
