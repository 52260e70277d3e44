"""What reaches Weights & Biases, read back from an offline run; and the adapter's edges."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from lightning_radam.monitor.callback import _KEYS
from lightning_radam.tracking.wandb import alert, wandb_runs
from tests.conftest import ROOT, history, inspect_run

# W&B's process-wide state wants a process of its own.
SCRIPT = """
import math
import wandb
from lightning.pytorch.loggers import WandbLogger
from lightning_radam import InstabilityMonitor
from tests.boring import Line, loader, trainer
logger = WandbLogger(save_dir=".", offline=True, project="p")
model = Line(poison={7: math.nan})
trainer(logger=logger, callbacks=[InstabilityMonitor()]).fit(model, loader(20))
wandb.finish()
wandb.teardown()
"""


@pytest.fixture(scope="module")
def offline_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("offline")
    # Not through the service of this process, which outlives the run.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_SERVICE")}
    environment = {**inherited, "PYTHONPATH": str(ROOT), "WANDB_SILENT": "true"}
    subprocess.run([sys.executable, "-c", SCRIPT], cwd=folder, env=environment, check=True)
    (run,) = folder.glob("wandb/offline-run-*")
    return run


def test_every_key_is_there_at_every_step(offline_run: Path) -> None:
    rows = [row for row in history(offline_run) if "stability/loss" in row]
    assert [row["trainer/global_step"] for row in rows] == list(range(20))
    assert all(set(_KEYS) <= set(row) for row in rows)
    assert rows[-1]["stability/incidents"] == 1


def test_metrics_are_defined_by_exact_names(offline_run: Path) -> None:
    defined = {
        record["metric"]["name"]: record["metric"]
        for record in inspect_run(offline_run)
        if record["type"] == "metric" and "name" in record["metric"]
    }
    for key in _KEYS:
        assert defined[key]["step_metric"] == "trainer/global_step"
        assert defined[key]["summary"] == {"min": True, "max": True, "last": True}


def test_a_critical_event_is_an_alert(offline_run: Path) -> None:
    alerts = [r["alert"] for r in inspect_run(offline_run) if r["type"] == "alert"]
    assert {(a["title"], a["text"]) for a in alerts} >= {
        ("Training is unstable: non_finite", "step 7: loss is nan")
    }


def test_without_a_wandb_run_there_is_nothing_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert wandb_runs([CSVLogger(tmp_path)]) == []
    # On ranks above 0 Lightning hands out a dummy instead of a run.
    monkeypatch.setattr(WandbLogger, "experiment", property(lambda self: object()))
    assert wandb_runs([WandbLogger(save_dir=tmp_path, offline=True)]) == []


def test_titles_are_cut_to_what_wandb_takes() -> None:
    class Run:
        def alert(self, title: str, **others: object) -> None:
            self.title = title

    run = Run()
    alert(run, "x" * 100, "text")  # type: ignore[arg-type]
    assert len(run.title) == 63
