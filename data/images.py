"""Encoded pictures to uint8 tensors; normalisation waits for the device, where it costs a quarter of the traffic."""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from metalm.data.views import View
from metalm.errors import DataError


def decode_image(encoded: bytes, size: int, interpolation: str = "bicubic", view: View | None = None) -> Tensor:
    """An encoded picture, or a `view` of it, as uint8 [3, size, size], squashed to the square so that nothing is cut off.

    Raises:
        DataError: the bytes are no picture, or the picture is truncated.
    """
    least = size if view is None else math.ceil(size / min(view.right - view.left, view.bottom - view.top))
    return fit_picture(read_picture(encoded, least), size, size, interpolation, view)


def read_picture(encoded: bytes, least: int) -> Tensor:
    """An encoded picture, upright, as uint8 [3, height, width].

    The camera's orientation mark (EXIF) is obeyed, 16-bit greys are brought to 8 bits, transparency is dropped.
    JPEGs are decoded at the smallest scale (1/1, 1/2, 1/4, 1/8) at which both sides still have `least` pixels.

    Raises:
        DataError: the bytes are no picture, or the picture is truncated.
    """
    from PIL import Image

    with picture_errors(), Image.open(io.BytesIO(encoded)) as image:
        image.draft("RGB", (least, least))
        image.load()  # before the mark is looked for, which would hide the error of a truncated PNG
        turn = _turn(image)
        if image.mode.startswith("I;16"):  # Pillow's own conversion would clip these to white
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        picture = image if image.mode == "RGB" else image.convert("RGB")
        return pixels_of(picture if turn is None else picture.transpose(turn))


def pixels_of(picture) -> Tensor:
    """A Pillow picture in RGB as uint8 [3, height, width], in memory as in the picture: pixel by pixel."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def picture_size(encoded: bytes, view: View | None = None) -> tuple[float, float]:
    """Width and height in pixels of an upright picture, or of a `view` of it; of a JPEG without decoding it.

    Raises:
        DataError: the bytes are no picture.
    """
    from PIL import Image
    from PIL.Image import Transpose

    with picture_errors(), Image.open(io.BytesIO(encoded)) as image:
        width, height = image.size
        if _turn(image) in (Transpose.ROTATE_90, Transpose.ROTATE_270, Transpose.TRANSPOSE, Transpose.TRANSVERSE):
            width, height = height, width
    if view is not None:
        return width * (view.right - view.left), height * (view.bottom - view.top)
    return width, height


@contextmanager
def picture_errors() -> Iterator[None]:
    """Whatever Pillow says of a broken picture, as a `DataError`."""
    from PIL import Image, UnidentifiedImageError

    try:
        yield
    except UnidentifiedImageError as error:  # whose text is the address of a buffer
        raise DataError("not a complete picture (no known format)") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"not a complete picture ({error})") from error


def fit_picture(
    picture_3HW: Tensor, width: int, height: int, interpolation: str = "bicubic", view: View | None = None
) -> Tensor:
    """A picture, or a `view` of it, in whole pixels, as uint8 [3, height, width], squashed to that size."""
    if view is not None:
        (top, bottom), (left, right) = (
            _whole_pixels(start, end, side)
            for start, end, side in zip((view.top, view.left), (view.bottom, view.right), picture_3HW.shape[1:])
        )
        picture_3HW = picture_3HW[:, top:bottom, left:right]
        if view.mirrored:
            picture_3HW = picture_3HW.flip(2)
    if picture_3HW.shape[1:] != (height, width):
        picture_3HW = resize(picture_3HW, width, height, interpolation)
    return picture_3HW.contiguous()


def resize(picture_3HW: Tensor, width: int, height: int, interpolation: str = "bicubic") -> Tensor:
    """A picture as uint8 [3, height, width], by Pillow's antialiased filters.

    PyTorch computes two of them with vector instructions, three to five times as fast: equal to one level of 255, but for
    a few pixels next to saturated ones where a picture is enlarged.
    """
    from PIL import Image

    if interpolation in ("bilinear", "bicubic"):
        return interpolate(picture_3HW[None], (height, width), mode=interpolation, antialias=True)[0]
    picture = Image.fromarray(picture_3HW.permute(1, 2, 0).numpy())
    return pixels_of(picture.resize((width, height), getattr(Image.Resampling, interpolation.upper())))


def _whole_pixels(start: float, end: float, side: int) -> tuple[int, int]:
    """The first pixel and the one after the last between two shares of a side; there is at least one."""
    first = min(round(start * side), side - 1)
    return first, max(round(end * side), first + 1)


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
