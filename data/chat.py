"""Chat templates: how a chat-tuned decoder is used to see turns written.

    turns       user: [picture] what is it?
    rendered    <start_of_turn>user\\n [picture] what is it? <end_of_turn>\\n <start_of_turn>model\\n
    segments    Text                   Span      Text

A template is a tokenizer's own, in Jinja, and is run in transformers' sandbox. The special tokens that it writes are read as
such; a turn that spells one out is refused, else whoever writes it could end their turn and speak as somebody else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from metalm.data.tokenizer import Tokenizer
from metalm.errors import ConfigError, DataError

MEDIUM = "\ufffc"  # Unicode's sign for an object in a text; here for a medium, while the template is filled in


@dataclass(frozen=True)
class Turn:
    """What somebody says: texts, and media as (kind, bytes), in their order. Roles are the template's, mostly `system`, `user`
    and `assistant`."""

    role: str
    content: Sequence[str | tuple[str, bytes]]

    @property
    def text(self) -> str:
        return "".join(part if isinstance(part, str) else MEDIUM for part in self.content)


def encode_turns(tokenizer: Tokenizer, turns: Sequence[Turn]) -> list[list[int]]:
    """Tokens of the turns, and of what the template has before an answer; cut where the media are, into one part more than
    there are media.

    Raises:
        ConfigError: the tokenizer has no template, or its template does not allow such turns.
        DataError: a turn holds a special token.
    """
    special = [token.content for token in tokenizer.backend.get_added_tokens_decoder().values() if token.special]
    for turn in turns:
        said = "".join(part for part in turn.content if isinstance(part, str))
        found = next((name for name in [*special, MEDIUM] if name in said), None)
        if found is not None:
            raise DataError(f"the turn of {turn.role!r} holds {found!r}, which the template alone may write: take it out")
    text = render(tokenizer, [{"role": turn.role, "content": turn.text} for turn in turns])
    return [tokenizer.encode(part, special=True) for part in text.split(MEDIUM)]


def render(tokenizer: Tokenizer, messages: list[dict[str, str]], answer: bool = True) -> str:
    """The template filled in with messages of a `role` and a `content`.

    Args:
        answer: whether the beginning of an answer follows.
    """
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    if not tokenizer.chat_template:
        raise ConfigError("the tokenizer has no chat template: prompt without one, or start from a chat-tuned decoder")
    try:
        rendered, _ = render_jinja_template(
            [messages], chat_template=tokenizer.chat_template, add_generation_prompt=answer, **tokenizer.special_names
        )
    except (TemplateError, TypeError) as error:
        raise ConfigError(f"the tokenizer's chat template does not take these turns: {error}") from error
    return rendered[0]


def answer_ends(tokenizer: Tokenizer) -> set[int]:
    """The tokens at which an answer ends: those that the tokenizer names, and the one that its template has after an answer."""
    if not tokenizer.chat_template:
        return tokenizer.ends
    try:
        said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": MEDIUM}]
        after = tokenizer.encode(render(tokenizer, said, answer=False).rpartition(MEDIUM)[2], special=True)
    except ConfigError:  # a template for other turns
        return tokenizer.ends
    added = tokenizer.backend.get_added_tokens_decoder()
    return tokenizer.ends | {token for token in after[:1] if token in added}
