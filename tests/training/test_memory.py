"""A training process keeps what it frees: pages do not come anew from the system for each tensor."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from metalm.training.engine import keep_freed_memory
torch.set_num_threads(1)
if sys.argv[1] == "kept":
    keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(1 << 24)
before = faults()
for _ in range(10):
    torch.ones(1 << 24)
print(faults() - before)
"""


LIBC, VERSION = platform.libc_ver()


@pytest.mark.skipif(LIBC != "glibc" or VERSION < "2.35", reason="a setting of glibc, as far as this goes from 2.35 on")
def test_pages_are_kept():
    def faults(which: str) -> int:
        return int(subprocess.run([sys.executable, "-c", FAULTS, which], check=True, capture_output=True, text=True).stdout)

    assert faults("kept") < 0.2 * faults("given back")
