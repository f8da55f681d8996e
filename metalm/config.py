"""Dataclasses <- YAML + `key=value`: typed, closed, and with errors that name the key, the file, and the right name.

OmegaConf reads the YAML, the overrides and `${…}`; `build` turns the plain result into dataclasses. Every class owns a
`Config` dataclass beside it, so this file knows no field of any of them. A field whose class is chosen by a `type` key
(an encoder, a connector) is declared by `plugin(registry)`: the chosen class's own `Config` is built.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any, Literal, Union

from metalm.errors import ConfigError
from metalm.registry import Registry, did_you_mean


def plugin(registry: Registry, **kwargs) -> Any:
    """A dataclass field that holds the `Config` of a class which the key `type` picks from the registry.

    The annotation says how many: `Any` for one, `dict[str, Any]` for several by name.
    """
    return dataclasses.field(metadata={"registry": registry}, **kwargs)


def read_yaml(path: str | Path, overrides: list[str] = ()) -> dict:
    """The plain content of a YAML file with `key=value` overrides merged over it and `${…}` resolved.

    A path that does not exist is looked up among the bundled configurations (`configs/demo/pretrain.yaml`).
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    path = find_config(path)
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"override {override!r}: write it as key=value, for example training.steps=100")
    try:
        tree = OmegaConf.load(path)
        if not OmegaConf.is_dict(tree):
            raise ConfigError(f"{path}: a configuration is a mapping of keys, this file holds a list")
        for override in overrides:
            _override(tree, override)
        return OmegaConf.to_container(tree, resolve=True)
    except (YAMLError, OmegaConfBaseException, ValueError, OSError) as error:
        raise ConfigError(f"{path}: {error}") from error


def _override(tree: Any, override: str) -> None:
    """Sets one `key=value` in OmegaConf's tree; `data.train[0].weight=2` reaches into a list."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    key, _, text = override.partition("=")
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # `${…}` stays as it is
        OmegaConf.update(tree, key, value)
    except (YAMLError, OmegaConfBaseException, ValueError, TypeError, IndexError, AssertionError) as error:
        raise ConfigError(f"override {override!r}: {str(error).splitlines()[0]}") from error


def find_config(path: str | Path) -> Path:
    """The file itself, or the bundled configuration of that name."""
    import metalm.configs

    path = Path(path)
    bundled = Path(metalm.configs.__path__[0])
    inside = path.relative_to("configs") if path.parts[:1] == ("configs",) else path
    for candidate in (path, bundled / inside):
        if candidate.is_file():
            return candidate
    names = sorted(str(p.relative_to(bundled)) for p in bundled.rglob("*.yaml"))
    raise ConfigError(f"no configuration file {str(path)!r}{did_you_mean(str(path), names)}")


def build(cls: type, values: dict, where: str, key: str = "") -> Any:
    """An instance of the dataclass `cls` from plain values.

    Args:
        where: the file (or call) that the values come from, for errors.
        key: dotted path of `values` inside it.

    Raises:
        ConfigError: an unknown key, a missing one, a wrong type, or what `__post_init__` refuses.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: {key or 'the top level'} takes keys ({_names(cls)}), not {values!r}")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    arguments = {}
    for name, value in values.items():
        path = f"{key}.{name}" if key else str(name)
        if name not in fields:
            raise ConfigError(f"{where}: unknown key {path!r}{did_you_mean(str(name), list(fields))}")
        registry = fields[name].metadata.get("registry")
        if registry and typing.get_origin(hints[name]) is dict:
            arguments[name] = _plugins(registry, value, where, path)
        elif registry:
            arguments[name] = None if value is None else build_plugin(registry, value, where, path)
        else:
            arguments[name] = _value(hints[name], value, where, path)
    required = [
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    missing = [name for name in required if name not in arguments]
    if missing:
        raise ConfigError(f"{where}: {key or 'the top level'} lacks the key {missing[0]!r}")
    try:
        return cls(**arguments)
    except ConfigError as error:
        raise ConfigError(f"{where}: {key + ': ' if key else ''}{error}") from error


def to_plain(config: Any) -> Any:
    """The inverse of `build`: plain dicts, lists and scalars, ready for YAML or JSON."""
    return dataclasses.asdict(config)


def _names(cls: type) -> str:
    return ", ".join(field.name for field in dataclasses.fields(cls))


def _plugins(registry: Registry, value: Any, where: str, key: str) -> dict[str, Any]:
    if not isinstance(value, dict) or any(not isinstance(entry, dict) for entry in value.values()):
        raise ConfigError(f"{where}: {key} takes {registry.kind}s by a name of your choice, each with its keys, not {value!r}")
    return {name: build_plugin(registry, entry, where, f"{key}.{name}") for name, entry in value.items()}


def build_plugin(registry: Registry, value: Any, where: str, key: str) -> Any:
    """The `Config` of the class that the key `type` of `value` picks from the registry.

    `TYPE:SPEC` stands for several keys at once, as the class's `Config.from_spec` has it: `timm:vit_base_patch16_224`.
    """
    if not isinstance(value, dict) or not (registry.default or "type" in value):
        raise ConfigError(f"{where}: {key} needs a key 'type', one of: {', '.join(registry.names())}")
    name, colon, spec = str(value.get("type", registry.default)).partition(":")
    try:
        cls = registry[name]
    except ConfigError as error:
        raise ConfigError(f"{where}: {key}.type: {error}") from error
    if colon:
        if not hasattr(cls.Config, "from_spec"):
            raise ConfigError(f"{where}: {key}.type: {name!r} takes nothing after a colon, not {spec!r}")
        value = cls.Config.from_spec(spec) | value | {"type": name}
    return build(cls.Config, value, where, key)


def _value(hint: Any, value: Any, where: str, key: str) -> Any:
    """`value` as the type `hint`, or a `ConfigError`; an int passes for a float, nothing else is converted."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        errors = []
        for option in arguments:
            if option is not type(None):
                try:
                    return _value(option, value, where, key)
                except ConfigError as error:
                    errors.append(error)
        raise errors[0]
    if origin is Literal:
        if value not in arguments:
            near = did_you_mean(str(value), [str(a) for a in arguments])
            raise ConfigError(f"{where}: {key} cannot be {value!r}{near}")
        return value
    if dataclasses.is_dataclass(hint):
        return build(hint, value, where, key)
    if origin is list and isinstance(value, list):
        return [_value(arguments[0], item, where, f"{key}[{i}]") for i, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {name: _value(arguments[1], item, where, f"{key}.{name}") for name, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    wanted = hint.__name__ if isinstance(hint, type) else str(hint)
    raise ConfigError(f"{where}: {key} must be {wanted}, not {type(value).__name__} {value!r}")
