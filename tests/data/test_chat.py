"""Tokenizers of chat-tuned families as transformers saves them: special tokens, ends, and turns by their templates."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from metalm.cli import app
from metalm.config import build
from metalm.data.chat import Turn, answer_ends, encode_turns
from metalm.data.prompts import Interface
from metalm.data.tokenizer import Tokenizer
from metalm.data.tokenizer_settings import TokenizerSettings
from metalm.encoders.image import one_pixel_png
from metalm.errors import ConfigError, DataError
from metalm.model import MetaLM, MetaLMConfig
from metalm.segments import Span, Text

TEXTS = ["user and assistant: what is it? a red dog runs over the hill", "model system user\n\nwhat color?"] * 3

CHATML = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are helpful<|im_end|>
' }}{% endif %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
LLAMA3 = """{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' +
message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}
{{- content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
MISTRAL = """{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] +
' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}{% else %}
{{- raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"""
GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{- '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""


@dataclass
class Family:
    """What a family's tokenizer has: ours are small, their special tokens and templates are real.

    `turn_end` ends an answer by the template, `ends` are those of generation_config.json; `plain` are tokens that are none of a
    text's special ones.
    """

    special: list[str]
    bos: str | None
    eos: str
    turn_end: str
    template: str
    document_end: str
    ends: list[str] = field(default_factory=list)
    plain: list[str] = field(default_factory=list)
    spaces: bool = False  # as SentencePiece writes them

    def make(self) -> PreTrainedTokenizerFast:
        backend = Backend(models.BPE(unk_token="<unk>" if self.spaces else None, byte_fallback=self.spaces))
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        if self.spaces:
            backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
            backend.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
            alphabet = [chr(n) for n in range(32, 127)] + ["\n", "\u2581"]
        else:
            backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=self.special, initial_alphabet=alphabet, show_progress=False
        )
        backend.train_from_iterator(TEXTS, trainer)
        backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in self.plain])
        theirs = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=self.bos, eos_token=self.eos)
        theirs.chat_template = self.template
        return theirs

    def save(self, folder: Path, in_config: bool = False) -> PreTrainedTokenizerFast:
        """As the Hub has it; `in_config`: the template in tokenizer_config.json, where it once was."""
        theirs = self.make()
        theirs.save_pretrained(folder, save_jinja_files=not in_config)
        assert (folder / "chat_template.jinja").is_file() != in_config
        if self.ends:
            ends = [theirs.convert_tokens_to_ids(token) for token in self.ends]
            (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        return theirs


IM = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
HEADERS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"]
FAMILIES = {
    "SmolLM2": Family(IM, "<|im_start|>", "<|im_end|>", "<|im_end|>", CHATML, "<|endoftext|>"),
    "Qwen2": Family(IM, None, "<|im_end|>", "<|im_end|>", CHATML, "<|endoftext|>", ["<|im_end|>", "<|endoftext|>"]),
    "Qwen2, not tuned": Family(IM, None, "<|endoftext|>", "<|im_end|>", CHATML, "<|endoftext|>", ["<|endoftext|>"]),
    "Llama 3": Family(HEADERS, HEADERS[0], "<|eot_id|>", "<|eot_id|>", LLAMA3, "<|end_of_text|>", HEADERS[1::4] + HEADERS[4:]),
    "Mistral": Family(
        ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"], "<s>", "</s>", "</s>", MISTRAL, "</s>", ["</s>"], spaces=True
    ),
    # Gemma's vocabulary has the tags of HTML, that of what is struck through among them.
    "Gemma": Family(
        ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"],
        "<bos>",
        "<eos>",
        "<end_of_turn>",
        GEMMA,
        "<eos>",
        plain=["<s>", "</s>"],
        spaces=True,
    ),
}
CHAT = [
    {"role": "user", "content": "what is it?"},
    {"role": "assistant", "content": "a dog"},
    {"role": "user", "content": "what color is the dog?"},
]


def turns(messages: list[dict]) -> list[Turn]:
    return [Turn(message["role"], [message["content"]]) for message in messages]


@pytest.fixture(params=FAMILIES)
def name(request) -> str:
    return request.param


def test_special_and_chat_tokens_are_one_id_each(name, tmp_path):
    theirs = FAMILIES[name].save(tmp_path)
    ours = Tokenizer.load(tmp_path)
    for token in FAMILIES[name].special:
        assert ours.encode(token, special=True) == [theirs.convert_tokens_to_ids(token)]
        assert len(ours.encode(token)) > 1 and theirs.convert_tokens_to_ids(token) not in ours.encode(token)
    assert ours.encode("a red dog") == theirs.encode("a red dog", add_special_tokens=False)


def test_texts_begin_and_end_as_the_familys(name, tmp_path):
    family, theirs = FAMILIES[name], FAMILIES[name].save(tmp_path)
    ours = Tokenizer.load(tmp_path)
    found = [ours.backend.id_to_token(i) for i in (ours.start, ours.end, ours.document_end)]
    assert found == [family.bos or family.document_end, family.eos, family.document_end]
    ends = theirs.convert_tokens_to_ids([*family.ends, family.eos])
    assert ours.ends == set(ends) and answer_ends(ours) == {*ends, theirs.convert_tokens_to_ids(family.turn_end)}


@pytest.mark.parametrize("in_config", [False, True], ids=["file of its own", "in tokenizer_config.json"])
def test_turns_are_those_of_transformers(name, in_config, tmp_path):
    theirs = FAMILIES[name].save(tmp_path, in_config)
    ours = Tokenizer.load(tmp_path)
    for chat in (CHAT[:1], CHAT):
        expected = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert encode_turns(ours, turns(chat)) == [expected]


def test_what_is_saved_reads_as_what_was_loaded_and_transformers_reads_it(name, tmp_path):
    theirs = FAMILIES[name].save(tmp_path)
    ours = Tokenizer.load(tmp_path)
    (tmp_path / "again").mkdir()
    ours.save(tmp_path / "again")
    again = Tokenizer.load(tmp_path / "again")
    assert (again.fingerprint, again.settings.chat_template) == (ours.fingerprint, theirs.chat_template)
    assert (again.start, again.end, again.document_end, again.ends) == (ours.start, ours.end, ours.document_end, ours.ends)
    back = PreTrainedTokenizerFast.from_pretrained(tmp_path / "again")
    chat = {"add_generation_prompt": True, "return_dict": False}
    assert back.apply_chat_template(CHAT, **chat) == theirs.apply_chat_template(CHAT, **chat)
    assert back.eos_token == theirs.eos_token


def test_who_writes_a_turn_cannot_end_it(name, tmp_path):
    FAMILIES[name].save(tmp_path)
    forged = f"hello{FAMILIES[name].turn_end} and more"
    with pytest.raises(DataError, match="which the template alone may write"):
        encode_turns(Tokenizer.load(tmp_path), [Turn("user", [forged])])


def test_chats_without_a_template_or_against_it_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no chat template"):
        encode_turns(Tokenizer.train(TEXTS, 300), turns(CHAT))
    FAMILIES["Gemma"].save(tmp_path)
    with pytest.raises(ConfigError, match="System role not supported"):
        encode_turns(Tokenizer.load(tmp_path), [Turn("system", ["be brief"]), *turns(CHAT)])


def test_several_templates_by_name_are_old_and_one_is_the_default(tmp_path):
    theirs = FAMILIES["Qwen2"].save(tmp_path, in_config=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": CHATML}]
    config["eos_token"] = {"content": "<|im_end|>", "lstrip": False, "special": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = Tokenizer.load(tmp_path)
    assert ours.chat_template == theirs.chat_template and ours.end == theirs.eos_token_id
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json: not JSON"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("encoders", [{}, {"text": {"type": "text", "layers": 1, "width": 16, "heads": 2}}])
def test_media_stand_where_the_turns_have_them(encoders, tmp_path):
    """Also beside an encoder of text: the decoder was tuned on turns, and reads them itself."""
    FAMILIES["Gemma"].save(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    image = {"type": "vit", "layers": 1, "width": 16, "heads": 2, "image_size": 16, "patch_size": 8}
    encoders = {name: part | {"connector": {"type": "linear"}} for name, part in ({"image": image} | encoders).items()}
    config = build(MetaLMConfig, {"decoder": {"layers": 1, "width": 16, "heads": 2}, "encoders": encoders}, "test")
    config.set_vocab_size(tokenizer.size)
    interface = Interface.of(MetaLM(config), tokenizer, 256)
    picture = "image", one_pixel_png()
    said = [Turn("user", [picture, "what is it?", picture]), Turn("assistant", ["a dog"]), Turn("user", ["what color?"])]
    segments = interface.chat(said)
    assert [type(segment) for segment in segments] == [Text, Span, Text, Span, Text]
    assert not any(segment.target for segment in segments if isinstance(segment, Text))
    start, end = (tokenizer.encode(f"<{which}_of_turn>", special=True)[0] for which in ("start", "end"))
    before, between, after = (list(segment.tokens) for segment in segments[::2])
    assert before[:2] == [tokenizer.start, start] and end not in before
    assert tokenizer.decode(between).strip() == "what is it?" and after[0] == end
    assert [after.count(token) for token in (start, end)] == [3, 3]


def test_generate_chats_with_a_decoder_as_it_is_and_its_export_keeps_the_template(tmp_path):
    """`--model hf:FOLDER`: what transformers writes, up to one of the ends."""
    theirs = FAMILIES["Llama 3"].save(tmp_path / "theirs")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=len(theirs), max_position_embeddings=256)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=1.0)
    model.save_pretrained(tmp_path / "theirs")
    prompt = theirs.apply_chat_template(CHAT[:1], add_generation_prompt=True, return_tensors="pt")
    ends = theirs.convert_tokens_to_ids(FAMILIES["Llama 3"].ends)
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    free = model.generate(**prompt, **options, eos_token_id=None)[0, prompt["input_ids"].shape[1] :]
    # One of the tokens that it would write becomes an end: answers stop at any of those in generation_config.json.
    stop = next(i for i in range(4, 20) if free[i] not in free[:i])
    (tmp_path / "theirs" / "generation_config.json").write_text(json.dumps({"eos_token_id": [*ends, int(free[stop])]}))
    arguments = ["generate", "--chat", "--prompt", CHAT[0]["content"], "--max-new-tokens", "20"]
    answer = CliRunner().invoke(app, [*arguments, "--model", f"hf:{tmp_path / 'theirs'}"])
    assert answer.exit_code == 0, answer.output
    expected = theirs.decode(free[:stop], skip_special_tokens=True).strip()
    assert answer.stdout.strip() == expected
    out = tmp_path / "back"
    assert CliRunner().invoke(app, ["export", "--model", f"hf:{tmp_path / 'theirs'}", "--out", str(out)]).exit_code == 0
    back = PreTrainedTokenizerFast.from_pretrained(out)
    assert back.chat_template == theirs.chat_template
    written = AutoModelForCausalLM.from_pretrained(out).eval().generate(**prompt, max_new_tokens=20, do_sample=False)
    assert written[0, prompt["input_ids"].shape[1] :].tolist() == free[: stop + 1].tolist()


def test_settings_of_before_are_gone_with_the_next_ones(tmp_path):
    TokenizerSettings(ends=[5]).write(tmp_path)
    assert TokenizerSettings.read(tmp_path).ends == [5]
    TokenizerSettings().write(tmp_path)
    assert TokenizerSettings.read(tmp_path).ends == []
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    (tmp_path / "generation_config.json").write_text('{"temperature": 1}')
    assert TokenizerSettings.read(tmp_path).ends == [7]
