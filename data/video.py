"""Frames of encoded films (MP4, WebM, Matroska, AVI, …), by PyAV."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor

from metalm.errors import ConfigError, DataError


def import_av() -> Any:
    """PyAV, at need; raises `ConfigError` where it is missing."""
    try:
        import av
    except ImportError as error:
        raise ConfigError("films need PyAV: pip install 'metalm[video]'") from error
    return av


def decode_frames(encoded: bytes, count: int) -> list[Tensor]:
    """`count` frames as uint8 [3, height, width], evenly spread from the film's beginning to its end; of a film that has fewer,
    some come twice.

    The film is decoded up to the last of them.

    Raises:
        ConfigError: PyAV is not installed.
        DataError: the bytes are no film, or it breaks off.
    """
    av = import_av()
    try:
        with av.open(io.BytesIO(encoded)) as film:
            if not film.streams.video:
                raise DataError("a film without pictures")
            total = film.streams.video[0].frames or sum(packet.size > 0 for packet in film.demux(video=0))
        if not total:
            raise DataError("a film without pictures")
        wanted = [round(n * (total - 1) / max(1, count - 1)) for n in range(count)]
        frames = {}
        with av.open(io.BytesIO(encoded)) as film:
            for number, frame in enumerate(film.decode(video=0)):
                if number in wanted:
                    frames[number] = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
                if number == wanted[-1]:
                    break
    except (av.FFmpegError, EOFError) as error:
        raise DataError(f"not a complete film ({error.strerror if isinstance(error, av.FFmpegError) else error})") from error
    if wanted[-1] not in frames and len(frames) < len(set(wanted)) - 1:  # a header may promise a frame too many
        raise DataError(f"a film that breaks off: {len(frames)} of {len(set(wanted))} frames are there")
    last = max(frames)
    return [frames.get(number, frames[last]) for number in wanted]
