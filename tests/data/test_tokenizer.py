"""Tokenizers: what is encoded comes back, special tokens are the paper's or the closest there are."""

from __future__ import annotations

from collections import Counter

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


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return Tokenizer.train_words(["the dog runs .", "the dog, the cat's déjà vu\n\n", "  語 <unk> </s> the 42nd dog"] * 3, 40)


def test_words_are_numbered_from_the_commonest_to_the_rarest():
    texts = ["b b b b", "the the the a a", "rare ones"]
    tokenizer = Tokenizer.train_words(texts, 50)
    count = Counter(token for text in texts for token in tokenizer.encode(text))
    assert [count[i] for i in range(4, tokenizer.size)] == sorted(count.values(), reverse=True)
    assert len(set(count.values())) > 2 and min(count) == 4


@pytest.mark.parametrize(
    "text", ["the dog runs .", " dog, the\n\n", "the cat's déjà vu", "  語 the", "the </s> <unk>", " 42nd", ""]
)
def test_texts_of_known_words_come_back(words, text, tmp_path):
    words.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert words.decode(words.encode(text)) == loaded.decode(loaded.encode(text))
    assert words.decode(words.encode(text)) in (text, f" {text}")
    assert loaded.fingerprint == words.fingerprint
    assert not {0, 1, 2, 3} & set(words.encode(text))  # "</s>" and "<unk>" in a text are signs and letters


def test_a_text_begins_as_after_a_space(words):
    assert words.encode("dog runs") == words.encode(" dog runs")
    assert words.decode(words.encode("dog runs")) == " dog runs"


def test_a_word_that_is_not_among_them_is_the_unknown_one(words):
    tokens = words.encode("the zebra, the dog")
    assert tokens[1] == words.backend.token_to_id("<unk>") and tokens.count(tokens[1]) == 1
    assert words.decode([words.start, *tokens, words.end]) == " the<unk>, the dog"
    few = Tokenizer.train_words(["a a a b b c"], 6)  # with the four names, room for two: " a" and " b"
    assert few.size == 6 and few.decode(few.encode("a b c")) == " a b<unk>"


def test_tokens_are_spelled_as_they_are_written(tokenizer, words):
    for one in (tokenizer, words):
        spellings = one.spellings()
        assert len(spellings) == len(set(spellings)) == one.size
        assert spellings[one.start] == "<s>"
    assert all(words.spellings()[i] == words.decode([i]) for i in range(3, words.size))
    text = " the cat's déjà vu"
    assert "".join(words.spellings()[i] for i in words.encode(text)) == text
    whole = [tokenizer.spellings()[i] for i in tokenizer.encode(TEXTS[0])]
    assert "".join(whole) == TEXTS[0] and len(whole) < len(TEXTS[0])


def test_tokens_of_others_are_spelled_as_in_their_vocabulary():
    assert word_level("<|endoftext|>").spellings() == ["<|endoftext|>", "a", "red", "circle"]


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
