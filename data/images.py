"""Encoded pictures to uint8 tensors; normalisation waits for the device, where it costs a quarter of the traffic."""

from __future__ import annotations

import io

import numpy as np
import torch
from torch import Tensor

from metalm.errors import DataError


def decode_image(encoded: bytes, size: int, interpolation: str = "bicubic") -> Tensor:
    """An encoded picture as uint8 [3, size, size], squashed to the square so that nothing is cut off.

    JPEGs are decoded at the smallest scale (1/1, 1/2, 1/4, 1/8) that still exceeds `size`.

    Raises:
        DataError: the bytes are no picture, or the picture is truncated.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(encoded)) as image:
            image.draft("RGB", (size, size))
            picture = image.convert("RGB")
        if picture.size != (size, size):
            picture = picture.resize((size, size), getattr(Image.Resampling, interpolation.upper()))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"not a complete picture ({error})") from error
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).contiguous()
