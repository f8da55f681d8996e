"""DeepSpeed compiles small C++ extensions when a run first needs them; here, where, and what a killed build leaves behind.

Torch keeps them in one folder of the user's cache for all virtual environments, so that two that take turns compile anew each
time; and it guards a build by a file `lock`, which a process that was killed leaves, and on which all others wait for ever.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from pathlib import Path

STALE = 600  # seconds; a build takes less than one minute


def prepare_extensions() -> list[str]:
    """Gives this virtual environment a folder of its own, and removes locks in it of builds that nobody can be at any more; a
    folder that TORCH_EXTENSIONS_DIR names is somebody else's to look after.

    Returns:
        What was removed and why, a line each.
    """
    own = hashlib.sha256(sys.prefix.encode()).hexdigest()[:8]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = cache / "torch_extensions" / f"metalm-{own}"
    if os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(folder)) != str(folder):
        return []
    messages = []
    for lock in sorted(folder.glob("**/lock")) if folder.is_dir() else ():
        try:
            age = time.time() - lock.stat().st_mtime
            if age > STALE:
                lock.unlink()
                messages.append(f"removed {lock}, which a build left {age / 60:,.0f} minutes ago")
        except OSError:  # another process was faster, or may and we may not
            continue
    return messages
