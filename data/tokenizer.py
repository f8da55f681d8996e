"""Text to token ids: a byte-level BPE trained here with `tokenizers`, or any Hugging Face tokenizer.

The special tokens are the paper's: `<s>` starts a text, `</s>` ends a turn (a caption, an answer), `</d>` ends a document.
A tokenizer that lacks one lends its own beginning- or end-of-sequence token.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

from metalm.errors import ConfigError

START, END, DOCUMENT_END = "<s>", "</s>", "</d>"
FILE = "tokenizer.json"


class Tokenizer:
    """Encodes without adding special tokens; layouts place those.

    Attributes:
        start, end, document_end: ids of the special tokens.
    """

    def __init__(self, backend):
        """Args: backend: a `tokenizers.Tokenizer`."""
        self.backend = backend
        backend.encode_special_tokens = True  # "</s>" in somebody's text is text
        backend.no_truncation()  # some published files cut or pad every text
        backend.no_padding()
        self.end = self._special(END, "<|endoftext|>", "<|end_of_text|>", "<eos>", "[SEP]")
        self.start = self._special(START, "<|startoftext|>", "<|begin_of_text|>", "<bos>", "[CLS]", default=self.end)
        self.document_end = self._special(DOCUMENT_END, default=self.end)

    def _special(self, *names: str, default: int | None = None) -> int:
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

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.backend.encode_batch(texts, add_special_tokens=False)]

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of the tokens, special ones left out."""
        return self.backend.decode(list(tokens), skip_special_tokens=True)

    def save(self, folder: str | Path) -> None:
        self.backend.save(str(Path(folder) / FILE))

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
                return cls(Backend.from_file(str(file)))
        from transformers import AutoTokenizer

        try:
            return cls(AutoTokenizer.from_pretrained(str(name)).backend_tokenizer)
        except (OSError, ValueError, AttributeError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"tokenizer {str(name)!r}: no such file, and not on the Hub ({reason})") from error

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Byte-level BPE on the texts: no unknown characters, spaces belong to the word that follows."""
        from tokenizers import Tokenizer as Backend
        from tokenizers import decoders, models, pre_tokenizers, trainers

        backend = Backend(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[START, END, DOCUMENT_END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        return cls(backend)
