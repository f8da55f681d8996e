"""What is installed: every folder is a listed package, and the command line answers at once."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent


def test_every_folder_with_modules_is_a_listed_package():
    listed = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {"metalm": "metalm", "encoders": "metalm.encoders", "connectors": "metalm.connectors"}
    folders |= {"data": "metalm.data", "configs": "metalm.configs"}
    found = set()
    for folder, package in folders.items():
        assert listed["package-dir"][package] == folder
        for init in (CHECKOUT / folder).rglob("__init__.py"):
            found.add(".".join([package, *init.parent.relative_to(CHECKOUT / folder).parts]))
    assert found == set(listed["packages"])


def test_help_loads_nothing_heavy():
    code = (
        "import sys; sys.argv = ['metalm', '--help']\n"
        "from metalm.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'transformers', 'deepspeed', 'omegaconf', 'webdataset'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for verb in ("demo", "train", "evaluate", "generate", "data"):
        assert verb in output


def test_errors_are_sentences_without_a_traceback(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("out: x\ndata: {train: [{shards: x, task: vqa}]}\ntraining: {stepz: 3}\nmodel: {}\n")
    result = subprocess.run([sys.executable, "-m", "metalm", "train", str(config)], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.strip() == f"error: {config}: unknown key 'training.stepz'; did you mean 'steps'?"
