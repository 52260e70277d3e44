"""The fold table: made once, kept in a file, never split again at training time."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

import pandas as pd
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from lightning_radam.competition.tables import read_table
from lightning_radam.errors import InputError

__all__ = ["fold_summary", "make_folds", "read_folds", "write_folds"]


def make_folds(
    train: pd.DataFrame,
    *,
    id_column: str,
    target_column: str,
    n_folds: int,
    seed: int,
    group_column: str | None = None,
) -> pd.DataFrame:
    """Split the training rows into folds that hold each label in equal shares.

    Args:
        train: The training table.
        id_column: Its column of ids.
        target_column: Its column of labels.
        n_folds: Number of folds, >= 2.
        seed: Seed of the shuffle.
        group_column: Rows of one group (a patient, say) never lie in two folds.

    Returns:
        A table of the id column and `fold`, in the order of `train`.

    Raises:
        InputError: If there are too few folds, rows of a label, or groups.
    """
    if n_folds < 2:
        raise InputError(f"folds={n_folds} must be at least 2: one to validate, the rest to train")
    counts = train[target_column].value_counts()
    if counts.iloc[-1] < 2:
        raise InputError(
            f"label {counts.index[-1]!r} of column {target_column!r} is in only one row: no fold "
            "could both train and validate on it; remove it, merge it, or add rows (at least 2)"
        )
    if n_folds > counts.iloc[0]:
        raise InputError(
            f"folds={n_folds} is more than the {counts.iloc[0]} rows of the most frequent label: "
            f"use {counts.iloc[0]} folds or fewer"
        )
    groups = None
    splitter = StratifiedKFold(n_folds, shuffle=True, random_state=seed)
    if group_column is not None:
        groups = train[group_column]
        if groups.nunique() < n_folds:
            raise InputError(
                f"folds={n_folds} is more than the {groups.nunique()} groups of column "
                f"{group_column!r}: use {groups.nunique()} folds or fewer"
            )
        splitter = StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed)
    folds = train[[id_column]].assign(fold=-1)
    with warnings.catch_warnings():
        # Labels with fewer rows than folds cannot be in every fold; the fold table shows it.
        warnings.filterwarnings("ignore", "The least populated class in y", UserWarning)
        for fold, (_, held_out) in enumerate(splitter.split(train, train[target_column], groups)):
            folds.loc[folds.index[held_out], "fold"] = fold
    sizes = folds["fold"].value_counts()
    if len(sizes) < n_folds:
        raise InputError(f"only {len(sizes)} of {n_folds} folds have rows: use fewer folds")
    return folds


def write_folds(path: Path, folds: pd.DataFrame) -> str:
    """Write the fold table, once.

    Returns:
        The SHA-256 of the file.

    Raises:
        InputError: If the file is there with another split: runs may rest on it.
    """
    text = folds.to_csv(index=False, lineterminator="\n")
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise InputError(
            f"{path} holds another split, and runs may rest on it: delete it (and the runs) first "
            "if you mean to split anew"
        )
    path.write_text(text, encoding="utf-8")
    return hashlib.sha256(text.encode()).hexdigest()


def read_folds(path: Path, train: pd.DataFrame, id_column: str) -> pd.DataFrame:
    """Read the fold table and check that it belongs to the training table.

    Raises:
        InputError: If it is missing, or its ids are not those of `train`.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist: run the verb `folds` first")
    folds = read_table(path, id_column, "fold").astype({"fold": int})
    unknown = set(folds[id_column]) ^ set(train[id_column])
    if unknown:
        raise InputError(
            f"{path} and the training table differ in {len(unknown)} ids, such as "
            f"{min(unknown)!r}: the data has changed; delete the folds and run `folds` again"
        )
    return folds


def fold_summary(folds: pd.DataFrame, train: pd.DataFrame, target_column: str) -> pd.DataFrame:
    """Return a table of rows per fold and label, to look at."""
    return pd.crosstab(folds["fold"], train[target_column], margins=True, margins_name="rows")
