"""Fixtures that several test files share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Tests run without a network; a hub look-up in a test would be a defect.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

CHECKOUT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real data (`data/flickr8k`, …), which users do not have: tests on it skip where it is missing."""
    folder = Path(os.environ.get("METALM_SHARED", CHECKOUT.parent / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"real data not found at {folder}: set METALM_SHARED to the folder that holds data/")
    return folder
