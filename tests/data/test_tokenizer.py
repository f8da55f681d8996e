"""Tokenizers: what is encoded comes back, special tokens are the paper's or the closest there are."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, processors

from metalm.data.tokenizer import Tokenizer
from metalm.errors import ConfigError

TEXTS = ["a red circle left of a blue square", "two dogs run over the grass", "question: what color is it? answer: red"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS * 5, 320)


@pytest.mark.parametrize("text", [*TEXTS, " leading", "naïve 語 🙂\n\ttabs", "Case KEPT", "", "  two  spaces  "])
def test_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_are_the_papers(tokenizer):
    assert [tokenizer.backend.id_to_token(i) for i in (tokenizer.start, tokenizer.end, tokenizer.document_end)] == [
        "<s>",
        "</s>",
        "</d>",
    ]
    assert len({tokenizer.start, tokenizer.end, tokenizer.document_end}) == 3
    tokens = [tokenizer.start, *tokenizer.encode("a red circle"), tokenizer.end]
    assert tokenizer.decode(tokens) == "a red circle"


def test_size_is_beyond_every_id(tokenizer):
    assert tokenizer.size == max(tokenizer.backend.get_vocab().values()) + 1
    assert all(0 <= i < tokenizer.size for text in TEXTS for i in tokenizer.encode(text))


def test_batches_are_as_one_by_one(tokenizer):
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]


def test_training_is_deterministic(tokenizer):
    assert Tokenizer.train(TEXTS * 5, 320).fingerprint == tokenizer.fingerprint
    assert Tokenizer.train(TEXTS * 5, 300).fingerprint != tokenizer.fingerprint


@pytest.mark.parametrize("place", ["tokenizer.json", "", "export"])
def test_saved_and_loaded(tokenizer, tmp_path, place):
    folder = tmp_path / "export" if place == "export" else tmp_path
    folder.mkdir(exist_ok=True)
    tokenizer.save(folder)
    loaded = Tokenizer.load(tmp_path / place if place != "export" else tmp_path)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert [loaded.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


def test_what_a_published_file_adds_cuts_or_pads_is_off(tokenizer, tmp_path):
    """Many `tokenizer.json` carry a template of special tokens, truncation and padding: layouts place their own."""
    backend = Backend.from_str(tokenizer.backend.to_str())
    backend.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    backend.enable_truncation(4)
    backend.enable_padding(length=50)
    backend.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])
    assert loaded.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)


def word_level(*special: str) -> Tokenizer:
    vocabulary = {word: i for i, word in enumerate([*special, "a", "red", "circle"])}
    backend = Backend(models.WordLevel(vocabulary, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return Tokenizer(backend)


@pytest.mark.parametrize(
    "special, expected",
    [
        (["<|endoftext|>"], ["<|endoftext|>"] * 3),  # GPT-2
        (["[CLS]", "[SEP]"], ["[CLS]", "[SEP]", "[SEP]"]),  # BERT
        (["<|begin_of_text|>", "<|end_of_text|>"], ["<|begin_of_text|>", "<|end_of_text|>", "<|end_of_text|>"]),  # Llama 3
        (["<s>", "</s>"], ["<s>", "</s>", "</s>"]),  # Llama, RoBERTa
    ],
)
def test_others_lend_their_special_tokens(special, expected):
    tokenizer = word_level(*special)
    ids = (tokenizer.start, tokenizer.end, tokenizer.document_end)
    assert [tokenizer.backend.id_to_token(i) for i in ids] == expected


def test_a_tokenizer_without_an_end_is_refused():
    with pytest.raises(ConfigError, match="no end token"):
        word_level("<s>")


def test_a_hugging_face_folder_loads(tokenizer, tmp_path):
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend, eos_token="</s>").save_pretrained(tmp_path)
    assert Tokenizer.load(tmp_path).encode(TEXTS[1]) == tokenizer.encode(TEXTS[1])


def test_a_name_that_is_nowhere_is_refused():
    with pytest.raises(ConfigError, match="'no/such-tokenizer': no such file, and not on the Hub"):
        Tokenizer.load("no/such-tokenizer")


def test_text_of_100_000_tokens(tokenizer):
    text = " ".join(TEXTS) * 4000
    tokens = tokenizer.encode(text)
    assert len(tokens) > 100_000
    assert tokenizer.decode(tokens) == text
