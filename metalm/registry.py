"""Plug-ins by name: built-in classes and whatever installed packages offer under an entry-point group.

A registry maps a name to an import path `package.module:Class`; nothing is imported before it is asked for.
A third party adds an encoder with one file and, in its own `pyproject.toml`,

    [project.entry-points."metalm.encoders"]
    my_encoder = "my_package.my_module:MyEncoder"
"""

from __future__ import annotations

import difflib
from importlib.metadata import EntryPoint, entry_points

from metalm.errors import ConfigError


class Registry:
    """Classes of one kind, found by name: `registry["timm"]`."""

    def __init__(self, kind: str, group: str, builtin: dict[str, str], default: str = ""):
        """Args: default: the name that a configuration without a `type` means."""
        self.kind = kind
        self.group = group
        self.builtin = builtin
        self.default = default

    def names(self) -> list[str]:
        return sorted({*self.builtin, *(entry.name for entry in entry_points(group=self.group))})

    def __getitem__(self, name: str) -> type:
        """The class called `name`; unknown names raise `ConfigError` with the nearest right one."""
        if name in self.builtin:
            return EntryPoint(name, self.builtin[name], self.group).load()
        for entry in entry_points(group=self.group):
            if entry.name == name:
                return entry.load()
        raise ConfigError(f"no {self.kind} is called {name!r}{did_you_mean(name, self.names())}")


def did_you_mean(name: str, names: list[str]) -> str:
    """`; did you mean 'x'?` for a near miss, else the list of what exists, unless that is long."""
    near = difflib.get_close_matches(name, names, n=1)
    if near:
        return f"; did you mean {near[0]!r}?"
    more = f", … ({len(names):,} in all)" if len(names) > 20 else ""
    return f"; there are: {', '.join(names[:20]) or 'none'}{more}"
