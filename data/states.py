"""States of a frozen encoder as shards hold them: what they are of need not be decoded and read again.

A sample's member `image.safetensors` (or `audio.`, `video.`), written by `metalm data encode`, holds the states of its images,
float [S, D] each, by their numbers from "0" on, and in its metadata, under `encoder`, the fingerprint of what made them
(`metalm.fingerprint`). How many states there are stands in its header: a layout counts positions without a look at the rest.

Shapes: S states, D width.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metalm.errors import DataError

SUFFIX = ".safetensors"  # after the kind of the media: a member's extension
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True)
class States:
    """The states of one medium: `data` is a row-major array of `shape` [S, D], `encoder` the fingerprint of what made it."""

    data: bytes
    dtype: torch.dtype
    shape: tuple[int, int]
    encoder: str

    def __len__(self) -> int:
        return self.shape[0]

    def tensor(self) -> Tensor:
        """Float [S, D]."""
        return torch.frombuffer(bytearray(self.data), dtype=self.dtype).view(self.shape)


def pack_states(media: Sequence[Tensor], encoder: str) -> bytes:
    """The member that holds the states [S, D] of each of a sample's media of a kind."""
    from safetensors.torch import save

    return save({str(number): states_SD.contiguous() for number, states_SD in enumerate(media)}, {"encoder": encoder})


def unpack_states(member: bytes) -> list[States]:
    """The states of each medium; only the header is parsed.

    Raises:
        DataError: the member is torn, or not of this kind.
    """
    try:
        start = 8 + int.from_bytes(member[:8], "little")
        header = json.loads(member[8:start])
        encoder = header.pop("__metadata__")["encoder"]
        found = []
        for number in sorted(header, key=int):
            dtype, (S, D), (first, last) = (header[number][field] for field in ("dtype", "shape", "data_offsets"))
            states = States(member[start + first : start + last], DTYPES[dtype], (S, D), encoder)
            if len(states.data) != math.prod(states.shape) * states.dtype.itemsize or not len(states):
                raise ValueError(f"{len(states.data):,} bytes for {S} x {D} {dtype}")
            found.append(states)
        return found
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"stored states that cannot be read ({type(error).__name__}: {error}); write them again by `metalm data encode`"
        ) from error
