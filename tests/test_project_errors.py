"""Bad input to a project's verbs: one clear line, exit code 2, nothing overwritten."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from lightning_radam.competition.demo import write_digits
from lightning_radam.competition.project import make_project
from tests.conftest import error_line, run_command

ANSWERS = {
    "slug": "digits",
    "backbone": "test_resnet",
    "pretrained": False,
    "image_size": 32,
    "folds": 2,
    "epochs": 1,
    "batch_size": 512,
    "tracking": "csv",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    project = tmp_path_factory.mktemp("project") / "digits"
    make_project(project, ANSWERS)
    write_digits(project / "data")
    return project


@pytest.fixture
def project(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "digits"))


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def lose_an_image(project: Path) -> None:
    (project / "data/train_images" / f"{first_id(project)}.png").unlink()


def first_id(project: Path) -> str:
    return str(pd.read_csv(project / "data/train.csv")["id"][0])


def rename_the_id(project: Path) -> None:
    path = project / "data/train.csv"
    path.write_text(path.read_text().replace("id,label", "image,label"))


def add_a_lonely_label(project: Path) -> None:
    path = project / "data/train.csv"
    lines = path.read_text().splitlines()
    lines[1] = lines[1].split(",")[0] + ",seventeen"
    path.write_text("\n".join(lines) + "\n")


def lose_the_table(project: Path) -> None:
    (project / "data/train.csv").unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lose_an_image,
            "1 of 1437 images are missing, the first is {p}/data/train_images/{id}",
        ),
        (rename_the_id, "{p}/data/train.csv has no column 'id'; it has 'image', 'label'"),
        (add_a_lonely_label, "label 'seventeen' of column 'label' is in only one row"),
        (lose_the_table, "{p}/data/train.csv does not exist: put the competition's table there"),
    ],
)
def test_bad_data_is_named_before_anything_is_written(
    project: Path, spoil: Callable[[Path], None], message: str
) -> None:
    item = first_id(project)
    spoil(project)
    before = snapshot(project)
    line = error_line(run_command("-m", "digits", "folds", cwd=project))
    assert message.format(p=project, id=item) in line
    assert snapshot(project) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train"], "{p}/folds.csv does not exist: run the verb `folds` first"),
        (["oof"], "{p}/runs/base/fold0/oof.csv does not exist: train that fold first"),
        (["predict"], "{p}/runs/base/fold0 is not trained to the end: run the verb `train` first"),
        (["submit"], "{p}/runs/base/test.csv does not exist"),
        (["oof", "--lr=1"], "unknown argument --lr=1: see --help"),
    ],
)
def test_verbs_in_the_wrong_order_say_what_comes_first(
    project: Path, words: list[str], message: str
) -> None:
    before = snapshot(project)
    line = error_line(run_command("-m", "digits", *words, cwd=project))
    assert message.format(p=project) in line
    assert snapshot(project) == before


def test_training_refuses_what_it_cannot_do(project: Path) -> None:
    assert run_command("-m", "digits", "folds", cwd=project).returncode == 0
    before = snapshot(project)
    for words, message in (
        (["--model.backbone=resnt18"], "backbone 'resnt18' is unknown to timm"),
        (["huge"], f"experiment 'huge' has no {project}/configs/huge.yaml; there are: base"),
    ):
        line = error_line(run_command("-m", "digits", "train", *words, cwd=project))
        assert message in line
    done = run_command("-m", "digits", "train", "--radam.lrr=1", cwd=project)
    assert done.returncode == 2
    assert "radam.lrr" in done.stderr
    assert snapshot(project) == before


def test_without_wandb_csv_tracking_goes_the_whole_way(project: Path, tmp_path: Path) -> None:
    # A module that cannot be imported, found before the real one: as if W&B were not installed.
    hide = tmp_path / "hide"
    hide.mkdir()
    (hide / "sitecustomize.py").write_text(
        "import importlib.abc, sys\n"
        "class NoWandb(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'wandb':\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, NoWandb())\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(hide)}
    for verb in ("folds", "train", "oof", "predict", "submit"):
        done = subprocess.run(
            [sys.executable, "-m", "digits", verb],
            cwd=project,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert (project / "submission.csv").exists()
    assert (project / "runs/base/fold1/metrics.csv").exists()
    assert not list(project.rglob("wandb"))


def test_a_spoilt_submission_is_refused_and_the_old_one_kept(project: Path) -> None:
    runs = project / "runs/base"
    runs.mkdir(parents=True)
    sample = pd.read_csv(project / "data/sample_submission.csv")
    classes = {str(digit): 0.1 for digit in range(10)}
    table = pd.DataFrame([classes] * len(sample)).assign(id=sample["id"]).set_index("id")
    table.iloc[:-1].to_csv(runs / "test.csv")
    (project / "submission.csv").write_text("an earlier one")
    line = error_line(run_command("-m", "digits", "submit", cwd=project))
    lost = sample["id"].iloc[-1]
    assert f"1 ids of the sample are missing, such as '{lost}'" in line
    assert (project / "submission.csv").read_text() == "an earlier one"
