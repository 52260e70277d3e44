"""configure_radam: the right optimizer, and a schedule as long as the run."""

import math

import pytest
import torch

from lightning_radam import RAdam, RAdamConfig, WarmupDecayLR, configure_radam
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


def test_what_it_builds() -> None:
    config = RAdamConfig(
        lr=0.5, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1, total_steps=10, min_lr=0.01
    )
    configured = configure_radam(Line(), config)
    optimizer = configured["optimizer"]
    assert isinstance(optimizer, RAdam)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"], group["initial_lr"]) == ((0.8, 0.9), 1e-6, 0.5)
    scheduler = configured["lr_scheduler"]["scheduler"]
    assert isinstance(scheduler, WarmupDecayLR)
    assert (scheduler.total_steps, scheduler.min_lr) == (10, 0.01)
    assert configured["lr_scheduler"]["interval"] == "step"


def test_an_unknown_length_asks_for_a_number() -> None:
    with pytest.raises(InputError, match="max_epochs=-1 and no max_steps: set one of them, or tot"):
        trainer(max_epochs=-1).fit(Line(), loader())
    with pytest.raises(InputError, match="this module has none yet: give total_steps=N"):
        configure_radam(Line())


def test_it_learns() -> None:
    model = Line(RAdamConfig(lr=0.1))
    trainer(max_epochs=40).fit(model, loader())
    assert math.isclose(model.layer.weight.item(), 1.0, abs_tol=1e-2)
    assert torch.isfinite(model.layer.bias).all()
