"""RAdamCLI: the sections of a configuration reach the optimizer, the schedule and the monitor."""

from pathlib import Path

import pytest
import yaml
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel

from lightning_radam import InstabilityMonitor, RAdam, RAdamCLI
from lightning_radam.schedule import WarmupDecayLR

QUIET = [
    "--seed_everything=1",
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=8",
    "--trainer.limit_val_batches=0",
    "--trainer.log_every_n_steps=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.logger=CSVLogger",
    "--trainer.logger.save_dir=.",
]


def test_the_flags_reach_optimizer_schedule_and_monitor(tmp_path: Path) -> None:
    flags = [
        "--radam.lr=0.25",
        "--radam.betas=[0.5,0.75]",
        "--radam.warmup_proportion=0.5",
        "--radam.min_lr=1e-5",
        f"--monitor.dirpath={tmp_path}",
        "--monitor.window=99",
    ]
    cli = RAdamCLI(BoringModel, BoringDataModule, run=False, args=QUIET + flags)
    cli.trainer.fit(cli.model, cli.datamodule)
    (optimizer,) = cli.trainer.optimizers
    assert isinstance(optimizer, RAdam)
    assert optimizer.param_groups[0]["betas"] == (0.5, 0.75)
    (scheduler,) = (config.scheduler for config in cli.trainer.lr_scheduler_configs)
    assert isinstance(scheduler, WarmupDecayLR)
    assert (scheduler.total_steps, scheduler.min_lr, scheduler.last_epoch) == (8, 1e-5, 8)
    (monitor,) = (c for c in cli.trainer.callbacks if isinstance(c, InstabilityMonitor))
    assert monitor.dirpath == str(tmp_path)
    saved = yaml.safe_load((Path(cli.trainer.log_dir) / "config.yaml").read_text())
    assert saved["radam"]["lr"] == 0.25
    assert saved["monitor"]["window"] == 99


def test_an_unknown_flag_ends_with_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        RAdamCLI(BoringModel, run=False, args=[*QUIET, "--radam.lrr=1"])
    assert stop.value.code == 2
    assert "radam.lrr" in capsys.readouterr().err
