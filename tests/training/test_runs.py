"""`metalm train`: runs survive being stopped, resume exactly, fine-tune, and say what is wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from metalm.data.sample import Sample
from metalm.data.shards import write_shards
from metalm.errors import CheckpointError, ConfigError, DataError, TrainingError
from metalm.pretrained import load_pretrained
from metalm.training.checkpoint import checkpoints
from metalm.training.config import TrainingConfig, load_run_config
from metalm.training.engine import parameter_groups
from metalm.training.loop import train


def losses(run: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def start(tiny_yaml: Path, *overrides: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "metalm", "train", str(tiny_yaml), *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def wait_for_steps(process: subprocess.Popen, run: Path, steps: int) -> None:
    while process.poll() is None and not (run / "metrics.jsonl").exists():
        time.sleep(0.1)
    while process.poll() is None and len(losses(run)) < steps:
        time.sleep(0.1)


@pytest.fixture(scope="module")
def finished(tiny_yaml, tmp_path_factory) -> Path:
    """A run of six steps, never stopped."""
    out = tmp_path_factory.mktemp("finished") / "run"
    train(load_run_config(tiny_yaml, [f"out={out}"]))
    return out


def test_a_run_leaves_config_metrics_tokenizer_checkpoints_and_export(finished):
    assert (finished / "config.yaml").is_file()
    assert sorted(losses(finished)) == [1, 2, 3, 4, 5, 6]
    assert [p.name for p in checkpoints(finished)] == ["step-000004", "step-000006"]
    files = {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {p.name for p in (finished / "export").iterdir()} == files


def test_a_run_with_a_schedule_of_its_mixture_ends_in_an_export(tiny_yaml, tmp_path):
    """And a line of its metrics that a crash tore costs nothing."""
    out = tmp_path / "run"
    config = load_run_config(tiny_yaml, [f"out={out}", "training.steps=2"])
    config.data.train[0].weight, config.data.train[1].loss_weight = [[0, 1.0], [100, 0.5]], 0.5
    out.mkdir()
    (out / "metrics.jsonl").write_text('{"step": 1, "lo\n')
    train(config)
    card = (out / "export/README.md").read_text()
    assert "1 at step 0, 0.5 at step 100" in card and "| `loss` | 2 |" in card
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["loss/image"] > 0 and last["loss/text"] > 0


def test_a_resumed_run_sees_the_same_samples_and_gives_the_same_losses(tiny_yaml, finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "checkpoints" / "step-000006")
    (out / "metrics.jsonl").unlink()
    train(load_run_config(tiny_yaml, [f"out={out}"]))
    assert losses(out) == {step: loss for step, loss in losses(finished).items() if step > 4}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("send", [os.kill, os.killpg])  # a launcher signals the whole group, data workers included
def test_a_signal_saves_a_checkpoint_and_the_same_command_goes_on(tiny_yaml, finished, tmp_path, number, send):
    out = tmp_path / "run"
    many = ["training.steps=5000", "training.checkpoint_every=0", "training.schedule=constant", f"out={out}"]
    process = start(tiny_yaml, *many)
    wait_for_steps(process, out, 3)
    send(process.pid, number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 2, output
    assert "stopped by a signal; the same command resumes from" in output
    saved = int(checkpoints(out)[-1].name[5:])
    assert sorted(losses(out)) == list(range(1, saved + 1))
    config = load_run_config(tiny_yaml, [*many, f"training.steps={saved + 2}"])
    train(config)
    assert sorted(losses(out)) == list(range(1, saved + 3))


def test_the_demos_processes_stop_with_it_and_save(tiny_yaml, tmp_path):
    out = tmp_path / "run"
    many = ["training.steps=5000", "training.checkpoint_every=0", "training.schedule=constant", f"out={out}"]
    program = f"from metalm.demo import train; train({str(tiny_yaml)!r}, *{many!r})"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for_steps(process, out, 3)
    process.terminate()
    output = process.communicate(timeout=90)[0]
    assert process.returncode == 1 and "training did not finish, see above" in output
    saved = int(checkpoints(out)[-1].name[5:])
    assert sorted(losses(out)) == list(range(1, saved + 1))
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline")] if Path("/proc").is_dir() else []
    assert not any(f"out={out}".encode() in command for command in commands)


def test_saved_loaded_in_a_new_process_and_evaluated_gives_the_same_figures(finished, scenes, tmp_path):
    outs = [tmp_path / f"{i}.json" for i in range(2)]
    for out in outs:
        command = ["evaluate", "vqa", "--model", str(finished), "--data", str(scenes / "vqa"), "--out", str(out)]
        subprocess.run([sys.executable, "-m", "metalm", *command], check=True, capture_output=True)
    first, second = (json.loads(out.read_text()) for out in outs)
    assert first["metrics"] == second["metrics"]
    lines = [Path(result["predictions"]).read_text() for result in (first, second)]
    assert lines[0] == lines[1] and lines[0].count("\n") == first["num_samples"]
    assert set(first) == {"task", "metrics", "num_samples", "model", "data", "config", "predictions"}


def test_fine_tuning_starts_from_the_weights_and_tokenizer_of_the_other_run(tiny_yaml, finished, scenes, tmp_path):
    values = tiny_yaml.read_text()
    config = tmp_path / "finetune.yaml"
    head, tail = values.split("model:")[0].split("tokenizer:")[0], values[values.index("data:") :]
    config.write_text(head + tail)
    model = ["model.decoder.trainable=none", "model.encoders.fused.trainable=none"]
    out = tmp_path / "run"
    train(load_run_config(config, [f"out={out}", f"init_from={finished}", "training.steps=2", *model]))
    before, tokenizer = load_pretrained(finished)
    after, same = load_pretrained(out)
    assert tokenizer.fingerprint == same.fingerprint
    changed = {n for (n, p), q in zip(before.named_parameters(), after.parameters()) if not torch.equal(p, q)}
    assert changed and all(name.startswith("connectors.") for name in changed)


def test_weights_of_another_shape_are_named(tiny_yaml, finished, tmp_path):
    with pytest.raises(
        CheckpointError, match=r"does not fit the model:\n.*decoder\.embedding\.weight: \(\d+, 32\) in the file, .* 16"
    ):
        overrides = [f"out={tmp_path / 'run'}", f"init_from={finished}", "model.decoder.width=16"]
        train(load_run_config(tiny_yaml, overrides))


def test_resuming_with_another_model_names_the_difference(tiny_yaml, finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    with pytest.raises(CheckpointError, match=r"begun with another model \(model\.decoder\.layers: 1, now 2\)"):
        train(load_run_config(tiny_yaml, [f"out={out}", "model.decoder.layers=2"]))


def test_resume_never_refuses_a_folder_with_checkpoints(tiny_yaml, finished):
    with pytest.raises(ConfigError, match="resume is 'never'"):
        train(load_run_config(tiny_yaml, [f"out={finished}", "resume=never"]))


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_nothing_after(tiny_yaml, tmp_path):
    out = tmp_path / "run"
    overrides = ["training.lr=1e30", "training.clip=0.0", "training.warmup=0", "training.steps=40", f"out={out}"]
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) between steps \d+ and \d+.*Lower training\.lr"):
        train(load_run_config(tiny_yaml, overrides))
    for folder in checkpoints(out):
        state = torch.load(folder / "state" / "mp_rank_00_model_states.pt", weights_only=False)["module"]
        assert all(torch.isfinite(tensor).all() for tensor in state.values() if tensor.is_floating_point())


def test_broken_pictures_are_named_skipped_and_limited(tiny_yaml, scenes, tmp_path, capsys):
    from metalm.data.shards import read_samples

    samples = list(read_samples(str(scenes / "images")))[:16]
    samples[3] = Sample("cut-off", samples[3].image[:200], samples[3].captions)
    write_shards(samples, tmp_path / "shards", 8)
    source = [{"shards": str(tmp_path / "shards"), "task": "image_text"}]
    overrides = [f"data.train={json.dumps(source)}", "data.block=8", "training.steps=8"]
    overrides += [f"data.validation={json.dumps(source)}", "training.validate_every=8"]
    train(load_run_config(tiny_yaml, [*overrides, f"out={tmp_path / 'run'}"]))
    said = capsys.readouterr().out
    assert "skipped: sample 'cut-off': not a complete picture" in said
    assert "skipped in validation: sample 'cut-off': not a complete picture" in said
    with pytest.raises(DataError, match=r"broken samples, more than data\.max_broken=0.*\n.*'cut-off'"):
        train(load_run_config(tiny_yaml, [*overrides, "data.max_broken=0", f"out={tmp_path / 'other'}"]))


def test_a_full_disk_is_said_and_earlier_checkpoints_stay(tiny_yaml, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(out)]).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        with pytest.raises(
            TrainingError, match=r"could not be written .*is the disk full\? Checkpoints saved before are untouched"
        ):
            train(load_run_config(tiny_yaml, [f"out={out}", "training.keep_checkpoints=9", "training.steps=12"]))
        left = checkpoints(out)
        assert left and all((folder / "rank-0.json").is_file() for folder in left)
        assert not list((out / "checkpoints").glob("*.partial"))
    finally:
        subprocess.run(["umount", "--lazy", str(out)], check=True)


def test_validation_loss_is_that_of_the_whole_set_and_tensorboard_holds_the_same(tiny_yaml, scenes, tmp_path):
    """The loss that the run logs at its last step, computed again from the export in one plain loop."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from metalm.data.prompts import Interface
    from metalm.data.stream import PackedStream

    out = tmp_path / "run"
    validation = [{"shards": str(scenes / "captioning-val"), "task": "captioning"}]
    overrides = [f"data.validation={json.dumps(validation)}", "training.validate_every=4", "training.tensorboard=true"]
    config = load_run_config(tiny_yaml, [*overrides, f"out={out}"])
    train(config)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    logged = {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}
    assert sorted(logged) == [4, 6]

    model, tokenizer = load_pretrained(out)
    interface = Interface.of(model, tokenizer, config.data.row_length)
    stream = PackedStream(config.data.validation, interface, config.data, repeat=False)
    batches = list(stream)
    with torch.no_grad():
        loss = sum(float(model(batch)) for batch in batches) / sum(batch.num_targets for batch in batches)
    assert logged[6] == pytest.approx(loss, rel=1e-5)

    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    assert {e.step: e.value for e in events.Scalars("val_loss")} == pytest.approx(logged)


def test_validation_without_data_is_refused(tiny_yaml):
    with pytest.raises(ConfigError, match=r"training\.validate_every is set, but data\.validation names no source"):
        load_run_config(tiny_yaml, ["training.validate_every=2"])


def test_a_partly_frozen_tower_of_timm_trains_in_bfloat16(tiny_yaml, tmp_path):
    """Buffers keep float32 under DeepSpeed's bfloat16, and frozen layers stay as they are."""
    out = tmp_path / "run"
    image = ["type=timm", "name=vit_tiny_patch16_224", "image_size=48", "trainable=1", "connector.type=linear"]
    size = [f"arguments.{setting}" for setting in ("embed_dim=32", "depth=2", "num_heads=2")]
    overrides = [f"model.encoders.image.{setting}" for setting in (*image, *size)]
    train(load_run_config(tiny_yaml, [*overrides, "training.precision=bfloat16", "training.steps=2", f"out={out}"]))
    assert all(torch.isfinite(torch.tensor(loss)) for loss in losses(out).values())
    model, _ = load_pretrained(out)
    assert not any(p.requires_grad for p in model.encoders["image"].model.blocks[0].parameters())
    assert all(p.requires_grad for p in model.encoders["image"].model.blocks[1].parameters())


def test_parts_have_their_own_rate_and_vectors_do_not_decay():
    from torch import nn

    model = nn.ModuleDict({"encoder": nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), "head": nn.Linear(2, 3)})
    config = TrainingConfig(steps=1, weight_decay=0.3, part_lr={"encoder": 0.1, "encoder.1": 0.5})
    groups = parameter_groups(list(model.named_parameters()), config)
    found = {id(p): (group["scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    expected = {
        "encoder.0.weight": (0.1, 0.3),
        "encoder.0.bias": (0.1, 0.0),
        "encoder.1.weight": (0.5, 0.0),
        "encoder.1.bias": (0.5, 0.0),
        "head.weight": (1.0, 0.3),
        "head.bias": (1.0, 0.0),
    }
    assert {name: found[id(p)] for name, p in model.named_parameters()} == expected
    with pytest.raises(ConfigError, match=r"part_lr: no parameter that trains begins with 'encodr'; did you mean 'encoder'"):
        parameter_groups(list(model.named_parameters()), TrainingConfig(steps=1, part_lr={"encodr": 0.1}))
