"""What can be trained, by name: METALM itself, the text-side pretraining modes whose results plug into it, and what is read
off their encoders.

A model is a `metalm.hub.PretrainedModel`, which brings `from_pretrained`, `save_pretrained` and `push_to_hub`, with

    Config             a dataclass with `type`, `set_vocab_size`, and `special_tokens` that the tokenizer must have, whose ids
                       go into fields called after them: `<mask>` into `mask_token`
    forward(batch)     the loss in nats, summed over the batch's targets
    hidden(batch)      what the softmax gets to see, at all positions: a tensor, or several
    num_predictions    of a batch: how often the softmax is asked
    processors         host side of its encoders, by name; empty for the text-side modes
    layout             its own way of laying out its task (`metalm.objectives.base.TextLayout`), or None where the data's
                       sources say how
    parts              what the loss of the last batch is made of, for the log: {name: (sum, count)}
"""

from typing import Any

from torch import nn

from metalm.data.tokenizer import Tokenizer
from metalm.nn.words import CharacterEmbedding
from metalm.registry import Registry

MODELS = Registry(
    "model",
    group="metalm.models",
    builtin={
        "metalm": "metalm.model:MetaLM",
        "mim": "metalm.objectives.mim:MIM",
        "pmlm": "metalm.objectives.pmlm:PMLM",
        "cloze": "metalm.objectives.cloze:Cloze",
        "classifier": "metalm.objectives.classifier:Classifier",
        "tagger": "metalm.objectives.tagger:Tagger",
        "seq2seq": "metalm.objectives.seq2seq:Seq2Seq",
    },
    default="metalm",
)


def token_field(name: str) -> str:
    """The configuration's field for the id of a special token."""
    return name.strip("<>") + "_token"


def fit_to_tokenizer(config: Any, tokenizer: Tokenizer) -> None:
    """Gives the tokenizer the special tokens that a model's configuration asks for, and the configuration their ids and the
    vocabulary's size.

    Raises:
        ConfigError: a vocabulary is smaller than the tokenizer's.
    """
    for name in config.special_tokens:
        setattr(config, token_field(name), tokenizer.special(name))
    config.set_vocab_size(tokenizer.size)


def spell_tokens(model: nn.Module, tokenizer: Tokenizer) -> None:
    """Tells the parts of a new model that read tokens by their characters how these are written.

    It is kept with the weights: a model that is loaded needs no spelling.
    """
    for module in model.modules():
        if isinstance(module, CharacterEmbedding):
            module.spell(tokenizer.spellings())
