"""The wheel holds the template, and makes a project without a checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytest.importorskip("hatchling", reason="the dev extra builds wheels")


def run(*words: str, cwd: Path, path: Path | None = None) -> str:
    environment = {**os.environ, "PYTHONPATH": str(path)} if path else None
    done = subprocess.run(
        [sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_makes_a_project(tmp_path: Path) -> None:
    run("-m", "build", "--wheel", "--no-isolation", "-o", str(tmp_path), cwd=ROOT)
    (wheel,) = tmp_path.glob("lightning_radam-*.whl")
    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    assert (installed / "lightning_radam/_template/copier.yml").is_file()
    assert (installed / "lightning_radam/py.typed").is_file()
    where = "import lightning_radam; print(lightning_radam.__file__)"
    assert run("-c", where, cwd=tmp_path, path=installed).startswith(str(installed))
    run("-m", "lightning_radam", "new", "cats", "--defaults", cwd=tmp_path, path=installed)
    assert (tmp_path / "cats/cats/__main__.py").is_file()
    assert (tmp_path / "cats/.copier-answers.yml").is_file()
