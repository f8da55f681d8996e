"""The loader's benchmark compares like with like: all sides make the same pixels of the same photos."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD, image_transform
from PIL import Image

from benchmarks import loader
from metalm.data.images import decode_image


@pytest.fixture(scope="module")
def photos() -> list[bytes]:
    rng = np.random.default_rng(0)
    return [loader.photo(rng, 320, 240) for _ in range(3)]


def test_open_clips_transform_gives_our_pixels(photos):
    transform = image_transform(loader.SIZE, is_train=False, resize_mode="squash", interpolation="bicubic")
    mean, std = (torch.tensor(values)[:, None, None] for values in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))
    for encoded in photos:
        theirs = (transform(Image.open(io.BytesIO(encoded)).convert("RGB")) * std + mean) * 255
        assert (theirs - decode_image(encoded, loader.SIZE)).abs().max() < 1.01


def test_every_side_is_measured(photos):
    measured = loader.measure(rounds=1, samples=64, photos=photos)
    assert measured.keys() >= {"metalm", "open_clip", "limit", "ratio", "share", "first_ratio"}
    assert all(value > 0 for name, value in measured.items() if name != "limit_first")
    assert measured["ratio"] == pytest.approx(measured["metalm"] / measured["open_clip"])
    assert measured["share"] == pytest.approx(measured["metalm"] / measured["limit"])
