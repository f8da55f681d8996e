"""Tiles: as many as a picture has details for, cut where they belong, mirrored with it."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from metalm.data.images import picture_size
from metalm.data.tiles import decode_tiles, tile_grid
from metalm.data.views import View
from metalm.errors import DataError


def encode(pixels: np.ndarray, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind, **options)
    return out.getvalue()


def checkerboard(rows: int, columns: int, side: int) -> np.ndarray:
    """Fields of one grey each, brighter from left to right and from top to bottom."""
    greys = 10 * (1 + np.arange(rows * columns, dtype=np.uint8).reshape(rows, columns))
    return np.repeat(np.kron(greys, np.ones((side, side), np.uint8))[:, :, None], 3, axis=2)


@pytest.mark.parametrize(
    "size, tiles, grid",
    [
        ((100, 100), 6, (1, 1)),  # smaller than the tower's input
        ((224, 224), 6, (1, 1)),
        ((448, 224), 6, (1, 2)),
        ((224, 448), 6, (2, 1)),
        ((448, 448), 6, (2, 2)),
        ((4000, 3000), 6, (2, 3)),
        ((3000, 4000), 6, (3, 2)),
        ((4000, 100), 6, (1, 6)),
        ((4000, 3000), 1, (1, 1)),
    ],
)
def test_the_grid_keeps_most_detail_with_fewest_tiles(size, tiles, grid):
    assert tile_grid(*size, 224, tiles) == grid


def test_tiles_are_the_fields_of_the_picture():
    fields = decode_tiles(encode(checkerboard(2, 3, 20)), 20, (2, 3), "bicubic")
    assert fields.shape == (7, 3, 20, 20)
    assert [int(tile[0, 10, 10]) for tile in fields[1:]] == [10, 20, 30, 40, 50, 60]
    assert all(tile.unique().numel() == 1 for tile in fields[1:])
    assert fields[0].unique().numel() > 5  # the whole picture


def test_a_mirrored_view_has_its_tiles_mirrored_too():
    picture = checkerboard(2, 3, 20)
    picture[0, 0] = 255  # the first corner
    mirrored = decode_tiles(encode(picture), 20, (2, 3), "bicubic", View(0, 0, 1, 1, mirrored=True))
    expected = decode_tiles(encode(np.ascontiguousarray(picture[:, ::-1])), 20, (2, 3), "bicubic")
    assert torch.equal(mirrored[1:], expected[1:]) and mirrored[3, 0, 0, 19] == 255
    part = decode_tiles(encode(picture), 20, (1, 2), "bicubic", View(1 / 3, 0.5, 1, 1))
    assert [int(tile[0, 10, 10]) for tile in part[1:]] == [50, 60]


def test_a_jpeg_is_decoded_at_the_scale_that_its_tiles_need():
    whole = encode(np.random.default_rng(0).integers(256, size=(800, 800, 3), dtype=np.uint8), "JPEG", quality=95)
    with Image.open(io.BytesIO(whole)) as image:
        full = image.convert("RGB")
    tile = decode_tiles(whole, 400, (2, 2), "bicubic")[1]
    assert torch.equal(tile, torch.from_numpy(np.asarray(full)[:400, :400].copy()).permute(2, 0, 1))


def test_the_size_is_that_of_the_upright_picture_and_of_its_view():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    turned = encode(np.zeros((30, 50, 3), np.uint8), "JPEG", exif=exif)
    assert picture_size(turned) == (30, 50)
    assert picture_size(encode(np.zeros((30, 50, 3), np.uint8)), View(0.5, 0, 1, 0.5)) == (25, 15)
    with pytest.raises(DataError, match="no known format"):
        picture_size(b"no picture")
