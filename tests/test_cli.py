"""RAdamCLI: the sections of a configuration reach the optimizer, the schedule and the monitor."""

import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel

from lightning_radam import InstabilityMonitor, RAdam, RAdamCLI
from lightning_radam.schedule import WarmupDecayLR


class Plain(BoringModel):
    """A module that leaves its optimizer to the command line."""

    configure_optimizers = LightningModule.configure_optimizers


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


def cli(*flags: str, model: type[LightningModule] = Plain) -> RAdamCLI:
    return RAdamCLI(model, BoringDataModule, run=False, args=[*QUIET, *flags])


def fit(made: RAdamCLI) -> Any:
    made.trainer.fit(made.model, made.datamodule)
    return made.trainer


def test_the_flags_reach_optimizer_schedule_and_monitor(tmp_path: Path) -> None:
    run = fit(
        cli(
            "--radam.lr=0.25",
            "--radam.betas=[0.5,0.75]",
            "--radam.warmup_proportion=0.5",
            "--radam.min_lr=1e-5",
            "--radam.decay=cosine",
            f"--monitor.dirpath={tmp_path}",
            "--monitor.window=99",
        )
    )
    (optimizer,) = run.optimizers
    assert isinstance(optimizer, RAdam)
    assert optimizer.param_groups[0]["betas"] == (0.5, 0.75)
    (scheduler,) = (config.scheduler for config in run.lr_scheduler_configs)
    assert isinstance(scheduler, WarmupDecayLR)
    assert (scheduler.total_steps, scheduler.min_lr, scheduler.decay) == (8, 1e-5, "cosine")
    assert scheduler.last_epoch == 8
    (monitor,) = (c for c in run.callbacks if isinstance(c, InstabilityMonitor))
    assert monitor.dirpath == str(tmp_path)
    saved = yaml.safe_load((Path(run.log_dir) / "config.yaml").read_text())
    assert saved["radam"]["lr"] == 0.25
    assert saved["monitor"]["window"] == 99


def test_a_saved_configuration_makes_the_same_run_again(tmp_path: Path) -> None:
    first = fit(cli("--radam.lr=0.25", "--monitor=null"))
    again = RAdamCLI(
        Plain, BoringDataModule, run=False, args=[f"--config={first.log_dir}/config.yaml"]
    )
    assert again.config.radam.lr == 0.25
    assert again.config.monitor is None


def test_null_switches_a_section_off() -> None:
    made = cli("--monitor=null")
    assert not any(isinstance(c, InstabilityMonitor) for c in made.trainer.callbacks)
    run = fit(cli("--radam=null", "--optimizer=SGD", "--optimizer.lr=0.1"))
    assert isinstance(run.optimizers[0], torch.optim.SGD)


def test_a_modules_own_optimizer_is_kept_and_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        run = fit(cli(model=BoringModel))
    assert isinstance(run.optimizers[0], torch.optim.SGD)
    said = "BoringModel keeps its own optimizer; --override_optimizer true gives it RAdam"
    assert said in caplog.messages


def test_a_modules_own_optimizer_is_overridden_when_told_to(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        run = fit(cli("--override_optimizer=true", "--radam.lr=0.1", model=BoringModel))
    assert isinstance(run.optimizers[0], RAdam)
    assert "RAdam replaces the optimizer that BoringModel configures itself" in caplog.messages


def test_settings_that_would_do_nothing_are_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli("--radam.lr=0.1", model=BoringModel)
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith(
        "error: BoringModel configures its optimizer itself, so --radam would do nothing: add "
        "--override_optimizer true, or --radam null\n"
    )


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--radam.lrr=1", "--radam.lrr is unknown: did you mean --radam.lr?"),
        ("--monitor.windw=99", "--monitor.windw is unknown: did you mean --monitor.window?"),
        ("--radam.zzz=1", "--radam.zzz is unknown: known are lr, betas, eps, weight_decay, vari"),
        ("--radam.lr=fast", "--radam.lr=fast is not allowed; --radam.help says what is"),
        ("--radam.total_steps=all", "--radam.total_steps=all is not allowed; --radam.help says"),
        ("--config=bad.yaml", "radam.decay is not allowed; --radam.help says what is"),
        ("--config=typo.yaml", "--radam.min_lrr is unknown: did you mean --radam.min_lr?"),
    ],
)
def test_a_mistake_in_a_section_is_one_line(
    flag: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("bad.yaml").write_text("radam: {decay: cosin}\n")
    Path("typo.yaml").write_text("radam: {min_lrr: 1.0e-5}\n")
    with pytest.raises(SystemExit) as stop:
        cli(flag)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")


def test_yaml_numbers_without_a_dot_are_numbers() -> None:
    Path("plain.yaml").write_text("radam: {lr: 1e-3, min_lr: 1e-5}\n")
    made = cli("--config=plain.yaml")
    assert (made.config.radam.lr, made.config.radam.min_lr) == (1e-3, 1e-5)


def test_the_help_comes_from_the_docstrings(capsys: pytest.CaptureFixture[str]) -> None:
    for flag, text in (
        ("--radam.help", "Share of the schedule that warms up"),
        ("--monitor.help", "Folder of the incident file"),
    ):
        with pytest.raises(SystemExit):
            cli(flag)
        assert text in " ".join(capsys.readouterr().out.split())


def test_print_config_shows_both_sections(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["program", "fit", "--print_config"])
    with pytest.raises(SystemExit):
        RAdamCLI(Plain, seed_everything_default=1)
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["radam"]["total_steps"] == "auto"
    assert shown["monitor"]["window"] == 128
    assert shown["override_optimizer"] is False
