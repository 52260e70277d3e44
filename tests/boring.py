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
