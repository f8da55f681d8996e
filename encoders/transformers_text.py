"""Encoders of text with the ecosystem's weights, by transformers: BERT, MiniLM, RoBERTa, XLM-R, ELECTRA, DeBERTa-v3, MPNet.

    the run's tokens  ->  text  ->  the encoder's own tokens, [CLS] … [SEP]  ->  states, one each

A model that was trained on other tokens than the decoder's reads its own: the layout decodes a span, half a character at a
border is left out, and each token that the encoder's tokenizer makes of the text becomes a state. They may be more than the
run's tokens, were it only by [CLS] and [SEP], or fewer.

Spans are read one a row, padded: not all families can be told where in a row a text begins.

Shapes: R rows, S positions of a row, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metalm.data.tokenizer import FILE, Tokenizer
from metalm.encoders.base import BESIDE, Collated, Encoder, EncoderConfig, Processor
from metalm.errors import ConfigError

FAMILIES = ("bert", "roberta", "xlm-roberta", "electra", "deberta-v2", "mpnet")  # as `model_type` has it; MiniLM is a bert


@dataclass(kw_only=True)
class TransformersConfig(EncoderConfig):
    """`name` is a folder in Hugging Face's layout or a Hub id: its `config.json` says the shape, its tokenizer comes along.

    With `pretrained` its weights are loaded, from safetensors alone; without, the same shape starts from random ones.
    """

    name: str
    pretrained: bool = False


@dataclass
class OwnTokensProcessor(Processor):
    """Texts in the encoder's own tokens; a blank span is the empty text.

    `max_positions` is the encoder's positions without [CLS] and [SEP], taken as the room for the *run's* tokens, which is what
    layouts draw spans by. Where a text of so many has more of the encoder's own, these are cut at the end of its positions, and
    the end of the text is not read; a run's vocabulary that is larger than the encoder's makes that likelier.

    Attributes:
        tokenizer: the contents of a `tokenizer.json` that cuts to the encoder's positions.
    """

    tokenizer: str
    padding: int
    max_positions: int
    reads = frozenset({"text"})
    own_tokens = True

    @cached_property
    def backend(self) -> Any:
        from tokenizers import Tokenizer as Backend

        backend = Backend.from_str(self.tokenizer)
        backend.encode_special_tokens = True  # "[SEP]" in somebody's text is text
        return backend

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "backend"}

    def tokens(self, inputs: dict) -> list[int]:
        return inputs["tokens"] if "tokens" in inputs else self.backend.encode(inputs["text"].strip("\ufffd")).ids

    def num_states(self, inputs: dict) -> int:
        return len(self.tokens(inputs))

    def load(self, inputs: dict) -> dict:
        return {"tokens": self.tokens(inputs)}

    def collate(self, loaded: list[dict]) -> Collated:
        rows = [torch.tensor(self.tokens(inputs)) for inputs in loaded]
        tokens_RS = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.padding)
        length_R = torch.tensor([len(row) for row in rows])
        mask_RS = torch.arange(tokens_RS.shape[1]) < length_R[:, None]
        return Collated({"tokens_RS": tokens_RS, "mask_RS": mask_RS.long()}, mask_RS.flatten().nonzero()[:, 0])

    def blank(self) -> dict:
        return {"text": ""}


class TransformersEncoder(Encoder):
    """A transformers model's last states, as they are."""

    Config = TransformersConfig

    def __init__(self, config: TransformersConfig):
        super().__init__()
        theirs = read_config(config.name)
        self.model = make_model(config, theirs)
        self.width = theirs.hidden_size
        self.processor = make_processor(config.name, self.model)

    def forward(self, tokens_RS: Tensor, mask_RS: Tensor) -> Tensor:
        if tokens_RS.is_meta:  # where nobody can look for padding, as transformers does in tokens and mask
            return self.model(inputs_embeds=self.model.get_input_embeddings()(tokens_RS)).last_hidden_state
        return self.model(input_ids=tokens_RS, attention_mask=mask_RS).last_hidden_state

    def layers(self) -> list[nn.Module]:
        return list(self.model.encoder.layer)

    def save_files(self, folder: Path, plain: dict) -> None:
        """The model's `config.json` and its tokenizer, which is all of `name` that an export needs."""
        folder.mkdir(parents=True, exist_ok=True)
        self.model.config.save_pretrained(folder)
        (folder / FILE).write_text(self.processor.tokenizer)
        plain["name"] = BESIDE + folder.name


def read_config(name: str) -> Any:
    """The configuration of a folder or Hub id, as transformers has it.

    Raises:
        ConfigError: there is none, or it is of no bidirectional encoder of text.
    """
    from transformers import AutoConfig

    try:
        theirs = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # of transformers, its checks of values or the Hub, without a common base
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"{name!r} is no folder with a config.json that transformers reads, nor on the Hub ({reason})"
        ) from error
    if theirs.model_type not in FAMILIES:
        raise ConfigError(
            f"{name!r} is a {theirs.model_type!r}, not one of the bidirectional encoders of text {', '.join(FAMILIES)}"
        )
    if getattr(theirs, "is_decoder", False):
        raise ConfigError(f"{name!r} is a {theirs.model_type!r} that reads from left to right: its is_decoder is set")
    return theirs


def make_model(config: TransformersConfig, theirs: Any) -> nn.Module:
    """The model without what pools its states; on the meta device, and without `pretrained`, its shape alone.

    Raises:
        ConfigError: it has no weights in safetensors, or they are not those of its configuration.
    """
    from transformers import AutoModel

    if not config.pretrained or torch.get_default_device().type == "meta":
        model = AutoModel.from_config(theirs, dtype=torch.float32, trust_remote_code=False)
    else:
        try:
            with quiet():
                model, report = AutoModel.from_pretrained(
                    config.name,
                    config=theirs,
                    dtype=torch.float32,
                    use_safetensors=True,  # a pickle may hold any program
                    trust_remote_code=False,
                    output_loading_info=True,
                )
        except Exception as error:  # of transformers, safetensors or the Hub, without a common base
            raise ConfigError(f"the weights of {config.name!r} cannot be loaded: {error}") from error
        check_weights(config.name, report)
    if hasattr(model, "pooler"):
        model.pooler = None  # has no part in the states, and would count as trained
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' table of heads and poolers, which are left out here on purpose, and its bar, from every rank."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def check_weights(name: str, report: dict) -> None:
    """Raises `ConfigError` where weights are missing, for which transformers takes random ones, or are of further layers.

    Heads are left out, on purpose.
    """
    problems = [f"lacks {weight}" for weight in sorted(report["missing_keys"]) if "pooler" not in weight]
    problems += [
        f"has {weight}, which the model has not" for weight in sorted(report["unexpected_keys"]) if ".layer." in weight
    ]
    if problems:
        more = f", and {len(problems) - 3} more such" if len(problems) > 3 else ""
        raise ConfigError(f"{name!r} is of another shape than its config.json says: it {'; it '.join(problems[:3])}{more}")


def make_processor(name: str, model: nn.Module) -> OwnTokensProcessor:
    """The host side of a model, with the tokenizer of a folder or Hub id.

    Raises:
        ConfigError: there is no tokenizer, or it is another model's.
    """
    tokenizer = Tokenizer.load(name)
    backend, vocabulary = tokenizer.backend, model.config.vocab_size
    if tokenizer.size > vocabulary:
        raise ConfigError(f"the tokenizer of {name!r} has {tokenizer.size:,} tokens, the model only {vocabulary:,}")
    ends = len(backend.encode("").ids)
    if not ends:
        raise ConfigError(f"the tokenizer of {name!r} puts nothing around a text, no [CLS] and no [SEP]: it is not whole")
    positions = num_positions(model)
    backend.enable_truncation(max_length=positions)
    padding = model.config.pad_token_id or 0
    return OwnTokensProcessor(backend.to_str(), padding, positions - ends)


def num_positions(model: nn.Module) -> int:
    """How many tokens the model reads at once; RoBERTa and its like count positions from after that of padding on."""
    table = getattr(model.embeddings, "position_embeddings", None)
    unused = 0 if table is None or table.padding_idx is None else table.padding_idx + 1
    return model.config.max_position_embeddings - unused
