"""Exports: a folder with `model.safetensors`, `config.json`, `tokenizer.json` and a model card, written by a run and loaded
anywhere.

An encoder that was made from files has these in a folder of its own name beside them.

A name for an export is its folder, the run that holds it (`RUN/export`), or a Hugging Face Hub id. Whoever wrote it, no pickle
is loaded: of the Hub only the files of `PATTERNS` are fetched, and a configuration that names other weights loses these names.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import metalm
from metalm.config import build_plugin, to_plain
from metalm.data.tokenizer import FILE, Tokenizer
from metalm.data.tokenizer_settings import FILES as SETTINGS
from metalm.encoders.base import BESIDE
from metalm.errors import CheckpointError
from metalm.models import MODELS

# What a part that starts from another's weights decides for itself; all else is their shape.
USE = ("connector", "trainable", "init_from", "dropout", "activation_checkpointing", "combination")
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
ADAPTERS = ("adapters.safetensors", "adapters.json")  # beside them, where a run had some
PATTERNS = ("*.json", "*.safetensors", CARD)  # what an export consists of
FOREIGN = "hf:"  # before the name of a checkpoint in Hugging Face's layout, a folder or a Hub id


def find_export(name: str | Path) -> Path:
    """The folder of an export; a Hub id is downloaded.

    Raises:
        CheckpointError: there is none.
    """
    for folder in (Path(name), Path(name) / "export"):
        if (folder / CONFIG).is_file():
            return folder
    if Path(name).exists():
        raise CheckpointError(f"{name} holds no export ({CONFIG}, {WEIGHTS}); a run writes one when it ends")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(name), allow_patterns=list(PATTERNS)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(f"no run or export at {str(name)!r}, and no such model on the Hub") from error


def read_model_config(name: str | Path) -> dict:
    """The plain `model` section of an export; of `hf:NAME`, a model that is that decoder and nothing else."""
    if str(name).startswith(FOREIGN):
        from metalm.interop.decoders import read_config

        return {"decoder": read_config(str(name).removeprefix(FOREIGN))[1]}
    return read_record(find_export(name))["model"]


def read_record(folder: Path) -> dict:
    """What an export's `config.json` says, with paths for the names of folders beside it; but for where to fetch other weights
    from: a stranger's would be a way in."""
    record = json.loads((folder / CONFIG).read_text())
    fetch_nothing(record["model"])
    for part in parts_beside(record["model"]):
        part["name"] = str(folder.resolve() / part["name"])
    return record


def parts_beside(plain: dict) -> Iterator[dict]:
    """The parts of a plain configuration that are made from files in a folder beside it."""
    if str(plain.get("name", "")).startswith(BESIDE):
        yield plain
    for value in plain.values():
        if isinstance(value, dict):
            yield from parts_beside(value)


def save_pretrained(
    weights: Mapping[str, Tensor], model: nn.Module, tokenizer: Tokenizer, folder: str | Path, card: str
) -> None:
    """Writes an export; of an older one in the same folder nothing is left, and nothing else there is touched.

    Args:
        weights: the model's state dict, on the CPU and whole.
        model: says the rest, whatever has become of its own weights.
        card: of `metalm.card.model_card`, or an older one.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    remove_old(folder)
    plain = to_plain(model.config)
    fetch_nothing(plain)
    for name, encoder in getattr(model, "encoders", {}).items():
        encoder.save_files(folder / name, plain["encoders"][name])
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / WEIGHTS)
    record = {"metalm_version": metalm.__version__, "tokenizer_fingerprint": tokenizer.fingerprint, "model": plain}
    (folder / CONFIG).write_text(json.dumps(record, indent=1))
    tokenizer.save(folder)
    (folder / CARD).write_text(card)


def files_of(config: str | bytes) -> set[str]:
    """The names of all files that an export with this `config.json` may have, relative to it; none where it is not ours."""
    try:
        record = json.loads(config)
        record["metalm_version"]
        folders = [part["name"].removeprefix(BESIDE) for part in parts_beside(record["model"])]
    except (ValueError, KeyError, TypeError, AttributeError):
        return set()
    own = [folder for folder in folders if Path(folder).name == folder]  # not what lies elsewhere
    return {CONFIG, WEIGHTS, CARD, FILE, *SETTINGS, *ADAPTERS} | {
        f"{folder}/{name}" for folder in own for name in (CONFIG, FILE)
    }


def remove_old(folder: Path) -> None:
    """Removes of the export in a folder what the next one need not overwrite: adapters, and the files of its encoders."""
    if not (folder / CONFIG).is_file():
        return
    for name in files_of((folder / CONFIG).read_bytes()) - {CONFIG, WEIGHTS, CARD, FILE, *SETTINGS}:
        (folder / name).unlink(missing_ok=True)
        own = (folder / name).parent
        if own != folder and own.is_dir() and not any(own.iterdir()):
            own.rmdir()


def fetch_nothing(plain: dict) -> None:
    """Takes out of a plain configuration where weights came from: they are in the export."""
    for key, value in plain.items():
        if key == "type":  # not `timm:NAME`, which would fetch
            plain[key] = str(value).partition(":")[0]
        elif key in ("init_from", "pretrained"):
            plain[key] = type(value)()
        elif key == "arguments" and value:
            value.pop("checkpoint_path", None)
        elif isinstance(value, dict):
            fetch_nothing(value)


def read_part(name: str | Path, part: str) -> tuple[str, dict]:
    """Where an export keeps a part of a model, `decoder`, `encoder` or `encoders.NAME`, and that part's plain configuration.

    A text-side pretraining mode has one `encoder`, which is anybody's; a model of one encoder takes METALM's `text`.

    Raises:
        CheckpointError: the export has no such part.
    """
    model = read_model_config(name)
    kind, _, own = part.partition(".")
    if kind != "decoder" and "encoder" in model:
        return "encoder", model["encoder"]
    own = own or "text"
    if kind != "decoder" and own in model.get("encoders", {}):
        return f"encoders.{own}", model["encoders"][own]
    if kind == "decoder" and "decoder" in model:
        return part, model["decoder"]
    there = ["decoder"] * ("decoder" in model) + ["encoder"] * ("encoder" in model)
    there += [f"encoders.{encoder}" for encoder in model.get("encoders", {})]
    raise CheckpointError(f"{find_export(name)} has no {part} to start from; it has {', '.join(there)}")


def source_of(where: str, encoder_type: str) -> str:
    """The part that the part `where` of a model starts from: its like, but a causal encoder starts from a decoder."""
    return "decoder" if encoder_type == "causal" else where


def inherit(part: dict, name: str | Path, where: str) -> dict:
    """The plain configuration of a part that starts from an export's, or a decoder from a foreign checkpoint: its type and
    shape, and of `part` how it is used."""
    if is_foreign(name, where):
        from metalm.interop.decoders import read_config

        _, source = read_config(str(name).removeprefix(FOREIGN))
    else:
        _, source = read_part(name, source_of(where, part.get("type", "")))
    shape = {key: value for key, value in source.items() if key not in USE}
    if part.get("type") == "causal":  # a decoder that is only read
        shape = {key: value for key, value in shape.items() if key not in ("tied", "logit_softcap")}
    return shape | {key: value for key, value in part.items() if key in USE or key not in source}


def is_foreign(name: str | Path, where: str) -> bool:
    """Whether a part starts from a checkpoint that is not ours.

    Raises:
        CheckpointError: it does, and is no decoder.
    """
    if not str(name).startswith(FOREIGN):
        return False
    if where != "decoder":
        raise CheckpointError(f"{where}.init_from {name}: only a decoder can start from a checkpoint of Hugging Face's layout")
    return True


def load_parts(model: nn.Module, config: Any, tokenizer: Tokenizer) -> None:
    """Loads the decoder and the encoders that have an `init_from` of their own.

    Raises:
        CheckpointError: a part is not there, does not fit, or was trained on other tokens.
    """
    parts = {name: (getattr(model, name, None), getattr(config, name, None)) for name in ("decoder", "encoder")}
    parts |= {f"encoders.{name}": (model.encoders[name], c) for name, c in getattr(config, "encoders", {}).items()}
    for name, (module, part) in parts.items():
        if getattr(part, "init_from", ""):
            foreign = is_foreign(part.init_from, name)
            folder = part.init_from.removeprefix(FOREIGN) if foreign else find_export(part.init_from)
            if not tokenizer.agrees_with(Tokenizer.load(folder)):
                raise CheckpointError(
                    f"{name}.init_from: {part.init_from} was trained on another tokenizer's tokens: set tokenizer.path to it"
                )
            if foreign:
                load_foreign(module, folder)
                continue
            source, _ = read_part(part.init_from, source_of(name, getattr(part, "type", "")))
            unread = f"{source}.softmax." if getattr(part, "type", "") == "causal" else None
            load_weights(module, part.init_from, source + ".", unread)


def load_foreign(decoder: nn.Module, name: str | Path) -> None:
    """Fills a decoder with a checkpoint of Hugging Face's layout.

    Raises:
        CheckpointError: it has other tensors than its configuration says.
    """
    from metalm.interop.decoders import read_config, read_weights, to_ours

    family, values = read_config(name)
    fill(decoder, to_ours(read_weights(name), family, values), name)


def load_foreign_model(name: str, dtype: torch.dtype | None) -> tuple[nn.Module, Tokenizer]:
    """A model that is a foreign decoder alone, in evaluation mode, and its tokenizer; `dtype` None is float32."""
    from metalm.interop.decoders import find_folder

    folder = find_folder(name.removeprefix(FOREIGN))
    config = build_plugin(MODELS, read_model_config(f"{FOREIGN}{folder}"), name, "model")
    model = MODELS[config.type](config)
    load_foreign(model.decoder, folder)
    model.tokenizer = Tokenizer.load(folder)
    return model.to(dtype or torch.float32).eval(), model.tokenizer


def load_weights(model: nn.Module, name: str | Path, prefix: str = "", unread: str | None = None) -> None:
    """Fills a model with an export's weights, or with those whose names begin with `prefix` but not with `unread`.

    Raises:
        CheckpointError: tensors are missing, left over, or of another shape; it names them.
    """
    folder = find_export(name)
    weights = read_weights(folder)
    chosen = [name for name in weights if name.startswith(prefix) and not (unread and name.startswith(unread))]
    found = {name.removeprefix(prefix): weights[name] for name in chosen}
    if not any(name.startswith("fusion.") for name in found):  # a model may be given one, which starts as nothing
        found |= {name: tensor for name, tensor in model.state_dict().items() if name.startswith("fusion.")}
    fill(model, found, folder / WEIGHTS)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Raises `CheckpointError` where an export's file of weights is missing or torn."""
    from safetensors.torch import load_file

    try:
        return load_file(folder / WEIGHTS)
    except Exception as error:  # safetensors raises its own and OSError, without a common base
        raise CheckpointError(f"{folder / WEIGHTS}: not a complete safetensors file ({error})") from error


def fill(model: nn.Module, weights: Mapping[str, Tensor], path: str | Path) -> None:
    """Loads a state dict; raises `CheckpointError` where tensors are missing, left over, or of another shape."""
    own = model.state_dict()
    problems = [f"{n}: missing" for n in own if n not in weights]
    problems += [f"{n}: unknown to this model" for n in weights if n not in own]
    problems += [
        f"{n}: {tuple(weights[n].shape)} in the file, {tuple(own[n].shape)} in the model"
        for n in own
        if n in weights and own[n].shape != weights[n].shape
    ]
    if problems:
        more = f"\n  … and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(f"{path} does not fit the model:\n  " + "\n  ".join(problems[:5]) + more)
    model.load_state_dict(weights)


def load_pretrained(name: str | Path, dtype: torch.dtype | None = torch.float32) -> tuple[nn.Module, Tokenizer]:
    """An export's model, in evaluation mode, and its tokenizer; the model keeps this and its card at hand.

    Args:
        name: a run, an export, a Hub id of one; or `hf:NAME`, a decoder of Hugging Face's layout.
        dtype: of all weights; None: as they are stored (of `hf:NAME`: float32).

    Raises:
        CheckpointError: there is no export, it does not fit, or its tokenizer is not the one that it was trained with.
    """
    if str(name).startswith(FOREIGN):
        return load_foreign_model(str(name), dtype)
    folder = find_export(name)
    record = read_record(folder)
    config = build_plugin(MODELS, record["model"], str(folder / CONFIG), "model")
    model = MODELS[config.type](config)
    weights = read_weights(folder)
    fill(model, weights, folder / WEIGHTS)
    for name, tensor in model.state_dict(keep_vars=True).items():
        stored = weights[name].dtype
        if dtype is None and stored != tensor.dtype:  # float32 holds all that a narrower type does, so nothing was lost
            tensor.data = tensor.data.to(stored)
    tokenizer = Tokenizer.load(folder)
    if tokenizer.fingerprint != record["tokenizer_fingerprint"]:
        raise CheckpointError(f"{folder}: the tokenizer is not the one that the model was trained with")
    model.tokenizer = tokenizer
    model.card = (folder / CARD).read_text() if (folder / CARD).is_file() else ""
    return (model if dtype is None else model.to(dtype)).eval(), tokenizer
