"""The check before the first step: a misfit of schedule and run is impossible to overlook."""

import pickle
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from lightning_radam import InstabilityMonitor, RAdam, RAdamConfig, WarmupDecayLR
from lightning_radam.monitor.incidents import read_incidents
from lightning_radam.preflight import lightning_callbacks, schedule_problems
from tests.boring import Line, loader, trainer

# What a run of 100 updates says of a schedule of another length.
MISFITS = {
    "spent": (
        RAdamConfig(total_steps=21, min_lr=1e-5),
        "WarmupDecayLR has total_steps=21, but this run has 100 optimizer updates: the last 79% of "
        "this run would train at min_lr=1e-05; use total_steps='auto' (configure_radam), or "
        "total_steps=100",
    ),
    "too long": (
        RAdamConfig(lr=1.0, total_steps=200, warmup_proportion=0.0),
        "WarmupDecayLR has total_steps=200, but this run has 100 optimizer updates: it would stop "
        "at lr=0.5, 50% of its peak, without having decayed to min_lr=0; use total_steps='auto' "
        "(configure_radam), or total_steps=100",
    ),
    "warm-up beyond the end": (
        RAdamConfig(total_steps=4000, warmup_proportion=0.5),
        "WarmupDecayLR has total_steps=4,000, but this run has 100 optimizer updates: the warm-up "
        "alone takes 2,000, so it would never end; use total_steps='auto' (configure_radam), or "
        "total_steps=100",
    ),
}


def problems(model: Line, **settings: Any) -> list[str]:
    """Train for 100 updates and return what the check warned of."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trainer(**settings).fit(model, loader(100))
    return [str(w.message) for w in seen if str(w.message).startswith("WarmupDecayLR")]


@pytest.mark.parametrize("case", MISFITS)
def test_a_misfit_is_one_warning_with_numbers_and_remedy(case: str) -> None:
    config, message = MISFITS[case]
    assert problems(Line(config)) == [message]


@pytest.mark.parametrize(
    "config",
    [
        RAdamConfig(),
        RAdamConfig(total_steps=100),
        RAdamConfig(total_steps=20, decay="constant"),  # constant after the warm-up in any case
        RAdamConfig(total_steps=500, decay="constant"),
    ],
)
def test_a_schedule_that_fits_is_silent(config: RAdamConfig) -> None:
    assert problems(Line(config)) == []


def test_accumulation_counts() -> None:
    assert problems(Line(RAdamConfig(total_steps=34)), accumulate_grad_batches=3) == []
    (problem,) = problems(Line(RAdamConfig(total_steps=100)), accumulate_grad_batches=3)
    assert "this run has 34 optimizer updates" in problem


class PerEpoch(Line):
    """What stock LightningCLI makes of `--lr_scheduler`: one step per epoch."""

    def configure_optimizers(self) -> Any:
        optimizer = RAdam(self.parameters())
        return [optimizer], [WarmupDecayLR(optimizer, 100)]


def test_a_step_per_epoch_says_how_to_mend_it() -> None:
    (problem,) = problems(PerEpoch())
    assert problem == (
        "WarmupDecayLR counts optimizer updates, but the trainer would step it once per epoch in a "
        "run of 100 updates, so that it would move at a fraction of its pace; return "
        "configure_radam(self) from configure_optimizers, or set interval='step' and frequency=1 "
        "in its lr_scheduler dictionary; LightningCLI's --lr_scheduler cannot, RAdamCLI does"
    )


def test_a_run_without_an_end_has_nothing_to_compare() -> None:
    model = Line(RAdamConfig(total_steps=21))
    assert problems(model, max_epochs=-1, limit_train_batches=5, max_time="00:00:00:01") == []


def test_the_check_can_be_pickled_as_spawning_strategies_do() -> None:
    (check,) = lightning_callbacks()
    assert type(pickle.loads(pickle.dumps(check))) is type(check)


def test_trainers_of_pytorch_lightning_have_it_too() -> None:
    script = """
import sys, warnings
warnings.simplefilter("ignore")
import pytorch_lightning as pl, torch
from lightning_radam.configure import configure_radam
class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
    def training_step(self, batch, batch_idx):
        return self.layer(batch).sum()
    def configure_optimizers(self):
        return configure_radam(self, **SETTINGS)
def fit(**settings):
    global SETTINGS
    SETTINGS = settings
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, logger=False, barebones=True)
    trainer.fit(Net(), torch.utils.data.DataLoader(torch.ones(10, 1)))
    return trainer.lr_scheduler_configs[0].scheduler.total_steps
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    print(fit(), fit(total_steps=5))
print([str(w.message) for w in seen if "WarmupDecayLR" in str(w.message)])
print("lightning" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    first, second, third = done.stdout.splitlines()[-3:]
    assert first == "10 5"
    assert re.fullmatch(r"\[.WarmupDecayLR has total_steps=5, .* the last 50% .*\]", second)
    assert third == "False"


@pytest.mark.filterwarnings("ignore:WarmupDecayLR has", "ignore:the schedule's 21 steps")
def test_the_monitor_keeps_it_as_an_incident(tmp_path: Path) -> None:
    monitor = InstabilityMonitor(dirpath=str(tmp_path))
    config, message = MISFITS["spent"]
    trainer(callbacks=[monitor]).fit(Line(config), loader(100))
    (incident,) = read_incidents(tmp_path / "incidents.jsonl")
    assert incident == {"kind": "schedule", "severity": "warning", "step": 0, "message": message}


def test_a_trainer_without_our_schedule_is_not_asked_for_its_length() -> None:
    class Other:
        lr_scheduler_configs: tuple[()] = ()  # and nothing else that could be asked for

    assert schedule_problems(Other()) == []
