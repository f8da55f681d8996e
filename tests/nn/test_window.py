"""Sliding windows: no position sees further, in training, with a cache, in encoders, and while holes are filled."""

from __future__ import annotations

import pytest
import torch

from metalm.config import build
from metalm.decoder import DecoderConfig
from metalm.encoders import ENCODERS
from metalm.errors import ConfigError
from metalm.inference.generate import GenerationConfig, generate
from metalm.inference.readings import Reading, Readings
from metalm.model import MetaLM, MetaLMConfig
from metalm.objectives.mim import MIMConfig
from metalm.objectives.pmlm import PMLMConfig
from metalm.objectives.seq2seq import Seq2SeqConfig
from metalm.segments import Document, Text, make_batch

SIZE = {"layers": 2, "width": 16, "heads": 2, "vocab_size": 30}
WINDOW = 3
REACH = 2 * (WINDOW - 1)  # of two layers


def make(**decoder) -> MetaLM:
    torch.manual_seed(0)
    model = MetaLM(build(MetaLMConfig, {"decoder": {**SIZE, "positions": "rotary", "window": WINDOW, **decoder}}, "test"))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model.double().eval()


def seen_by(model: MetaLM, documents: list[Document], place: int) -> list[int]:
    """The columns of a row whose input vectors the hidden state at `place` depends on."""
    batch = make_batch([documents], {})
    x_BTD = model.decoder.embed(batch.tokens_BT).detach().requires_grad_()
    model.decoder(x_BTD, batch.position_BT, model.attention(batch))[0, place].sum().backward()
    return x_BTD.grad[0].abs().sum(-1).nonzero()[:, 0].tolist()


def test_a_position_sees_as_far_as_its_layers_reach():
    model = make()
    text = Document([Text(list(range(12)))])
    assert seen_by(model, [text], 9) == list(range(9 - REACH, 10))
    assert seen_by(model, [text, text], 14) == [12, 13, 14]
    assert seen_by(make(window=0), [text], 9) == list(range(10))


def test_a_branch_reaches_back_by_positions_not_by_columns():
    """The second branch goes on from the trunk, whatever lies between them in the row."""
    document = Document([Text([1, 2, 3, 4, 5, 6])], "", [[Text([7, 8, 9])], [Text([10, 11])]])
    assert seen_by(make(), [document], 9) == [2, 3, 4, 5, 9]


def test_the_decoder_alone_keeps_to_its_window():
    model = make()
    tokens_BT = torch.arange(12)[None]
    alone = model.decoder(model.decoder.embed(tokens_BT), torch.arange(12)[None])
    whole = model.hidden(make_batch([[Document([Text(list(range(12)))])]], {}))
    torch.testing.assert_close(alone, whole)


def test_layers_see_as_far_as_each_of_them_does():
    text = Document([Text(list(range(12)))])
    assert seen_by(make(window=[3, 2]), [text], 9) == list(range(9 - 3, 10))
    assert seen_by(make(window=[3, 0]), [text], 9) == list(range(10))
    assert seen_by(make(window=[2], layers=3), [text], 9) == list(range(9 - 3, 10))


def test_a_list_of_windows_repeats_and_may_be_one_for_all():
    assert DecoderConfig(layers=5, width=16, heads=2, window=[4, 4, 0]).windows == [4, 4, 0, 4, 4]
    assert DecoderConfig(layers=4, width=16, heads=2, window=[4]).window == 4
    assert DecoderConfig(layers=4, width=16, heads=2, window=[0, 0]).window == 0


ACROSS_LAYERS = {"window": [WINDOW, 0], "local_rotary_base": 50.0, "attention_softcap": 2.0, "logit_softcap": 3.0}
ACROSS_LAYERS |= {"post_norm": True, "scale_width": 4, "qk_norm": True}


def test_a_causal_encoder_reads_as_the_decoder_that_it_starts_from():
    """With all that Gemmas have."""
    model, cls = make(**ACROSS_LAYERS), ENCODERS["causal"]
    shape = SIZE | {"positions": "rotary", **ACROSS_LAYERS}
    del shape["logit_softcap"]
    encoder = cls(build(cls.Config, {"type": "causal", **shape}, "test")).double().eval()
    encoder.load_state_dict(model.decoder.state_dict())
    tokens = torch.randint(30, (1, 12), generator=torch.Generator().manual_seed(0))
    position = torch.arange(12)[None]
    with torch.no_grad():
        read = encoder(tokens, torch.ones_like(tokens), position)
        torch.testing.assert_close(read, model.decoder(model.decoder.embed(tokens), position))


@pytest.mark.parametrize("decoder", [{}, ACROSS_LAYERS], ids=["one window", "as in Gemmas"])
def test_texts_written_by_the_cache_are_those_written_without(decoder):
    model = make(**decoder)
    prompts = [Document([Text(list(range(2, 2 + n)), target=False)]) for n in (2, 9, 5)]
    with torch.no_grad():
        found = generate(model, prompts, -1, GenerationConfig(max_new_tokens=10))
        for prompt, tokens in zip(prompts, found):
            written = list(prompt.segments[0].tokens)
            for token in tokens:
                hidden = model.hidden(make_batch([[Document([Text(written)])]], {}))
                assert token == int(model.decoder.logits(hidden[0, -1]).argmax())
                written.append(token)


@pytest.mark.parametrize("decoder", [{}, ACROSS_LAYERS], ids=["one window", "as in Gemmas"])
def test_both_sides_of_a_hole_are_read_within_the_window(decoder):
    model, tokens = make(**decoder), [*range(3, 15)]
    with torch.no_grad():
        expected = model.decoder.logits(model.decoder(model.decoder.embed(torch.tensor([tokens])), torch.arange(12)[None]))[0]
        readings = Readings(model, 1, 20)
        first = readings({0: (Reading(0, tokens[:8], 2), Reading(0, tokens[:1], 1))})[0]
        second = readings({0: (Reading(8, tokens[8:], 4), None)})[0]
    torch.testing.assert_close(torch.cat([first[0], second[0]]), expected[6:].float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind, reach", [("text", (4, 5, 6, 7, 8, 9, 10, 11, 12)), ("causal", (4, 5, 6, 7, 8))])
def test_encoders_of_text_keep_to_their_window(kind, reach):
    torch.manual_seed(0)
    cls = ENCODERS[kind]
    encoder = cls(build(cls.Config, {"type": kind, **SIZE, "window": WINDOW}, "test")).double().eval()
    states = {}
    for changed in (None, *range(16)):
        tokens = [1] * 16
        if changed is not None:
            tokens[changed] = 2
        inputs = encoder.processor.collate([{"tokens": tokens}]).inputs
        with torch.no_grad():
            states[changed] = encoder(**inputs)[0, 8]
    assert tuple(n for n in range(16) if not torch.equal(states[n], states[None])) == reach


def test_windows_are_refused_where_they_cannot_be_kept():
    for values, message in (
        ({"decoder": SIZE | {"window": -1}}, "window is -1"),
        ({"decoder": SIZE | {"window": []}}, r"window is \[\]"),
        ({"decoder": SIZE | {"window": [4, -4]}}, r"window is \[4, -4\]"),
        ({"decoder": SIZE | {"window": [4, 0, 4]}}, "window lists 3 layers, there are 2"),
        ({"decoder": SIZE | {"local_rotary_base": 10.0}}, "local_rotary_base is for rotary positions"),
        ({"decoder": SIZE | {"attention_softcap": -1.0}}, "attention_softcap is -1"),
        ({"decoder": SIZE | {"logit_softcap": -1.0}}, "logit_softcap is -1"),
        (
            {"decoder": SIZE, "encoders": {"text": {"type": "text", **SIZE, "window": -1, "connector": {"type": "linear"}}}},
            "window is -1",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            build(MetaLMConfig, values, "test")
    for key, value in (("window", [4, 0]), ("logit_softcap", 30.0)):
        with pytest.raises(ConfigError, match="synchronous" if key == "window" else key):
            build(MIMConfig, {"decoder": SIZE | {"positions": "rotary", key: value}, "synchronous": 0.3}, "test")
    for config in (PMLMConfig, Seq2SeqConfig):
        with pytest.raises(ConfigError, match=r"encoder\.window"):
            build(config, {"encoder": {"type": "text", **SIZE, "window": 4}}, "test")
