"""What an encoder makes of a medium depends on its configuration and its weights: a hash of both says whether it is the same.

Of the configuration counts what an export keeps, but for how a model uses it (its connector, what trains). Weights count in
bfloat16, so that a run in bfloat16, its export and what it started from are one encoder. Cost: a pass over the weights, about
0.3 s for 100M parameters.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from metalm.config import to_plain
from metalm.encoders.base import Encoder, EncoderConfig
from metalm.nn.freezing import is_frozen
from metalm.nn.partitions import whole
from metalm.pretrained import USE, fetch_nothing


def fingerprint(encoder: Encoder, config: EncoderConfig) -> str:
    """16 hexadecimal digits; under ZeRO-3 all processes must ask together."""
    plain = to_plain(config)
    fetch_nothing(plain)
    digest = hashlib.sha256()
    with TemporaryDirectory() as folder:
        encoder.save_files(Path(folder) / "encoder", plain)
        plain = {key: value for key, value in plain.items() if key not in USE}
        digest.update(json.dumps(plain, sort_keys=True).encode())
        for path in sorted(Path(folder).rglob("*.json")):
            digest.update(path.read_bytes())
    for name, tensor in sorted(encoder.state_dict(keep_vars=True).items()):
        with whole(tensor):
            digest.update(f"{name} {list(tensor.shape)}".encode())
            digest.update(rounded_bytes(tensor.detach()))
    return digest.hexdigest()[:16]


def rounded_bytes(tensor: Tensor) -> memoryview:
    """A tensor's values, floats in bfloat16."""
    rounded = tensor.to("cpu", torch.bfloat16 if tensor.is_floating_point() else tensor.dtype)
    return rounded.contiguous().flatten().view(torch.uint8).numpy().data


def fingerprints(model: nn.Module, frozen: bool = False) -> dict[str, str]:
    """Those of a model's encoders that read media, by name; with `frozen` of those alone of which nothing trains."""
    return {
        name: fingerprint(encoder, model.config.encoders[name])
        for name, encoder in getattr(model, "encoders", {}).items()
        if encoder.processor.reads != {"text"} and (is_frozen(encoder) or not frozen)
    }
