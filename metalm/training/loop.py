"""`metalm train`: from a configuration to an export, resumable at any moment."""

from __future__ import annotations

import math
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from metalm.config import to_plain
from metalm.data.corpus import write_corpus
from metalm.data.prompts import Interface
from metalm.data.shards import list_shards, read_shard
from metalm.data.stream import DataConfig, Loader, PackedStream, SourceConfig
from metalm.data.tokenizer import Tokenizer
from metalm.errors import CheckpointError, ConfigError, TrainingError
from metalm.fingerprint import fingerprints
from metalm.models import MODELS, fit_to_tokenizer, spell_tokens
from metalm.pretrained import load_parts, load_weights
from metalm.segments import Batch
from metalm.training.adapters import add_adapters, load_adapters
from metalm.training.checkpoint import checkpoints, load_checkpoint, save_checkpoint, write_export
from metalm.training.config import RunConfig
from metalm.training.distill import Distillation
from metalm.training.engine import Parts, all_sum, make_engine, setup_distributed, train_step
from metalm.training.progress import Reporter
from metalm.training.schedule import learning_rate

TOKENIZER_SAMPLES = 20_000  # of each source, when a tokenizer is trained


def train(config: RunConfig) -> Path:
    """Runs a configuration to its end and returns the export's folder.

    On SIGTERM or SIGINT the run saves a checkpoint after the current step and stops; the same command goes on from there.

    Raises:
        ConfigError, DataError, CheckpointError, TrainingError: see `metalm.errors`.
    """
    device = setup_distributed()
    rank, world = dist.get_rank(), dist.get_world_size()
    run = Path(config.out)
    found = checkpoints(run)
    if found and config.resume == "never":
        raise ConfigError(f"{run} holds checkpoints and resume is 'never': choose another out, or remove it")
    prepare_corpus(config, run, rank)
    tokenizer = prepare_tokenizer(config, run, rank)
    fit_to_tokenizer(config.model, tokenizer)
    if rank == 0:
        write_config(config, run)
    torch.manual_seed(config.training.seed)
    model = MODELS[config.model.type](config.model)
    spell_tokens(model, tokenizer)
    if config.init_from and not found:
        load_weights(model, config.init_from)
    if not found:
        load_parts(model, config.model, tokenizer)
    if config.training.adapters:
        add_adapters(model, config.training.adapters)
        if config.training.adapters.init_from and not found:
            load_adapters(model, config.training.adapters.init_from)
    if config.training.distill:
        precision = getattr(torch, config.training.precision)
        model.taught_by = Distillation(config.training.distill, model, tokenizer, precision)
    interface = Interface.of(model, tokenizer, config.data.row_length)
    stream = PackedStream(
        config.data.train, interface, config.data, config.training.seed, rank, world, accumulation=config.training.accumulation
    )
    engine = make_engine(model.to(device), config.training, config.data.rows)
    loader = Loader(stream, pin_memory=True)
    step = load_checkpoint(engine, loader, found[-1]) if found else 0
    interface.fingerprints = lasting_encoders(model)
    with Reporter(run, config.training.steps, step, rank == 0, config.training.tensorboard) as reporter:
        if found:
            reporter.message(f"resuming {run} at step {step:,}")
        finished = run_steps(engine, loader, config, step, reporter, interface)
        if finished:
            export = write_export(engine, tokenizer, config)
            reporter.message(f"export: {export}")
            return export
    raise TrainingError(f"stopped by a signal; the same command resumes from {checkpoints(run)[-1]}")


def lasting_encoders(model: nn.Module) -> dict[str, str]:
    """Fingerprints of the encoders that stay as they are, by name: their stored states may stand for them. A teacher reads the
    same batches, so its encoder must be the same."""
    own, teaching = fingerprints(model, frozen=True), getattr(model, "taught_by", None)
    if not (own and teaching):
        return own
    theirs = fingerprints(teaching.teacher)
    return {name: found for name, found in own.items() if theirs.get(name) == found}


def run_steps(engine, loader: Loader, config: RunConfig, step: int, reporter: Reporter, interface: Interface) -> bool:
    """Trains to the last step (True) or to a signal (False), logging, validating and saving on the way."""
    training, run = config.training, Path(config.out)
    loss, tokens, positions, since = torch.zeros((), device=engine.device), 0, 0, time.monotonic()
    parts = Parts()
    broken = 0
    stop = StopSignal()
    micro_batches = iter(loader)
    saved = step
    engine.train()
    while step < training.steps:
        batches = [next(micro_batches) for _ in range(training.accumulation)]
        step += 1
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate(step, training) * group["scale"]
        share, targets = train_step(engine, batches, parts)
        loss, tokens = loss + share, tokens + targets
        positions += sum(batch.num_positions for batch in batches)
        for message in [message for batch in batches for message in batch.broken]:
            broken += 1
            reporter.message(f"skipped: {message}")
        last = step == training.steps
        stopping = all_sum(torch.tensor(float(stop.received)), engine.device) > 0
        checkpoint = last or stopping or (training.checkpoint_every and step % training.checkpoint_every == 0)
        if step % training.log_every == 0 or checkpoint:
            mean = float(all_sum(loss, engine.device)) / (step - saved)
            if not math.isfinite(mean):
                raise TrainingError(
                    f"the loss is {mean} between steps {saved + 1} and {step}; nothing was saved since. Lower training.lr, "
                    "lengthen training.warmup, or look for broken data; the last good checkpoint is in "
                    f"{run / 'checkpoints'}"
                )
            seconds = time.monotonic() - since
            all_positions = float(all_sum(torch.tensor(float(positions)), engine.device))
            values = {
                "loss": mean,
                "lr": learning_rate(step, training),
                "grad_norm": float(engine.get_global_grad_norm() or 0.0),
                "seconds": seconds,
                "tokens_per_second": all_positions / seconds,
                "targets_per_second": tokens / seconds,
                "broken": broken,
            }
            reporter.metrics(step, values | parts.means(engine.device))
            loss, tokens, positions, since, saved = torch.zeros_like(loss), 0, 0, time.monotonic(), step
            parts = Parts()
        if training.validate_every and (step % training.validate_every == 0 or last):
            reporter.metrics(step, validate(engine, config, interface, reporter))
        if checkpoint:
            try:
                save_checkpoint(engine, loader, run, step, training.keep_checkpoints)
            except TrainingError as error:
                if last or stopping:
                    raise
                reporter.message(f"WARNING: {error}. Training goes on.")
        if stopping:
            return False
    return True


class StopSignal:
    """Remembers that SIGTERM or SIGINT came; a second SIGINT interrupts at once."""

    def __init__(self):
        self.received = False
        try:
            signal.signal(signal.SIGTERM, self._receive)
            signal.signal(signal.SIGINT, self._receive)
        except ValueError:  # not in the main thread: then the caller handles signals
            return

    def _receive(self, number: int, frame) -> None:
        self.received = True
        signal.signal(signal.SIGINT, signal.default_int_handler)


def prepare_corpus(config: RunConfig, run: Path, rank: int) -> None:
    """Imports the text at `data.path`, if there is one, into the run's folder, once."""
    folder = run / "data"
    if rank == 0 and config.data.path and not folder.exists():
        partial = run / "data.partial"
        shutil.rmtree(partial, ignore_errors=True)
        write_corpus(config.data.path, config.data.per, config.data.held_out, partial)
        partial.rename(folder)
    dist.barrier()


def prepare_tokenizer(config: RunConfig, run: Path, rank: int) -> Tokenizer:
    """The run's own tokenizer if it has one, else the configured one, trained by rank 0 where no path is given."""
    if rank == 0 and not (run / "tokenizer.json").exists():
        if config.tokenizer.path:
            tokenizer = Tokenizer.load(config.tokenizer.path)
        else:
            train_tokenizer = {"bpe": Tokenizer.train, "words": Tokenizer.train_words}[config.tokenizer.type]
            tokenizer = train_tokenizer(texts(config.data.train), config.tokenizer.vocab_size)
        for name in config.model.special_tokens:
            tokenizer.special(name)
        run.mkdir(parents=True, exist_ok=True)
        tokenizer.save(run)
    dist.barrier()
    return Tokenizer.load(run)


def texts(sources: list[SourceConfig]) -> Iterator[str]:
    """Captions, texts, questions and answers of the first samples of each source, as layouts put them."""
    from metalm.data.prompts import CAPTION_PROMPT, question_prompt

    yield CAPTION_PROMPT
    for source in sources:
        count = 0
        for url in list_shards(source.shards):
            for _, sample in read_shard(url, on_error=lambda error: None):
                count += 1
                yield from (" " + caption for caption in sample.captions)
                if sample.text:
                    yield sample.text
                for question in sample.questions:
                    yield f"{question_prompt(question.question)} {question.best_answer}"
            if count > TOKENIZER_SAMPLES:
                break


def write_config(config: RunConfig, run: Path) -> None:
    """Saves the resolved configuration with the run.

    Raises:
        CheckpointError: the run was begun with another model.
    """
    import yaml

    path = run / "config.yaml"
    plain = to_plain(config)
    if path.exists() and checkpoints(run):
        before = yaml.safe_load(path.read_text())["model"]
        if before != plain["model"]:
            raise CheckpointError(
                f"{run} was begun with another model ({difference(before, plain['model'])}): choose another out, or remove it"
            )
    path.write_text(yaml.safe_dump(plain, sort_keys=False))


def difference(before: dict, after: dict, key: str = "model") -> str:
    """The first key in which two plain configurations differ, with both values."""
    for name in {**before, **after}:
        one, other = before.get(name), after.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            found = difference(one, other, f"{key}.{name}")
            if found:
                return found
        elif one != other:
            return f"{key}.{name}: {one!r}, now {other!r}"
    return ""


def validate(engine, config: RunConfig, interface: Interface, reporter: Reporter) -> dict[str, float]:
    """`val_loss`, in nats a target token over the whole validation set, and its parts; the same for any number of ranks.

    Every rank lays all of it out and computes each world-th batch; all run equally many forward passes, which ZeRO-3
    requires.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    shape = DataConfig(config.data.train, [], config.data.row_length, config.data.rows, workers=0, block=config.data.block)
    stream = PackedStream(config.data.validation, interface, shape, seed=0, repeat=False)
    total, parts = torch.zeros(2, dtype=torch.float64), Parts()
    engine.eval()

    def run_group(group: list[Batch]) -> None:
        batch = group[rank] if rank < len(group) else group[0]
        with torch.no_grad():
            loss = engine.module(batch.to(engine.device))
        if rank < len(group):
            total.add_(torch.tensor([float(loss), batch.target_weight], dtype=torch.float64))
            parts.add(engine.module.parts)

    group: list[Batch] = []
    for batch in stream:
        for message in batch.broken:
            reporter.message(f"skipped in validation: {message}")
        group.append(batch)
        if len(group) == world:
            run_group(group)
            group = []
    if group:
        run_group(group)
    engine.train()
    total = all_sum(total.float() if engine.device.type == "cuda" else total, engine.device)
    if total[1] == 0:
        raise TrainingError("the validation set holds no target token")
    means = {"loss": float(total[0] / total[1])} | parts.means(engine.device)
    return {f"val_{name}": mean for name, mean in means.items()}
