"""Large pictures in tiles, so that a tower of one input size sees their details.

    the whole picture, and below it a grid of as many tiles as keep most of the detail

    800 x 500, size 224, up to 6 tiles        [whole]  [ a | b | c ]
                                                       [ d | e | f ]

As in LLaVA-NeXT and InternVL; here tiles are squashed to the square rather than padded, as whole pictures are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from metalm.data.images import fit_picture, read_picture
from metalm.data.views import View

WHOLE = View(0.0, 0.0, 1.0, 1.0)


def tile_grid(width: float, height: float, size: int, tiles: int) -> tuple[int, int]:
    """Rows and columns, at most `tiles` together, that keep most of a picture's pixels; of those the fewest, and the squarest.

    A tile holds `size` x `size` pixels; (1, 1) where the picture as a whole has no more.
    """
    grids = [(rows, columns) for rows in range(1, tiles + 1) for columns in range(1, tiles // rows + 1)]

    def kept(grid: tuple[int, int]) -> float:
        rows, columns = grid
        return min(1.0, columns * size / width) * min(1.0, rows * size / height)

    def stretched(grid: tuple[int, int]) -> float:
        rows, columns = grid
        return abs(math.log((width / columns) / (height / rows)))

    return min(grids, key=lambda grid: (-round(kept(grid), 6), math.prod(grid), stretched(grid)))


def decode_tiles(encoded: bytes, size: int, grid: tuple[int, int], interpolation: str, view: View | None = None) -> Tensor:
    """An encoded picture, or a `view` of it, and below it its tiles, row by row: uint8 [1 + rows * columns, 3, size, size].

    Raises:
        DataError: the bytes are no picture, or the picture is truncated.
    """
    view = view or WHOLE
    rows, columns = grid
    least = math.ceil(max(rows, columns) * size / min(view.right - view.left, view.bottom - view.top))
    picture = read_picture(encoded, least)
    views = [view, *(tile_of(view, row, column, grid) for row in range(rows) for column in range(columns))]
    return torch.stack([fit_picture(picture, size, size, interpolation, view) for view in views])


def tile_of(view: View, row: int, column: int, grid: tuple[int, int]) -> View:
    """One tile of a view; of a mirrored one the first column is the last of the picture."""
    rows, columns = grid
    if view.mirrored:
        column = columns - 1 - column
    width, height = (view.right - view.left) / columns, (view.bottom - view.top) / rows
    left, top = view.left + column * width, view.top + row * height
    return View(left, top, left + width, top + height, view.mirrored)
