"""RAdam under Lightning: mixed precision with clipping, accumulation, resume, sharding."""

from __future__ import annotations

import os
import socket
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from lightning_radam.optimizer import RAdam
from tests.test_optimizer_distributed import needs_fsdp_on_cpu

BATCHES, EPOCHS = 6, 2


class Module(LightningModule):
    def __init__(self, optimizer: type[torch.optim.Optimizer] = RAdam, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        self.optimizer, self.settings = optimizer, {"lr": 0.05, "weight_decay": 0.1} | settings

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            for layer in (self.net[0], self.net[2], self.net):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        (x,) = batch
        return (self.net(x) - x.sin()).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters(), **self.settings)


def data(
    batch_size: int = 8, dtype: torch.dtype = torch.float64, share: slice = slice(None)
) -> DataLoader:
    x = torch.randn(8 * BATCHES, 3, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return DataLoader(TensorDataset(x[share]), batch_size=batch_size)


def trainer(folder: Path, **settings: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    base = {"accelerator": "cpu", "devices": 1, "max_epochs": EPOCHS, "enable_checkpointing": False}
    return Trainer(default_root_dir=folder, **(quiet | base | settings))


@pytest.fixture(autouse=True)
def _lightning_advice():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        warnings.filterwarnings("ignore", ".*(litlogger|isinstance.treespec|LeafSpec).*")
        yield


def fit(
    folder: Path,
    batch_size: int = 8,
    module: Module | None = None,
    share: slice = slice(None),
    **settings: Any,
) -> tuple[Module, Trainer]:
    module = module or Module()
    fitted = trainer(folder, **settings)
    fitted.fit(module, data(batch_size, next(module.parameters()).dtype, share))
    return module, fitted


def resume(folder: Path, module: Module, checkpoint: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*callbacks used to create the checkpoint.*")
        trainer(folder).fit(module, data(), ckpt_path=checkpoint, weights_only=True)


def reference() -> dict[str, torch.Tensor]:
    """The plain loop, with PyTorch's RAdam."""
    module = Module(torch.optim.RAdam, decoupled_weight_decay=True)
    optimizer = module.configure_optimizers()
    for _ in range(EPOCHS):
        for batch in data():
            optimizer.zero_grad()
            module.training_step(batch, 0).backward()
            optimizer.step()
    return module.state_dict()


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_plain_fit(tmp_path):
    assert_same(fit(tmp_path)[0].state_dict(), reference())


def test_accumulated_batches_count_once(tmp_path):
    module, fitted = fit(tmp_path, batch_size=2, accumulate_grad_batches=4)
    assert_same(module.state_dict(), reference())
    steps = {int(state["step"]) for state in fitted.optimizers[0].state.values()}
    assert steps == {BATCHES * EPOCHS}


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
@pytest.mark.parametrize("kernel", [{}, {"fused": True}], ids=str)
def test_mixed_precision_with_clipping_and_accumulation(tmp_path, precision, algorithm, kernel):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if precision == "16-mixed" else None
    results = {}
    for optimizer in (RAdam, torch.optim.RAdam):
        settings = kernel if optimizer is RAdam else {"decoupled_weight_decay": True}
        module, fitted = fit(
            tmp_path,
            batch_size=4,
            module=Module(optimizer, **settings).float(),
            plugins=MixedPrecision(precision, "cpu", scaler),
            gradient_clip_val=0.01,
            gradient_clip_algorithm=algorithm,
            accumulate_grad_batches=2,
        )
        results[optimizer] = module.state_dict()
        assert {int(s["step"]) for s in fitted.optimizers[0].state.values()} == {BATCHES * EPOCHS}
    torch.testing.assert_close(*results.values(), rtol=1e-4, atol=1e-5)


def test_resumed_equals_uninterrupted(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_epochs=1)
    whole, _ = fit(tmp_path, callbacks=checkpoint, enable_checkpointing=True)
    first_epoch = next(tmp_path.glob("epoch=0*.ckpt"))
    resumed = Module()
    resume(tmp_path, resumed, first_epoch)
    assert_same(resumed.state_dict(), whole.state_dict())


def _sharded(rank: int, folder: Path, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "NODE_RANK": "0",
        "LOCAL_RANK": str(rank),
    }
    strategy = ModelParallelStrategy(2, 1, save_distributed_checkpoint=False)
    checkpoint = ModelCheckpoint(folder, save_top_k=-1, every_n_epochs=1)
    module, _ = fit(
        folder,
        batch_size=4,
        share=slice(rank, None, 2),  # Half of every batch.
        use_distributed_sampler=False,
        strategy=strategy,
        devices=2,
        callbacks=checkpoint,
        enable_checkpointing=True,
    )
    full = {name: param.full_tensor() for name, param in module.state_dict().items()}
    if rank == 0:
        torch.save(full, folder / "sharded.pt")


@needs_fsdp_on_cpu
def test_model_parallel_strategy(tmp_path):
    """Two ranks give the result of one, and their checkpoint goes on on one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_sharded, (tmp_path, port), nprocs=2)
    assert_same(torch.load(tmp_path / "sharded.pt"), reference())

    resumed = Module()
    first_epoch = next(tmp_path.glob("epoch=0*.ckpt"))
    resume(tmp_path, resumed, first_epoch)
    assert_same(resumed.state_dict(), reference())
