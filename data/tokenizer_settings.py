"""What a tokenizer of transformers says beside its vocabulary, read from and written to the files that it has for that.

tokenizer_config.json    bos_token, eos_token and others by name; chat_template
chat_template.jinja      the template, where it has a file of its own
generation_config.json   eos_token_id, of all tokens at which an answer ends; else as config.json says
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from metalm.errors import ConfigError

CONFIG, TEMPLATE, GENERATION = "tokenizer_config.json", "chat_template.jinja", "generation_config.json"
FILES = (CONFIG, GENERATION)  # that `write` leaves


@dataclass
class TokenizerSettings:
    """`special_names`: `bos_token` and its like, by their names; `ends`: ids of the tokens at which an answer ends."""

    special_names: dict[str, str] = field(default_factory=dict)
    chat_template: str = ""
    ends: list[int] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> TokenizerSettings:
        """Those of a folder, as far as it has such files.

        Raises:
            ConfigError: a file is no JSON.
        """
        config = read_json(folder / CONFIG)
        template = config.get("chat_template")
        if (folder / TEMPLATE).is_file():
            template = (folder / TEMPLATE).read_text()
        ends = read_json(folder / GENERATION).get("eos_token_id")
        return cls.of(config, template, read_json(folder / "config.json").get("eos_token_id") if ends is None else ends)

    @classmethod
    def of(cls, names: Mapping[str, Any], template: Any, ends: int | list[int] | None) -> TokenizerSettings:
        """From what transformers has: special tokens as strings or with their properties, templates by name or one alone."""
        if isinstance(template, list):  # as old files have several
            template = {one["name"]: one["template"] for one in template}
        if isinstance(template, Mapping):
            template = template.get("default")
        named = {key: name["content"] if isinstance(name, Mapping) else name for key, name in names.items()}
        special = {
            key: str(name) for key, name in named.items() if key.endswith("_token") and not isinstance(name, bool) and name
        }
        return cls(special, template or "", [ends] if isinstance(ends, int) else list(ends or []))

    def write(self, folder: Path) -> None:
        """Such that transformers reads the tokenizer as we do, and stops where we do."""
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **self.special_names}
        if self.chat_template:
            config["chat_template"] = self.chat_template
        (folder / CONFIG).write_text(json.dumps(config, indent=1, ensure_ascii=False))
        (folder / GENERATION).unlink(missing_ok=True)  # of what was there before
        if self.ends:
            (folder / GENERATION).write_text(json.dumps({"eos_token_id": self.ends}, indent=1))


def read_json(path: Path) -> dict:
    """A file's content; nothing where there is no such file."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON ({error})") from error
