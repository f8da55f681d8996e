"""Decoders of the ecosystem on our stack, and back: GPT-2, Llama (SmolLM, TinyLlama, …), Mistral, Qwen2, Qwen3, Gemma 1 to 3.

    config.json            <->   DecoderConfig                by a family's table of settings
    *.safetensors          <->   CausalDecoder.state_dict()   by its table of names

A name is that of a folder in Hugging Face's layout, or a Hub id. Only safetensors are read, in one file or in several. What a
family can do and our stack cannot is refused, by name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metalm.decoder import DecoderConfig
from metalm.errors import CheckpointError

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


class Rule(NamedTuple):
    """A tensor of ours and those of theirs that it is made of, one below the other; `{}` is the layer's number.

    `transposed`: theirs are [in, out]. `offset`: what ours has more.
    """

    ours: str
    theirs: tuple[str, ...]
    transposed: bool = False
    offset: float = 0.0


# Ours and theirs of a layer's norms; where there are some after attention and MLP, the names shift.
NORMS = {
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
}
POST_NORMS = NORMS | {
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}


def llama_rules(norms: dict[str, str] = NORMS, norm_offset: float = 0.0) -> list[Rule]:
    block, layer = "transformer.blocks.{}.", "model.layers.{}."
    attention = [f"{layer}self_attn.{part}_proj" for part in "qkv"]
    rules = [
        Rule("embedding.weight", ("model.embed_tokens.weight",)),
        Rule("softmax.weight", ("lm_head.weight",)),
        Rule("transformer.norm.weight", ("model.norm.weight",), offset=norm_offset),
        *(Rule(f"{block}{ours}.weight", (f"{layer}{theirs}.weight",), offset=norm_offset) for ours, theirs in norms.items()),
    ]
    for kind in ("weight", "bias"):
        rules += [
            Rule(f"{block}attention.qkv.{kind}", tuple(f"{name}.{kind}" for name in attention)),
            Rule(f"{block}attention.out.{kind}", (f"{layer}self_attn.o_proj.{kind}",)),
            Rule(f"{block}mlp.up.{kind}", (f"{layer}mlp.gate_proj.{kind}", f"{layer}mlp.up_proj.{kind}")),
            Rule(f"{block}mlp.down.{kind}", (f"{layer}mlp.down_proj.{kind}",)),
        ]
    return rules


def gpt2_rules() -> list[Rule]:
    block, layer = "transformer.blocks.{}.", "transformer.h.{}."
    parts = {"attention.qkv": "attn.c_attn", "attention.out": "attn.c_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
    norms = {"attention_norm": "ln_1", "mlp_norm": "ln_2"}
    rules = [
        Rule("embedding.weight", ("transformer.wte.weight",)),
        Rule("softmax.weight", ("lm_head.weight",)),
        Rule("transformer.positions.weight", ("transformer.wpe.weight",)),
    ]
    for kind in ("weight", "bias"):
        rules += [Rule(f"transformer.norm.{kind}", (f"transformer.ln_f.{kind}",))]
        rules += [Rule(f"{block}{ours}.{kind}", (f"{layer}{theirs}.{kind}",)) for ours, theirs in norms.items()]
        rules += [
            Rule(f"{block}{ours}.{kind}", (f"{layer}{theirs}.{kind}",), kind == "weight") for ours, theirs in parts.items()
        ]
    return rules


@dataclass(frozen=True)
class Family:
    """How a family writes its configurations and names its tensors.

    Attributes:
        settings: what our configuration says for every model of the family.
        sizes: our names of what differs from model to model, and theirs.
        read: what else our configuration gets from theirs.
        write: what else theirs gets from ours.
        fits: whether one of ours, whose settings are the family's, can be written as theirs.
    """

    architecture: str
    settings: dict[str, Any]
    sizes: dict[str, str]
    rules: list[Rule]
    read: Callable[[Any], dict] = lambda config: {}
    write: Callable[[DecoderConfig], dict] = lambda config: {}
    fits: Callable[[DecoderConfig], bool] = lambda config: True


LLAMA_SIZES = {
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "ffn": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "max_positions": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "tied": "tie_word_embeddings",
}
GPT2_SIZES = {
    "layers": "n_layer",
    "width": "n_embd",
    "heads": "n_head",
    "norm_eps": "layer_norm_epsilon",
    "max_positions": "n_positions",
    "vocab_size": "vocab_size",
    "tied": "tie_word_embeddings",
}
UNCAPPED = {"attention_softcap": 0.0, "logit_softcap": 0.0}
PLAIN = {"post_norm": False, "local_rotary_base": 0.0, "scale_width": 0, "qk_norm": False, "scaled": False, **UNCAPPED}
ROTARY = {"norm": "rms", "positions": "rotary", "bias": False, "mlp": "swiglu", "qkv_bias": False}
GEMMA = ROTARY | {"mlp": "geglu_tanh", "scaled": True}
SLIDING, FULL = "sliding_attention", "full_attention"
GATES = {"silu": "swiglu", "gelu_pytorch_tanh": "geglu_tanh"}
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}


def read_llama(config: Any) -> dict:
    """Rotation, head width, biases, and sliding windows."""
    rope = getattr(config, "rope_parameters", None) or {"rope_theta": config.rope_theta, **(config.rope_scaling or {})}
    rope = rope.get(FULL, rope)  # Gemma 3's of its layers without a window
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise CheckpointError(f"{config.model_type}: rotary positions of the kind {kind!r} are not supported")
    if config.model_type.startswith("gemma"):  # the first files of which say "gelu" and mean its approximation
        activation = getattr(config, "hidden_activation", None) or "gelu_pytorch_tanh"
    else:
        activation = config.hidden_act
    if activation not in GATES:
        raise CheckpointError(f"{config.model_type}: the activation {activation!r} is not supported")
    if getattr(config, "mlp_bias", False) or (config.model_type != "qwen2" and getattr(config, "attention_bias", False)):
        raise CheckpointError(f"{config.model_type}: biases in its linear maps are not supported")
    scaling = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if kind == "linear":
        scaling = ("factor",)
    return {
        "mlp": GATES[activation],
        "head_width": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "rotary_base": rope["rope_theta"],
        "rotary_scaling": None if kind == "default" else {name: float(rope[name]) for name in scaling if rope.get(name)},
        "window": read_window(config),
    }


def read_window(config: Any) -> int | list[int]:
    """Of all layers, or of each."""
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    kinds = getattr(config, "layer_types", None) or [SLIDING]
    windows = [window or 0 if kind == SLIDING else 0 for kind in kinds]
    return windows if len(set(windows)) > 1 else windows[0]


def write_window(config: DecoderConfig) -> dict:
    if not config.window:
        return {"use_sliding_window": False}
    kinds = [SLIDING if window else FULL for window in config.windows]
    return {"sliding_window": max(config.windows), "layer_types": kinds, "use_sliding_window": True}


def one_window(config: DecoderConfig) -> bool:
    """In some layers or in all."""
    return len(set(config.windows) - {0}) <= 1


def read_gemma2(config: Any) -> dict:
    """Soft caps, and by what scores are divided; raises `CheckpointError` where it is none that reads from left to right."""
    if getattr(config, "use_bidirectional_attention", False):
        raise CheckpointError(f"{config.model_type}: it reads in both directions, and is no decoder")
    ours = read_llama(config)
    width = config.query_pre_attn_scalar
    return ours | {
        "attention_softcap": config.attn_logit_softcapping or 0.0,
        "logit_softcap": config.final_logit_softcapping or 0.0,
        "scale_width": 0 if width == ours["head_width"] else width,
    }


def write_gemma2(config: DecoderConfig) -> dict:
    return write_llama(config) | {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": config.scale_width or config.head_width,
        "attn_logit_softcapping": config.attention_softcap or None,
        "final_logit_softcapping": config.logit_softcap or None,
        "sliding_window": max(config.windows) or config.max_positions,  # transformers wants one, though no layer has it
        "layer_types": [SLIDING if window else FULL for window in config.windows],
    }


def read_gemma3(config: Any) -> dict:
    """Its layers with a window rotate by a base of their own; scores it does not cap, whatever its configuration says."""
    ours = read_gemma2(config) | {"attention_softcap": 0.0}
    local = (getattr(config, "rope_parameters", None) or {}).get(SLIDING)
    local = local or {"rope_theta": config.rope_local_base_freq}  # as versions of transformers before 5 have it
    if local.get("rope_type", "default") != "default":
        raise CheckpointError(f"{config.model_type}: scaled rotary positions of layers with a window are not supported")
    return ours | {"local_rotary_base": local["rope_theta"] if ours["window"] else 0.0}


def write_gemma3(config: DecoderConfig) -> dict:
    theirs = write_gemma2(config)
    local = config.local_rotary_base or config.rotary_base
    return theirs | {
        "rope_parameters": {FULL: theirs["rope_parameters"], SLIDING: {"rope_type": "default", "rope_theta": local}},
        "rope_local_base_freq": local,  # as versions of transformers before 5 have it
    }


def write_llama(config: DecoderConfig) -> dict:
    rope: dict[str, Any] = {"rope_theta": config.rotary_base, "rope_type": "default"}
    if config.rotary_scaling:
        rope |= config.rotary_scaling | {"rope_type": "llama3" if len(config.rotary_scaling) > 1 else "linear"}
    old = {name: value for name, value in rope.items() if name != "rope_theta"}
    return {
        "head_dim": config.head_width,
        "rope_parameters": rope,
        "rope_theta": config.rotary_base,  # as versions of transformers before 5 have it
        "rope_scaling": old if config.rotary_scaling else None,
        "hidden_act": "gelu_pytorch_tanh" if config.mlp == "geglu_tanh" else "silu",
        "attention_bias": False,
    }


def read_gpt2(config: Any) -> dict:
    if config.activation_function not in ACTIVATIONS:
        raise CheckpointError(f"gpt2: the activation {config.activation_function!r} is not supported")
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise CheckpointError("gpt2: scale_attn_by_inverse_layer_idx is not supported")
    return {"ffn": config.n_inner or 4 * config.n_embd, "mlp": ACTIVATIONS[config.activation_function]}


def write_gpt2(config: DecoderConfig) -> dict:
    activation = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}[config.mlp]
    return {"n_inner": config.ffn, "activation_function": activation}


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", PLAIN | ROTARY | {"window": 0}, LLAMA_SIZES, llama_rules(), read_llama, write_llama),
    "mistral": Family(
        "MistralForCausalLM",
        PLAIN | ROTARY,
        LLAMA_SIZES,
        llama_rules(),
        read_llama,
        lambda c: write_llama(c) | {"sliding_window": c.window or None},
        lambda c: not isinstance(c.window, list),
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        PLAIN | ROTARY | {"qkv_bias": True},
        LLAMA_SIZES,
        llama_rules(),
        read_llama,
        lambda c: write_llama(c) | write_window(c),
        one_window,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        PLAIN | ROTARY | {"qk_norm": True},
        LLAMA_SIZES,
        llama_rules(),
        read_llama,
        lambda c: write_llama(c) | write_window(c),
        one_window,
    ),
    "gemma": Family(
        "GemmaForCausalLM",
        PLAIN | GEMMA | {"window": 0},
        LLAMA_SIZES,
        llama_rules(norm_offset=1.0),
        read_llama,
        lambda c: write_llama(c) | {"hidden_activation": "gelu_pytorch_tanh"},
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        GEMMA | {"post_norm": True, "qk_norm": False, "local_rotary_base": 0.0},
        LLAMA_SIZES,
        llama_rules(POST_NORMS, norm_offset=1.0),
        read_gemma2,
        write_gemma2,
        one_window,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        GEMMA | {"post_norm": True, "qk_norm": True, "attention_softcap": 0.0},
        LLAMA_SIZES,
        llama_rules(POST_NORMS, norm_offset=1.0),
        read_gemma3,
        write_gemma3,
        one_window,
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        PLAIN | {"norm": "layer", "positions": "learned", "bias": True, "qkv_bias": None, "window": 0},
        GPT2_SIZES,
        gpt2_rules(),
        read_gpt2,
        write_gpt2,
        lambda c: c.mlp not in ("swiglu", "geglu_tanh") and (c.kv_heads, c.head_width) == (c.heads, c.width // c.heads),
    ),
}


def find_folder(name: str | Path) -> Path:
    """The folder of a checkpoint; a Hub id is downloaded.

    Raises:
        CheckpointError: there is none.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(name), allow_patterns=["*.json", "*.safetensors", "tokenizer*", "*.jinja"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(f"no folder {str(name)!r}, and no such model on the Hub") from error


def read_config(name: str | Path) -> tuple[Family, dict]:
    """The family of a checkpoint, and our decoder's configuration for it.

    Raises:
        CheckpointError: it is of no family that our stack knows, or does what our stack cannot.
    """
    from transformers import AutoConfig

    folder = find_folder(name)
    try:
        config = AutoConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{name}: no {CONFIG} that transformers can read ({str(error).splitlines()[0]})") from error
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise CheckpointError(f"{name} is a {config.model_type!r}; our decoder reads {', '.join(FAMILIES)}")
    sizes = {ours: getattr(config, theirs) for ours, theirs in family.sizes.items()}
    return family, family.settings | sizes | family.read(config)


def read_weights(name: str | Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, of one file or of several.

    Raises:
        CheckpointError: there are no safetensors, or a file is missing or torn.
    """
    from safetensors.torch import load_file

    folder = find_folder(name)
    files = [WEIGHTS]
    if not (folder / WEIGHTS).exists() and (folder / INDEX).exists():
        files = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    weights: dict[str, Tensor] = {}
    for file in files:
        try:
            weights |= load_file(folder / file)
        except Exception as error:  # safetensors raises its own and OSError, without a common base
            raise CheckpointError(f"{folder / file}: not a complete safetensors file ({error})") from error
    return weights


def expand(rules: list[Rule], layers: int) -> Iterator[Rule]:
    """The rules of every layer."""
    for rule in rules:
        for layer in range(layers) if "{}" in rule.ours else (0,):
            yield rule._replace(ours=rule.ours.format(layer), theirs=tuple(name.format(layer) for name in rule.theirs))


def to_ours(weights: Mapping[str, Tensor], family: Family, config: dict) -> dict[str, Tensor]:
    """A decoder's state dict from a checkpoint's tensors.

    Raises:
        CheckpointError: tensors are left over, so that the model would not be what it was.
    """
    weights = {full_name(name, family): tensor for name, tensor in weights.items() if not name.endswith(BUFFERS)}
    if config["tied"]:
        weights.pop("lm_head.weight", None)
    ours = {}
    for rule in expand(family.rules, config["layers"]):
        if all(name in weights for name in rule.theirs):
            tensors = [weights.pop(name) for name in rule.theirs]
            tensor = torch.cat([t.T if rule.transposed else t for t in tensors])
            ours[rule.ours] = tensor.float() + rule.offset if rule.offset else tensor
    if weights:
        raise CheckpointError(f"tensors that our decoder has no place for: {', '.join(sorted(weights)[:5])}")
    return ours


BUFFERS = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")  # constants that old files hold


def full_name(name: str, family: Family) -> str:
    """GPT-2's first files lack the prefix that later ones have."""
    known = ("transformer.", "model.", "lm_head.")
    return name if name.startswith(known) or family.architecture != "GPT2LMHeadModel" else f"transformer.{name}"


def to_theirs(weights: Mapping[str, Tensor], family: Family, config: DecoderConfig) -> dict[str, Tensor]:
    """A checkpoint's tensors from a decoder's state dict."""
    heads, groups = (n * config.head_width for n in (config.heads, config.kv_heads))
    theirs = {}
    for rule in expand(family.rules, config.layers):
        if rule.ours in weights:
            tensor = weights[rule.ours] - rule.offset
            rows = {3: [heads, groups, groups], 2: [config.ffn] * 2, 1: [len(tensor)]}[len(rule.theirs)]
            for name, part in zip(rule.theirs, tensor.split(rows), strict=True):
                theirs[name] = (part.T if rule.transposed else part).contiguous()
    return theirs


def family_of(config: DecoderConfig) -> tuple[str, Family]:
    """The first family that a decoder can be written as.

    Raises:
        CheckpointError: there is none.
    """
    for name, family in FAMILIES.items():
        plain = vars(config) | {"qkv_bias": None if config.qkv_bias == config.bias else config.qkv_bias}
        wanted = family.settings
        wanted = wanted | {"qkv_bias": None if wanted["qkv_bias"] == wanted["bias"] else wanted["qkv_bias"]}
        if all(plain[key] == value for key, value in wanted.items()) and family.fits(config):
            return name, family
    raise CheckpointError(
        f"no family of the ecosystem has this decoder's choices (norm {config.norm}, positions {config.positions}, mlp "
        f"{config.mlp}, bias {config.bias}, window {config.window}); it can be written as {', '.join(FAMILIES)}"
    )


def save_decoder(
    weights: Mapping[str, Tensor], config: DecoderConfig, folder: str | Path, start: int | None = None, end: int | None = None
) -> str:
    """Writes a decoder's state dict in Hugging Face's layout, as transformers loads it; returns the family's name.

    Args:
        start, end: the tokens that start a text and end a turn, at which `generate` stops.

    Raises:
        CheckpointError: no family has its choices.
    """
    from safetensors.torch import save_file

    name, family = family_of(config)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {theirs: getattr(config, ours) for ours, theirs in family.sizes.items()}
    record = {"architectures": [family.architecture], "model_type": name, **sizes, **family.write(config)}
    record |= {"bos_token_id": start, "eos_token_id": end}
    (folder / CONFIG).write_text(json.dumps(record, indent=1))
    save_file(to_theirs(weights, family, config), folder / WEIGHTS, metadata={"format": "pt"})
    return name
