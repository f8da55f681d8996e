"""Every family, randomly initialised and saved in its real format: logits and greedy texts are transformers' own, both ways."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from benchmarks.families import FAMILIES as PUBLISHED
from benchmarks.families import GEMMA2, GEMMA3, GPT2, SHAPE, Decoder, logits_of
from benchmarks.parity import measure
from metalm.decoder import CausalDecoder, DecoderConfig
from metalm.errors import CheckpointError
from metalm.interop.decoders import read_config, read_weights, save_decoder, to_ours
from metalm.segments import Document, Text, make_batch

VARIANTS = [
    Decoder("GPT-2, exact GELU, own width", "GPT2", GPT2 | {"activation_function": "gelu", "n_inner": 40}),
    Decoder("Llama, tied", "Llama", SHAPE | {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    Decoder(
        "Llama, longer positions",
        "Llama",
        SHAPE | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    ),
    Decoder("Mistral, window", "Mistral", SHAPE | {"sliding_window": 16}),
    Decoder(
        "Qwen2, window in upper layers",
        "Qwen2",
        SHAPE | {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    ),
    Decoder(
        "Gemma 2, without caps",
        "Gemma2",
        SHAPE | GEMMA2 | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "query_pre_attn_scalar": 16},
    ),
    Decoder("Gemma 3, windows everywhere", "Gemma3", SHAPE | GEMMA3 | {"layer_types": ["sliding_attention"] * 3}),
    Decoder("Gemma 3, no window", "Gemma3", SHAPE | GEMMA3 | {"layer_types": ["full_attention"] * 3}),
]
MODELS = {decoder.name: decoder for decoder in [*PUBLISHED, *VARIANTS] if isinstance(decoder, Decoder)}


def make_theirs(name: str):
    return MODELS[name].make()


def load_ours(folder) -> CausalDecoder:
    return MODELS["Llama"].load(folder).decoder  # of whichever family the folder says


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_greedy_texts_are_transformers(name):
    """All of the texts, by our own cache."""
    found = measure(MODELS[name])
    assert found.holds and found.same_text, found


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_what_is_written_back_transformers_reads(name, tmp_path):
    theirs = make_theirs(name)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_ours(tmp_path / "theirs")
    family = save_decoder(ours.state_dict(), ours.config, tmp_path / "back")
    # A Mistral without a window is a Llama, and is written as one.
    assert family == ("llama" if name == "Mistral" else MODELS[name].family.lower().replace("gemma3", "gemma3_text"))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    tokens_BT = torch.randint(1, 60, (2, 60))
    assert (again(tokens_BT).logits - theirs(tokens_BT).logits).abs().max() <= 1e-4


@torch.no_grad()
def test_checkpoints_in_several_files_load(tmp_path):
    theirs = make_theirs("Llama")
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    tokens_BT = torch.randint(1, 60, (1, 20))
    assert (logits_of(load_ours(tmp_path), tokens_BT) - theirs(tokens_BT).logits).abs().max() <= 1e-4


@torch.no_grad()
def test_gemmas_norms_are_not_rounded(tmp_path):
    """Its files are bfloat16, which holds 1 + weight badly; transformers adds in float32."""
    theirs = make_theirs("Gemma").bfloat16()
    theirs.save_pretrained(tmp_path)
    family, values = read_config(tmp_path)
    ours = to_ours(read_weights(tmp_path), family, values)
    assert torch.equal(ours["transformer.norm.weight"], 1 + theirs.model.norm.weight.float())


@torch.no_grad()
def test_gpt2s_first_files_load(tmp_path):
    """Names without the prefix, and the causal mask among the weights."""
    theirs = make_theirs("GPT-2")
    theirs.save_pretrained(tmp_path)
    old = {name.removeprefix("transformer."): tensor for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    old["h.0.attn.bias"] = torch.ones(1, 1, 128, 128)
    save_file(old, tmp_path / "model.safetensors")
    tokens_BT = torch.randint(1, 60, (1, 20))
    assert (logits_of(load_ours(tmp_path), tokens_BT) - theirs(tokens_BT).logits).abs().max() <= 1e-4


@pytest.mark.parametrize(
    "name, change",
    [
        ("Gemma 2", {"window": 16}),
        ("Gemma 2", {"window": 0}),
        ("Gemma 2", {"attention_softcap": 0.0}),
        ("Gemma 2", {"logit_softcap": 0.0}),
        ("Gemma 2", {"scale_width": 0}),
        ("Gemma 3", {"local_rotary_base": 0.0}),
        ("Gemma 3", {"rotary_scaling": None}),
        ("Gemma 3", {"window": [16, 16, 0]}),
    ],
)
@torch.no_grad()
def test_every_choice_of_gemmas_counts(name, change, tmp_path):
    """What equals transformers' would not without it: the bench's models are not too small to show it."""
    theirs = make_theirs(name)
    theirs.save_pretrained(tmp_path)
    ours = load_ours(tmp_path)
    other = CausalDecoder(DecoderConfig(**read_config(tmp_path)[1] | change)).eval()
    other.load_state_dict(ours.state_dict())
    tokens_BT = torch.randint(1, 60, (2, 60), generator=torch.Generator().manual_seed(0))
    assert (logits_of(other, tokens_BT) - theirs(tokens_BT).logits).abs().max() > 1e-2


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["Gemma 2", "Gemma 3"])
def test_losses_and_gradients_are_transformers(name, recompute, tmp_path):
    theirs = make_theirs(name)
    theirs.save_pretrained(tmp_path)
    ours = MODELS[name].load(tmp_path).train()
    ours.config.decoder.activation_checkpointing = recompute
    tokens = torch.randint(1, 60, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    loss = ours(make_batch([[Document([Text(tokens)])]], {}))
    expected = theirs(torch.tensor([tokens]), labels=torch.tensor([tokens])).loss * (len(tokens) - 1)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    loss.backward(), expected.backward()
    block, layer = ours.decoder.transformer.blocks[0], theirs.model.layers[0]
    for own, other in (
        (ours.decoder.embedding, theirs.model.embed_tokens),
        (block.attention_post_norm, layer.post_attention_layernorm),
        (block.attention.out, layer.self_attn.o_proj),
    ):
        scale = other.weight.grad.abs().max()
        torch.testing.assert_close(own.weight.grad / scale, other.weight.grad / scale, rtol=1e-3, atol=1e-4)


def test_gemma_3s_first_files_load(tmp_path):
    """Their rotary bases have names of their own, and a number says how many layers have a window."""
    make_theirs("Gemma 3").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"], config["layer_types"]
    old = {"rope_theta": 1000.0, "rope_local_base_freq": 100.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    (tmp_path / "config.json").write_text(json.dumps(config | old | {"sliding_window_pattern": 2}))
    found = read_config(tmp_path)[1]
    assert (found["rotary_base"], found["local_rotary_base"], found["rotary_scaling"]) == (1000.0, 100.0, {"factor": 8.0})
    assert found["window"] == [16, 0, 16]


def test_gemmas_that_read_both_ways_are_no_decoders(tmp_path):
    make_theirs("Gemma 3").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"use_bidirectional_attention": True}))
    with pytest.raises(CheckpointError, match="reads in both directions"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "opt"}, "is a 'opt'; our decoder reads llama, mistral"),
        ({"mlp_bias": True}, "biases in its linear maps are not supported"),
        ({"hidden_act": "relu"}, "the activation 'relu' is not supported"),
        ({"hidden_act": "gelu"}, "the activation 'gelu' is not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "of the kind 'yarn' are not supported"),
    ],
)
def test_what_our_stack_cannot_do_is_refused(tmp_path, change, message):
    make_theirs("Llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=message):
        read_config(tmp_path)


def test_broken_checkpoints_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="no folder"):
        read_config(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        read_config(tmp_path)
    make_theirs("Llama").save_pretrained(tmp_path)
    family, values = read_config(tmp_path)
    weights = read_weights(tmp_path)
    with pytest.raises(CheckpointError, match=r"no place for: model\.layers\.0\.self_attn\.rank"):
        to_ours(weights | {"model.layers.0.self_attn.rank": torch.zeros(1)}, family, values)
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        read_weights(tmp_path)


def test_a_decoder_of_no_family_is_not_written(tmp_path):
    gemma2 = read_config_of("Gemma 2", tmp_path)
    for config in (
        DecoderConfig(layers=1, width=8, heads=1, vocab_size=10),
        DecoderConfig(**gemma2 | {"qkv_bias": True}),
        DecoderConfig(**gemma2 | {"window": [4, 8, 0]}),  # theirs have one window
    ):
        with pytest.raises(CheckpointError, match="no family of the ecosystem has this decoder's choices"):
            save_decoder(CausalDecoder(config).state_dict(), config, tmp_path)


def read_config_of(name: str, folder) -> dict:
    make_theirs(name).save_pretrained(folder)
    return read_config(folder)[1]


def make_tokenizer(folder) -> None:
    """A byte-level BPE of 280 pieces as SmolLM's, whose end token is `<|endoftext|>`, with chat tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["the red dog runs over the hill"] * 3, trainer)
    backend.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("name", ["Llama, tied", "GPT-2", "Gemma", "Gemma 2", "Gemma 3"])
def test_a_run_starts_from_a_checkpoint_and_its_decoder_goes_back(name, tmp_path):
    """`decoder.init_from: hf:FOLDER`, docked with an encoder; then `metalm export`, read by transformers."""
    from typer.testing import CliRunner

    from metalm.cli import app
    from metalm.pretrained import load_pretrained
    from metalm.training.config import load_run_config
    from metalm.training.loop import train

    shape = MODELS[name].shape | {"vocab_size": 288}  # more rows than tokens, as published models have
    theirs = Decoder(name, MODELS[name].family, shape).make()
    folder = tmp_path / "theirs"
    theirs.save_pretrained(folder)
    make_tokenizer(folder)
    (tmp_path / "story.txt").write_text("\n\n".join(f"the red dog {n} runs over the hill ." for n in range(40)))
    source = {
        "shards": "${out}/data/train",
        "task": "text",
        "objective": {"type": "semicausal", "min_length": 2, "max_length": 4},
    }
    encoder = {"type": "text", "layers": 1, "width": 16, "heads": 2, "connector": {"type": "linear"}}
    config = {
        "out": str(tmp_path / "run"),
        "model": {"decoder": {"init_from": f"hf:{folder}"}, "encoders": {"text": encoder}},
        "data": {
            "path": str(tmp_path / "story.txt"),
            "row_length": 64,
            "rows": 2,
            "block": 16,
            "workers": 0,
            "train": [source],
        },
        "training": {"steps": 2, "lr": 1e-30, "warmup": 1, "precision": "float32", "checkpoint_every": 0},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    run = train(load_run_config(tmp_path / "run.yaml"))
    model, tokenizer = load_pretrained(run)
    assert tokenizer.start == tokenizer.end == tokenizer.document_end == tokenizer.backend.token_to_id("<|endoftext|>")
    tokens_BT = torch.tensor([tokenizer.encode("the red dog runs")])
    with torch.no_grad():
        assert (logits_of(model.decoder, tokens_BT) - theirs(tokens_BT).logits).abs().max() <= 1e-4
        answer = CliRunner().invoke(app, ["export", "--model", str(run), "--out", str(tmp_path / "back")])
        assert answer.exit_code == 0 and MODELS[name].family.lower() in answer.stdout, answer.output
        back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
        assert (back(tokens_BT).logits - theirs(tokens_BT).logits).abs().max() <= 1e-4
    assert back.config.eos_token_id == tokenizer.end


def test_only_a_decoder_starts_from_a_foreign_checkpoint(tmp_path):
    from metalm.training.config import load_run_config

    config = {"out": "x", "model": {"type": "pmlm", "encoder": {"init_from": "hf:bert"}}, "data": {}, "training": {"steps": 1}}
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"encoder\.init_from hf:bert: only a decoder"):
        load_run_config(tmp_path / "run.yaml")
