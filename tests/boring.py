"""The smallest module that trains: one linear layer on fixed numbers."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

from lightning_radam import RAdamConfig, configure_radam


class Line(LightningModule):
    """Fits y = x; `poison[batch_idx]` replaces the loss of that batch.

    Args:
        config: How to configure RAdam.
        poison: Loss by the number of the batch since the start.
    """

    def __init__(
        self, config: RAdamConfig | None = None, poison: dict[int, float] | None = None
    ) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        torch.nn.init.constant_(self.layer.weight, 0.5)
        torch.nn.init.zeros_(self.layer.bias)
        self.config = config
        self.poison = poison or {}
        self.batches = -1
        self.lrs: list[float] = []

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.batches += 1
        x, y = batch
        loss = (self.layer(x) - y).square().mean()
        if self.batches in self.poison:
            loss = loss - loss.detach() + self.poison[self.batches]  # the gradient stays
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        return configure_radam(self, self.config)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.lrs.append(optimizer.param_groups[0]["lr"])


def loader(batches: int = 10, size: int = 4) -> DataLoader[tuple[torch.Tensor, ...]]:
    """`batches` batches of the same numbers."""
    x = torch.linspace(-1, 1, size).repeat(batches)[:, None]
    return DataLoader(TensorDataset(x, x), batch_size=size)


def trainer(**settings: Any) -> Trainer:
    """A trainer that only trains."""
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 1,
        "log_every_n_steps": 1,
    }
    return Trainer(**quiet | settings)


class Faulty(LightningModule):
    """Learns a smooth function, with batch norm on the way, and meets faults.

    Args:
        faults: By number of the batch since the start, where and with what value: "input", "loss",
            "gradient" (all of it), "layer" (one coordinate of one layer).
        rank: The only rank that has the faults; None for all.
        optimizer: What to train with; None is RAdam with its schedule.
        lr: Learning rate.
    """

    def __init__(
        self,
        faults: dict[int, tuple[str, float]] | None = None,
        rank: int | None = None,
        optimizer: type[torch.optim.Optimizer] | None = None,
        lr: float = 0.02,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(
            torch.nn.Linear(2, 16),
            torch.nn.BatchNorm1d(16),
            torch.nn.Tanh(),
            torch.nn.Linear(16, 1),
        )
        self.faults, self.rank, self.optimizer, self.lr = faults or {}, rank, optimizer, lr
        self.batches = -1

    def fault(self) -> tuple[str, float]:
        here = self.rank is None or self.rank == self.global_rank
        return self.faults.get(self.batches, ("", 0.0)) if here else ("", 0.0)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.batches += 1
        x, y = batch
        place, value = self.fault()
        if place == "input":
            x = x.clone()
            x[0, 0] = value
        loss = (self.net(x) - y).square().mean()
        return loss * value if place == "loss" else loss

    def on_after_backward(self) -> None:
        place, value = self.fault()
        if place == "gradient":
            for param in self.parameters():
                param.grad.fill_(value)
        elif place == "layer":
            self.net[0].weight.grad[0, 0] = value

    def configure_optimizers(self) -> Any:
        if self.optimizer is not None:
            return self.optimizer(self.parameters(), lr=self.lr)
        return configure_radam(self, RAdamConfig(lr=self.lr, betas=(0.9, 0.99)))


class Validated(Faulty):
    """Logs a validation loss too."""

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", (self.net(x) - y).square().mean())


def smooth(
    samples: int = 256, size: int = 16, seed: int = 0, shuffle: bool = True
) -> DataLoader[Any]:
    """Batches for `Faulty`, in an order that depends on `seed`."""
    generator = torch.Generator().manual_seed(7)
    x = torch.rand(samples, 2, generator=generator) * 4 - 2
    y = torch.sin(x[:, :1]) * x[:, 1:]
    order = torch.Generator().manual_seed(seed)
    return DataLoader(TensorDataset(x, y), batch_size=size, shuffle=shuffle, generator=order)
