"""The monitor among everything else that Lightning can do."""

import base64
import importlib
import logging
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader

from lightning_radam import InstabilityMonitor, RAdam, RAdamConfig
from lightning_radam.monitor.incidents import read_incidents
from tests.boring import Faulty, Line, Validated, loader, smooth, trainer

CONFIG = RAdamConfig(lr=1e-3, betas=(0.9, 0.99))


def rows(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "csv/metrics.csv")


def fit(folder: Path, model: LightningModule, data: Any, **settings: Any) -> InstabilityMonitor:
    monitor = InstabilityMonitor()
    logger = CSVLogger(folder, name="", version="csv")
    trainer(callbacks=[monitor], logger=logger, **settings).fit(model, data)
    return monitor


# Both packages --------------------------------------------------------------------------------


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_it_works_under_either_package(tmp_path: Path, package: str) -> None:
    pl: ModuleType = pytest.importorskip(package)
    loggers = importlib.import_module(f"{package}.loggers")

    class Net(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
            loss = (self.layer(batch[0]) - batch[1]).square().mean()
            return loss * (math.nan if index == 3 else 1.0)

        def validation_step(self, batch: list[torch.Tensor], index: int) -> None:
            self.log("val_loss", self.layer(batch[0]).square().mean())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return RAdam(self.parameters())

    monitor = InstabilityMonitor(on_critical="rollback")
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "log_every_n_steps": 1,
    }
    logger = loggers.CSVLogger(tmp_path, "", "csv")
    run = pl.Trainer(max_epochs=1, logger=logger, callbacks=[monitor], **settings)
    net = Net()
    run.fit(net, loader(10), loader(2))
    run.validate(net, loader(2), verbose=False)
    path = tmp_path / "end.ckpt"
    run.save_checkpoint(path)
    assert rows(tmp_path).dropna(subset="stability/loss")["step"].tolist() == [
        step for step in range(10) if step != 3
    ]
    assert rows(tmp_path)["stability/gap"].notna().sum() == 1
    (incident,) = {i["step"] for i in read_incidents(tmp_path / "csv/incidents.jsonl")}
    assert incident == 3
    again = pl.Trainer(max_epochs=2, logger=False, callbacks=[monitor], **settings)
    again.fit(Net(), loader(10), loader(2), ckpt_path=path, weights_only=True)
    assert monitor.dropped_updates == 2
    assert all(param.isfinite().all() for param in net.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("optimizer", [RAdam, torch.optim.AdamW, torch.optim.SGD])
def test_on_a_gpu_no_hook_waits_and_faults_are_dropped(tmp_path: Path, optimizer: Any) -> None:
    class Strict(InstabilityMonitor):
        """Any wait between the backward pass and the end of the step is an error."""

        def on_before_optimizer_step(self, *args: Any) -> None:
            torch.cuda.set_sync_debug_mode("error")
            super().on_before_optimizer_step(*args)

        def on_train_batch_end(self, *args: Any) -> None:
            super().on_train_batch_end(*args)
            torch.cuda.set_sync_debug_mode("default")

    faults = {3: ("input", math.nan), 30: ("layer", math.inf)}
    model = Faulty(faults, optimizer=optimizer)
    monitor = Strict(dirpath=str(tmp_path), on_warning="skip", log_every_n_steps=5)
    settings: dict[str, Any] = {"accelerator": "gpu", "devices": 1, "max_epochs": 4}
    try:
        trainer(callbacks=[monitor], **settings).fit(model, smooth())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert monitor.dropped_updates == 2
    found = [i for i in read_incidents(tmp_path / "incidents.jsonl") if i["kind"] == "non_finite"]
    assert {i["step"] for i in found} == {3, 30}
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


# Ways to optimize -----------------------------------------------------------------------------


class Manual(LightningModule):
    """Two optimizers; the second's loss is a hundred times the first's."""

    def __init__(self, faults: dict[int, int] | None = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(1, 1), nn.Linear(1, 1)
        self.faults = faults or {}

    def training_step(self, batch: list[torch.Tensor], index: int) -> None:
        for number, (layer, optimizer) in enumerate(
            zip((self.first, self.second), self.optimizers(), strict=True)
        ):
            loss = (layer(batch[0]) - 1).square().mean() * 100**number
            if self.faults.get(index) == number:
                loss = loss * math.nan
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [RAdam(self.first.parameters()), torch.optim.SGD(self.second.parameters(), lr=1e-5)]


def test_each_optimizer_has_a_stream_of_its_own(tmp_path: Path) -> None:
    model = Manual({90: 1})
    monitor = fit(tmp_path, model, loader(100))
    found = rows(tmp_path)
    first, second = found["stability/loss"].dropna(), found["stability/loss_1"].dropna()
    assert (len(first), len(second)) == (100, 99)
    assert second.min() > 2 * first.max()
    assert found["radam/rect"].notna().sum() == 100
    assert "radam/rect_1" not in found  # SGD
    (incident,) = [
        i
        for i in read_incidents(tmp_path / "csv/incidents.jsonl")
        if i["message"].startswith("loss")
    ]
    assert (incident["optimizer"], incident["batch_idx"], incident["step"]) == (1, [90], 181)
    assert monitor.dropped_updates == 1
    assert all(param.isfinite().all() for param in model.parameters())


def test_two_optimizers_may_share_their_backward_passes(tmp_path: Path) -> None:
    class Shared(Manual):
        def training_step(self, batch: list[torch.Tensor], index: int) -> None:
            optimizers = self.optimizers()
            for layer, optimizer in zip((self.first, self.second), optimizers, strict=True):
                optimizer.zero_grad()
                self.manual_backward((layer(batch[0]) - 1).square().mean())
            for optimizer in optimizers:
                optimizer.step()

    fit(tmp_path, Shared(), loader(5))
    found = rows(tmp_path)
    assert (found["stability/loss"].dropna().tolist()) == found[
        "stability/loss_1"
    ].dropna().tolist()


@pytest.mark.parametrize("optimizer", [RAdam, torch.optim.AdamW], ids=["RAdam", "AdamW"])
def test_a_grad_scaler_is_seen_through(tmp_path: Path, optimizer: Any) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    plain, scaled = (Faulty(optimizer=optimizer) for _ in range(2))
    fit(tmp_path / "plain", plain, smooth())
    fit(tmp_path / "scaled", scaled, smooth(), plugins=plugin, gradient_clip_val=0.1)
    for key in ("stability/loss", "stability/grad_norm"):
        first = [rows(tmp_path / which)[key][0] for which in ("plain", "scaled")]
        assert first[1] == pytest.approx(first[0], rel=0.02)


def test_a_grad_scaler_that_finds_its_scale_is_no_incident(tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    model = Faulty(optimizer=RAdam)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    monitor = fit(tmp_path, model, smooth(samples=1024), plugins=plugin)
    assert scaler.get_scale() < 2.0**30
    assert monitor.dropped_updates > 5
    assert not [
        i for i in read_incidents(tmp_path / "csv/incidents.jsonl") if i["severity"] == "critical"
    ]
    assert all(param.isfinite().all() for param in model.parameters())


def test_it_leaves_the_optimizer_as_it_was(tmp_path: Path) -> None:
    model = Faulty({3: ("loss", math.nan)})
    run = trainer(callbacks=[InstabilityMonitor(dirpath=str(tmp_path))])
    run.fit(model, smooth())
    (optimizer,) = run.optimizers
    assert optimizer.found_inf is None
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


# What happens around a training -----------------------------------------------------------------


def test_validation_is_compared_and_sanity_checks_are_not(tmp_path: Path) -> None:
    monitor = InstabilityMonitor()
    logger = CSVLogger(tmp_path, name="", version="csv")
    run = trainer(callbacks=[monitor], logger=logger, max_epochs=3, num_sanity_val_steps=2)
    model = Validated()
    run.fit(model, smooth(), smooth(shuffle=False))
    found = rows(tmp_path).dropna(subset="stability/gap")
    assert found["step"].tolist() == [15, 31, 47]
    assert {"stability/val_fluctuation", "stability/val_steps_since_best"} <= set(found.columns)
    validated = rows(tmp_path).dropna(subset="val_loss")["val_loss"].tolist()
    assert found["stability/gap"].iloc[-1] == pytest.approx(
        validated[-1] - monitor._streams[0].trend.mean, rel=1e-4
    )
    run.validate(model, smooth(shuffle=False), verbose=False)
    run.fit_loop.max_epochs = 4
    run.fit(model, smooth(), smooth(shuffle=False))
    assert monitor._streams[0].detector.state_dict()["step"] == 63  # went on, did not begin again


def test_test_predict_and_validate_alone_need_no_training(tmp_path: Path) -> None:
    class Tested(Validated):
        test_step = Validated.validation_step

        def predict_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
            return self.net(batch[0])

    run = trainer(callbacks=[InstabilityMonitor(dirpath=str(tmp_path))])
    data = smooth(shuffle=False)
    run.test(Tested(), data, verbose=False)
    run.validate(Tested(), data, verbose=False)
    run.predict(Tested(), data)
    assert not list(tmp_path.glob("*.jsonl"))


def test_an_exception_passes_and_the_next_fit_begins_anew(tmp_path: Path) -> None:
    class Breaks(Line):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            if self.batches == 4:
                raise ZeroDivisionError
            return super().training_step(batch, batch_idx)

    monitor = InstabilityMonitor(dirpath=str(tmp_path))
    with pytest.raises(ZeroDivisionError):
        trainer(callbacks=[monitor]).fit(Breaks(CONFIG, {2: math.nan}), loader(10))
    assert [i["step"] for i in read_incidents(tmp_path / "incidents.jsonl")] == [2]
    trainer(callbacks=[monitor]).fit(Line(CONFIG), loader(10))
    assert monitor.incidents == 0


def test_an_exception_before_the_first_step_passes(tmp_path: Path) -> None:
    class Breaks(Validated):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            raise ZeroDivisionError

    run = trainer(callbacks=[InstabilityMonitor(dirpath=str(tmp_path))])
    with pytest.raises(ZeroDivisionError):
        run.fit(Breaks(), smooth(), smooth(shuffle=False))


def test_a_checkpoint_written_without_it_will_do(tmp_path: Path) -> None:
    run = trainer(limit_train_batches=5)
    run.fit(Line(CONFIG), loader(10))
    run.save_checkpoint(tmp_path / "bare.ckpt")
    monitor = InstabilityMonitor(dirpath=str(tmp_path))
    again = trainer(callbacks=[monitor], max_epochs=2, limit_train_batches=5)
    model = Line(CONFIG, {1: math.nan})
    again.fit(model, loader(10), ckpt_path=tmp_path / "bare.ckpt", weights_only=True)
    assert [i["step"] for i in read_incidents(tmp_path / "incidents.jsonl")] == [6]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    def line(poison: dict[int, float]) -> Line:
        torch.manual_seed(0)
        return Line(CONFIG, poison)

    def state(monitor: InstabilityMonitor) -> dict[str, Any]:
        stream = monitor.state_dict()["streams"][0]
        # The grace after a resume keeps the sums at 0; all that is remembered is the same.
        remembered = {key: stream["detector"][key] for key in ("step", "loss", "log_norm")}
        return remembered | {"trend": stream["trend"], "first": stream["first_sample"].tolist()}

    whole = InstabilityMonitor(str(tmp_path))
    keeper = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_epochs=1)
    settings: dict[str, Any] = {"limit_train_batches": 20, "max_epochs": 4}
    run = trainer(callbacks=[whole, keeper], enable_checkpointing=True, **settings)
    run.fit(line({5: math.nan}), loader(20))
    rest = InstabilityMonitor(str(tmp_path))
    (half,) = tmp_path.glob("epoch=1-*.ckpt")
    again = trainer(callbacks=[rest, keeper], enable_checkpointing=True, **settings)
    again.fit(line({}), loader(20), ckpt_path=half, weights_only=True)
    assert state(rest) == state(whole)
    assert rest.incidents == whole.incidents == 1


# What a person sees -----------------------------------------------------------------------------


def test_repeats_are_folded_on_the_console_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    poison = dict.fromkeys([*range(10, 40), 200], math.nan)
    with caplog.at_level(logging.WARNING, "lightning_radam"):
        fit(tmp_path, Line(CONFIG, poison), loader(250))
    lines = [message for message in caplog.messages if "nan" in message or "more" in message]
    assert lines == [
        "step 10: loss is nan; update dropped",
        "step 200: loss is nan; update dropped (29 repeats before it not shown)",
    ]
    incidents = read_incidents(tmp_path / "csv/incidents.jsonl")
    assert [i["step"] for i in incidents if i["kind"] == "non_finite"] == list(poison)
    assert ["rng_state" in i for i in incidents if i["step"] in (10, 11, 200)] == [
        True,
        False,
        True,
    ]


def test_what_was_folded_is_told_in_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "lightning_radam"):
        fit(tmp_path, Line(CONFIG, dict.fromkeys(range(3, 6), math.nan)), loader(10))
    assert caplog.messages == [
        "step 3: loss is nan; update dropped",
        "2 more events not shown: critical non_finite",
    ]


def test_an_incident_can_be_replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")

    class Dreaming(Line):
        """Draws a random number a step, as dropout does."""

        drawn = 0.0

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            number = float(torch.rand(()))
            if batch_idx == 6:
                self.drawn = number
            data = batch["x"], batch["x"]
            return super().training_step(data, batch_idx) * (math.nan if batch_idx == 6 else 1.0)

    data = [{"x": torch.full((2, 1), float(i)), "id": [f"a{i}", f"b{i}"]} for i in range(10)]
    model = Dreaming(CONFIG)
    fit(tmp_path, model, DataLoader(data, batch_size=None), accumulate_grad_batches=2)
    incident, *_ = read_incidents(tmp_path / "csv/incidents.jsonl")
    assert (incident["step"], incident["epoch"], incident["batch_idx"]) == (3, 0, [6, 7])
    assert incident["sample_ids"] == [["a6", "b6"], ["a7", "b7"]]
    assert incident["seed"] == "7"
    assert incident["lr"] == pytest.approx(model.lrs[3])
    assert 0 <= incident["rect"] <= 1
    assert sum(incident["log_grad_histogram"].values()) == pytest.approx(1)
    assert set(incident["top_layers"]) == {"layer.weight", "layer.bias"}
    state = base64.b64decode(incident["rng_state"]["cpu"])
    torch.set_rng_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
    assert float(torch.rand(())) == model.drawn


def test_layers_have_the_names_that_a_person_knows(tmp_path: Path) -> None:
    fit(tmp_path, Faulty(), smooth())
    layers = [column for column in rows(tmp_path).columns if column.startswith("layers/")]
    kinds = {"grad_norm", "lag", "update_ratio"}
    names = {f"net.{i}.{what}" for i in (0, 1, 3) for what in ("weight", "bias")}
    assert {column.split("/")[1] for column in layers} == kinds
    assert {column.split("/")[2] for column in layers} <= names


def test_every_documented_key_is_logged_and_every_logged_key_documented(tmp_path: Path) -> None:
    from lightning_radam.monitor.callback import _KEYS, _KEYS_AT_TIMES

    logger = CSVLogger(tmp_path, name="", version="csv")
    run = trainer(callbacks=[InstabilityMonitor()], logger=logger)
    run.fit(Validated(optimizer=RAdam), smooth(), smooth(shuffle=False))
    columns = {c for c in rows(tmp_path).columns if c.startswith(("radam/", "stability/"))}
    assert columns == {*_KEYS, *_KEYS_AT_TIMES}
    text = str(InstabilityMonitor.__doc__)
    for key in columns:
        assert f"`{key}`" in text or f"`{key.removeprefix('stability/')}`" in text, key
