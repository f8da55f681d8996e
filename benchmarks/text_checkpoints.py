"""Small checkpoints of the ecosystem's encoders of text in their real format: weights, configuration, a trained tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

TEXTS = ["The red dog runs over the hill.", "a blue café, and 12 little birds!", "what color is the dog?"] * 4
SHAPE = {"num_hidden_layers": 3, "hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 40}
SHAPE |= {"max_position_embeddings": 64}
BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ROBERTA = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
DEBERTA = {
    "relative_attention": True,
    "pos_att_type": ["c2p", "p2c"],
    "share_att_key": True,
    "position_biased_input": False,
    "position_buckets": 8,
    "norm_rel_ebd": "layer_norm",
    "type_vocab_size": 0,
}
# The family's classes are called after the first entry; its tokenizer is a WordPiece, byte-level BPE or Unigram.
FAMILIES = {
    "bert": ("Bert", "words", BERT, {}),
    "roberta": ("Roberta", "bytes", ROBERTA, {"max_position_embeddings": 66}),
    "xlm-roberta": ("XLMRoberta", "unigram", ["<s>", "<pad>", "</s>", "<unk>", "<mask>"], {"max_position_embeddings": 66}),
    "electra": ("Electra", "words", BERT, {"embedding_size": 16}),
    "deberta-v2": ("DebertaV2", "unigram", ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"], DEBERTA),
    "mpnet": ("MPNet", "words", ["<s>", "<pad>", "</s>", "[UNK]", "<mask>"], {"max_position_embeddings": 66}),
}


def make_tokenizer(kind: str, special: list[str], name: str):
    """A tokenizer of `TEXTS`, as the family's own class of transformers."""
    common = {"vocab_size": 90, "special_tokens": special, "show_progress": False}
    if kind == "words":
        backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        backend.train_from_iterator(TEXTS, trainers.WordPieceTrainer(**common))
        arguments = {"vocab": backend.get_vocab()}
    elif kind == "bytes":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        backend.train_from_iterator(TEXTS, trainers.BpeTrainer(**common | {"vocab_size": 280}, initial_alphabet=alphabet))
        model = json.loads(backend.to_str())["model"]
        arguments = {"vocab": model["vocab"], "merges": [tuple(pair) for pair in model["merges"]]}
    else:
        backend = Tokenizer(models.Unigram())
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        unknown = next(token for token in special if "unk" in token.lower())
        backend.train_from_iterator(TEXTS, trainers.UnigramTrainer(**common, unk_token=unknown))
        pieces = json.loads(backend.to_str())["model"]["vocab"]
        arguments = {"vocab": [tuple(piece) for piece in pieces]}
    return getattr(transformers, f"{name}TokenizerFast")(**arguments)


def make_model(family: str, head: str = "Model", **shape):
    """Random weights of a family, in evaluation mode.

    Args:
        head: what its class is called after the family: `Model`, or `ForMaskedLM`, whose encoder has a prefix in the file.
    """
    name, _, _, more = FAMILIES[family]
    tokenizer = family_tokenizer(family)
    config = getattr(transformers, f"{name}Config")(**SHAPE | more | {"vocab_size": len(tokenizer)} | shape)
    config.pad_token_id = tokenizer.pad_token_id
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}{head}")(config)
    for parameter in model.parameters():  # biases and norms that do nothing would prove nothing
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def family_tokenizer(family: str):
    name, kind, special, _ = FAMILIES[family]
    return make_tokenizer(kind, special, "Bert" if name == "Electra" else name)


def save_checkpoint(model, family: str, folder: Path) -> None:
    """Writes a model with its family's tokenizer."""
    family_tokenizer(family).save_pretrained(folder)
    model.save_pretrained(folder)


def write_checkpoint(folder: Path, family: str, head: str = "Model", **shape):
    """Random weights of a family with its tokenizer, saved; returns the model, in evaluation mode."""
    model = make_model(family, head, **shape)
    save_checkpoint(model, family, folder)
    return model
