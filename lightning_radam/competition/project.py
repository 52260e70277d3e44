"""Making a project from the template."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from lightning_radam.errors import InputError

__all__ = ["make_project", "questions"]

_YES_AND_NO = {"yes", "no", "true", "false"}


def template_root() -> Path:
    """Return the folder of copier.yml: inside an installed wheel, or the root of a checkout."""
    package = Path(__file__).resolve().parents[1]
    for root in (package / "_template", package.parent):
        if (root / "copier.yml").is_file():
            return root
    raise InputError("this installation holds no template: reinstall lightning-radam")


@cache
def questions() -> dict[str, dict[str, Any]]:
    """Return the template's questions by name, as copier.yml defines them."""
    text = (template_root() / "copier.yml").read_text(encoding="utf-8")
    return {k: v for k, v in yaml.safe_load(text).items() if not k.startswith("_")}


def make_project(folder: Path, answers: dict[str, Any], *, ask: bool = False) -> None:
    """Make a competition project in a new or empty folder.

    Args:
        folder: Where; made if missing.
        answers: Answers by question; the others get their defaults.
        ask: Ask the questions that `answers` leaves open, on the terminal.

    Raises:
        InputError: If the folder is not empty, or an answer is not allowed.
    """
    import copier
    from copier.errors import CopierError, DirtyLocalWarning, ShallowCloneWarning

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is not empty: choose a new folder, nothing was written")
    for name, value in answers.items():
        _check_answer(name, value)
    with warnings.catch_warnings():
        # A checkout is copied as it stands, uncommitted changes included.
        warnings.simplefilter("ignore", DirtyLocalWarning)
        warnings.simplefilter("ignore", ShallowCloneWarning)
        try:
            copier.run_copy(
                str(template_root()),
                folder,
                data=answers,
                defaults=not ask,
                vcs_ref="HEAD",
                quiet=True,
            )
        except (CopierError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"the project was not made: {reason}") from None


def _check_answer(name: str, value: object) -> None:
    """Raise InputError if an answer is of another type or no choice; copier would not name it."""
    kind = questions()[name]["type"]
    choices = list(questions()[name].get("choices", {}).values())
    if choices and value not in choices:
        raise InputError(f"{name}={value} must be one of {', '.join(choices)}")
    number = {"int": int, "float": float}.get(kind)
    if number is not None:
        try:
            number(str(value))
        except ValueError:
            what = "a whole number" if number is int else "a number"
            raise InputError(f"{name}={value} must be {what}") from None
    if kind == "bool" and str(value).lower() not in _YES_AND_NO:
        raise InputError(f"{name}={value} must be yes or no")
