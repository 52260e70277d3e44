"""The main job, run as a user runs it: interrupted in the middle, gone on with, and looked at."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from lightning_radam.competition.demo import write_digits
from tests.conftest import error_line, history, run_command

pytestmark = pytest.mark.slow


def interrupt_when(process: subprocess.Popen[str], file: Path, gone: Path | None = None) -> str:
    """Press Ctrl-C once a file is there (and another is gone), and return what was printed."""
    deadline = time.monotonic() + 900
    try:
        while not file.exists() or (gone is not None and gone.exists()):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, f"{file} never came"
            time.sleep(0.2)
        os.killpg(process.pid, signal.SIGINT)
        return process.communicate(timeout=120)[0]
    finally:  # leave no process behind, whatever went wrong
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo that was stopped by Ctrl-C while it trained its second fold."""
    folder = tmp_path_factory.mktemp("demo") / "demo"
    process = subprocess.Popen(
        [sys.executable, "-m", "lightning_radam", "demo", "--dir", str(folder)],
        start_new_session=True,  # a terminal sends Ctrl-C to the whole group
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    output = interrupt_when(process, folder / "digits/runs/base/fold1/metrics.csv")
    assert process.returncode != 0
    assert "Traceback" not in output
    assert not (folder / "summary.json").exists()
    return folder


@pytest.fixture(scope="module")
def resumed(interrupted: Path) -> tuple[Path, str]:
    """The same demo after a second call, with what that printed."""
    done = run_command("demo", "--dir", str(interrupted))
    assert done.returncode == 0, done.stdout + done.stderr
    return interrupted, done.stdout


@pytest.fixture(scope="module")
def summary(resumed: tuple[Path, str]) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((resumed[0] / "summary.json").read_text())
    return read


def test_it_goes_on_where_it_was_stopped_and_says_so(resumed: tuple[Path, str]) -> None:
    folder, output = resumed
    assert f"{folder} holds an interrupted demo: it goes on" in output
    assert "fold 0: done already, kept" in output
    assert "fold 1: was interrupted, starts again" in output


def test_the_summary_has_its_keys_and_the_scores_their_height(summary: dict[str, Any]) -> None:
    assert set(summary) == {
        "oof_score",
        "test_score",
        "fold_scores",
        "incidents",
        "seconds",
        "submission",
        "figure",
    }
    assert summary["oof_score"] >= 0.97
    assert summary["test_score"] >= 0.97
    assert len(summary["fold_scores"]) == 5


def test_the_table_says_what_the_summary_says(
    resumed: tuple[Path, str], summary: dict[str, Any]
) -> None:
    output = resumed[1]
    scores = [*summary["fold_scores"], summary["oof_score"], summary["test_score"]]
    table = output[output.index("\naccuracy\n") :].splitlines()[2:9]
    assert [line.split()[-1] for line in table] == [f"{score:.4f}" for score in scores]
    for path in (summary["submission"], summary["figure"], "wandb/offline-run-*"):
        assert path in output


def test_the_submission_matches_the_sample_and_the_hidden_labels(
    resumed: tuple[Path, str], summary: dict[str, Any], tmp_path: Path
) -> None:
    sample = pd.read_csv(resumed[0] / "digits/data/sample_submission.csv", dtype=str)
    submission = pd.read_csv(summary["submission"], dtype=str)
    assert list(submission.columns) == list(sample.columns)
    assert submission["id"].tolist() == sample["id"].tolist()
    # The score again, by hand, from the data set itself.
    digits = load_digits().target
    truth = [str(digits[int(item[1:])]) for item in submission["id"]]
    hits = sum(a == b for a, b in zip(truth, submission["label"], strict=True))
    assert summary["test_score"] == pytest.approx(hits / len(truth))


def test_each_folds_offline_run_can_be_read_back(resumed: tuple[Path, str]) -> None:
    for fold in range(5):
        folder = resumed[0] / f"digits/runs/base/fold{fold}"
        (run,) = folder.glob("wandb/offline-run-*")
        rows = history(run)
        keys = {key for row in rows for key in row}
        assert keys >= {
            "radam/lr",
            "radam/rect",
            "radam/rho_t",
            "train_loss",
            "val_loss",
            "val_accuracy",
            "stability/loss",
            "stability/grad_norm",
            "stability/incidents",
        }
        losses = pd.read_csv(folder / "metrics.csv")["val_loss"].dropna().tolist()
        assert [row["val_loss"] for row in rows if "val_loss" in row] == pytest.approx(losses)


def test_the_picture_is_a_picture(summary: dict[str, Any]) -> None:
    with Image.open(summary["figure"]) as image:
        assert image.size[0] >= 1000
        colours = image.convert("RGB").getcolors(2**24)
    assert colours is not None
    assert len(colours) > 100  # curves, not an empty frame


def test_a_finished_demo_is_moved_aside(resumed: tuple[Path, str], tmp_path: Path) -> None:
    # Stopped as soon as the new project stands: the training itself is tested above.
    folder = tmp_path / "demo"
    shutil.copytree(resumed[0], folder)
    before = (folder / "summary.json").read_text()
    process = subprocess.Popen(
        [sys.executable, "-m", "lightning_radam", "demo", "--dir", str(folder)],
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    output = interrupt_when(process, folder / "digits/folds.csv", gone=folder / "summary.json")
    (earlier,) = (folder / "earlier").iterdir()
    assert f"{folder} held an earlier demo, now in {earlier}: a new one starts" in output
    assert (earlier / "summary.json").read_text() == before
    assert not (folder / "digits/runs/base/fold0/oof.csv").exists()


def test_the_test_labels_stay_outside(tmp_path: Path) -> None:
    truth = write_digits(tmp_path)
    train = pd.read_csv(tmp_path / "train.csv", dtype=str)
    sample = pd.read_csv(tmp_path / "sample_submission.csv", dtype=str)
    assert len(train) + len(sample) == 1797
    assert set(train["id"]).isdisjoint(sample["id"])
    assert sample["label"].unique().tolist() == ["0"]
    assert truth.index.tolist() == sample["id"].tolist()
    with Image.open(tmp_path / f"train_images/{train['id'][0]}.png") as image:
        assert image.size == (8, 8)


def test_a_strange_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    done = run_command("demo", "--dir", str(tmp_path))
    assert error_line(done) == (
        f"error: {tmp_path} is not empty and holds no demo: choose another --dir"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_unknown_tracking_word_is_named(tmp_path: Path) -> None:
    done = run_command("demo", "--dir", str(tmp_path / "demo"), "--tracking=mlflow")
    assert done.returncode == 2
    assert "--tracking: invalid choice: 'mlflow' (choose from" in done.stderr
