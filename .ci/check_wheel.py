"""Checks a built wheel: one top-level package, every module of the checkout in it, and a working console script.

python .ci/check_wheel.py build/wheel/metalm-….whl
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
FOLDERS = {"metalm": "metalm", "encoders": "metalm/encoders", "connectors": "metalm/connectors"}
FOLDERS |= {"data": "metalm/data", "configs": "metalm/configs"}


def main(wheel: str) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    top = {name.split("/")[0] for name in names}
    version = next(name for name in top if name.endswith(".dist-info")).split("-")[1].removesuffix(".dist")
    assert top == {"metalm", next(name for name in top if name.endswith(".dist-info"))}, f"more than metalm: {top}"
    expected = {
        str(Path(target) / path.relative_to(CHECKOUT / folder))
        for folder, target in FOLDERS.items()
        for path in (CHECKOUT / folder).rglob("*")
        if path.suffix in (".py", ".yaml", ".json") and "__pycache__" not in path.parts
    }
    assert not expected - names, f"not in the wheel: {sorted(expected - names)}"
    # Installed alone into a folder of its own, with the packages of this environment beside it, away from the checkout.
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, wheel]
        subprocess.run(pip, check=True)
        code = (
            "import sys; sys.path.insert(0, sys.argv[1]); import metalm, metalm.encoders, metalm.data.shards; "
            "from metalm.config import find_config; assert metalm.__file__.startswith(sys.argv[1]), metalm.__file__; "
            "print(find_config('demo/pretrain.yaml')); sys.argv = ['metalm', '--help']; from metalm.cli import main; main()"
        )
        result = subprocess.run([sys.executable, "-c", code, folder], cwd=folder, capture_output=True, text=True)
        assert result.returncode == 0 and "evaluate" in result.stdout, result.stdout + result.stderr
    print(f"{wheel}: {len(names)} files, all of metalm {version}, works outside the checkout")


if __name__ == "__main__":
    main(sys.argv[1])
