"""Blending predictions: joined by id, never by position."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from lightning_radam.errors import InputError

__all__ = ["mean"]


def mean(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Return the mean of several predictions for the same ids.

    Args:
        tables: Predictions indexed by id, with the same columns; the order of rows is free.

    Raises:
        InputError: If ids or columns differ.

    Example:
        >>> one = pd.DataFrame({"cat": [1.0, 0.0]}, index=["a", "b"])
        >>> two = pd.DataFrame({"cat": [1.0, 0.5]}, index=["b", "a"])
        >>> mean([one, two])["cat"].to_dict()
        {'a': 0.75, 'b': 0.5}
    """
    first = tables[0]
    for table in tables[1:]:
        if list(table.columns) != list(first.columns) or set(table.index) != set(first.index):
            raise InputError(
                "predictions to blend must have the same ids and classes; "
                f"{len(first)} rows of {list(first.columns)} meet "
                f"{len(table)} rows of {list(table.columns)}"
            )
    total = sum((table.loc[first.index] for table in tables[1:]), start=first)
    return total / len(tables)
