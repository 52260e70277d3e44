"""Predictions as tables keyed by id: written, read, pooled and scored."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from lightning_radam.errors import InputError

__all__ = ["accuracy", "most_likely", "pool", "read_predictions", "write_predictions"]


def write_predictions(
    path: Path, id_column: str, ids: Sequence[str], classes: Sequence[str], rows: Sequence[object]
) -> None:
    """Write one row per id with the probability of each class.

    The file appears whole or not at all, so its presence says that the predictions are done.

    Args:
        path: The CSV file.
        id_column: Name of the id column.
        ids: The ids, one per row.
        classes: The columns, one per class.
        rows: The probabilities, shape (ids, classes).
    """
    table = pd.DataFrame(rows, columns=list(classes))
    table.insert(0, id_column, list(ids))
    partial = path.with_suffix(".partial")
    table.to_csv(partial, index=False)
    partial.replace(path)


def read_predictions(path: Path, id_column: str) -> pd.DataFrame:
    """Read a table of `write_predictions`, indexed by id.

    Raises:
        InputError: If there is none.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist: train that fold first")
    table: pd.DataFrame = pd.read_csv(path, dtype={id_column: str}, keep_default_na=False)
    return table.set_index(id_column)


def pool(tables: Sequence[pd.DataFrame], ids: Sequence[str]) -> pd.DataFrame:
    """Join the out-of-fold predictions of all folds into one row per training id.

    Args:
        tables: The folds' predictions, indexed by id.
        ids: All training ids; the result has their order.

    Raises:
        InputError: If an id has no prediction or several, or is not a training id.
    """
    pooled = pd.concat(tables)
    repeated = pooled.index[pooled.index.duplicated()]
    if len(repeated):
        raise InputError(f"id {repeated[0]!r} was predicted by more than one fold: train anew")
    differing = pooled.index.symmetric_difference(pd.Index(ids))
    if len(differing):
        raise InputError(
            f"{len(differing)} ids are in the training table or in the predictions, but not in "
            f"both, such as {differing[0]!r}: train every fold on the same data"
        )
    return pooled.loc[list(ids)]


def most_likely(predictions: pd.DataFrame) -> pd.Series[str]:
    """Return the most likely class of each row."""
    return predictions.idxmax(axis="columns").astype(str)


def accuracy(predictions: pd.DataFrame, truth: pd.Series[str]) -> float:
    """Return the share of rows whose most likely class is the true one.

    Args:
        predictions: Probabilities, indexed by id.
        truth: Labels, indexed by id; every predicted id is there.
    """
    return float((most_likely(predictions) == truth.loc[predictions.index]).mean())
