"""InstabilityMonitor under a real trainer."""

import logging
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_radam import InstabilityMonitor, RAdamConfig
from lightning_radam.monitor.incidents import read_incidents
from lightning_radam.rectification import r_t
from tests.boring import Line, loader, trainer

CONFIG = RAdamConfig(lr=1e-3, betas=(0.9, 0.99), warmup_proportion=0.5)


def fit(folder: Path, model: Line, monitor: InstabilityMonitor, **settings: Any) -> pd.DataFrame:
    """Train with a CSV logger and return its rows."""
    logger = CSVLogger(folder, name="", version="csv")
    trainer(logger=logger, callbacks=[monitor], **settings).fit(model, loader(100))
    return pd.read_csv(folder / "csv/metrics.csv")


def test_what_it_logs_is_what_happened(tmp_path: Path) -> None:
    model = Line(CONFIG)
    rows = fit(tmp_path, model, InstabilityMonitor())
    ours = rows.dropna(subset="stability/loss").set_index("step")
    lightnings = rows.dropna(subset="train_loss").set_index("step")
    assert list(ours.index) == list(range(100))
    # The same step has the same loss in both kinds of rows.
    assert ours["stability/loss"].equals(lightnings["train_loss"].rename("stability/loss"))
    assert ours["radam/lr"].tolist() == pytest.approx(model.lrs)
    expected = [r_t(t, 0.99) for t in range(1, 101)]
    assert ours["radam/rect"].tolist() == pytest.approx(expected)
    assert (ours["stability/grad_norm"] > 0).all()
    assert (ours["stability/incidents"] == 0).all()
    assert not (tmp_path / "csv/incidents.jsonl").exists()


def test_rows_come_every_n_steps(tmp_path: Path) -> None:
    rows = fit(tmp_path, Line(CONFIG), InstabilityMonitor(log_every_n_steps=25))
    assert rows.dropna(subset="radam/lr")["step"].tolist() == [0, 25, 50, 75]


def test_the_loss_of_a_step_is_the_mean_of_its_micro_batches(tmp_path: Path) -> None:
    poison = {batch: float(batch) for batch in range(100)}
    rows = fit(tmp_path, Line(CONFIG, poison), InstabilityMonitor(), accumulate_grad_batches=3)
    losses = rows.dropna(subset="stability/loss")["stability/loss"].tolist()
    means = [float(3 * step + 1) for step in range(33)]
    # Batch 99 is a step of its own. Lightning scales its gradient by 1/3 all the same.
    assert losses == [*means, 99.0]


def test_incidents_are_logged_counted_and_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monitor = InstabilityMonitor(dirpath=str(tmp_path / "kept"), log_every_n_steps=50)
    model = Line(CONFIG, {80: math.nan, 90: 50.0} | dict.fromkeys(range(80), 2.0))
    with caplog.at_level(logging.WARNING, "lightning_radam"):
        rows = fit(tmp_path, model, monitor)
    first, second = read_incidents(tmp_path / "kept/incidents.jsonl")
    assert (first["kind"], first["step"], first["value"]) == ("non_finite", 80, "nan")
    assert (first["severity"], first["epoch"]) == ("critical", 0)
    assert (second["kind"], second["step"], second["value"]) == ("spike", 90, 50.0)
    assert caplog.messages == [
        "step 80: loss is nan; update dropped",
        "step 90: loss 50 is 25 times its median of 2",
    ]
    at_events = rows.set_index("step").loc[[80, 90], "stability/incidents"]
    assert at_events.dropna().tolist() == [1.0, 2.0]
    assert monitor.incidents == 2


def test_a_non_finite_gradient_is_an_incident_of_its_own(tmp_path: Path) -> None:
    class Broken(Line):
        def on_after_backward(self) -> None:
            if self.batches == 5:
                self.layer.bias.grad.fill_(torch.inf)

    fit(tmp_path, Broken(CONFIG), InstabilityMonitor(), limit_train_batches=6)
    (incident,) = read_incidents(tmp_path / "csv/incidents.jsonl")
    assert (incident["message"], incident["step"]) == ("gradient norm is inf", 5)


def test_it_needs_no_logger_and_survives_a_second_fit(tmp_path: Path) -> None:
    monitor = InstabilityMonitor()
    for _ in range(2):
        run = trainer(callbacks=[monitor], default_root_dir=tmp_path)
        run.fit(Line(CONFIG, {3: math.nan}), loader())
    assert [i["step"] for i in read_incidents(tmp_path / "incidents.jsonl")] == [3, 3]


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_step_that_returns_none_is_passed_over(tmp_path: Path) -> None:
    class Shy(Line):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor | None:
            return None if batch_idx == 2 else super().training_step(batch, batch_idx)

    rows = fit(tmp_path, Shy(CONFIG), InstabilityMonitor(), limit_train_batches=5)
    assert len(rows.dropna(subset="stability/loss")) == 4


def test_its_state_travels_in_checkpoints(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"limit_train_batches": 70}
    monitor = InstabilityMonitor(dirpath=str(tmp_path))
    run = trainer(callbacks=[monitor], default_root_dir=tmp_path, **settings)
    run.fit(Line(CONFIG, {9: math.nan}), loader(100))
    path = tmp_path / "at70.ckpt"
    run.save_checkpoint(path)
    resumed = InstabilityMonitor(dirpath=str(tmp_path))
    again = trainer(callbacks=[resumed], default_root_dir=tmp_path, max_epochs=2, **settings)
    again.fit(Line(CONFIG, {0: 50.0}), loader(100), ckpt_path=path, weights_only=True)
    # The baseline of the first 70 steps makes the first resumed step a spike.
    kinds = [(i["kind"], i["step"]) for i in read_incidents(tmp_path / "incidents.jsonl")]
    assert kinds == [("non_finite", 9), ("spike", 70)]
    assert resumed.incidents == 2


def test_a_bad_interval_is_named() -> None:
    with pytest.raises(ValueError, match="log_every_n_steps=0 must be at least 1; None takes"):
        InstabilityMonitor(log_every_n_steps=0)
