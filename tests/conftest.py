"""Shared helpers: commands run as a user runs them."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]

# More threads than the two cores only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ["WANDB_ERROR_REPORTING"] = "false"
os.environ["WANDB_MODE"] = "offline"

Command = Callable[..., subprocess.CompletedProcess[str]]


def run_command(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run `lightning-radam WORDS`, or `python -m MODULE ...` if the first word is `-m`."""
    start = words if words[0] == "-m" else ("-m", "lightning_radam", *words)
    return subprocess.run(
        [sys.executable, *start],
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=1500,
    )


def error_line(done: subprocess.CompletedProcess[str]) -> str:
    """Return the one line that a failed command wrote, after checking that it is one."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    return lines[0]


@pytest.fixture(autouse=True)
def _no_files_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let code that writes to the working folder write to a temporary one."""
    monkeypatch.chdir(tmp_path)


def inspect_run(run: Path) -> list[dict[str, Any]]:
    """Return the records of an offline W&B run, as W&B's own reader sees them."""
    wandb = Path(sys.executable).with_name("wandb")
    deadline = time.monotonic() + 60
    while True:
        done = subprocess.run(
            [str(wandb), "leet", "inspect", "--json", str(run)], capture_output=True, text=True
        )
        records = [json.loads(line) for line in done.stdout.splitlines()]
        # W&B's own process may still be writing; its last word is the exit record.
        if done.returncode == 0 and any(record["type"] == "exit" for record in records):
            return records
        assert time.monotonic() < deadline, f"{run} is not complete: {done.stderr}"
        time.sleep(1)


def history(run: Path) -> list[dict[str, Any]]:
    """Return the logged rows of an offline W&B run."""
    return [r["history"]["item"] for r in inspect_run(run) if r["type"] == "history"]
