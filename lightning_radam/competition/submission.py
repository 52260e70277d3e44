"""The submission: joined by id, and written only if it matches the sample."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from lightning_radam.competition.tables import read_table
from lightning_radam.errors import InputError

__all__ = ["check_submission", "write_submission"]


def check_submission(submission: pd.DataFrame, sample: pd.DataFrame) -> None:
    """Compare a submission with the sample submission.

    Args:
        submission: The table to hand in.
        sample: The competition's sample; its first column holds the ids.

    Raises:
        InputError: If columns, ids or their order differ, or a cell is empty; it says what differs.
    """
    if list(submission.columns) != list(sample.columns):
        raise InputError(
            f"the submission has columns {list(submission.columns)}, the sample has "
            f"{list(sample.columns)}: they must be the same, in the same order"
        )
    key = sample.columns[0]
    ours, theirs = list(submission[key]), list(sample[key])
    missing = [item for item in theirs if item not in set(ours)]
    extra = [item for item in ours if item not in set(theirs)]
    if missing or extra:
        parts = [
            f"{len(ids)} ids {what}, such as {ids[0]!r}"
            for ids, what in ((missing, "of the sample are missing"), (extra, "are not in it"))
            if ids
        ]
        raise InputError(f"the submission differs from the sample: {'; '.join(parts)}")
    repeated = submission[key][submission[key].duplicated()]
    if len(repeated):
        raise InputError(
            f"the submission has {len(ours)} rows, the sample {len(theirs)}; the id "
            f"{repeated.iloc[0]!r} comes twice"
        )
    if ours != theirs:
        at = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
        raise InputError(
            "the submission is not in the sample's order; they first differ in row "
            f"{at + 1}: {ours[at]!r} instead of {theirs[at]!r}"
        )
    empty = submission.columns[submission.isna().any()]
    if len(empty):
        raise InputError(f"the submission has empty cells in column {empty[0]!r}")


def write_submission(path: Path, answers: pd.Series[str], sample_path: Path, target: str) -> None:
    """Fill the sample's rows with answers, check the result and write it.

    Args:
        path: The file to write; left as it is if the check fails.
        answers: The value to hand in, indexed by id.
        sample_path: The competition's sample submission; its first column holds the ids.
        target: The column to fill.

    Raises:
        InputError: If the answers do not fit the sample.
    """
    header = pd.read_csv(sample_path, nrows=0).columns if sample_path.is_file() else [""]
    sample = read_table(sample_path, header[0])
    submission = answers.rename(target).rename_axis(header[0]).reset_index()
    order = pd.Series(range(len(sample)), index=sample[header[0]])
    submission = submission.sort_values(
        header[0], key=lambda ids: ids.map(order), kind="stable", ignore_index=True
    )
    check_submission(submission, sample)
    partial = path.with_suffix(".partial")
    submission.to_csv(partial, index=False)
    partial.replace(path)
