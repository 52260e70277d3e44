"""The demo: scikit-learn's digits as a competition, from the template to a scored submission."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from lightning_radam.competition.predictions import accuracy, pool, read_predictions
from lightning_radam.competition.project import make_project
from lightning_radam.competition.tables import read_table
from lightning_radam.errors import InputError
from lightning_radam.monitor.incidents import read_alarms
from lightning_radam.tracking.curves import draw_runs

__all__ = ["run_demo", "write_digits"]

_N_FOLDS = 5
_STATE = "demo.json"  # says that a folder is ours, and with which settings it was begun
_ANSWERS: dict[str, Any] = {
    "slug": "digits",
    "backbone": "resnet10t",
    "pretrained": False,
    "image_size": 32,
    "horizontal_flip": False,
    "folds": _N_FOLDS,
    "epochs": 8,
    "batch_size": 64,
    "lr": 0.004,
}


def write_digits(data: Path) -> pd.Series[str]:
    """Write scikit-learn's 1,797 scanned digits the way Kaggle hands out a competition.

    Args:
        data: Folder for `train.csv`, `train_images/`, `test_images/`, `sample_submission.csv`.

    Returns:
        The labels of the test images, indexed by id. They are nowhere in the folder.
    """
    digits = load_digits()
    ids = np.array([f"d{number:04d}" for number in range(len(digits.target))])
    train, test = train_test_split(
        np.arange(len(ids)), test_size=0.2, stratify=digits.target, random_state=0
    )
    for name, rows in (("train_images", train), ("test_images", test)):
        folder = data / name
        folder.mkdir(parents=True, exist_ok=True)
        for row in rows:
            pixels = (digits.images[row] * 255 / 16).round().astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{ids[row]}.png")
    labels = pd.Series(digits.target.astype(str), index=ids)
    pd.DataFrame({"id": ids[train], "label": labels.iloc[train].to_numpy()}).to_csv(
        data / "train.csv", index=False
    )
    pd.DataFrame({"id": ids[test], "label": 0}).to_csv(data / "sample_submission.csv", index=False)
    return labels.iloc[test]


def run_demo(folder: Path, tracking: str) -> dict[str, Any]:
    """Go the whole way in `folder`: data, project, folds, training, scores, submission, picture.

    Args:
        folder: Where; new, empty, or of an earlier demo. A demo that was cut off goes on; a
            finished one is moved to `earlier/` first.
        tracking: "offline" (Weights & Biases without an account) or "csv".

    Returns:
        What `summary.json` holds.

    Raises:
        InputError: If the folder holds something else.
    """
    begun = time.monotonic()
    project = folder / "digits"
    _prepare(folder, project, {"tracking": tracking, **_ANSWERS})
    truth = write_digits(project / "data")
    for verb in ("folds", "train", "oof", "predict", "submit"):
        print(f"\n$ python -m digits {verb}", flush=True)
        code = subprocess.call([sys.executable, "-m", "digits", verb], cwd=project)
        if code != 0:
            raise InputError(f"`python -m digits {verb}` in {project} ended with {code}: see above")
    runs = {f"fold {i}": project / f"runs/base/fold{i}" for i in range(_N_FOLDS)}
    draw_runs(runs, folder / "curves.png", f"Digits, {_N_FOLDS} folds, RAdam")
    summary = {
        **_scores(project, runs, truth),
        "incidents": sum(len(read_alarms(run / "incidents.jsonl")) for run in runs.values()),
        "seconds": round(time.monotonic() - begun, 1),
        "submission": str(project / "submission.csv"),
        "figure": str(folder / "curves.png"),
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    _print(summary, runs)
    return summary


def _prepare(folder: Path, project: Path, answers: dict[str, Any]) -> None:
    """Make the project, or say that an interrupted demo goes on; never mix two demos."""
    state = folder / _STATE
    begun_with = json.loads(state.read_text(encoding="utf-8")) if state.is_file() else None
    if begun_with is None and folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty and holds no demo: choose another --dir")
    if begun_with is not None:
        if begun_with == answers and not (folder / "summary.json").exists():
            print(f"{folder} holds an interrupted demo: it goes on with the folds that are left")
            return
        earlier = folder / "earlier" / datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S-%f")
        earlier.mkdir(parents=True)
        for item in folder.iterdir():
            if item.name != "earlier":
                item.rename(earlier / item.name)
        print(f"{folder} held an earlier demo, now in {earlier}: a new one starts")
    folder.mkdir(parents=True, exist_ok=True)
    make_project(project, answers)
    # Last, so that a folder with the state file always has a whole project.
    state.write_text(json.dumps(answers, indent=2) + "\n", encoding="utf-8")


def _scores(project: Path, runs: Mapping[str, Path], truth: pd.Series[str]) -> dict[str, Any]:
    """Score what the project's files say, out of fold and on the hidden test labels."""
    train = read_table(project / "data/train.csv", "id", "label").set_index("id")["label"]
    folds = [read_predictions(run / "oof.csv", "id") for run in runs.values()]
    submission = read_table(project / "submission.csv", "id", "label").set_index("id")["label"]
    return {
        "oof_score": accuracy(pool(folds, train.index), train),
        "test_score": float((submission == truth.loc[submission.index]).mean()),
        "fold_scores": [accuracy(fold, train) for fold in folds],
    }


def _print(summary: dict[str, Any], runs: Mapping[str, Path]) -> None:
    rows = [(name, score) for name, score in zip(runs, summary["fold_scores"], strict=True)]
    rows += [("pooled OOF", summary["oof_score"]), ("test (hidden labels)", summary["test_score"])]
    print("\naccuracy")
    for name, score in rows:
        print(f"  {name:<22}{score:.4f}")
    print(f"incidents {summary['incidents']}, {summary['seconds']:.0f} seconds")
    print(f"submission  {summary['submission']}")
    offline = [str(path) for run in runs.values() for path in run.glob("wandb/offline-run-*")]
    if offline:
        print(f"W&B runs    {runs['fold 0'].parent}/fold*/wandb/offline-run-*  ({len(offline)})")
    print(f"picture     {summary['figure']}")
