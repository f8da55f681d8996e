"""Text to token ids: a byte-level BPE or whole words, trained here with `tokenizers`, or any Hugging Face tokenizer.

    text      New York's mayors, re-elected
    words     | New| York|'s| mayors|,| re|-|elected|        where the BPE cuts first, and never joins across

Where letters, digits and other signs meet, a word ends; the space before it belongs to it (at a text's beginning there is taken
to be one), so that texts of known words come back as they were. Words are numbered from the commonest to the rarest, as an
adaptive softmax wants them. One that is not among them is `<unk>`, to a model that reads spellings too.

The special tokens are the paper's: `<s>` starts a text, `</s>` ends a turn (a caption, an answer), `</d>` ends a document.
A tokenizer that says which tokens begin and end its sequences is taken at its word, another lends what it has in their place.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

from metalm.data.tokenizer_settings import TokenizerSettings
from metalm.errors import ConfigError

START, END, DOCUMENT_END, UNKNOWN = "<s>", "</s>", "</d>", "<unk>"
FILE = "tokenizer.json"


class Tokenizer:
    """Encodes without adding special tokens; layouts place those.

    Attributes:
        start, end, document_end: ids of the special tokens.
        settings: what a published tokenizer says beside its vocabulary.
    """

    def __init__(self, backend, settings: TokenizerSettings | None = None):
        """Args: backend: a `tokenizers.Tokenizer`."""
        self.backend = backend
        self.settings = settings or TokenizerSettings()
        backend.encode_special_tokens = True  # "</s>" in somebody's text is text
        backend.no_truncation()  # some published files cut or pad every text
        backend.no_padding()
        begins, ends = (self.settings.special_names.get(name, "") for name in ("bos_token", "eos_token"))
        self.end = self._special(ends, END, "<|endoftext|>", "<|end_of_text|>", "<eos>", "[SEP]")
        self.document_end = self._special(DOCUMENT_END, "<|endoftext|>", "<|end_of_text|>", default=self.end)
        self.start = self._special(
            begins, START, "<|startoftext|>", "<|begin_of_text|>", "<bos>", "[CLS]", default=self.document_end
        )

    def _special(self, *names: str, default: int | None = None) -> int:
        names = tuple(filter(None, names))
        ids = [self.backend.token_to_id(name) for name in names]
        found = next((i for i in ids if i is not None), default)
        if found is None:
            raise ConfigError(f"the tokenizer has no end token; one of {', '.join(names)} is needed")
        return found

    @property
    def size(self) -> int:
        """The number of ids, added tokens included."""
        return max(self.backend.get_vocab().values()) + 1

    def special(self, name: str) -> int:
        """The id of a special token, which is added to the vocabulary where it is not there yet."""
        self.backend.add_special_tokens([name])
        return self.backend.token_to_id(name)

    @property
    def ends(self) -> set[int]:
        """Ids of the tokens at which an answer ends, `end` among them."""
        return {self.end, *self.settings.ends}

    @property
    def chat_template(self) -> str:
        """In Jinja; empty where there is none. See `metalm.data.chat`."""
        return self.settings.chat_template

    @property
    def special_names(self) -> dict[str, str]:
        """What templates call special tokens, and how these are written."""
        own = {"bos_token": self.backend.id_to_token(self.start), "eos_token": self.backend.id_to_token(self.end)}
        return own | self.settings.special_names

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Token ids of a text; one that spells out special tokens holds these if `special`, else they are text as any."""
        self.backend.encode_special_tokens = not special
        try:
            return self.backend.encode(text, add_special_tokens=False).ids
        finally:
            self.backend.encode_special_tokens = True

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.backend.encode_batch(texts, add_special_tokens=False)]

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of the tokens, special ones left out."""
        return self.backend.decode(list(tokens), skip_special_tokens=True)

    def spellings(self) -> list[str]:
        """How the tokens 0, 1, … are written, space before them included: what a model reads that goes by characters.

        A byte-level token is the text that it stands for, if it is whole characters; any other is as in the vocabulary.
        """
        from tokenizers import decoders

        names = {i: name for name, i in self.backend.get_vocab().items()}
        tokens = [names.get(i, "") for i in range(self.size)]
        if not isinstance(self.backend.decoder, decoders.ByteLevel):
            return tokens
        texts = [self.backend.decoder.decode([token]) for token in tokens]
        return [token if "\ufffd" in text else text for token, text in zip(tokens, texts)]

    def save(self, folder: str | Path) -> None:
        """As transformers reads it."""
        self.backend.save(str(Path(folder) / FILE))
        TokenizerSettings(self.special_names, self.chat_template, self.settings.ends).write(Path(folder))

    @cached_property
    def fingerprint(self) -> int:
        """Equal for equal vocabularies: a model and a tokenizer that do not belong together would train on noise."""
        import zlib

        return zlib.crc32(repr(sorted(self.backend.get_vocab().items())).encode())

    def agrees_with(self, other: Tokenizer) -> bool:
        """Whether both give a text the same tokens; special tokens that were added to either do not count."""
        return self.backend.get_vocab(with_added_tokens=False) == other.backend.get_vocab(with_added_tokens=False)

    @classmethod
    def load(cls, name: str | Path) -> Tokenizer:
        """From a `tokenizer.json`, a folder that holds one (an export, a run), or a Hugging Face id."""
        from tokenizers import Tokenizer as Backend

        path = Path(name)
        for file in (path, path / FILE, path / "export" / FILE):
            if file.is_file():
                return cls(Backend.from_file(str(file)), TokenizerSettings.read(file.parent))
        from transformers import AutoTokenizer

        try:
            theirs = AutoTokenizer.from_pretrained(str(name))
            settings = TokenizerSettings.of(theirs.special_tokens_map, theirs.chat_template, published_ends(str(name)))
            return cls(theirs.backend_tokenizer, settings)
        except (OSError, ValueError, AttributeError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"tokenizer {str(name)!r}: no such file, and not on the Hub ({reason})") from error

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Byte-level BPE on the texts: no unknown characters, spaces belong to the word that follows."""
        from tokenizers import models, pre_tokenizers, trainers

        backend = _byte_level(models.BPE(), add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[START, END, DOCUMENT_END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        return cls(backend)

    @classmethod
    def train_words(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """The commonest words of the texts, as many as `vocab_size` holds beside the special tokens and `<unk>`."""
        from tokenizers import models, trainers

        special = [START, END, DOCUMENT_END]
        counted = _byte_level(models.WordLevel(unk_token=UNKNOWN), add_prefix_space=True)
        trainer = trainers.WordLevelTrainer(vocab_size=vocab_size, special_tokens=[*special, UNKNOWN], show_progress=False)
        counted.train_from_iterator(texts, trainer)
        backend = _byte_level(models.WordLevel(counted.get_vocab(), unk_token=UNKNOWN), add_prefix_space=True)
        backend.add_special_tokens(special)  # `<unk>` is none, so that `decode` shows it
        return cls(backend)


def published_ends(name: str) -> int | list[int] | None:
    """The tokens at which a Hub id's model ends an answer, if it says so."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(name).eos_token_id
    except (OSError, ValueError):
        return None


def _byte_level(model, add_prefix_space: bool):
    """A `tokenizers.Tokenizer` that cuts texts where letters, digits and other signs meet, and puts them together again."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, pre_tokenizers

    backend = Backend(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    return backend
