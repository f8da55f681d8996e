"""Encoded pictures to uint8 tensors; normalisation waits for the device, where it costs a quarter of the traffic."""

from __future__ import annotations

import io
import math
import struct

import numpy as np
import torch
from torch import Tensor

from metalm.data.views import View
from metalm.errors import DataError


def decode_image(encoded: bytes, size: int, interpolation: str = "bicubic", view: View | None = None) -> Tensor:
    """An encoded picture, or a `view` of it, as uint8 [3, size, size], squashed to the square so that nothing is cut off.

    The camera's orientation mark (EXIF) is obeyed, 16-bit greys are brought to 8 bits, transparency is dropped.
    JPEGs are decoded at the smallest scale (1/1, 1/2, 1/4, 1/8) that still exceeds `size`.

    Raises:
        DataError: the bytes are no picture, or the picture is truncated.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(encoded)) as image:
            needed = size if view is None else math.ceil(size / min(view.right - view.left, view.bottom - view.top))
            image.draft("RGB", (needed, needed))
            image.load()  # before the mark is looked for, which would hide the error of a truncated PNG
            turn = _turn(image)
            if image.mode.startswith("I;16"):  # Pillow's own conversion would clip these to white
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            picture = image.convert("RGB")
        if turn is not None:
            picture = picture.transpose(turn)
        return fit_square(picture, size, interpolation, view)
    except UnidentifiedImageError as error:  # whose text is the address of a buffer
        raise DataError("not a complete picture (no known format)") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"not a complete picture ({error})") from error


def fit_square(picture, size: int, interpolation: str = "bicubic", view: View | None = None) -> Tensor:
    """A Pillow picture in RGB, or a `view` of it, as uint8 [3, size, size], squashed to the square."""
    from PIL import Image

    width, height = picture.size
    box = (0, 0, width, height)
    if view is not None:
        box = (view.left * width, view.top * height, view.right * width, view.bottom * height)
    if box != (0, 0, size, size):
        picture = picture.resize((size, size), getattr(Image.Resampling, interpolation.upper()), box)
    if view is not None and view.mirrored:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).contiguous()


def _turn(image):
    """Pillow's transposition that sets the picture upright, or None; an unreadable mark is as good as none."""
    from PIL import ExifTags
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    try:
        return turns.get(image.getexif().get(ExifTags.Base.Orientation))
    except (OSError, SyntaxError, ValueError, TypeError, struct.error):
        return None
