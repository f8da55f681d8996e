"""Checkpoints that are either whole or not there: DeepSpeed's state, where each data reader stands, and random numbers.

RUN/checkpoints/step-000500/   written under a temporary name, renamed when every rank is done
RUN/export/                    weights for use: safetensors + config.json + tokenizer.json + model card
"""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from metalm.card import model_card
from metalm.data.stream import Loader
from metalm.data.tokenizer import Tokenizer
from metalm.errors import CheckpointError, TrainingError
from metalm.pretrained import save_pretrained
from metalm.training.adapters import merge_adapters, save_adapters
from metalm.training.config import RunConfig
from metalm.training.engine import all_sum, full_weights

TAG = "state"


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [p for p in (run / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", p.name)]
    return sorted(found, key=lambda p: int(p.name[5:]))


def save_checkpoint(engine, loader: Loader, run: Path, step: int, keep: int) -> Path:
    """Saves everything that exact resuming needs and removes all but the `keep` newest checkpoints.

    Raises:
        TrainingError: it could not be written on some rank; what was there before is untouched.
    """
    folder = run / "checkpoints" / f"step-{step:06d}"
    partial = folder.with_name(folder.name + ".partial")
    rank = dist.get_rank()
    error: Exception | None = None
    try:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
    except OSError as e:
        error = e
    _raise_together(error, engine, partial)
    try:
        engine.save_checkpoint(str(partial), tag=TAG)
        state = {"step": step, "world": dist.get_world_size(), "data": loader.state_dict(), "python": random.getstate()}
        torch.save({"torch": torch.get_rng_state(), "cuda": _cuda_state()}, partial / f"random-{rank}.pt")
        (partial / f"rank-{rank}.json").write_text(json.dumps(state))
    except (OSError, RuntimeError) as e:  # torch reports a full disk as RuntimeError
        error = e
    _raise_together(error, engine, partial)
    if rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        for old in checkpoints(run)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    dist.barrier()
    return folder


def _raise_together(error: Exception | None, engine, partial: Path) -> None:
    """Raises on every rank if any failed, so that none waits for another forever."""
    if all_sum(torch.tensor(float(error is not None)), engine.device) > 0:
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise TrainingError(
            f"the checkpoint {partial.with_suffix('')} could not be written ({error or 'on another rank'}); is the disk "
            "full? Checkpoints saved before are untouched"
        ) from error


def load_checkpoint(engine, loader: Loader, folder: Path) -> int:
    """Restores a checkpoint; returns its step.

    Raises:
        CheckpointError: it was saved by another number of processes, or does not fit the model.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    saved = json.loads((folder / "rank-0.json").read_text())
    if saved["world"] != world:
        raise CheckpointError(
            f"{folder} was saved by {saved['world']} processes, now there are {world}: shards are divided among them, so "
            "resume with the same number, or start anew with init_from=RUN"
        )
    try:
        engine.load_checkpoint(str(folder), tag=TAG)
    except (RuntimeError, KeyError, AssertionError, ValueError) as error:
        raise CheckpointError(f"{folder} does not fit this model: {error}") from error
    state = json.loads((folder / f"rank-{rank}.json").read_text())
    loader.load_state_dict(state["data"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    numbers = torch.load(folder / f"random-{rank}.pt", weights_only=True)
    torch.set_rng_state(numbers["torch"])
    if numbers["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(numbers["cuda"])
    return state["step"]


def _cuda_state() -> torch.Tensor | None:
    return torch.cuda.get_rng_state() if torch.cuda.is_available() else None


def card_or_none(model: nn.Module, weights: dict, vocab_size: int, config: RunConfig) -> str:
    """The model card, or a line in its place: whatever goes wrong with it must not cost the weights."""
    try:
        return model_card(model, weights, vocab_size, config)
    except Exception as error:
        return f"A METALM. Its card could not be written ({type(error).__name__}: {error}).\n"


def write_export(engine, tokenizer: Tokenizer, config: RunConfig) -> Path:
    """Writes `RUN/export`, replacing an older one only when the new one is whole; adapters are merged and lie beside it.

    Raises:
        TrainingError: the disk is full.
    """
    run, adapters = Path(config.out), config.training.adapters
    folder, partial = run / "export", run / "export.partial"
    weights = full_weights(engine)
    error: Exception | None = None
    if dist.get_rank() == 0:
        try:
            shutil.rmtree(partial, ignore_errors=True)
            plain = merge_adapters(weights, engine.module.config, adapters) if adapters else weights
            card = card_or_none(engine.module, plain, tokenizer.size, config)
            save_pretrained(plain, engine.module, tokenizer, partial, card)
            if adapters:
                save_adapters(weights, adapters, partial)
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
        except Exception as e:  # safetensors reports a full disk as an error of its own
            error = e
    _raise_together(error, engine, partial)
    return folder
