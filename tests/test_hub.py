"""Models by name: loaded, saved again, and through a Hub on this machine, by the Hub's own client."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hub_server import TOKEN, serve

from metalm.card import NAME, fill_in, model_card
from metalm.config import build
from metalm.errors import CheckpointError, DataError
from metalm.evaluation.result import Prediction, Result
from metalm.hub import push_export
from metalm.model import MetaLM, MetaLMConfig
from metalm.models import MODELS
from metalm.objectives.mim import MIM
from metalm.pretrained import ADAPTERS, load_pretrained
from metalm.training.config import load_run_config
from metalm.training.loop import train

STACK = {"layers": 1, "width": 32, "heads": 2, "max_positions": 64}


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def run(request, tiny_yaml, scenes, tmp_path_factory) -> Path:
    """Two steps on pictures."""
    out = tmp_path_factory.mktemp("run") / "shapes"
    validation = f'data.validation=[{{shards: "{scenes}/images", task: image_text}}]'
    changes = [f"out={out}", "training.steps=2", "training.validate_every=2", f"training.precision={request.param}"]
    train(load_run_config(tiny_yaml, [*changes, validation]))
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def on_hub(url: str, home: Path, *command: str, **more: str) -> subprocess.CompletedProcess:
    """Python in a process that takes `url` for the Hub."""
    environment = os.environ | {"HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}
    environment |= {"HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"} | more
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)


def test_what_is_loaded_and_saved_is_the_same_to_the_bit(run, tmp_path):
    model = MetaLM.from_pretrained(run)
    assert not model.training and model.tokenizer.encode("a circle")
    model.save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(run / "export")
    MetaLM.from_pretrained(tmp_path / "again").save_pretrained(tmp_path / "again")  # over itself
    assert contents(tmp_path / "again") == contents(run / "export")


def test_weights_are_of_the_type_that_is_asked_for(run):
    assert {p.dtype for p in MetaLM.from_pretrained(run, torch.float64).parameters()} == {torch.float64}
    wide = MetaLM.from_pretrained(run, torch.float32).state_dict()
    assert all(torch.equal(wide[n], t.float()) for n, t in MetaLM.from_pretrained(run).state_dict().items())


def test_the_card_says_what_the_run_was(run):
    card = (run / "export/README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "metalm",
        "pipeline_tag": "image-text-to-text",
        "tags": ["metalm", "image"],
    }
    weights = load_pretrained(run)[0].state_dict()
    assert f"{sum(tensor.numel() for tensor in weights.values()):,} parameters" in body
    assert "| `encoders.fused` | `fused`, 1 layer, width 32 |" in body and "| `connectors.fused` | `linear` |" in body
    assert f'model = MetaLM.from_pretrained("{NAME}")' in body
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    [val_loss] = [row["val_loss"] for row in rows if "val_loss" in row]
    loss = [row["loss"] for row in rows if "loss" in row][-1]
    assert f"| `loss` | 2 | {loss:.4f} |" in body and f"| `val_loss` | 2 | {val_loss:.4f} |" in body
    config = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
    own = yaml.safe_load((run / "config.yaml").read_text())
    assert config == {key: value for key, value in own.items() if key != "variables"}
    shards = config["data"]["train"][0]["shards"]
    count = json.loads((Path(shards) / "index.json").read_text())["num_samples"]
    assert f"| training | `{shards}` | image_text | 1 | {count:,} |" in body


def test_no_secret_of_a_run_is_published(run, tmp_path):
    """Commands, signatures and passwords; what the shards are called may be known."""
    yaml_of_run = yaml.safe_load((run / "config.yaml").read_text())
    secret = "x7SECRETx"
    yaml_of_run["data"]["train"][0]["shards"] = [
        f"pipe:curl -H 'Authorization: {secret}' https://me:{secret}@host/a-{{000..012}}.tar?k={secret}",
        f"https://me:{secret}@host/b/c.tar?signature={secret}#{secret}",
    ]
    yaml_of_run["data"]["validation"][0]["shards"] = f"s3://{secret}:{secret}@bucket/{{d,e}}.tar"
    yaml_of_run["variables"] = {"token": secret}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(yaml_of_run))
    config = load_run_config(tmp_path / "config.yaml")
    assert secret in str(config)
    model, tokenizer = load_pretrained(run)
    card = model_card(model, model.state_dict(), tokenizer.size, config)
    assert secret not in card
    assert card.count("https://host/b/c.tar") == card.count("s3://bucket/{d,e}.tar") == 2
    assert "| training | `pipe:… a-{000..012}.tar`, `https://host/b/c.tar` | image_text |" in card
    Result("vqa", {"accuracy": 0.5}, "x", f"https://{secret}@h/v.tar?{secret}", {}, [Prediction("1", "", [], 1.0)]).write(
        tmp_path / "result.json"
    )
    filled = fill_in(card, "me/it", [tmp_path / "result.json"])
    assert secret not in filled and "`https://h/v.tar`" in filled


SMALL = {
    "mim": {"decoder": STACK, "r2l_token": 2},
    "pmlm": {"encoder": {"type": "text", **STACK}},
    "cloze": {"encoder": {"type": "two_tower", **STACK}},
    "classifier": {"encoder": {"type": "text", **STACK}, "labels": ["good", "bad"]},
    "tagger": {"encoder": {"type": "text", **STACK}, "tags": ["O", "B-PER", "I-PER"]},
    "seq2seq": {"encoder": {"type": "text", **STACK}},
    "metalm": {"decoder": STACK},
}


def small(kind: str):
    from metalm.data.tokenizer import Tokenizer
    from metalm.models import fit_to_tokenizer

    tokenizer = Tokenizer.train(["the red dog runs over the hill"] * 3, 280)
    config = build(MODELS[kind].Config, {"type": kind, **SMALL[kind]}, "test")
    fit_to_tokenizer(config, tokenizer)
    model = MODELS[kind](config)
    model.tokenizer = tokenizer
    return model


def test_every_model_is_saved_and_loaded_by_these_methods(tmp_path):
    assert set(SMALL) == set(MODELS.builtin)
    tags = {}
    for kind in SMALL:
        model = small(kind)
        model.save_pretrained(tmp_path / kind)
        loaded = type(model).from_pretrained(tmp_path / kind)
        assert all(torch.equal(t, loaded.state_dict()[n]) for n, t in model.state_dict().items()) and not loaded.training
        loaded.save_pretrained(tmp_path / "again")
        assert contents(tmp_path / "again") == contents(tmp_path / kind)
        tags[kind] = yaml.safe_load(loaded.card.split("---")[1])["pipeline_tag"]
    assert tags["pmlm"] == "fill-mask" and tags["tagger"] == "token-classification" and tags["metalm"] == "text-generation"


def test_another_class_of_model_is_refused(tmp_path):
    small("pmlm").save_pretrained(tmp_path / "pmlm")
    with pytest.raises(CheckpointError, match=r"holds a PMLM, no MetaLM: load it by PMLM\.from_pretrained"):
        MetaLM.from_pretrained(tmp_path / "pmlm")
    small("metalm").save_pretrained(tmp_path / "metalm")
    with pytest.raises(CheckpointError, match="holds a MetaLM, no MIM"):
        MIM.from_pretrained(tmp_path / "metalm")
    with pytest.raises(CheckpointError, match=r"set `model\.tokenizer`"):
        MetaLM(build(MetaLMConfig, {"decoder": STACK | {"vocab_size": 9}}, "test")).save_pretrained(tmp_path / "none")


class Trap:
    """What a pickle can do to whoever loads it."""

    def __reduce__(self):
        return exec, ("raise SystemExit('the trap was sprung')",)


def test_no_pickle_of_a_stranger_is_loaded(tmp_path):
    """An export that names other files of weights, which its own do without."""
    model = MetaLM(
        build(
            MetaLMConfig,
            {
                "decoder": STACK | {"vocab_size": 300},
                "encoders": {
                    "image": {
                        "type": "timm",
                        "name": "vit_tiny_patch16_224",
                        "image_size": 32,
                        "arguments": {"depth": 1, "embed_dim": 24},
                        "connector": {"type": "linear"},
                    }
                },
            },
            "test",
        )
    )
    model.tokenizer = small("metalm").tokenizer
    model.save_pretrained(tmp_path)
    (tmp_path / "trap.bin").write_bytes(pickle.dumps(Trap()))
    record = json.loads((tmp_path / "config.json").read_text())
    record["model"]["decoder"]["init_from"] = str(tmp_path / "trap.bin")
    record["model"]["encoders"]["image"]["pretrained"] = True
    record["model"]["encoders"]["image"]["arguments"]["checkpoint_path"] = str(tmp_path / "trap.bin")
    record["model"]["encoders"]["image"]["type"] = f"timm:local-dir:{tmp_path}"  # would stand for pretrained, too
    (tmp_path / "config.json").write_text(json.dumps(record))
    loaded = MetaLM.from_pretrained(tmp_path)
    assert all(torch.equal(t, loaded.state_dict()[n]) for n, t in model.state_dict().items())


def test_a_model_goes_to_the_hub_and_comes_back(tmp_path):
    """`metalm push` and `from_pretrained`, each in a process of its own, and `push_to_hub` of what came back."""
    small("mim").save_pretrained(tmp_path / "export")
    Result("perplexity", {"perplexity": 7.25}, "export", "shards/val", {}, [Prediction("1", "", [], 1.0)]).write(
        tmp_path / "result.json"
    )
    with serve() as hub:
        home = tmp_path / "home"
        push = ["-m", "metalm", "push", "--model", str(tmp_path / "export"), "--to", "me/tiny", "--private"]
        pushed = on_hub(hub.url, home, *push, "--results", str(tmp_path / "result.json"))
        assert pushed.returncode == 0, pushed.stderr
        assert pushed.stdout.strip() == f"{hub.url}/me/tiny" and hub.private == {"me/tiny"}
        there, here = dict(hub.models["me/tiny"]), contents(tmp_path / "export")
        card = there.pop("README.md").decode()
        assert there == {name: content for name, content in here.items() if name != "README.md"}
        assert 'MIM.from_pretrained("me/tiny")' in card and "| perplexity | `shards/val` | 1 | perplexity | 7.2500 |" in card
        code = (
            "from metalm.objectives.mim import MIM\n"
            f"model = MIM.from_pretrained('me/tiny'); model.save_pretrained({str(tmp_path / 'back')!r})\n"
            "print(model.push_to_hub('me/again'))"
        )
        again = on_hub(hub.url, home, "-c", code)
        assert again.returncode == 0 and again.stdout.strip() == f"{hub.url}/me/again", again.stderr
        assert contents(tmp_path / "back") == {**there, "README.md": card.encode()}
        renamed = card.replace('"me/tiny"', '"me/again"')
        assert hub.models["me/again"] == {**there, "README.md": renamed.encode()} and renamed.count("## Evaluation") == 1
        repeated = on_hub(hub.url, home, *push)
        assert repeated.returncode == 0, repeated.stderr


def old_export(folder: Path) -> set[str]:
    """An export of a model with two encoders made from files, and adapters beside it; returns what is not ours in it."""
    tower = folder.parent / "tower"
    tower.mkdir()
    architecture = {
        "architecture": "vit_tiny_patch16_224",
        "pretrained_cfg": {},
        "model_args": {"img_size": 32, "depth": 1, "embed_dim": 24},
    }
    (tower / "config.json").write_text(json.dumps(architecture))
    encoder = {"type": "timm", "name": f"local-dir:{tower}", "connector": {"type": "linear"}}
    decoder = STACK | {"vocab_size": 300}
    model = MetaLM(build(MetaLMConfig, {"decoder": decoder, "encoders": {"eye": encoder, "other": encoder}}, "test"))
    model.tokenizer = small("metalm").tokenizer
    model.save_pretrained(folder)
    for name in (*ADAPTERS, "notes.json", "eye/notes.json"):
        (folder / name).write_text("{}")
    return {"notes.json", "eye/notes.json"}


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_of_an_older_export_in_the_same_folder_nothing_is_left(tmp_path):
    folder = tmp_path / "export"
    others = old_export(folder)
    assert {"eye/config.json", "other/config.json", *ADAPTERS} <= names(folder)
    small("mim").save_pretrained(tmp_path / "new")
    small("mim").save_pretrained(folder)
    assert names(folder) == names(tmp_path / "new") | others and not (folder / "other").exists()
    (tmp_path / "theirs").mkdir()
    for name in ("config.json", *ADAPTERS):
        (tmp_path / "theirs" / name).write_text("{}")
    small("mim").save_pretrained(tmp_path / "theirs")  # another program's
    assert names(tmp_path / "theirs") == names(tmp_path / "new") | set(ADAPTERS)


def test_a_strangers_export_does_not_say_what_is_removed_elsewhere(tmp_path):
    old_export(tmp_path / "export")
    record = json.loads((tmp_path / "export/config.json").read_text())
    record["model"]["encoders"]["eye"]["name"] = "./../tower"
    (tmp_path / "export/config.json").write_text(json.dumps(record))
    small("mim").save_pretrained(tmp_path / "export")
    assert (tmp_path / "tower/config.json").exists() and not (tmp_path / "export/other").exists()


def test_a_push_removes_of_an_older_export_what_the_new_one_has_not(tmp_path):
    others = old_export(tmp_path / "old")
    small("mim").save_pretrained(tmp_path / "new")
    with serve() as hub:
        for name in ("old", "new"):
            command = ["-m", "metalm", "push", "--model", str(tmp_path / name), "--to", "me/tiny"]
            pushed = on_hub(hub.url, tmp_path / f"home of {name}", *command)
            assert pushed.returncode == 0, pushed.stderr
            assert set(hub.models["me/tiny"]) == names(tmp_path / name) | others


@pytest.mark.parametrize(
    "to, more, message",
    [
        ("me/tiny", {"HF_TOKEN": "wrong"}, "log in by `hf auth login`, or set HF_TOKEN"),
        ("you/tiny", {}, "take a name of your own"),
        ("me/ti/ny", {}, "error: the Hub allows no model called 'me/ti/ny': write user/name"),
        ("me/tiny", {"HF_HUB_OFFLINE": "1"}, "may not be asked while HF_HUB_OFFLINE is set"),
        ("me/tiny", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "the Hub cannot be reached; the export is still where it was"),
    ],
)
def test_what_hinders_an_upload_is_said(tmp_path, to, more, message):
    small("metalm").save_pretrained(tmp_path / "export")
    with serve() as hub:
        command = ["-m", "metalm", "push", "--model", str(tmp_path / "export"), "--to", to]
        pushed = on_hub(hub.url, tmp_path / "home", *command, **more)
    assert pushed.returncode == 2 and message in pushed.stderr and "Traceback" not in pushed.stderr, pushed.stderr


def test_what_is_no_export_or_no_result_is_not_uploaded(tmp_path):
    small("metalm").save_pretrained(tmp_path)
    (tmp_path / "result.json").write_text("[]")
    with pytest.raises(DataError, match=r"result\.json is no result of `metalm evaluate`"):
        push_export(tmp_path, "me/tiny", results=[tmp_path / "result.json"])
    (tmp_path / "README.md").unlink()
    with pytest.raises(CheckpointError, match=r"has no model card \(README\.md\)"):
        push_export(tmp_path, "me/tiny")
