"""With default settings a fault leaves the weights finite, and the result where it would be."""

import errno
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule

from lightning_radam import InstabilityMonitor
from lightning_radam.monitor.incidents import read_incidents
from tests.boring import Faulty, Validated, smooth, trainer

EPOCHS, BATCHES = 5, 16
EVERY_PLACE = ["input", "loss", "gradient", "layer"]


def fit(
    folder: Path, model: Faulty, epochs: int = EPOCHS, seed: int = 0, **settings: Any
) -> InstabilityMonitor:
    monitor = InstabilityMonitor(dirpath=str(folder), log_every_n_steps=50)
    run = trainer(max_epochs=epochs, callbacks=[monitor], **settings)
    run.fit(model, smooth(seed=seed))
    return monitor


@torch.no_grad()
def final_loss(model: LightningModule) -> float:
    model.eval()  # so that running statistics count
    x, y = next(iter(smooth(size=256)))
    return float((model.net(x) - y).square().mean())


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> tuple[float, float]:
    """The range of results without a fault, of four orders of the data, and as much again."""
    losses = []
    for seed in range(4):
        model = Faulty()
        fit(tmp_path_factory.mktemp("clean"), model, seed=seed)
        losses.append(final_loss(model))
    spread = max(losses) - min(losses)
    return min(losses) - spread / 2, max(losses) + spread / 2


def assert_healthy(model: Faulty, noise: tuple[float, float]) -> None:
    for name, tensor in model.state_dict().items():
        assert tensor.isfinite().all(), name
    assert noise[0] <= final_loss(model) <= noise[1]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", EVERY_PLACE)
@pytest.mark.parametrize("step", [0, 4], ids=["first step", "warm-up"])
def test_a_fault_is_dropped(
    tmp_path: Path, noise: tuple[float, float], place: str, value: float, step: int
) -> None:
    model = Faulty({step: (place, value)})
    monitor = fit(tmp_path, model)
    assert monitor.dropped_updates == 1
    incidents = read_incidents(tmp_path / "incidents.jsonl")
    found = [i for i in incidents if i["kind"] == "non_finite"]
    assert {i["step"] for i in found} == {step}
    assert all(i["dropped"] for i in found)
    assert_healthy(model, noise)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("place", EVERY_PLACE)
def test_any_optimizer_is_protected(tmp_path: Path, optimizer: Any, place: str) -> None:
    model = Faulty({3: (place, math.nan), 20: (place, math.inf)}, optimizer=optimizer)
    assert fit(tmp_path, model, epochs=2).dropped_updates == 2
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    assert final_loss(model) < 1.2


def test_a_batch_that_is_bad_in_every_epoch(tmp_path: Path, noise: tuple[float, float]) -> None:
    bad = {epoch * BATCHES + 5: ("input", math.nan) for epoch in range(EPOCHS)}
    model = Faulty(bad)
    assert fit(tmp_path, model).dropped_updates == EPOCHS
    steps = {i["step"] for i in read_incidents(tmp_path / "incidents.jsonl")}
    assert steps == set(bad)
    assert_healthy(model, noise)


def test_a_burst_in_accumulated_batches(tmp_path: Path) -> None:
    model = Faulty(dict.fromkeys(range(9, 13), ("loss", math.nan)))
    # Batches 9 to 12 belong to the steps of 8 to 11 and of 12 to 15.
    monitor = fit(tmp_path, model, epochs=2, accumulate_grad_batches=4)
    assert monitor.dropped_updates == 2
    first, *_ = read_incidents(tmp_path / "incidents.jsonl")
    assert (first["step"], first["batch_idx"]) == (2, [8, 9, 10, 11])
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


def test_right_after_a_resume(tmp_path: Path, noise: tuple[float, float]) -> None:
    half = EPOCHS // 2
    run = trainer(max_epochs=half, callbacks=[InstabilityMonitor(dirpath=str(tmp_path))])
    run.fit(Faulty(), smooth())
    run.save_checkpoint(tmp_path / "half.ckpt")
    losses = []
    for faults in ({}, {0: ("layer", math.nan)}):
        model = Faulty(faults)
        again = trainer(max_epochs=EPOCHS, callbacks=[InstabilityMonitor(dirpath=str(tmp_path))])
        again.fit(model, smooth(seed=1), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
        losses.append(final_loss(model))
    (incident,) = read_incidents(tmp_path / "incidents.jsonl")
    assert (incident["step"], incident["dropped"]) == (half * BATCHES, True)
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    assert losses[1] == pytest.approx(losses[0], abs=(noise[1] - noise[0]) / 2)


def test_the_validation_after_a_bad_batch_is_finite(tmp_path: Path) -> None:
    model = Validated({BATCHES - 1: ("input", math.nan)})
    run = trainer(callbacks=[InstabilityMonitor(dirpath=str(tmp_path))])
    run.fit(model, smooth(), smooth(shuffle=False))
    assert math.isfinite(run.callback_metrics["val_loss"])


def test_without_the_monitor_all_is_lost(tmp_path: Path) -> None:
    """The faults are faults."""
    for place in EVERY_PLACE:
        model = Faulty({4: (place, math.nan)})
        trainer().fit(model, smooth())
        assert not all(tensor.isfinite().all() for tensor in model.state_dict().values()), place


def test_a_full_disk_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    model = Faulty(dict.fromkeys((3, 4, 9), ("loss", math.nan)))
    assert fit(tmp_path, model, epochs=1).dropped_updates == 3
    warnings = [message for message in caplog.messages if message.startswith("cannot write")]
    assert len(warnings) == 1
