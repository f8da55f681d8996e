"""torch.compile on a CPU: the C++ compiler that it calls."""

from __future__ import annotations

import shutil

from metalm.errors import ConfigError


def require_compiler(setting: str) -> None:
    """For a model on the CPU: raises a ConfigError that names the setting, where there is no compiler."""
    from torch._inductor.config import cpp

    names = [name for name in cpp.cxx if name]
    if not any(map(shutil.which, names)):
        raise ConfigError(f"{setting} needs a C++ compiler, and there is no {' or '.join(names)}: install one, or leave it out")
