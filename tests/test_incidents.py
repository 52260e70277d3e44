"""The incident file: every line is on the disk, and valid JSON."""

import errno
import json
import math
import os
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from lightning_radam.monitor.incidents import (
    IncidentLog,
    RepeatFolder,
    read_incidents,
    sample_ids,
)


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


def test_a_full_disk_is_one_warning_and_no_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = IncidentLog(tmp_path / "incidents.jsonl")
    log.append({"step": 1})
    with monkeypatch.context() as full:

        def refuse(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        full.setattr(os, "fsync", refuse)
        log.append({"step": 2})
        log.append({"step": 3})
    (warning,) = caplog.messages
    assert warning == (
        f"cannot write {log.path} (No space left on device): incidents are only on the console "
        "from here on, and training goes on"
    )
    with log.path.open("a") as file:
        file.write('{"step": 4, "ki')  # as a disk that fills up leaves it
    log.append({"step": 5})
    assert [incident["step"] for incident in read_incidents(log.path)][-1] == 5


def test_tensors_and_nested_values_become_json(tmp_path: Path) -> None:
    log = IncidentLog(tmp_path / "incidents.jsonl")
    log.append(
        {"ids": [torch.tensor([1, 2])], "top": {"a": math.nan}, "path": tmp_path, "no": None}
    )
    (incident,) = read_incidents(log.path)
    assert incident == {"ids": [[1, 2]], "top": {"a": "nan"}, "path": str(tmp_path), "no": None}


class Pair(NamedTuple):
    image: str
    id: list[str]


@pytest.mark.parametrize(
    ("batch", "ids"),
    [
        ({"image": 0, "id": ["a"]}, ["a"]),
        ({"index": [3]}, [3]),
        (Pair("x", ["b"]), ["b"]),
        (("x", "y"), None),
        (["x"], None),
        ({"image": 0}, None),
        (None, None),
    ],
)
def test_ids_are_found_where_they_have_a_name(batch: object, ids: object) -> None:
    assert sample_ids(batch) == ids


def test_repeats_are_counted_by_kind() -> None:
    folder = RepeatFolder(quiet_steps=5)
    assert [folder.is_news("a", step) for step in (0, 1, 6, 12)] == [True, False, False, True]
    assert folder.is_news("b", 2)
    assert folder.kinds() == ["a"]
    assert (folder.folded("a"), folder.folded("a"), folder.folded("b")) == (2, 0, 0)


def test_no_file_means_no_incidents(tmp_path: Path) -> None:
    assert read_incidents(tmp_path / "incidents.jsonl") == []
