"""configure_radam: the right optimizer, and a schedule as long as the run."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_radam import RAdam, RAdamConfig, WarmupDecayLR, configure_radam
from lightning_radam.configure import RAdamKeywords
from lightning_radam.errors import InputError
from tests.boring import Line, loader, trainer


@pytest.mark.parametrize(
    ("settings", "updates"),
    [
        ({"max_epochs": 3}, 30),
        ({"max_epochs": 3, "limit_train_batches": 4}, 12),
        ({"max_epochs": 3, "accumulate_grad_batches": 3}, 12),  # 4 per epoch, the last of 1 batch
        ({"max_epochs": -1, "max_steps": 7}, 7),
        ({"max_epochs": 3, "max_steps": 7}, 7),
    ],
)
def test_auto_is_the_number_of_updates_of_the_run(settings: dict[str, int], updates: int) -> None:
    model = Line(RAdamConfig(lr=1.0, warmup_proportion=0.0, min_lr=0.25))
    run = trainer(**settings)
    run.fit(model, loader())
    assert run.global_step == updates
    (scheduler,) = (config.scheduler for config in run.lr_scheduler_configs)
    assert scheduler.total_steps == updates
    # The schedule ends where the run ends: the first update is one step down, the last at min_lr.
    assert model.lrs[0] == pytest.approx(1.0 - 0.75 / updates)
    assert model.lrs[-1] == pytest.approx(0.25)


class Reporting(Line):
    """Writes the length of its schedule and of its run to a file of the working folder."""

    def on_train_end(self) -> None:
        schedule = self.trainer.lr_scheduler_configs[0].scheduler
        Path(f"rank{self.global_rank}").write_text(
            f"{schedule.total_steps} {self.trainer.global_step}"
        )


@pytest.mark.filterwarnings("ignore")  # in two processes, Lightning recommends this and that
def test_two_processes_take_half_the_updates(tmp_path: Path) -> None:
    run = trainer(devices=2, strategy="ddp_spawn", max_epochs=3)
    run.fit(Reporting(), loader())
    assert [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)] == ["15 15", "15 15"]


def test_what_it_builds() -> None:
    config = RAdamConfig(
        lr=0.5, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1, total_steps=10, min_lr=0.01
    )
    configured = configure_radam(Line(), config, decay="cosine", variant="keras")
    optimizer = configured["optimizer"]
    assert isinstance(optimizer, RAdam)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"], group["initial_lr"]) == ((0.8, 0.9), 1e-6, 0.5)
        assert (group["variant"], group["decoupled_weight_decay"]) == ("keras", True)
    scheduler = configured["lr_scheduler"]["scheduler"]
    assert isinstance(scheduler, WarmupDecayLR)
    assert (scheduler.total_steps, scheduler.min_lr) == (10, 0.01)
    assert (scheduler.decay, scheduler.warmup_steps) == ("cosine", 1.0)
    assert configured["lr_scheduler"]["interval"] == "step"
    assert config.decay == "linear"  # the caller's configuration is not touched


def test_keywords_are_the_fields_of_the_configuration() -> None:
    fields = {field.name: field.type for field in dataclasses.fields(RAdamConfig)}
    assert {k: str(v.__forward_arg__) for k, v in RAdamKeywords.__annotations__.items()} == fields


def test_an_unknown_length_asks_for_a_number() -> None:
    with pytest.raises(InputError, match="max_epochs=-1 and no max_steps: set one of them, or tot"):
        trainer(max_epochs=-1).fit(Line(), loader())
    with pytest.raises(InputError, match="this module has none: give total_steps=N"):
        configure_radam(Line())
    with pytest.raises(InputError, match="this module has none: give total_steps=N"):
        configure_radam(nn.Linear(1, 1))
    fabric = L.Fabric(accelerator="cpu", devices=1)
    model = Line()
    fabric.setup_module(model)
    with pytest.raises(InputError, match="this module has none: give total_steps=N"):
        configure_radam(model)


def test_an_error_in_the_loader_is_not_mistaken_for_a_missing_trainer() -> None:
    class Broken(Line):
        def train_dataloader(self) -> Any:
            raise RuntimeError("no such disk")

    with pytest.raises(RuntimeError, match="no such disk"):
        trainer().fit(Broken())


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"weigth_decay": 0.1}, TypeError, "does not know 'weigth_decay': did you mean 'weight_d"),
        ({"zzz": 1}, TypeError, "does not know 'zzz': known are lr, betas, eps, weight_decay"),
        ({"lr": "fast"}, ValueError, "lr='fast' must be a number, such as 1.0e-3"),
        ({"lr": -1.0}, ValueError, "learning rate: -1.0; it must be 0 or more"),
        ({"decay": "cosin"}, ValueError, "decay='cosin' must be one of"),
        ({"total_steps": 0}, ValueError, "total_steps=0 must be a whole number"),
        ({"total_steps": "all"}, ValueError, "total_steps='all' must be a whole number"),
    ],
)
def test_mistakes_are_named(keywords: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        configure_radam(nn.Linear(1, 1), **{"total_steps": 10, **keywords})


def test_numbers_may_come_as_text() -> None:
    # PyYAML, which W&B's sweeps use, reads 1e-5 as a word.
    config = RAdamConfig(lr="1e-3", min_lr="1e-5", betas=["0.9", "0.99"], warmup_steps="5")  # type: ignore[arg-type]
    assert (config.lr, config.min_lr, config.warmup_steps) == (1e-3, 1e-5, 5.0)
    assert config.betas == (0.9, 0.99)


class Saved(L.LightningModule):
    """Keeps its configuration among its hyperparameters."""

    def __init__(self, radam: RAdamConfig, width: int = 1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(width, 1)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self) -> dict[str, Any]:
        return configure_radam(self, self.hparams["radam"])


def test_a_configuration_survives_a_checkpoint_read_safely(tmp_path: Path) -> None:
    config = RAdamConfig(lr=0.25, betas=(0.5, 0.75), total_steps=10)
    run = trainer()
    run.fit(Saved(config), loader())
    run.save_checkpoint(tmp_path / "last.ckpt")
    loaded = Saved.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert loaded.hparams["radam"] == config


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("stop", [2, 5, 10])  # in the warm-up, after it, at the end
def test_a_resumed_run_has_the_lrs_of_an_uninterrupted_one(tmp_path: Path, stop: int) -> None:
    config = RAdamConfig(lr=1.0, warmup_proportion=0.3)
    whole = Line(config)
    trainer(max_epochs=2).fit(whole, loader())
    every_step = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    stopped = trainer(max_epochs=2, enable_checkpointing=True, callbacks=[every_step])
    stopped.fit(Line(config), loader())
    resumed = Line(config)
    path = tmp_path / f"step={stop}.ckpt"
    trainer(max_epochs=2).fit(resumed, loader(), ckpt_path=path, weights_only=True)
    assert resumed.lrs == pytest.approx(whole.lrs[stop:])


def test_an_extended_run_has_the_lrs_of_a_run_of_the_new_length(tmp_path: Path) -> None:
    config = RAdamConfig(lr=1.0)
    run = trainer(max_epochs=1)
    run.fit(Line(config), loader())
    run.save_checkpoint(tmp_path / "end.ckpt")
    longer, extended = Line(config), Line(config)
    trainer(max_epochs=2).fit(longer, loader())
    trainer(max_epochs=2).fit(
        extended, loader(), ckpt_path=tmp_path / "end.ckpt", weights_only=True
    )
    assert extended.lrs == pytest.approx(longer.lrs[10:])
    assert extended.lrs[0] > 0.4


def test_it_learns() -> None:
    model = Line(RAdamConfig(lr=0.1))
    trainer(max_epochs=40).fit(model, loader())
    assert math.isclose(model.layer.weight.item(), 1.0, abs_tol=1e-2)
    assert torch.isfinite(model.layer.bias).all()
