"""Random views of the pictures a model learns from, so that no visit shows the same: a crop, perhaps mirrored."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class View:
    """A part of an upright picture, its edges as shares of the sides; `mirrored` exchanges left and right."""

    left: float
    top: float
    right: float
    bottom: float
    mirrored: bool = False


def draw_view(crop: float, mirror: bool, rng: random.Random) -> View:
    """A view that keeps at least `crop` of either side, each drawn on its own, anywhere in the picture."""
    width, height = rng.uniform(crop, 1), rng.uniform(crop, 1)
    left, top = rng.uniform(0, 1 - width), rng.uniform(0, 1 - height)
    return View(left, top, left + width, top + height, mirror and rng.random() < 0.5)
