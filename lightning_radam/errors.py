"""The one exception for what a person gave us and can mend, and how a command ends on it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["InputError", "one_line_errors"]


class InputError(ValueError):
    """Bad input. The message is one line: what, where, which values are allowed, what to do."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End a command on bad input with one line on stderr and exit code 2, without a traceback.

    Ctrl-C ends it with exit code 130. Everything else is a defect and keeps its traceback.

    Example:
        >>> try:
        ...     with one_line_errors():  # on stderr: "error: folds=1 must be at least 2"
        ...         raise InputError("folds=1 must be at least 2")
        ... except SystemExit as stop:
        ...     stop.code
        2
    """
    try:
        yield
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        raise SystemExit(130) from None
