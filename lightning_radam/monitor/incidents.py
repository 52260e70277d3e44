"""The incident file: one JSON object a line, on disk before the next step."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["IncidentLog", "RepeatFolder", "read_alarms", "read_incidents", "sample_ids"]

_log = logging.getLogger("lightning_radam")

_ID_FIELDS = ("id", "ids", "sample_id", "sample_ids", "image_id", "index", "idx")


class IncidentLog:
    """Append incidents to a JSON-lines file, each flushed to the disk at once.

    The file is opened at the first incident: a healthy run leaves none. If it cannot be written,
    the training goes on, and one warning says so.

    Args:
        path: The file; its folder is made when needed.

    Example:
        >>> import tempfile
        >>> log = IncidentLog(Path(tempfile.mkdtemp()) / "incidents.jsonl")
        >>> log.append({"step": 3, "kind": "non_finite", "value": float("nan")})
        >>> log.path.read_text()
        '{"step": 3, "kind": "non_finite", "value": "nan"}\\n'
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._has_failed = False

    def append(self, incident: dict[str, Any]) -> None:
        """Write one incident and wait until the disk has it."""
        torn = "\n" if self._has_failed else ""  # half a line may have been written
        line = torn + json.dumps(_plain(incident)) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if not self._has_failed:
                _log.warning(
                    "cannot write %s (%s): incidents are only on the console from here on, "
                    "and training goes on",
                    self.path,
                    error.strerror or error,
                )
            self._has_failed = True


def read_incidents(path: Path) -> list[dict[str, Any]]:
    """Return the incidents of a file, oldest first; none if there is no file.

    A line that a full disk has cut short is passed over.
    """
    if not path.is_file():
        return []
    incidents = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            incidents.append(json.loads(line))
    return incidents


def read_alarms(path: Path) -> list[dict[str, Any]]:
    """Return the incidents that count as such: warnings and critical events, not remarks."""
    return [incident for incident in read_incidents(path) if incident["severity"] != "info"]


class RepeatFolder:
    """Let the first of many like events through, and count the rest.

    Args:
        quiet_steps: Steps without the event after which it is news again.

    Example:
        >>> folder = RepeatFolder(quiet_steps=10)
        >>> [folder.is_news("non_finite", step) for step in (1, 2, 3, 20)]
        [True, False, False, True]
        >>> folder.folded("non_finite")
        2
        >>> folder.folded("non_finite")
        0
    """

    def __init__(self, quiet_steps: int = 100) -> None:
        self.quiet_steps = quiet_steps
        self._last: dict[str, int] = {}
        self._folded: dict[str, int] = {}

    def is_news(self, kind: str, step: int) -> bool:
        """Whether this event is to be shown; takes it in."""
        news = step - self._last.get(kind, -math.inf) > self.quiet_steps
        self._last[kind] = step
        if not news:
            self._folded[kind] = self._folded.get(kind, 0) + 1
        return news

    def folded(self, kind: str) -> int:
        """Return how many were not shown since this was last asked."""
        return self._folded.pop(kind, 0)

    def kinds(self) -> list[str]:
        """Return the kinds of which some were not shown."""
        return list(self._folded)


def sample_ids(batch: object) -> object:
    """Return the ids in a batch, if it is a mapping or a named tuple with a field for them.

    Example:
        >>> sample_ids({"image": ..., "id": ["a", "b"]})
        ['a', 'b']
    """
    for field in _ID_FIELDS:
        found = batch.get(field) if isinstance(batch, Mapping) else getattr(batch, field, None)
        if found is not None and not callable(found):  # a tuple has a method `index`
            return found
    return None


def _plain(value: object) -> object:
    """Spell what JSON does not have: non-finite numbers as text, tensors as lists."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, str | int | float):
        return value
    to_list = getattr(value, "tolist", None)
    return _plain(to_list()) if to_list else str(value)
