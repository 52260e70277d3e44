"""The incident file: every line is on the disk, and valid JSON."""

import json
import os
from pathlib import Path

import pytest

from lightning_radam.monitor.incidents import IncidentLog, read_incidents


def test_lines_are_strict_json_and_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    log = IncidentLog(tmp_path / "new/incidents.jsonl")
    log.append({"step": 1, "value": float("inf")})
    log.append({"step": 2, "value": 0.5, "grad_norm": None})
    assert len(synced) == 2

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = log.path.read_text().splitlines()
    parsed = [json.loads(line, parse_constant=refuse) for line in lines]
    assert parsed == read_incidents(log.path)
    assert parsed[0] == {"step": 1, "value": "inf"}


def test_no_file_means_no_incidents(tmp_path: Path) -> None:
    assert read_incidents(tmp_path / "incidents.jsonl") == []
