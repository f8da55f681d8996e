"""Errors that speak to the person who runs METALM.

The command line prints their text alone, without a traceback: each says what was wrong, where, and what to do.
Anything else that is raised is a defect of ours and keeps its traceback.
"""


class MetalmError(Exception):
    """Root of every error that the user can mend."""


class ConfigError(MetalmError):
    """A configuration that names an unknown key, has a wrong type, or cannot work."""


class DataError(MetalmError):
    """A shard, sample, image, or annotation file that cannot be used."""


class CheckpointError(MetalmError):
    """A checkpoint or export that is missing, incomplete, or of another shape."""


class TrainingError(MetalmError):
    """A run that cannot go on: the loss is not finite, a batch has no target, the disk is full."""
