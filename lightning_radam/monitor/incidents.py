"""The incident file: one JSON object a line, on disk before the next step."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

__all__ = ["IncidentLog", "read_incidents"]


class IncidentLog:
    """Append incidents to a JSON-lines file, each flushed to the disk at once.

    The file is opened at the first incident: a healthy run leaves none.

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

    def append(self, incident: dict[str, Any]) -> None:
        """Write one incident and wait until the disk has it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({k: _plain(v) for k, v in incident.items()}) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_incidents(path: Path) -> list[dict[str, Any]]:
    """Return the incidents of a file, oldest first; none if there is no file."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def _plain(value: object) -> object:
    """Spell non-finite numbers as text, since JSON has none."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
