"""The reactions, as a training sees them."""

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger

from lightning_radam import InstabilityMonitor, RAdamConfig
from lightning_radam.monitor.incidents import read_incidents
from lightning_radam.monitor.reactions import UnstableTraining
from tests.boring import Line, loader, trainer

CONFIG = RAdamConfig(lr=1e-3, betas=(0.9, 0.99), warmup_proportion=0.0, min_lr=1e-4)
CALM = {batch: 2.0 + 0.01 * (batch % 5) for batch in range(400)}  # losses, a baseline


class Recorder(Callback):
    """The weights after each step, and the learning rate of each update."""

    def __init__(self) -> None:
        self.weights: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *args: Any) -> None:
        self.weights.append(float(module.layer.weight.detach()))


class Wild(Line):
    """`Line` with gradients a thousand times as large at some steps."""

    wild: tuple[int, ...] = ()

    def on_after_backward(self) -> None:
        if self.batches in self.wild:
            for param in self.parameters():
                param.grad.mul_(1000)


def fit(folder: Path, model: Line, batches: int = 120, **settings: Any) -> Any:
    monitor = InstabilityMonitor(dirpath=str(folder), log_every_n_steps=1000, **settings)
    recorder = Recorder()
    logger = CSVLogger(folder, name="", version="csv")
    run = trainer(callbacks=[monitor, recorder], logger=logger)
    try:
        run.fit(model, loader(batches))
    finally:
        monitor.recorder, monitor.trainer = recorder, run
    return monitor


def test_log_drops_nothing(tmp_path: Path) -> None:
    model = Line(CONFIG, {3: math.nan, 4: 1.0})
    monitor = fit(tmp_path, model, 6, on_critical="log")
    (incident,) = read_incidents(tmp_path / "incidents.jsonl")
    assert (incident["dropped"], incident["reaction"]) == (False, "log")
    assert monitor.dropped_updates == 0
    # `Line` keeps the gradient of a loss that is replaced.
    assert monitor.recorder.weights[3] != monitor.recorder.weights[2]


def test_skip_on_warnings_drops_explosions(tmp_path: Path) -> None:
    model = Wild(CONFIG, CALM)
    model.wild = (100, 101)
    monitor = fit(tmp_path, model, on_warning="skip")
    explosions = [
        incident
        for incident in read_incidents(tmp_path / "incidents.jsonl")
        if incident["kind"] == "gradient_explosion"
    ]
    assert [(i["step"], i["dropped"], i["reaction"]) for i in explosions] == [
        (100, True, "skip"),
        (101, True, "skip"),
    ]
    assert monitor.dropped_updates == 2
    weights = monitor.recorder.weights
    assert weights[99] == weights[100] == weights[101] != weights[102]


def test_explosions_pass_by_default(tmp_path: Path) -> None:
    model = Wild(CONFIG, CALM)
    model.wild = (100,)
    assert fit(tmp_path, model).dropped_updates == 0


def test_the_lr_is_lowered_and_recovers_beside_the_schedule(tmp_path: Path) -> None:
    quiet = Line(CONFIG, CALM)
    fit(tmp_path / "quiet", quiet)
    model = Line(CONFIG, CALM | {90: 50.0})
    monitor = fit(tmp_path, model, on_warning="lower_lr", lr_recovery_steps=20)
    shares = [lr / scheduled for lr, scheduled in zip(model.lrs, quiet.lrs, strict=True)]
    assert shares[:91] == [1.0] * 91
    assert shares[91] == pytest.approx(0.5)
    assert shares[101] == pytest.approx(math.sqrt(0.5))
    assert shares[111:] == pytest.approx([1.0] * 9)
    schedule = monitor.trainer.lr_scheduler_configs[0].scheduler
    assert monitor.trainer.optimizers[0].param_groups[0]["lr"] == schedule.get_last_lr()[0]


def test_a_rollback_goes_back_to_a_good_snapshot_and_on_with_the_data(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = Line(CONFIG, CALM | {95: 50.0})
    with caplog.at_level(logging.WARNING, "lightning_radam"):
        monitor = fit(tmp_path, model, on_warning="rollback", snapshot_every_n_steps=20)
    weights = monitor.recorder.weights
    # The copy after step 79 is the latest; that after step 59 has been quiet for twenty steps.
    assert weights[95] == weights[59]
    assert weights[94] != weights[59]
    assert monitor.rollbacks == 1
    assert model.batches == 119  # every batch was seen once
    assert caplog.messages[1:] == [
        "rollback 1 of 3: weights and optimizer are those of step 60 again"
    ]
    # The optimizer's own count went back too, the trainer's did not.
    (state, *_) = monitor.trainer.optimizers[0].state.values()
    assert int(state["step"]) == 60 + 24
    assert monitor.trainer.global_step == 120


def test_too_many_rollbacks_stop(tmp_path: Path) -> None:
    model = Line(CONFIG, CALM | {80: 50.0, 100: 50.0})
    with pytest.raises(UnstableTraining, match="1 rollbacks did not help: loss 50 is"):
        fit(tmp_path, model, on_warning="rollback", max_rollbacks=1)


def test_a_dropped_update_needs_no_rollback_but_ten_do(tmp_path: Path) -> None:
    model = Line(CONFIG, CALM | {70: math.nan} | dict.fromkeys(range(80, 92), math.nan))
    monitor = fit(tmp_path, model, on_critical="rollback", snapshot_every_n_steps=20)
    reactions = {
        incident["step"]: incident["reaction"]
        for incident in read_incidents(tmp_path / "incidents.jsonl")
    }
    assert reactions[70] == "log"
    assert all(reactions[step] == "log" for step in range(80, 89))
    assert reactions[89] == "rollback"
    assert monitor.dropped_updates == 13


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_stop_saves_a_checkpoint_and_ends_with_an_exit_code(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = Line(CONFIG, {7: math.nan})
    path = tmp_path / "unstable-step=8.ckpt"
    with pytest.raises(UnstableTraining) as end:
        fit(tmp_path, model, on_critical="stop")
    message = f"training stopped after step 7: loss is nan; see {path}"
    assert (str(end.value), end.value.code) == (message, 3)
    assert caplog.messages[-1] == message
    weights = torch.load(path, weights_only=True)["state_dict"]
    assert all(tensor.isfinite().all() for tensor in weights.values())
    # It goes on from there, the bad batch behind it.
    monitor = InstabilityMonitor(dirpath=str(tmp_path), on_critical="stop")
    again = trainer(callbacks=[monitor])
    again.fit(Line(CONFIG), loader(120), ckpt_path=path, weights_only=True)
    assert again.global_step == 120
    assert (monitor.incidents, monitor.dropped_updates) == (1, 1)


def test_a_cut_travels_in_a_checkpoint() -> None:
    monitor = InstabilityMonitor(on_warning="lower_lr")
    state = monitor.state_dict() | {"lr_scale": 0.25, "rollbacks": 2}
    monitor.load_state_dict(state)
    assert monitor.state_dict() == state


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"on_warning": "panic"}, "on_warning='panic' must be one of 'log', 'skip', 'lower_lr'"),
        ({"on_critical": None}, "on_critical=None must be one of"),
        ({"snapshot_every_n_steps": 0}, "snapshot_every_n_steps=0 must be at least 1"),
        ({"max_rollbacks": -1}, "max_rollbacks=-1 must be at least 0; 0 stops at once"),
        ({"lr_factor": 2.0}, r"lr_factor=2.0 must lie in \(0, 1\)"),
        ({"window": 10}, "window=10 must be at least 64 steps"),
    ],
)
def test_bad_arguments_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InstabilityMonitor(**settings)
