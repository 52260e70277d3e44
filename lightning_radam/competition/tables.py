"""Reading the tables and finding the images that a competition hands out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from lightning_radam.errors import InputError

__all__ = ["image_paths", "read_table"]


def read_table(path: Path, id_column: str, *other_columns: str) -> pd.DataFrame:
    """Read a CSV whose rows have an id each.

    Ids stay text, so that `007` is not 7.

    Args:
        path: The CSV file.
        id_column: The column of ids: unique, none empty.
        other_columns: Columns that must be there too, with no empty cell.

    Returns:
        The table, with ids and the other named columns as text.

    Raises:
        InputError: If the file, a column or a cell is missing, or an id comes twice.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist: put the competition's table there")
    named = [id_column, *other_columns]
    try:
        table = pd.read_csv(path, dtype=dict.fromkeys(named, str), keep_default_na=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a CSV table: {str(error).strip()}") from None
    for column in named:
        if column not in table.columns:
            raise InputError(
                f"{path} has no column {column!r}; it has {', '.join(map(repr, table.columns))}: "
                "name the right one in settings.py, or mend the table"
            )
        empty = table.index[table[column] == ""]
        if len(empty):
            raise InputError(
                f"{path} has no {column} in line {empty[0] + 2} ({len(empty)} such rows): "
                "fill them in or remove the rows"
            )
    repeated = table[id_column][table[id_column].duplicated()]
    if len(repeated):
        raise InputError(
            f"{path} has the id {repeated.iloc[0]!r} more than once ({len(repeated)} repeated "
            "rows): each image needs one row"
        )
    if table.empty:
        raise InputError(f"{path} has no rows: put the competition's table there")
    return table


def image_paths(root: Path, pattern: str, ids: Sequence[str]) -> list[Path]:
    """Return the image file of each id.

    Args:
        root: The project's folder.
        pattern: Path below `root` with `{id}` in it, such as `data/train_images/{id}.png`.
        ids: The ids, in order.

    Raises:
        InputError: If the pattern has no `{id}`, or an image is missing.
    """
    if "{id}" not in pattern:
        raise InputError(
            f"image pattern {pattern!r} must contain {{id}}, such as data/train_images/{{id}}.png"
        )
    paths = [root / pattern.replace("{id}", item) for item in ids]
    missing = [(item, path) for item, path in zip(ids, paths, strict=True) if not path.is_file()]
    if missing:
        item, path = missing[0]
        raise InputError(
            f"{len(missing)} of {len(ids)} images are missing, the first is {path} (id {item!r}): "
            "unpack them there, or correct the image pattern in settings.py"
        )
    return paths
